"""`trl vllm-serve`: start a server of vLLM that trainers sample from, with what they need of it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from trl.import_utils import VLLM, is_gpu_available, is_vllm_available, pip_install
from trl.scripts.quiet import without_secrets


class Part(NamedTuple):
    """Words of the command, or a variable of its environment, and what they do."""

    words: tuple[str, ...]
    does: str


def command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of the policy as it is before training; the first word may say it too."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; who reaches it can replace the weights.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    dtype: Annotated[str | None, typer.Option(help="Precision. [float32 on a CPU, auto on a GPU]")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and completion. [the context]")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs that share the weights.", min=1)] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU's memory to take.")] = 0.9,
    max_lora_rank: Annotated[int, typer.Option(help="Largest rank of LoRA adapters; 0: none are taken.", min=0)] = 16,
    untie_embeddings: Annotated[
        bool, typer.Option("--untie-embeddings", help="Serve a copy whose head is no longer its embeddings.")
    ] = False,
    python: Annotated[str | None, typer.Option(help="Python of the environment that has vLLM. [this one]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and start nothing.")] = False,
) -> None:
    """Start vLLM for trainers with `use_vllm=True, vllm_mode="server"`; all further words go to vLLM as they are.

    Each flag is printed with what it is for. The server runs until it is ended by Ctrl-C or SIGTERM.
    """
    more = list(context.args)
    if model is None and more and not more[0].startswith("-"):
        model = more.pop(0)
    if model is None:
        raise ValueError("--model: say what is served, a folder or a name on the Hub")
    if python is None and not dry_run and not is_vllm_available():
        raise ImportError(
            f"vLLM is not installed here: {pip_install(VLLM)}, or name the python of an environment that has it "
            "(--python /path/to/bin/python)"
        )
    base, adapter = base_of(model)
    if adapter:
        print(f"{model} is an adapter: its base {base} is served, and trainers send the adapter")
    served = untied(base, dry_run=dry_run) if untie_embeddings else base
    on_gpu = is_gpu_available()
    parts = [
        Part(("--model", served), "the policy before training; trainers replace its weights"),
        *_place(host, port),
        *_memory(on_gpu, dtype, max_model_len, tensor_parallel_size, gpu_memory_utilization),
        *_training(on_gpu, max_lora_rank),
    ]
    line = [python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    line += [word for part in parts for word in part.words] + more
    variables = environment(on_gpu, max_lora_rank)
    _say(parts, variables, line, host, more)
    if not dry_run:
        sys.stdout.flush()
        os.execvpe(line[0], line, {**os.environ, **{name: part.words[0] for name, part in variables.items()}})


def base_of(model: str) -> tuple[str, bool]:
    """The model that is served, and whether a folder of an adapter was named."""
    file = Path(model, "adapter_config.json")
    if not file.is_file():
        return model, False
    from trl.models.weight_files import read_json

    base = read_json(file).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{model} is an adapter that does not say its base: give the folder of the base as --model")
    return str(base), True


def untied(model: str, *, dry_run: bool = False) -> str:
    """A copy of the model whose head is a weight of its own, equal to the embeddings."""
    from trl.quickstart.assets import cache_folder

    place = str(Path(model).resolve()) if Path(model).exists() else model  # several models have one last name
    folder = cache_folder() / "untied" / f"{Path(place).name}-{sha256(place.encode()).hexdigest()[:12]}"
    if not dry_run:
        from trl.generation.vllm.sync import write_untied

        print(f"writing a copy of {model} whose head is a weight of its own to {folder}")
        write_untied(model, folder)
    return str(folder)


def _place(host: str, port: int) -> list[Part]:
    return [Part(("--host", host, "--port", str(port)), "where trainers find it (vllm_server_base_url)")]


def _memory(on_gpu: bool, dtype: str | None, longest: int | None, gpus: int, share: float) -> list[Part]:
    parts = [Part(("--dtype", dtype or ("auto" if on_gpu else "float32")), "precision; the policy's own is the best")]
    if longest is not None:
        parts.append(Part(("--max-model-len", str(longest)), "longest prompt and completion together"))
    if gpus > 1:
        parts.append(Part(("--tensor-parallel-size", str(gpus)), "GPUs that share the weights"))
    if on_gpu:
        parts.append(Part(("--gpu-memory-utilization", f"{share:g}"), "share of the GPU's memory"))
    else:
        parts.append(Part(("--no-enable-chunked-prefill",), "on a CPU a prompt that is read in parts loses its seed"))
        parts.append(Part(("--enforce-eager",), "nothing is compiled on a CPU"))
    return parts


def _training(on_gpu: bool, max_lora_rank: int) -> list[Part]:
    """What training needs beside serving."""
    parts = [
        Part(("--enable-scale-out",), "tokens in, tokens out (/inference/v1/generate)"),
        Part(
            ("--logprobs-mode", "processed_logprobs"),
            "log-probabilities of what was really sampled, temperature and filters applied",
        ),
    ]
    if max_lora_rank:
        parts.append(
            Part(("--enable-lora", "--max-lora-rank", str(max_lora_rank)), "adapters are taken up to this rank")
        )
    if on_gpu:
        parts.append(
            Part(("--weight-transfer-config", '{"backend":"nccl"}'), "weights come over NCCL from the trainer's GPU")
        )
    return parts


def environment(on_gpu: bool, max_lora_rank: int) -> dict[str, Part]:
    """Variables of the server; those that are set already stay as they are."""
    variables = {"VLLM_SERVER_DEV_MODE": Part(("1",), "opens the routes that replace weights and pause")}
    if max_lora_rank:
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = Part(("True",), "opens the route that loads adapters")
    if not on_gpu:
        variables["VLLM_CPU_KVCACHE_SPACE"] = Part(("4",), "GiB for keys and values")
    return {name: part for name, part in variables.items() if name not in os.environ}


def _say(
    parts: Sequence[Part], variables: dict[str, Part], line: Sequence[str], host: str, more: Sequence[str]
) -> None:
    """What is started, and what each word of it is for."""
    rows = [(" ".join(part.words), part.does) for part in parts]
    rows += [(f"{name}={part.words[0]}", part.does) for name, part in variables.items()]
    if more:
        rows.append((" ".join(without_secrets(more)), "as you said"))
    width = min(max(len(words) for words, _ in rows), 48)
    print("vLLM is started with")
    for words, does in rows:
        print(f"  {words:<{width}}  {does}")
    if not (host == "localhost" or host.startswith("127.") or host == "::1"):
        print(
            f"--host {host}: whoever reaches this port can replace the weights, load files that this user reads, and "
            "pause the server; --api-key does not protect these routes. Open it to a private network only."
        )
    told = [f"{name}={shlex.quote(part.words[0])}" for name, part in variables.items()]
    print(" ".join([*told, *map(shlex.quote, without_secrets(line))]))
