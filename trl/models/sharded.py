"""Weights that ranks hold in parts (FSDP2, ZeRO-3): gathered for a while, or read in step, layer by layer.

A pass of a sharded model gathers its weights, so all ranks must run the same passes. Sampling cannot promise that:
ranks draw completions of different lengths, and some draw none. Two contexts allow it: `gathered` and `in_step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from trl.kernels.layers import swapped_forward
from trl.models import zero
from trl.models.forward import eval_no_grad, small_picture
from trl.models.precision import size_text
from trl.models.unwrap import below_accelerate, below_peft, each_alone, has_parts, in_parts, is_sharded

logger = logging.getLogger(__name__)


def _shards(model: nn.Module) -> list[Any]:
    """The modules whose weights FSDP has sharded, the outermost first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _groups(shards: list[Any]) -> list[Any]:
    """What FSDP gathers at a time, each once: several modules may share one."""
    found = {id(group): group for shard in shards for group in shard._get_fsdp_state()._fsdp_param_groups}
    return list(found.values())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights on every rank. Collective at the start; in between each rank may run passes of its own."""
    if not is_sharded(model):  # whole, or gathered already
        yield
        return
    if has_parts(model):
        with zero.gathered_model(model), each_alone([model, *below_accelerate(model).modules()]):
            yield
        return
    shards = _shards(model)
    shards[0]._get_fsdp_state()._lazy_init()  # else the part of the model that is called first becomes the root
    groups = _groups(shards)
    after_forward = [group.post_forward_mesh_info for group in groups]
    try:
        for group in groups:
            group.post_forward_mesh_info = None  # a pass leaves the weights where they are
        for shard in shards:
            shard.unshard()
        with each_alone(shards):
            yield
    finally:
        for group, own in zip(groups, after_forward, strict=True):
            group.post_forward_mesh_info = own
        _forget_passes(groups)
        for shard in shards:
            shard.reshard()


def _forget_passes(groups: list[Any]) -> None:
    """FSDP gathers ahead in a backward pass by the order of all passes since the last one, and ranks ran their own."""
    for group in groups:
        group.comm_ctx.post_forward_order.clear()
        group._post_forward_indices.clear()


def say_gathering(model: nn.Module, *, in_layers: bool | None = None) -> None:
    """One line before the first rollout: how sampling gets the weights, and what they take.

    in_layers: what `gather` says; None: there is no choice.
    """
    plain = not in_layers
    where = "at once, for each round of sampling" if plain else "layer by layer, in each pass, with all ranks in step"
    more = "gather='layers' needs less memory and is far slower" if plain else "gather='model' is faster where they fit"
    size = size_text(sum(zero.elements(weight) * weight.element_size() for weight in model.parameters()))
    more = "" if in_layers is None else f"; {more}"
    logger.warning("sampling gathers the sharded weights, %s, %s%s", size, where, more)


def reshard(model: nn.Module) -> None:
    """Let go of the weights that a pass has left whole."""
    for shard in _shards(model):
        shard.reshard()


def prime(model: nn.Module) -> None:
    """Gather each part of a sharded model once, so that FSDP sees which weights are trained as they are now.

    It looks at the first gathering and never again; a switched off adapter would not be trained.
    """
    shards = _shards(model)
    if shards:
        shards[0]._get_fsdp_state()._lazy_init()
    for shard in shards:
        shard.unshard()
        shard.reshard()


@contextmanager
def in_step(*models: nn.Module) -> Iterator[None]:
    """Within it, without gradients, ranks may run sharded models differently often, one pass of all ranks at a time.

    Before each pass ranks tell each other whose it is; ranks that are done run passes of one token until all are done.
    Collective at both ends.
    """
    with ExitStack() as stack:
        for model in models:
            if zero.lacks_engine(model):
                stack.enter_context(gathered(model))
        stack.enter_context(_one_by_one([model for model in models if is_sharded(model)]))
        yield


@contextmanager
def _one_by_one(sharded: Sequence[nn.Module]) -> Iterator[None]:
    """The passes of these models in turn, see `in_step`."""
    if not sharded:
        yield
        return
    device = next(sharded[0].parameters()).device
    depth = 0

    def turn(number: int) -> int:
        """Whose pass it is: 1 for the first model; 0 if no rank has any."""
        which = torch.tensor(number, device=device)
        dist.all_reduce(which, dist.ReduceOp.MAX)
        return int(which)

    def begin(number: int) -> None:
        nonlocal depth
        if not depth:
            turn(number)
        depth += 1

    def end() -> None:
        nonlocal depth
        depth -= 1

    with ExitStack() as stack:
        for number, model in enumerate(sharded, 1):
            _idle_pass(model)  # weights that stay after a pass are there from now on
            root = next(iter(_shards(model)), below_accelerate(model))
            hooks = (
                root.register_forward_pre_hook(lambda *call, own=number: begin(own), prepend=True),
                root.register_forward_hook(lambda *call: end(), always_call=True),
            )
            for hook in hooks:
                stack.callback(hook.remove)
            stack.enter_context(_through(root, below_peft(model), lambda: depth > 0))
            stack.enter_context(each_alone([model, *root.modules()]))
        yield
        depth = 1  # passes of other ranks from here on
        while number := turn(0):
            _idle_pass(sharded[number - 1])
    for model in sharded:
        _forget_passes(_groups(_shards(model)))


@contextmanager
def _through(root: nn.Module, network: nn.Module, inside: Callable[[], bool]) -> Iterator[None]:
    """Calls of `network`, which lies in `root`, go through the root, whose hooks gather the weights."""
    if network is root:
        yield
        return
    own = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if inside():
            return own(*args, **kwargs)
        with swapped_forward(root, own):
            return root(*args, **kwargs)

    with swapped_forward(network, forward):
        yield


def _idle_pass(model: nn.Module) -> None:
    """A pass of one token, for the ranks that have one of their own."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with eval_no_grad(model), small_picture(model) as pictures:  # as the other ranks' passes call the vision tower
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **pictures)


# -- models that are only read ----------------------------------------------------------------


def prepare_frozen(accelerator: Any, model: Any) -> Any:
    """A model that is only read, on the device; sharded where the policy is."""
    if shards_weights(accelerator):
        return shard(accelerator, model)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    if zero.is_on(accelerator):  # whose `save_state` takes each model that it knows for an engine
        accelerator._models = [each for each in accelerator._models if each not in (prepared, model)]
    return prepared


def shards_weights(accelerator: Any) -> bool:
    """Whether each rank keeps a part only of the weights of prepared models."""
    return bool(getattr(accelerator, "is_fsdp2", False)) or zero.shards_weights(accelerator)


def shard(accelerator: Any, model: Any) -> Any:
    """A model in parts, as the plugin of the accelerator says; by its own kinds of layers where that names others."""
    if zero.shards_weights(accelerator):
        return zero.shard(accelerator, model)
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    with own_layers(accelerator, model):
        return fsdp2_prepare_model(accelerator, model)


def shard_beside(accelerator: Any, model: Any, optimizer: Any, prepare: Callable[[], Any]) -> Any:
    """What `prepare()` gives for another model and the optimizer, which has this model's weights too; both are sharded.

    accelerate prepares one model with an optimizer: it does not see the weights of this one.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups: list[list[Any]] = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [weight for weight in group["params"] if id(weight) not in names]
    prepared = prepare()
    own = dict(shard(accelerator, model).named_parameters())
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        others = iter(group["params"])
        group["params"] = [own[names[id(each)]] if id(each) in names else next(others) for each in before]
    return prepared


@contextmanager
def own_layers(accelerator: Any, model: Any) -> Iterator[None]:
    """Within it the plugin of an FSDP2 accelerator names layers that the model has."""
    plugin = accelerator.state.fsdp_plugin
    named, there = plugin.transformer_cls_names_to_wrap, {type(module).__name__ for module in model.modules()}
    own = [name for name in named or () if name in there]
    plugin.transformer_cls_names_to_wrap = own or list(getattr(below_peft(model), "_no_split_modules", None) or [])
    try:
        yield
    finally:
        plugin.transformer_cls_names_to_wrap = named


# -- single weights ---------------------------------------------------------------------------


def whole(weight: Tensor) -> Tensor:
    """A weight that may be sharded, whole. Collective where it is."""
    if in_parts(weight):
        with zero.gathered_weights([weight]):
            return weight.detach().clone()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def held_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight, in the same memory."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def like_shards(value: Tensor, like: Tensor) -> Tensor:
    """A value as a weight is held: whole or in parts. Collective where one of them is sharded."""
    if not isinstance(like, DTensor):
        return whole(value)
    if not isinstance(value, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.redistribute(like.device_mesh, like.placements)


def part_of(value: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank holds of a weight, and the same part of a value of its shape. Collective where one is sharded."""
    if in_parts(like):
        return zero.own_part(like), zero.own_part(value)
    return held_part(like), held_part(like_shards(value, like))


@contextmanager
def optimizers_without_state() -> Iterator[None]:
    """Within it a whole state is loaded into an optimizer that keeps none (SGD without momentum) too.

    torch (2.13) asks such an optimizer on which device its state lies, and fails. Its settings, which the first rank
    has read, are all there is to load.
    """
    module: Any = torch.distributed.checkpoint.state_dict
    own = module.set_optimizer_state_dict

    def load(model: nn.Module, optimizers: Any, optim_state_dict: Any, *, options: Any = None) -> None:
        optimizer = getattr(optimizers, "optimizer", optimizers)  # below accelerate's
        plain = isinstance(optimizer, torch.optim.SGD) and not any(
            group["momentum"] for group in optimizer.param_groups
        )
        if not plain or options is None or not options.full_state_dict:
            own(model, optimizers, optim_state_dict, options=options)
            return
        groups = [[{**group, "params": None} for group in (optim_state_dict or {}).get("param_groups", [])]]
        torch.distributed.broadcast_object_list(groups, 0)
        for group, kept in zip(optimizer.param_groups, groups[0], strict=True):
            group.update({**kept, "params": group["params"]})

    module.set_optimizer_state_dict = load
    try:
        yield
    finally:
        module.set_optimizer_state_dict = own
