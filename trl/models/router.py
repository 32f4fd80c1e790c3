"""A mixture's routers: the balance loss, which keeps its experts equally busy (eq. 4 to 6 of arXiv:2101.03961), and
the replay of choices that an engine made (R3, arXiv:2510.11370)."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trl.data.records import PackedBatch, moved_ahead
from trl.losses.loss_sum import LossSum
from trl.models.forward import Routes, eval_no_grad, padded_pass, probe_rows, watched_routers
from trl.models.unwrap import below_accelerate, below_peft, below_value_head, is_encoder_decoder

FUNCTION = "load_balancing_loss_func"
"""what transformers calls it, in the module of each mixture that has one"""


def balance_weight(model: nn.Module, asked: float | None) -> float:
    """The weight of the balance loss: as asked, else as the model's config says; 0 where there is nothing to balance.

    ValueError for a mixture of which transformers has no such loss, if one was asked for.
    """
    network = below_peft(below_value_head(model))
    text: Any = network.config.get_text_config()  # type: ignore[operator, union-attr]
    own = next((v for v in (getattr(network, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef"))
                if v is not None), None)  # fmt: skip
    if _function_of(network) is not None and own is not None and not is_encoder_decoder(model):
        if asked is not None:
            return float(asked)
        says = getattr(network.config, "output_router_logits", False) or getattr(text, "output_router_logits", False)
        return float(own) if says else 0.0
    if asked and is_mixture(network):
        raise ValueError(
            f"router_aux_loss_coef={asked!r}: transformers has no balance loss for {type(network).__name__}; leave it "
            "out"
        )
    return 0.0


def is_mixture(model: nn.Module) -> bool:
    """Whether the config says that tokens go to experts."""
    network: Any = below_peft(below_value_head(model))
    text = network.config.get_text_config()
    return any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _function_of(network: nn.Module) -> Callable[..., Tensor] | None:
    modules = (sys.modules.get(kind.__module__) for kind in type(network).__mro__)
    return next((function for module in modules if (function := getattr(module, FUNCTION, None))), None)


def with_balance(model: nn.Module, weight: float, function: Callable[[], LossSum]) -> LossSum:
    """The loss, plus `weight` times the balance loss of the passes with gradient that it makes.

    The balance loss is that of the tokens of these passes; in the mean of an optimizer step each micro-batch's weighs
    as its count does. It is a product of two means over tokens, so it is not that of the step's tokens together.
    """
    seen: list[Routes] = []
    with watched_routers(seen):
        result = function()
    if not seen:
        return result
    auxiliary = balance_loss(model, seen)
    share = auxiliary.detach() * result.count
    total = result.total + weight * auxiliary.to(result.total.device) * result.count
    return LossSum(total, result.count, result.metrics | {"aux_loss": (share, result.count)})


def balance_loss(model: nn.Module, seen: list[Routes]) -> Tensor:
    """The balance loss of passes, those of several weighed by their tokens; each token of a row counts once. []"""
    network: Any = below_peft(below_value_head(model))
    function = _function_of(network)
    assert function is not None
    losses, tokens = [], []
    for logits, packed, mask_BL in seen:
        if not logits or not logits[0].requires_grad:
            raise ValueError(
                f"router_aux_loss_coef: the routers of {type(network).__name__} give nothing to learn from (frozen, "
                "or reentrant checkpoints: set gradient_checkpointing_kwargs={'use_reentrant': False}); leave it out"
            )
        if packed.piece is not None:
            logits = tuple(packed.piece.whole(of_layer) for of_layer in logits)
        weight_BL = token_counts(packed)[None] if mask_BL is None else _with_virtual(mask_BL, len(logits[0]))
        losses.append(function(logits, network.num_experts, network.num_experts_per_tok, weight_BL))
        tokens.append(weight_BL.sum())
    weight = torch.stack(tokens).float()
    return (torch.stack(losses) * (weight / weight.sum()).to(losses[0].device)).sum()


def token_counts(packed: PackedBatch) -> Tensor:
    """In how many rows of the batch each packed token stands. [N]"""
    rows = [0] * len(packed.segments)
    for segment in packed.row_segment:
        while segment >= 0:
            rows[segment] += 1
            segment = packed.segments[segment].parent
    counts_N = torch.zeros(packed.segments[-1].end, dtype=torch.float32)
    for (start, end, _), count in zip(packed.segments, rows, strict=True):
        counts_N[start:end] = count
    return moved_ahead(counts_N, packed.ids_N.device)


def _with_virtual(mask_BL: Tensor, routed: int) -> Tensor:
    """The mask with ones for the tokens that a PEFT adapter has put before each row."""
    return nn.functional.pad(mask_BL, (routed // len(mask_BL) - mask_BL.shape[1], 0), value=1)


# -- replay -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Router:
    """A module that sends each token to the highest of its scores."""

    module: nn.Module
    layer: int
    """the first number in its name"""
    experts: int
    choices: int
    """experts of a token"""


class _Seen(TorchFunctionMode):
    """Notes each `topk` over the rows of a matrix, with the module that is at work."""

    def __init__(self, at_work: list[nn.Module]):
        super().__init__()
        self.at_work, self.found = at_work, dict[nn.Module, tuple[int, int]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in TOPK and self.at_work:
            given = args[0] if args else kwargs["input"]
            self.found[self.at_work[-1]] = (given.shape[-1], result[1].shape[-1])  # the last one decides
        return result


TOPK = (torch.topk, torch.Tensor.topk)
_routers: WeakKeyDictionary[nn.Module, list[Router]] = WeakKeyDictionary()


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a network in the order in which a pass calls them; found in a pass of a few tokens, once."""
    network = below_value_head(model)
    if network not in _routers:
        at_work: list[nn.Module] = []
        names = {module: name for name, module in network.named_modules()}

        def leave(*call: Any) -> None:
            at_work.pop()

        with ExitStack() as stack:
            for module in names:
                before = module.register_forward_pre_hook(lambda called, inputs: at_work.append(called))
                after = module.register_forward_hook(leave, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            seen = stack.enter_context(_Seen(at_work))
            with eval_no_grad(model):
                padded_pass(below_accelerate(model), probe_rows(network)[0])
        numbers = {module: re.search(r"\d+", names[module]) for module in seen.found}
        _routers[network] = [
            Router(module, int(number[0]) if (number := numbers[module]) else 0, *sizes)
            for module, sizes in seen.found.items()
        ]
    return _routers[network]


class _Sent(TorchFunctionMode):
    """The router's last `topk` gives these experts, with the scores that they have; -1: its own choice."""

    def __init__(self, router: Router, experts_NC: Tensor):
        super().__init__()
        self.router, self.experts_NC, self.replaced = router, experts_NC, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in TOPK:
            return result
        scores, own = args[0] if args else (kwargs or {})["input"], result[1]
        if (scores.shape[-1], own.shape[-1], own.numel()) != (
            self.router.experts, self.router.choices, self.experts_NC.numel()
        ):  # fmt: skip
            return result
        given = self.experts_NC.view(own.shape).to(own)
        index = torch.where(given >= 0, given, own)
        self.replaced = True
        return type(result)((scores.gather(-1, index), index))


@dataclass
class _Order:
    """What a router is told."""

    router: Router
    experts_NC: Tensor
    live: bool = True
    """whether the pass is being computed; later only the backward pass computes it again, for checkpoints"""
    obeyed: bool = False
    mode: _Sent | None = None


_orders: WeakKeyDictionary[nn.Module, _Order] = WeakKeyDictionary()


def _begin(module: nn.Module, inputs: Any) -> None:
    order = _orders.get(module)
    if order is not None and (order.live or torch._C._current_graph_task_id() != -1):
        order.mode = _Sent(order.router, order.experts_NC)
        order.mode.__enter__()


def _end(module: nn.Module, inputs: Any, output: Any) -> None:
    order = _orders.get(module)
    if order is not None and order.mode is not None:
        mode, order.mode = order.mode, None
        mode.__exit__(None, None, None)
        order.obeyed = order.obeyed or mode.replaced


@contextmanager
def replayed(model: nn.Module, packed: PackedBatch, *, padded: bool) -> Iterator[None]:
    """Within it each router sends the tokens of a pass to the batch's experts; the gates are its own, with gradient.

    ValueError where the network has no routers that choose by `topk`, or others than the experts are of.
    """
    network = below_value_head(model)
    routers = routers_of(model)
    columns = _columns(network, routers, packed)
    experts_NLC = _of_padded_rows(packed) if padded else packed.experts_NLC
    assert experts_NLC is not None
    orders = []
    for router, column in zip(routers, columns, strict=True):
        if router.module not in _orders:  # hooks that do nothing without an order, in copies of the module too
            router.module.register_forward_pre_hook(_begin)
            router.module.register_forward_hook(_end, always_call=True)
        orders.append(_Order(router, experts_NLC[:, column]))
        _orders[router.module] = orders[-1]
    try:
        yield
    finally:
        for order in orders:
            order.live = False
    if not all(order.obeyed for order in orders):
        raise ValueError(
            f"routing_replay: a router of {type(below_peft(network)).__name__} did not choose among the tokens of the "
            "pass; set routing_replay=False"
        )


def _columns(network: nn.Module, routers: list[Router], packed: PackedBatch) -> list[int]:
    """Which layer of the given experts each router takes. An engine may name the layers without a router too."""
    held: Any = packed.kept.get("host", packed)
    _, layers, choices = held.experts_NLC.shape
    name, config = type(below_peft(network)).__name__, below_peft(network).config.get_text_config()  # type: ignore[operator, union-attr]
    way_out = "set routing_replay=False, or let the engine serve this model"
    if not routers:
        raise ValueError(
            f"routing_replay: {name} has no router that takes the highest scores; set routing_replay=False"
        )
    wrong = [router.choices for router in routers if router.choices != choices]
    if wrong:
        raise ValueError(f"routing_replay: {choices} experts a token were given, {name} takes {wrong[0]}; {way_out}")
    most = int(held.experts_NLC.max()) if held.experts_NLC.numel() else -1
    fewest = min(router.experts for router in routers)
    if most >= fewest:
        raise ValueError(f"routing_replay: expert {most} was given, {name} has {fewest}; {way_out}")
    if layers == len(routers):
        return list(range(layers))
    if layers == config.num_hidden_layers:
        return [router.layer for router in routers]
    raise ValueError(f"routing_replay: experts of {layers} layers were given, {name} has {len(routers)}; {way_out}")


def _of_padded_rows(packed: PackedBatch) -> Tensor:
    """The experts of the tokens of padded rows, -1 where one is padding. [B * L, L', C]"""
    assert packed.experts_NLC is not None
    rows = [torch.tensor(packed.row_indices(row), device=packed.ids_N.device) for row in range(packed.rows)]
    index_BL = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return packed.experts_NLC[index_BL.clamp(min=0)].masked_fill((index_BL < 0)[..., None, None], -1).flatten(0, 1)
