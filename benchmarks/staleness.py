"""Random walks by GRPO whose rollouts are drawn ahead: what staleness costs, and what corrections give back.

    OMP_NUM_THREADS=1 python benchmarks/staleness.py --out docs/results
    OMP_NUM_THREADS=1 python benchmarks/staleness.py --server http://127.0.0.1:8000 --seeds 0

The second line samples by a vLLM server on the folder of the imitating model, which the first line writes (`--model`):
`trl vllm-serve --model /tmp/staleness-model --host 127.0.0.1 --max-model-len 32 --dtype float32`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import plots
import torch
from datasets import Dataset
from random_walks import optimality
from transformers import LlamaConfig, LlamaForCausalLM
from walks import Graph, known_graph, rewards_for, tokenizer_of

from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, set_seed

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")

CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {"staleness_correction": "none"},
    "token_truncate": {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 2.0},
    "sequence_mask": {},
}
"""none: the ratio to the weights that sampled is clipped; else that to the weights at the start of an update, by whose
ratio to the weights that sampled tokens are weighed (decoupled PPO)"""


def new_model(graph: Graph) -> LlamaForCausalLM:
    """4 layers of width 128, with heads of width 64 and a head of its own, as vLLM's kernels for a CPU need them."""
    tokens, goal = len(graph.edges) + 1, list(graph.edges).index(graph.goal)
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=goal, pad_token_id=tokens - 1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def imitating(graph: Graph, walks: list[str], folder: Path) -> Path:
    """The folder of a model that walks as the data does; it is made once."""
    if not (folder / "config.json").exists():
        set_seed(0)
        model, tokenizer = new_model(graph), tokenizer_of(graph)
        rows = Dataset.from_list([{"input_ids": tokenizer(walk)["input_ids"]} for walk in walks])
        with tempfile.TemporaryDirectory() as scratch:
            numbers = SFTConfig(
                output_dir=scratch, per_device_train_batch_size=100, num_train_epochs=25, learning_rate=1e-3, seed=0,
                lr_scheduler_type="cosine", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            SFTTrainer(model, numbers, train_dataset=rows, processing_class=tokenizer).train()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def reinforce(
    folder: Path, graph: Graph, seed: int, rollouts: int, rate: float, **settings: Any
) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """A model, and the logs of its rollouts: 16 walks from each of 8 start nodes, two updates on each."""
    set_seed(seed)
    model = LlamaForCausalLM.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=128, num_generations=16, num_iterations=2,
            max_steps=2 * rollouts, max_completion_length=graph.max_length - 1, learning_rate=rate, loss_type="dr_grpo",
            scale_rewards="group", lr_scheduler_type="constant", seed=seed, report_to=[], save_strategy="no",
            save_rollouts=False, logging_steps=2, disable_tqdm=True, **settings,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": start} for start in graph.starts])
        trainer = GRPOTrainer(model, rewards_for(graph), config, rows, processing_class=tokenizer_of(graph))
        trainer.train()
    return model, [row for row in trainer.state.log_history if "reward" in row]


KEPT = ("reward", "approx_kl", "sampling/waited", "sampling/idle")


def one_run(
    place: dict[str, Any], folder: Path, graph: Graph, rollouts: int, further: dict[str, Any]
) -> dict[str, Any]:
    """place: what tells the run from the others."""
    started, clock = time.process_time(), time.perf_counter()
    settings = {"max_staleness": place["staleness"], **CORRECTIONS[place["correction"]], **further}
    model, logs = reinforce(folder, graph, place["seed"], rollouts, place["rate"], **settings)
    curves = {name: [round(row[name], 4) for row in logs if name in row] for name in KEPT}
    first = next((step for step, score in enumerate(curves["reward"], 1) if score > 0.95), None)
    result = {
        **place, "final": optimality(model, graph, place["seed"] + 1), "rollouts_to_0.95": first,
        "cpu_seconds": time.process_time() - started, "seconds": time.perf_counter() - clock, "curves": curves,
    }  # fmt: skip
    print({key: value for key, value in result.items() if key != "curves"}, flush=True)
    return result


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each correction: the mean score of a rollout's walks over the seeds, a line for each staleness."""
    ages = sorted({result["staleness"] for result in results})
    colours = dict(zip(map(name_of, ages), plots.COLOURS, strict=False))
    panels = []
    for engine in ("local", "vllm"):
        for correction in CORRECTIONS:
            here = [
                r for r in results if r["engine"] == engine and (not r["staleness"] or r["correction"] == correction)
            ]
            if not any(r["correction"] == correction for r in here):
                continue
            curves = {}
            for age in ages:
                runs = [r["curves"]["reward"] for r in here if r["staleness"] == age]
                if runs:
                    curves[name_of(age)] = [sum(each) / len(each) for each in zip(*runs, strict=True)]
            title = f"{engine} sampler, correction: {correction}"
            panels.append(plots.lines(title, curves, colours, (0.15, 1.02), [plots.Mark(0.95, "0.95", below=True)], 5))
    plots.write(path, panels, 3, colours, f"optimality of a rollout's 128 walks; {plots.RAW.format(5)}")


def name_of(staleness: int) -> str:
    return f"staleness {staleness}" if staleness else "in step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="runs found there are not repeated")
    parser.add_argument(
        "--model", type=Path, default=Path("/tmp/staleness-model"), help="folder of the imitating model"
    )
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 2, 4, 8])
    parser.add_argument("--corrections", nargs="+", choices=CORRECTIONS, default=list(CORRECTIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--server", help="address of a vLLM server that serves the folder; else the local sampler")
    arguments = parser.parse_args()
    graph, walks = known_graph()
    folder = imitating(graph, walks, arguments.model)
    further = {} if arguments.server is None else {
        "use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": arguments.server
    }  # fmt: skip
    file = arguments.out / "staleness.json"
    results = json.loads(file.read_text()) if file.exists() else []
    for correction in arguments.corrections:
        for staleness in arguments.staleness:
            if not staleness and correction != "none":  # nothing is stale
                continue
            for seed in arguments.seeds:
                place = {
                    "engine": "local" if arguments.server is None else "vllm", "staleness": staleness,
                    "correction": correction, "seed": seed, "rate": arguments.rate,
                }  # fmt: skip
                if any(place.items() <= result.items() for result in results):
                    continue
                results.append(one_run(place, folder, graph, arguments.rollouts, further))
                file.write_text(json.dumps(results))
    plot(results, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
