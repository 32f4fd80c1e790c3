"""The engine of vLLM that a config asks for, and whether it serves the policy that is trained."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from trl.data.pictures import processor_of
from trl.generation.sampler import Sampler, SamplingParams
from trl.generation.vllm.client import ServerEngine
from trl.generation.vllm.colocate import ColocatedEngine
from trl.generation.vllm.engine import Engine, EngineError
from trl.generation.vllm.sampler import VLLMSampler
from trl.generation.vllm.sync import make_sync, new_stamp
from trl.generation.vllm.verify import Verification
from trl.models.prepare import context_length, embedding_rows
from trl.models.unwrap import below_peft, below_value_head, is_encoder_decoder
from trl.models.weight_files import read_json

if TYPE_CHECKING:
    from trl.trainer.rollout_trainer import RolloutConfig

logger = logging.getLogger(__name__)
PROBE = "The quick brown fox, 12 times: <b>é</b>\n\tjumps!"
"""a text that tokenizers cut differently"""
SHAPE = ("architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""what two configs of one network have in common"""


def engine_sampler(
    config: RolloutConfig,
    model: nn.Module,
    tokenizer: Any,
    score: Callable[[list[list[int]], list[list[int]]], list[list[float]]],
    precision: Callable[[], str],
    local: Callable[[], Sampler],
) -> VLLMSampler:
    """The sampler of a config with `use_vllm=True`; EngineError where nobody answers, or another model does.

    score, precision: see `Verification`; local: makes the sampler that goes on where vLLM has other weights.
    """
    if is_encoder_decoder(model):
        raise ValueError("use_vllm=True: an encoder-decoder is sampled here, by its own `generate`; leave it out")
    colocated = config.vllm_mode == "colocate"
    engine = _colocated(config, model, tokenizer) if colocated else _server(config)
    settings = engine.settings()
    sync = make_sync(
        model, config.vllm_weight_sync, urls=engine.urls, folder=config.vllm_sync_folder,
        max_rank=settings.max_lora_rank, workers=settings.workers, group_port=config.vllm_group_port,
        own_engines=colocated, clients=[engine] if isinstance(engine, ColocatedEngine) else (),
        mode="keep" if config.sync_in_flight else "wait",
    )  # fmt: skip
    network: Any = below_peft(below_value_head(model))
    verify = Verification(
        score, precision, int(network.config.get_text_config().vocab_size), config.vllm_verify_every,
        config.temperature, config.vllm_verify_tolerance, settings.dtype,
        tied=bool(getattr(network.config.get_text_config(), "tie_word_embeddings", False)), own_engines=colocated,
    )  # fmt: skip
    pattern = config.vllm_structured_outputs_regex
    sampler = VLLMSampler(
        engine, sync, tokenizer, model=model, stamp=new_stamp(), verify=verify,
        further={} if pattern is None else {"structured_outputs": {"regex": pattern}},
        otherwise=local if config.vllm_on_mismatch == "local" and pattern is None else None,
        keeps=config.sync_in_flight,
    )  # fmt: skip
    check_served(sampler, model, tokenizer)
    if not config.process_index:
        about = sampler.about
        where = "in this process" if colocated else f"at {', '.join(engine.urls)}"
        logger.info("completions come from vLLM %s %s, which serves %s", about.release, where, about.model)
    return sampler


def _server(config: RolloutConfig) -> ServerEngine:
    return ServerEngine(
        config.vllm_urls(), wait=config.vllm_server_timeout, timeout=config.vllm_request_timeout,
        api_key=os.environ.get("VLLM_API_KEY"),
    )  # fmt: skip


def _colocated(config: RolloutConfig, model: nn.Module, tokenizer: Any) -> ColocatedEngine:
    if config.world_size > 1 and config.vllm_tensor_parallel_size > 1:
        raise ValueError(
            f"vllm_tensor_parallel_size={config.vllm_tensor_parallel_size}: with {config.world_size} processes that "
            "train, each has an engine of its own; for GPUs that share one, take vllm_mode='server'"
        )
    base: Any = below_peft(below_value_head(model))
    settings: dict[str, Any] = {
        "dtype": config.vllm_dtype or str(next(base.parameters()).dtype).removeprefix("torch."),
        "gpu_memory_utilization": config.vllm_gpu_memory_utilization, "model_impl": config.vllm_model_impl,
        "max_model_len": config.vllm_max_model_length, "tensor_parallel_size": config.vllm_tensor_parallel_size,
        "trust_remote_code": config.trust_remote_code, "seed": config.seed,
    }  # fmt: skip
    if config.vllm_enable_prefix_caching is not None:
        settings["enable_prefix_caching"] = config.vllm_enable_prefix_caching
    ranks = [each.r for each in getattr(below_value_head(model), "peft_config", {}).values() if hasattr(each, "r")]
    if ranks:
        settings |= {"enable_lora": True, "max_lora_rank": _lora_rank(max(ranks))}
    if config.world_size > 1:
        settings["distributed_executor_backend"] = "external_launcher"
    if next(base.parameters()).device.type == "cuda":
        settings["weight_transfer_config"] = {"backend": "ipc"}
    with tempfile.TemporaryDirectory(prefix="trl-vllm-") as folder:
        place = _folder_of(base, Path(folder))
        if tokenizer is not None:
            processor_of(tokenizer).save_pretrained(folder)
            settings["tokenizer"] = folder
        return ColocatedEngine.start(str(place), sleeps=config.vllm_enable_sleep_mode, **settings)


def _lora_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that holds an adapter of this one."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _folder_of(base: Any, folder: Path) -> str | Path:
    """Where vLLM finds the network: the name that it was loaded from, or a folder that is written."""
    name = str(getattr(base.config, "_name_or_path", "") or "")
    if name and (Path(name, "config.json").exists() or (not Path(name).exists() and name.count("/") == 1)):
        return name
    base.save_pretrained(folder)
    return folder


# -- whether it serves the policy ------------------------------------------------------------------


def check_served(sampler: VLLMSampler, model: nn.Module, tokenizer: Any) -> None:
    """EngineError where the engine serves another network, cuts texts otherwise, or says other log-probabilities."""
    _check_network(sampler.about.model, model)
    _check_tokens(sampler.engine, sampler.about.model, tokenizer)
    _check_vocabulary(sampler.engine, sampler.about.model, model)
    _check_logprobs(sampler)
    own, served = context_length(model), sampler.about.max_model_len
    if served is not None and (own is None or served < own):
        logger.warning(
            "vLLM serves %d tokens of prompt and completion together, the policy %s: start it with a larger "
            "--max-model-len (vllm_max_model_length) if rows need more", served, own or "any number",
        )  # fmt: skip


def _check_network(served: str, model: nn.Module) -> None:
    """Compare the configs, where the engine's folder is on this machine."""
    file = Path(served, "config.json")
    if not file.is_file():
        return
    try:
        theirs = read_json(file)
    except ValueError as error:
        raise EngineError(f"vLLM serves {served}, and whether that is the policy is not known: {error}") from error
    ours = below_peft(below_value_head(model)).config.to_dict()
    theirs, ours = (each.get("text_config") or each for each in (theirs, ours))
    for name in SHAPE:
        if theirs.get(name) and ours.get(name) and theirs[name] != ours[name]:
            raise EngineError(
                f"vLLM serves {served}, whose {name} is {theirs[name]}, and that of the policy {ours[name]}: serve the "
                "policy's own folder"
            )


def _check_tokens(engine: Engine, served: str, tokenizer: Any) -> None:
    if tokenizer is None:
        return
    theirs, ours = engine.tokenized(PROBE), list(tokenizer.encode(PROBE, add_special_tokens=False))
    if theirs is not None and theirs != ours:
        raise EngineError(
            f"vLLM serves {served}, whose tokenizer makes {theirs[:6]} of {PROBE[:9]!r}..., and the policy's "
            f"{ours[:6]}: serve the policy's own folder, with its tokenizer"
        )


def _check_vocabulary(engine: Engine, served: str, model: nn.Module) -> None:
    """Ask for a token that only the policy knows, where the engine knows fewer."""
    rows = embedding_rows(model)
    if rows is None:
        return
    try:
        engine.prompt_logprobs([[rows - 1, rows - 1]])
    except EngineError as error:
        if "vocabulary" not in str(error):
            raise
        raise EngineError(
            f"vLLM serves {served}, which does not know the policy's token {rows - 1}: serve the policy's own folder"
        ) from error


def _check_logprobs(sampler: VLLMSampler) -> None:
    """The most probable token alone is certain: an engine that says otherwise leaves filters and temperature out."""
    ((one,),) = sampler.sample([[1]], SamplingParams(max_new_tokens=1, top_k=1, seed=0, stop_token_ids=()))
    if abs(one.logprobs[0]) > 1e-3:
        raise EngineError(
            f"vLLM says the log-probability {one.logprobs[0]:.3g} of a token that was the only one to choose: start it "
            "with --logprobs-mode processed_logprobs, as `trl vllm-serve` does"
        )
