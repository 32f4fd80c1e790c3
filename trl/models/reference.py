"""The frozen policy that a KL term or a preference loss measures against."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from trl.models import zero
from trl.models.forward import eval_mode, introduce_like
from trl.models.modeling_base import create_reference_model
from trl.models.peft_support import base_is_start, is_peft_model
from trl.models.precision import dtype_of
from trl.models.prepare import equalise
from trl.models.sharded import like_shards, part_of, prime, shard, shards_weights, whole
from trl.models.unwrap import below_accelerate, below_value_head, has_parts, holds_parts, is_sharded

logger = logging.getLogger(__name__)


def needs_no_copy(policy: nn.Module) -> bool:
    """Whether the policy with its adapter switched off is the policy as it is now: the adapter is new."""
    network = below_value_head(policy)
    return is_peft_model(network) and base_is_start(network)


def copy_of(policy: nn.Module, *, share: bool = True) -> nn.Module:
    """A frozen copy of the policy as it is now; below an adapter, it shares the frozen weights with the policy.

    share: False where the weights will be sharded, each model's by itself; see `Reference.prepare`.
    """
    model = below_accelerate(policy)
    equalise(model)
    if not share or not is_peft_model(below_value_head(model)):
        return create_reference_model(model)
    frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return zero.copy_in_parts(model, frozen).eval().requires_grad_(False)


def copy_with_adapter(policy: Any, name: str) -> nn.Module:
    """A frozen copy of a PeftModel with another of its adapters active; base weights are shared if they stay whole."""
    own = {f".{policy.active_adapter}.", f".{name}."}
    frozen = [(key, weight) for key, weight in policy.named_parameters() if not weight.requires_grad]
    shared = {id(weight): weight for key, weight in frozen if not any(part in key for part in own)}
    copy = zero.copy_in_parts(policy, {} if is_fsdp_enabled() or is_deepspeed_zero3_enabled() else shared)
    copy.set_adapter(name)
    copy.delete_adapter(policy.active_adapter)
    return copy.eval().requires_grad_(False)


class Reference:
    """`with reference.model() as m:` is the one place that knows what the reference is.

    A model that the user gave; else the policy with its adapter switched off, if that is new; else a frozen copy of the
    policy as it is now. `precomputed`: its log-probabilities are in the data, and `m` is None.
    After `accelerator.prepare` assign the prepared models to `policy` and, if it is not None, to `frozen`.
    autocast: the context in which the policy computes; the reference then computes in the same precision.
    share: see `copy_of`.
    """

    def __init__(
        self,
        policy: nn.Module,
        given: nn.Module | None = None,
        *,
        precomputed: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        share: bool = True,
    ):
        if given is not None and below_accelerate(given) is below_accelerate(policy):
            raise ValueError("the reference is the policy itself: leave it out for a frozen copy, or load it again")
        if given is not None and precomputed:
            raise ValueError("a reference model and precomputed reference log-probabilities: pass one of them")
        self.policy = policy
        self.precomputed = precomputed
        self.autocast = autocast
        self.adapter_off = given is None and not precomputed and needs_no_copy(policy)
        self.frozen: nn.Module | None = None
        self._primed = False
        if given is not None:
            given.eval()  # which gives nothing back for an engine of DeepSpeed
            self.frozen = given.requires_grad_(False)
            self._warn_of_rounding(given)
        elif not precomputed and not self.adapter_off:
            self.frozen = copy_of(policy, share=share)
        introduce_like(self.frozen, policy)

    def _warn_of_rounding(self, given: nn.Module) -> None:
        own, other = dtype_of(self.policy), dtype_of(given)
        if own is not None and other is not None and own != other:
            logger.warning(
                "the reference is stored in %s and the policy in %s: by rounding their log-probabilities differ from "
                "the start; load both in one dtype, or give both by name", other, own,
            )  # fmt: skip

    @property
    def kept(self) -> list[nn.Module]:
        """The separate model, if there is one."""
        return [] if self.frozen is None else [self.frozen]

    def prepare(self, accelerator: Any) -> None:
        """Shard a copy of the policy as the policy will be; elsewhere it stays where it is."""
        if self.frozen is not None and shards_weights(accelerator):
            self.frozen = shard(accelerator, self.frozen)

    @contextmanager
    def model(self) -> Iterator[nn.Module | None]:
        """The reference in eval mode and without gradients; afterwards the policy is as it was before."""
        if self.precomputed:
            with self.autocast():
                yield None
            return
        model = self.policy if self.frozen is None else self.frozen
        if self.adapter_off and not self._primed and is_sharded(model):
            prime(model)
            self._primed = True
        adapter_off = below_value_head(self.policy).disable_adapter() if self.adapter_off else nullcontext()
        with eval_mode(model), _gradients_as_before(model), adapter_off, torch.no_grad(), self.autocast():
            yield model

    def state(self) -> dict[str, Any]:
        """The weights of a separate reference model, which a checkpoint needs because they may have moved.

        Those that it shares with the policy are not among them.
        """
        if self.frozen is None:
            return {}
        shared = self._shared()
        state = below_accelerate(self.frozen).state_dict(keep_vars=True)
        return {name: whole(value).detach().cpu() for name, value in state.items() if name not in shared}

    def load(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        if self.frozen is None:
            return
        if has_parts(self.frozen):
            zero.load(below_accelerate(self.frozen), state)
            return
        if holds_parts(self.frozen):
            own = below_accelerate(self.frozen).state_dict()
            state = {name: like_shards(value, own.get(name, value)) for name, value in state.items()}
        below_accelerate(self.frozen).load_state_dict(state, strict=not self._shared())

    def _shared(self) -> set[str]:
        policy = dict(below_accelerate(self.policy).named_parameters())
        reference = below_accelerate(self.frozen).named_parameters() if self.frozen is not None else ()
        return {name for name, kept in reference if kept is policy.get(name)}

    @torch.no_grad()
    def sync(self, alpha: float = 1.0) -> None:
        """Move the reference towards the policy: alpha * policy + (1 - alpha) * reference.

        The soft update of TR-DPO (arXiv:2404.09656); alpha = 1 is its hard update.
        """
        if self.frozen is None:
            what = "precomputed" if self.precomputed else "the policy without its adapter"
            raise ValueError(f"the reference is {what}: nothing there can be synchronised; pass a reference model")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is a weight: use 0 (keep the reference) to 1 (take the policy)")
        policy = dict(below_accelerate(self.policy).named_parameters())
        reference = dict(below_accelerate(self.frozen).named_parameters())
        if missing := sorted(reference.keys() - policy.keys()):
            raise ValueError(
                f"the policy has no parameter {missing[0]!r}: only a reference of its own kind can follow it"
            )
        for name, kept in reference.items():
            if kept is not policy[name]:  # else the layer is shared
                mine, theirs = part_of(policy[name], kept)
                mine.lerp_(theirs.to(mine), alpha)
                zero.drop_whole(kept)


@contextmanager
def _gradients_as_before(model: nn.Module) -> Iterator[None]:
    """Puts back which parameters ask for gradients: PEFT changes it when it switches an adapter off and on."""
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, asked in gradients:
            if parameter.requires_grad != asked:
                parameter.requires_grad_(asked)
