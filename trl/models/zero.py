"""Weights that DeepSpeed ZeRO-3 leaves to ranks in parts: gathered, copied, and read without its hooks.

A weight in parts is empty outside of its module's call; `ds_tensor` is what this rank holds of it. DeepSpeed is
imported here only, where a weight in parts or an accelerator shows that it is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from trl.models.unwrap import below_peft, has_parts, in_parts


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether the accelerator's models are held in parts by ZeRO-3 when they are prepared."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    return int(accelerator.deepspeed_plugin.zero_stage) == 3


# -- the engine -------------------------------------------------------------------------------


def is_on(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains: it steps inside the backward pass, and every backward pass is one of all ranks."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def fill_config(accelerator: Accelerator, rows: int, max_grad_norm: float | None) -> None:
    """Write what the settings say into entries of DeepSpeed's config that nobody has filled in; before `prepare`.

    rows: of a micro-batch. Whole weights are gathered for saving, and a bfloat16 step that is not finite is left out.
    """
    if not is_on(accelerator):
        return
    config = accelerator.deepspeed_plugin.deepspeed_config
    given = {"train_micro_batch_size_per_gpu": rows, "gradient_clipping": max_grad_norm or 0.0}
    config.update({name: value for name, value in given.items() if config.get(name, "auto") == "auto"})
    if accelerator.deepspeed_plugin.zero_stage == 3:
        name = "stage3_gather_16bit_weights_on_model_save"
        if config["zero_optimization"].get(name, "auto") == "auto":
            config["zero_optimization"][name] = True
    if isinstance(config.get("bf16"), dict):
        config["bf16"].setdefault("check_grad_overflow", True)


def as_one(accelerator: Accelerator, policy: nn.Module, critic: nn.Module | None) -> nn.Module:
    """What `prepare` is given to train these models: an engine trains one module, so it has both where there are two.

    Its passes are made by `forward.in_pass`; the models stay where they are.
    """
    if critic is None or not is_on(accelerator):
        return policy
    both = nn.ModuleDict({"policy": policy, "critic": critic})
    both.config = below_peft(policy).config  # whose width accelerate reads
    return both


def step_norm(accelerator: Any) -> float | None:
    """The gradient's norm in the step that was just made; inf: it was not finite, and DeepSpeed has left the step out.

    None in fp16, where that is no news: the loss scale is lowered then.
    """
    fp16 = accelerator.deepspeed_plugin.deepspeed_config.get("fp16", {}).get("enabled", False)
    norm = None if fp16 is True else accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
    return None if norm is None else float(norm)


# -- whole weights ----------------------------------------------------------------------------


@contextmanager
def gathered_weights(weights: Iterable[Tensor]) -> Iterator[None]:
    """Within it these weights are whole on every rank; collective at both ends. Those that are not in parts stay."""
    held = [weight for weight in weights if in_parts(weight) and not _is_whole(weight)]
    if not held:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(held):
        yield


def _is_whole(weight: Any) -> bool:
    return weight.ds_status.name == "AVAILABLE"


@contextmanager
def gathered_model(model: nn.Module) -> Iterator[None]:
    """All weights on every rank; collective at both ends. In between each rank may run passes of its own."""
    with gathered_weights(model.parameters()), without_hooks(model):
        yield


def lacks_engine(model: nn.Module) -> bool:
    """Whether weights are in parts and no call gathers them: the model was loaded so, and is not prepared yet."""
    hooks = chain.from_iterable(module._forward_pre_hooks.values() for module in model.modules())
    return has_parts(model) and not any(map(_is_deepspeeds, hooks))


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Within it no call of a module gathers or drops weights, nor does DeepSpeed note the order of calls."""
    dicts = [hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    kept = [(hooks, list(hooks.items())) for hooks in dicts if any(map(_is_deepspeeds, hooks.values()))]
    for hooks, items in kept:
        for key, hook in items:
            if _is_deepspeeds(hook):
                del hooks[key]
    try:
        yield
    finally:
        for hooks, items in kept:
            now = dict(hooks)
            before = {key: hook for key, hook in items if key in now or _is_deepspeeds(hook)}
            hooks.clear()
            hooks.update(before | now)


def _is_deepspeeds(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


# -- a second model ---------------------------------------------------------------------------


def copy_in_parts(model: nn.Module, shared: dict[int, Any]) -> Any:
    """A deep copy of a model whose weights are in parts, in parts too; one weight at a time is whole.

    shared: the memo of `deepcopy`, for what both models hold. Collective.
    """
    with without_hooks(model):
        copied = deepcopy(model, dict(shared))
    for module in copied.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):  # made for the module that was copied
            module.__dict__.pop(name, None)
    theirs = dict(copied.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not in_parts(weight) or in_parts(theirs[name]):
                continue
            with gathered_weights([weight]):
                theirs[name].data = weight.data.clone()
            weight.convert_to_zero_parameters(param_list=[theirs[name]])  # type: ignore[attr-defined]
    return copied


def shard(accelerator: Accelerator, model: nn.Module) -> Any:
    """A model that is only read, under ZeRO-3 as the accelerator's plugin says."""
    import deepspeed

    config = _without_auto(accelerator.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"):
        config.pop(name, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    config.setdefault("train_micro_batch_size_per_gpu", 1)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A copy without entries that nobody has filled in."""
    plain = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in plain.items() if not (isinstance(value, str) and value == "auto")}


# -- single weights ---------------------------------------------------------------------------


def own_part(weight: Tensor) -> Tensor:
    """What this rank holds of a weight in parts. [its share of the elements, padded]"""
    return weight.ds_tensor  # type: ignore[attr-defined,no-any-return]


def elements(weight: Tensor) -> int:
    """Of a weight when it is whole."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight when it is whole."""
    return getattr(weight, "ds_shape", weight.shape)


def drop_whole(weight: Any) -> None:
    """After the part of a weight was changed: the next call gathers it anew, also if DeepSpeed keeps it whole."""
    if in_parts(weight):
        weight.partition(has_been_updated=False)


@torch.no_grad()
def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put whole values, which every rank has, into a model that is held in parts."""
    import deepspeed

    for name, value in model.state_dict(keep_vars=True).items():
        if not in_parts(value):
            value.data.copy_(state[name])
            continue
        with deepspeed.zero.GatheredParameters([value], modifier_rank=0):
            value.data.copy_(state[name])
