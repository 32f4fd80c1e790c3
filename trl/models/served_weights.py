"""The weights of a policy under the names of its checkpoint, one piece at a time, for an engine that serves them.

What lies around a transformers model is left out: value heads, PEFT's names, wrappers of engines. An adapter is merged
into a copy of its layer, so the policy's own weights stay as they are to the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from trl.import_utils import is_peft_available
from trl.models.sharded import whole
from trl.models.unwrap import below_peft, below_value_head, learns_prompt
from trl.models.zero import whole_shape

if is_peft_available():
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together: one weight, or those of a layer whose adapter is merged."""

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[[bool], list[Tensor] | None]
    """the tensors, whole; collective where ranks hold parts. False: this rank only takes part, and gets None"""


def pieces_of(model: nn.Module) -> list[Piece]:
    """All weights of the transformers model in it, adapters merged. A tied head stands there under its own name too.

    ValueError for what cannot be said in weights.
    """
    network = below_peft(model)
    if learns_prompt(model):
        raise ValueError(
            f"{type(network).__name__}: its adapter puts virtual tokens before the prompt, and no weights can say "
            "that; train LoRA, or sample with the local sampler (use_vllm=False)"
        )
    found = list(_below(network, ""))
    odd = next((piece for piece in found for dtype in piece.dtypes if dtype in (torch.uint8, torch.int8)), None)
    if odd is not None:
        raise ValueError(
            f"{odd.names[0]} is stored in {str(odd.dtypes[0]).removeprefix('torch.')} (a quantised base): its whole "
            "weights cannot be sent; let vLLM serve the same quantised model and train a LoRA adapter that it can load"
        )
    return _under_saved_names(network, found)


def _below(module: nn.Module, prefix: str) -> Iterator[Piece]:
    if is_peft_available():
        if isinstance(module, ModulesToSaveWrapper):
            names = () if module.disable_adapters else module.active_adapters
            inner = module.modules_to_save[names[0]] if names else module.original_module
            yield from _below(inner, prefix)
            return
        if isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        if isinstance(module, BaseTunerLayer):
            yield _merged(module, prefix)
            return
    fleeting = module._non_persistent_buffers_set
    own = {**module._parameters, **{k: v for k, v in module._buffers.items() if k not in fleeting}}
    for name, weight in own.items():
        if weight is not None:
            yield _plain(f"{prefix}{name}", weight)
    for name, child in module.named_children():
        yield from _below(child, f"{prefix}{name}.")
    yield from _twins(module, prefix)


def _twins(module: nn.Module, prefix: str) -> Iterator[Piece]:
    """Children that `named_children` leaves out because they stand in a module twice."""
    shown = {name for name, _ in module.named_children()}
    for name, child in module._modules.items():
        if child is not None and name not in shown:
            yield from _below(child, f"{prefix}{name}.")


def _plain(name: str, weight: Tensor) -> Piece:
    def make(keep: bool) -> list[Tensor] | None:
        tensor = whole(weight).detach()
        return [tensor] if keep else None

    return Piece((name,), (weight.dtype,), (tuple(whole_shape(weight)),), make)


def _merged(layer: Any, prefix: str) -> Piece:
    base = layer.get_base_layer()
    own = dict(base.named_parameters())

    @torch.no_grad()
    def make(keep: bool) -> list[Tensor] | None:
        weights = {id(weight): whole(weight).detach() for weight in layer.parameters()}
        if not keep:
            return None
        copied = _copied(layer, weights)
        for each in reversed(list(copied.modules())):
            if isinstance(each, BaseTunerLayer):
                each.merge()
        made = dict(copied.get_base_layer().named_parameters())
        return [made[name].detach() for name in own]

    return Piece(
        tuple(f"{prefix}{name}" for name in own),
        tuple(weight.dtype for weight in own.values()),
        tuple(tuple(whole_shape(weight)) for weight in own.values()),
        make,
    )


def _copied(layer: Any, weights: dict[int, Tensor]) -> Any:
    """A copy of a layer with these weights for its own, by their ids; without hooks, which may hold the whole model."""
    memo: dict[int, Any] = {key: nn.Parameter(weight.clone(), requires_grad=False) for key, weight in weights.items()}
    for module in layer.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs") or name.endswith("_always_called"):
                memo[id(value)] = type(value)()
    kind = next(kind for kind in type(layer).__mro__ if not issubclass(kind, FSDPModule))
    copied: Any = object.__new__(kind)
    memo[id(layer)] = copied
    copied.__dict__.update(deepcopy(vars(layer), memo))
    return copied


# -- names of the checkpoint ----------------------------------------------------------------------


def _conversions(network: Any) -> Sequence[Any]:
    """What transformers did to the tensors of the checkpoint when it loaded them."""
    known = getattr(network, "_weight_conversions", None)
    if known is not None:
        return known
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(network, add_legacy=False)


def _under_saved_names(network: Any, pieces: list[Piece]) -> list[Piece]:
    """The pieces as a checkpoint has them; where several weights become one there, or one several, all as one piece."""
    conversions = _conversions(network)
    if not conversions:
        return pieces
    if any(isinstance(each, WeightConverter) for each in conversions):
        return [_converted(network, _joined(pieces))]
    return [_converted(network, piece) for piece in pieces]


def _joined(pieces: list[Piece]) -> Piece:
    def make(keep: bool) -> list[Tensor] | None:
        made = [piece.make(keep) for piece in pieces]
        return [tensor.cpu() for tensors in made for tensor in tensors or ()] if keep else None

    return Piece(
        tuple(name for piece in pieces for name in piece.names),
        tuple(dtype for piece in pieces for dtype in piece.dtypes),
        tuple(shape for piece in pieces for shape in piece.shapes),
        make,
    )


def _converted(network: Any, piece: Piece) -> Piece:
    def convert(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(revert_weight_conversion(network, dict(zip(piece.names, tensors, strict=True))))

    empty = [torch.empty(s, dtype=d, device="meta") for s, d in zip(piece.shapes, piece.dtypes, strict=True)]
    like = convert(empty)

    def make(keep: bool) -> list[Tensor] | None:
        tensors = piece.make(keep)
        return None if tensors is None else list(convert(tensors).values())

    return replace(
        piece,
        names=tuple(like),
        dtypes=tuple(tensor.dtype for tensor in like.values()),
        shapes=tuple(tuple(tensor.shape) for tensor in like.values()),
        make=make,
    )


# -- adapters ----------------------------------------------------------------------------------

BASE_INITS = re.compile(r"pissa|olora|corda|loftq|qalora", re.IGNORECASE)
"""ways to begin a LoRA adapter that change the base, which an engine has as it was saved"""


def unserved_adapter(model: nn.Module, max_rank: int | None = None) -> str | None:
    """Why vLLM cannot load what is trained here as a LoRA adapter beside its own base; None: it can.

    max_rank: of the adapters that the engine takes; None: not known.
    """
    network: Any = below_value_head(model)
    configs = getattr(network, "peft_config", None)
    if not configs or not hasattr(network, "active_adapters"):
        return "there is no adapter"
    names = list(network.active_adapters)
    if len(names) != 1:
        return f"{len(names)} adapters are active ({', '.join(names)})"
    config = configs[names[0]]
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"its kind is {kind}"
    for name, text in _REFUSED.items():
        if getattr(config, name, None):
            return text
    if config.bias != "none":
        return f"it trains biases (bias={config.bias!r})"
    if isinstance(config.init_lora_weights, str) and BASE_INITS.match(config.init_lora_weights):
        return f"init_lora_weights={config.init_lora_weights!r} has changed the base"
    rank = max([config.r, *config.rank_pattern.values()])
    if max_rank == 0:
        return "the engine takes none (--enable-lora)"
    if max_rank is not None and rank > max_rank:
        return f"its rank {rank} is above the engine's {max_rank} (--max-lora-rank)"
    trained = [name for name, weight in below_peft(model).named_parameters() if weight.requires_grad]
    beside = next((name for name in trained if "lora_" not in name), None)
    return None if beside is None else f"{beside} is trained beside it"


_REFUSED = {
    "use_dora": "it is a DoRA adapter",
    "modules_to_save": "it trains whole modules (modules_to_save)",
    "trainable_token_indices": "it trains single tokens (trainable_token_indices)",
    "target_parameters": "it adapts parameters of experts (target_parameters)",
    "lora_bias": "its products have a bias (lora_bias)",
    "alora_invocation_tokens": "it is an aLoRA adapter",
    "layer_replication": "it repeats layers (layer_replication)",
    "use_qalora": "it is a QALoRA adapter",
    "use_bdlora": "it is a block-diagonal adapter",
    "arrow_config": "it is an Arrow router",
}
"""a field of a LoRA config that is set -> what is said of it"""
