"""The forward pass of a batch: rows packed, rows padded, or an encoder and a decoder.

What is read of a pass is computed inside the call of the module that reads it (`in_module`): FSDP, DeepSpeed and DDP
then see a module that is called as usual. A probe of a few tokens finds out how a network may be run (`ForwardPlan`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import chain, product
from math import inf
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trl.data.packing import pack
from trl.data.pictures import reader_of
from trl.data.records import Branch, PackedBatch, TokenTree
from trl.kernels import context_parallel
from trl.kernels.layers import Reading, fast, swapped_forward, uncompiled
from trl.losses.loss_sum import LossSum
from trl.models.attention import enable_tree_attention, inside_tree, lay_out_for_graphs, own_attention
from trl.models.precision import EXACT, HALF, TOLERANCES, coarsest, precision_of
from trl.models.unwrap import (
    accepts,
    adapter_state,
    below_accelerate,
    below_peft,
    below_processes,
    below_value_head,
    holds_parts,
    is_encoder_decoder,
    learns_prompt,
    reads_pictures,
    reads_rows,
    runs_in_step,
)

logger = logging.getLogger(__name__)

PROBE_ERRORS = (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, LookupError)
Found = TypeVar("Found")


Routes = tuple[tuple[Tensor, ...], PackedBatch, Tensor | None]
"""of a pass: each layer's router logits, the batch, and the attention mask where rows are padded"""
_routes: ContextVar[list[Routes] | None] = ContextVar("routes", default=None)


@contextmanager
def watched_routers(seen: list[Routes]) -> Iterator[None]:
    """Within it each pass with gradient adds what the routers of a mixture say of its tokens."""
    token = _routes.set(seen)
    try:
        yield
    finally:
        _routes.reset(token)


# -- what is computed of a pass, and where ----------------------------------------------------


def in_module(
    model: nn.Module,
    module: nn.Module,
    packed: PackedBatch,
    function: Callable[[Tensor], Tensor | Sequence[Tensor]],
    index_S: Tensor | None = None,
    row_S: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`function(states_SD)` inside the call of `module`, a head of the model, on the states that reach it.

    index_S: the packed positions of the states, and row_S their rows; default: where scored tokens are predicted.
    """
    if index_S is None or row_S is None:
        index_S, row_S = packed.scored_S, packed.row_S
    plan = _plan_for(model, module, packed)
    if packed.piece is not None:
        check_sharing(model, module, plan, packed.piece.group)
    if packed.experts_NLC is not None:
        from trl.models.router import routers_of  # which knows this module

        routers_of(model)  # found before the head is another one
    if plan.narrow and (_routes.get() is not None or packed.experts_NLC is not None):  # the last routers see all tokens
        plan = replace(plan, narrow=False)
    return _pass(model, module, packed, function, index_S, row_S, plan)


def _pass(
    model: nn.Module,
    module: nn.Module,
    packed: PackedBatch,
    function: Callable[[Tensor], Tensor | Sequence[Tensor]],
    index_S: Tensor,
    row_S: Tensor,
    plan: ForwardPlan,
) -> tuple[Tensor, ...]:
    """`in_module` by a given plan.

    The results leave as the module's output, in the shape of one number for each position: on that tensor sits what
    gathers sharded weights again for the backward pass. What the model does to its logits afterwards is thrown away.
    """
    parts: list[Tensor] = []
    outputs: list[Tensor] = []
    reading = Reading(index_S)

    def compute(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        batch, length = hidden.shape[0], hidden.shape[-2]
        if is_encoder_decoder(model):
            states_SD = hidden[packed.row_S, packed.slot_S]
        elif plan.packed:
            states_SD, length = reading.states(hidden), len(packed.ids_N)
        else:
            states_SD = hidden[row_S, packed.position_N[index_S] + virtual_tokens(packed, hidden)]
        result = function(states_SD)
        parts[:] = [result] if isinstance(result, Tensor) else result
        return _as_output(parts, batch, length) if torch.is_grad_enabled() else hidden.new_zeros(batch, length, 1)

    with swapped_forward(module, compute):
        last = module.register_forward_hook(lambda called, inputs, output: outputs.append(output))
        try:
            _run(model, packed, plan, reading)
        finally:
            last.remove()
    if not torch.is_grad_enabled():
        return tuple(parts)
    flat = outputs[-1].flatten()
    pieces = flat[: sum(part.numel() for part in parts)].split([part.numel() for part in parts])
    return tuple(
        piece.view(part.shape) if part.requires_grad else part.detach()
        for piece, part in zip(pieces, parts, strict=True)
    )


def _as_output(parts: Sequence[Tensor], batch: int, length: int) -> Tensor:
    """All numbers of the parts, then zeros, in a tensor that a model takes for logits of one word. [B, L or more, 1]"""
    numbers = torch.cat([part.flatten() for part in parts])
    length = max(length, -(-len(numbers) // batch))
    return nn.functional.pad(numbers, (0, batch * length - len(numbers))).view(batch, length, 1)


def _run(model: nn.Module, packed: PackedBatch, plan: ForwardPlan, reading: Reading) -> Any:
    """The model's call, and what it returns."""
    network = below_value_head(model)
    with ExitStack() as stack:
        if packed.experts_NLC is not None:
            from trl.models.router import replayed

            stack.enter_context(replayed(model, packed, padded=not plan.packed))
        wrapper = below_accelerate(model)
        if wrapper is not network:  # its own forward computes values everywhere and keeps the states of all layers
            stack.enter_context(swapped_forward(wrapper, lambda **inputs: network(**inputs)))
        if is_encoder_decoder(model):
            return model(**encoder_decoder_inputs(model, packed))
        if not plan.packed:
            inputs = stack.enter_context(_with_pictures(model, packed, padded_text_of(model, packed), plan))
            return _watched(model, packed, inputs, inputs["attention_mask"])
        enable_tree_attention(network)  # again where somebody has set the attention since the probe
        stack.enter_context(inside_tree())
        tree = stack.enter_context(fast(network, packed, reading, narrow=plan.narrow, early=plan.early))
        if tree.table is not None and packed.ids_N.device.type != "cpu":
            lay_out_for_graphs(tree, network)
        inputs = {"input_ids": packed.ids_N[None], "position_ids": packed.position_N[None], "tree": tree}
        inputs = stack.enter_context(_with_pictures(model, packed, inputs, plan))
        return _watched(model, packed, {**inputs, "use_cache": False}, None)


def _with_pictures(
    model: nn.Module, packed: PackedBatch, inputs: dict[str, Any], plan: ForwardPlan
) -> AbstractContextManager[dict[str, Any]]:
    """The inputs with what pictures among the rows add, within which these are encoded."""
    if not packed.has_pictures and not (reads_pictures(model) and _pictures().needs_company(model)):
        return nullcontext(inputs)
    return _pictures().in_pass(model, packed, inputs, padded=not plan.packed, plain=plan.plain)  # type: ignore[no-any-return]


def introduce(model: nn.Module | None, tokenizer: Any) -> None:
    """Tell a vision-language model what reads its pictures: the processor that this tokenizer belongs to, if any."""
    if (reader := reader_of(tokenizer)) is not None:
        _pictures().introduce(model, reader)


def introduce_like(model: nn.Module | None, other: nn.Module) -> None:
    """Tell a model to read pictures as the other does."""
    if reads_pictures(other):
        _pictures().introduce(model, _pictures().reader_for(other))


def small_picture(model: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
    """Keywords of a small picture that stands nowhere, for a pass that is to call the vision tower, if there is one."""
    return _pictures().kept_in_step(model) if reads_pictures(model) else nullcontext({})


def _pictures() -> Any:
    from trl.models import pictures  # which knows this module, and which rows of text do without

    return pictures


def _watched(model: nn.Module, packed: PackedBatch, inputs: dict[str, Any], mask_BL: Tensor | None) -> Any:
    """The model's call; where routers are watched and gradients flow, what they say is kept."""
    seen = _routes.get() if torch.is_grad_enabled() else None
    if seen is None:
        return model(**inputs)
    output = model(**inputs, output_router_logits=True)
    seen.append((output.router_logits, packed, mask_BL))
    return output


def padded_pass(model: nn.Module, packed: PackedBatch) -> Any:
    """What the model returns for the rows padded, with its own logits."""
    return _run(model, packed, PADDED, Reading(packed.scored_S))


def within_forward(model: nn.Module, function: Callable[[nn.Module], LossSum]) -> LossSum:
    """`function` of the model below its wrapper, run as if it were the wrapped model's forward.

    DDP takes a parameter that the output of its forward does not reach for unused and reduces it too early. Inside, it
    sees what is really computed.
    """
    result, total = in_pass(model, function, lambda result: result.total)
    return replace(result, total=total)


def in_pass(
    model: nn.Module, function: Callable[[nn.Module], Found], output: Callable[[Found], Tensor]
) -> tuple[Found, Tensor]:
    """What `function` gives of the model below its wrapper, run as the wrapped model's forward; and its `output`."""
    inner = below_processes(model)
    if inner is model:
        result = function(model)
        return result, output(result)
    results: list[Found] = []
    own = inner.forward

    def run() -> Tensor:
        with swapped_forward(inner, own):  # `function` calls the model
            results.append(function(inner))
        return output(results[0])

    with swapped_forward(inner, run):
        returned = model()
    return results[0], returned


# -- the inputs of a pass ---------------------------------------------------------------------

_padded: ContextVar[bool] = ContextVar("rows_padded", default=False)


@contextmanager
def rows_padded(flag: bool) -> Iterator[None]:
    """Within it every pass pads its rows; False: rows are packed wherever the network can compute them so."""
    token = _padded.set(flag)
    try:
        yield
    finally:
        _padded.reset(token)


_sharing: ContextVar[Any] = ContextVar("ranks_of_a_row", default=None)


@contextmanager
def rows_shared(group: Any) -> Iterator[None]:
    """Within it the ranks of a process group compute each batch together; None: each rank computes its own."""
    token = _sharing.set(group)
    try:
        yield
    finally:
        _sharing.reset(token)


def is_sharing() -> bool:
    """Whether other ranks compute parts of the same batch."""
    return _sharing.get() is not None


def own_part(packed: PackedBatch) -> PackedBatch:
    """What this rank computes of the batch: a part of it within `rows_shared`, else the batch."""
    group = _sharing.get()
    if group is not None and packed.has_pictures:
        raise ValueError("context_parallel_size: ranks share rows of text only, and rows have pictures; leave it out")
    return packed if group is None else context_parallel.own_part(packed, group)


def padded_inputs(packed: PackedBatch, pad_token_id: int = 0) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `position_ids` of the rows, each whole and padded on the right. [B, L]"""
    rows = [torch.tensor(packed.row_indices(row), device=packed.ids_N.device) for row in range(packed.rows)]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    index = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids = torch.where(mask.bool(), packed.ids_N[index], pad_token_id)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": packed.position_N[index] * mask}


def padded_inputs_of(model: nn.Module, packed: PackedBatch) -> dict[str, Any]:
    """The rows padded, as keywords that this model takes, those of pictures as often as they come. [B, L]"""
    inputs = padded_text_of(model, packed)
    with _with_pictures(model, packed, inputs, PLAIN) as whole:
        return whole if packed.has_pictures else inputs


def padded_text_of(model: nn.Module, packed: PackedBatch) -> dict[str, Any]:
    """The rows padded, as keywords that this model takes, with tokens of pictures as they are in the batch. [B, L]"""
    inputs = padded_inputs(packed, _pad_token(model))
    counts_itself = is_encoder(model) or learns_prompt(model)  # PEFT shifts the positions by its virtual tokens
    if counts_itself or not accepts(model, "position_ids"):
        inputs.pop("position_ids")
    return inputs if is_encoder(model) else {**inputs, "use_cache": False}


def encoder_decoder_inputs(model: nn.Module, packed: PackedBatch) -> dict[str, Any]:
    """Prompts for the encoder and branches, shifted right, for the decoder; both padded on the right."""
    start_token_id, pad_token_id = below_value_head(model).config.decoder_start_token_id, _pad_token(model)
    device = packed.ids_N.device
    prompts, branches = [], []
    for row, prompt_tokens in enumerate(packed.prompt_tokens):
        index = torch.tensor(packed.row_indices(row), device=device)
        ids = packed.ids_N[index]
        prompts.append(ids[:prompt_tokens])
        branches.append(torch.cat([ids.new_tensor([start_token_id]), ids[prompt_tokens:-1]]))
    columns: dict[str, Any] = {"use_cache": False}
    for name, rows in (("", prompts), ("decoder_", branches)):
        columns[f"{name}input_ids"] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        ones = [torch.ones_like(row) for row in rows]
        columns[f"{name}attention_mask"] = nn.utils.rnn.pad_sequence(ones, batch_first=True)
    return columns


def _pad_token(model: nn.Module) -> int:
    pad = getattr(below_value_head(model).config, "pad_token_id", None)
    return 0 if pad is None else pad


def is_encoder(model: nn.Module) -> bool:
    """Whether the model reads a text from both sides, as BERT does."""
    network = below_value_head(model)
    return not hasattr(network, "prepare_inputs_for_generation") and not hasattr(network, "score")


# -- modes ------------------------------------------------------------------------------------


@contextmanager
def eval_mode(*models: nn.Module, checkpointing: bool = False) -> Iterator[None]:
    """Eval mode; the training flags of all modules come back.

    checkpointing: layers that checkpoint their activations stay in training mode, without which they would keep them.
    Dropout whose rate they hold as a number is 0 for the while.
    """
    before = {module: module.training for module in chain.from_iterable(model.modules() for model in models)}
    rates: list[tuple[nn.Module, str, float]] = []
    for module in before:
        module.training = checkpointing and bool(getattr(module, "gradient_checkpointing", False))
        if module.training:
            rates += [(module, name, rate) for name, rate in dropout_rates(module).items()]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
        for module, name, rate in rates:
            setattr(module, name, rate)


def dropout_rates(module: nn.Module) -> dict[str, float]:
    """The rates of dropout, and of skipped layers, that a module holds as numbers."""
    named = {name: value for name, value in vars(module).items() if "dropout" in name or "layerdrop" in name}
    return {name: value for name, value in named.items() if isinstance(value, float)}


@contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the training flags of all modules come back."""
    with eval_mode(model), torch.no_grad():
        yield


# -- the probe --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generates:
    """When a network's `generate` computes rows together as it computes them alone."""

    behind_padding: bool = True
    """with padding on the left, which the mask hides"""
    with_cache: bool = True


@dataclass(frozen=True)
class ForwardPlan:
    """How a network computes a batch, with its adapter as it is now and in the precision of now."""

    packed: bool = False
    """rows are packed; else padded"""
    narrow: bool = False
    """the last layer may skip positions that nobody reads"""
    early: bool = False
    """the final norm may leave them out, so that the head gets only those that are read"""
    reach: float = 0
    """tokens of the longest row for which the probe has found out `packed`, `narrow` and `early`"""
    samples_locally: bool | None = None
    """whether the local sampler's engine computes what the network computes; None: nobody has asked"""
    why_not_local: str = ""
    precision: str = ""
    """in which the network computes, see `computes_in`; "": nobody has asked"""
    generates: Generates | None = None
    """None: nobody has asked"""
    plain: bool = False
    """the model's own call computes the padded rows, which are of one length: it finds positions of pictures itself"""
    pictured: ForwardPlan | None = None
    """how it computes a batch with pictures; None: nobody has asked"""
    reads_pictures: str | None = None
    """how the local sampler's engine reads those of a prompt, see `generation.probe`; None: nobody has asked"""


PADDED = ForwardPlan()
PLAIN = ForwardPlan(plain=True)
_plans: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], ForwardPlan]] = WeakKeyDictionary()


def plan_of(model: nn.Module) -> ForwardPlan:
    """What is known so far of the model as it is now."""
    network = below_value_head(model)
    return _plans.get(network, {}).get(_state_of(network), PADDED)


def note(model: nn.Module, plan: ForwardPlan) -> ForwardPlan:
    """Keep what was found out of the model as it is now."""
    network = below_value_head(model)
    _plans.setdefault(network, {})[_state_of(network)] = plan
    return plan


def computes_in(model: nn.Module) -> str:
    """The precision in which the model computes now, as `precision_of` finds it; asked once for each state of it."""
    plan = plan_of(model)
    return (plan if plan.precision else note(model, replace(plan, precision=precision_of(model)))).precision


def _state_of(network: nn.Module) -> tuple[Any, ...]:
    """What a plan depends on: adapter, precision, attention, which a user may change; and whether ranks run in step.

    What ranks found out each alone does not count where they run in step: one may know what another does not.
    """
    weight = next(network.parameters())
    kind = weight.device.type
    backends: Any = torch.backends
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    switches = [backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul, backends.mkldnn.matmul]
    rounding = tuple(switch.fp32_precision for switch in switches)
    return adapter_state(network), own_attention(network), weight.dtype, autocast, rounding, runs_in_step(network)


def _plan_for(model: nn.Module, module: nn.Module, packed: PackedBatch) -> ForwardPlan:
    """The plan for these rows; the network is probed at the first, and when rows reach a pattern not yet probed.

    Processes that run in step ask for the same probes, also where one of them has no picture.
    """
    if is_encoder_decoder(model):
        return PADDED
    pictured = _any_pictures(model, packed)
    own = PADDED if _padded.get() else _text_plan(model, module, packed)
    if not pictured:
        return own
    plan = _pictured_plan(model, module)
    if not packed.has_pictures:
        return own
    return replace(plan, narrow=plan.narrow and own.narrow, early=plan.early and own.early) if own.packed else PADDED


def _text_plan(model: nn.Module, module: nn.Module, packed: PackedBatch) -> ForwardPlan:
    """The plan for rows of so many tokens, all of them text."""
    plan = plan_of(model)
    if plan.reach == inf:
        return plan
    longest = _longest_row(packed)
    if runs_in_step(model):  # a probe is a pass, and all ranks must run it
        lengths = torch.tensor(longest, device=packed.ids_N.device)
        torch.distributed.all_reduce(lengths, torch.distributed.ReduceOp.MAX)
        longest = int(lengths)
    return plan if longest <= plan.reach else note(model, _probe(below_accelerate(model), module, longest))


def _any_pictures(model: nn.Module, packed: PackedBatch) -> bool:
    """Whether rows have pictures, here or on another process that runs the same passes."""
    if not reads_pictures(model) or not runs_in_step(model):
        return packed.has_pictures
    found = torch.tensor(int(packed.has_pictures), device=packed.ids_N.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def _pictured_plan(model: nn.Module, module: nn.Module) -> ForwardPlan:
    """The plan for rows with pictures: packed where that gives what the model's own calls give, else padded.

    ValueError where neither does.
    """
    known = plan_of(model)
    if known.pictured is None:
        known = note(model, replace(known, pictured=_probe_pictures(below_accelerate(model), module)))
    assert known.pictured is not None
    return known.pictured


def _probe_pictures(model: nn.Module, module: nn.Module) -> ForwardPlan:
    """How rows with pictures are computed, by rows with two sample pictures, each alone in the model's own call."""
    network = below_value_head(model)
    packed = _pictures().picture_rows(model)
    alone = _pictures().each_alone(packed)
    switched_off, _ = adapter_state(network)
    shares_prompts = switched_off or not (learns_prompt(network) or reads_rows(network))
    with eval_no_grad(model), uncompiled(model):
        rows = _measured_alone(model, module, alone)
        expected = Expected(torch.cat([states_SD for states_SD, _ in rows]), coarsest(own for _, own in rows))
        _check_causal(model, module, alone[0], expected._replace(states_SD=rows[0][0]))
        ways = product((True, False), repeat=2) if shares_prompts else ()
        plans = [ForwardPlan(packed=True, narrow=narrow, early=early) for narrow, early in ways]
        if plans:
            enable_tree_attention(network)
        for plan in (*plans, PADDED):
            try:
                if expected.agrees(measured_pass(model, module, packed, plan)[0]):
                    break
            except PROBE_ERRORS as error:
                logger.debug("probe of %s with pictures failed: %s", type(network).__name__, error)
        else:
            raise ValueError(
                f"{type(below_peft(network)).__name__} does not compute rows with pictures together as it computes "
                "each alone, so their losses would be wrong: another version of transformers may"
            )
    if not plan.packed:
        logger.warning(
            "%s does not compute packed rows with pictures as it computes separate ones: it pads them (same results, "
            "slower).", type(below_peft(network)).__name__,
        )  # fmt: skip
    return plan


def _measured_alone(model: nn.Module, module: nn.Module, alone: Sequence[PackedBatch]) -> list[tuple[Tensor, str]]:
    """What the model's own call of each row gives; ValueError where a prompt that an adapter learns is in its way."""
    try:
        return [measured_pass(model, module, row, PLAIN) for row in alone]
    except PROBE_ERRORS as error:
        network = below_value_head(model)
        if not learns_prompt(network):
            raise
        raise ValueError(
            f"peft_config: {type(below_peft(network)).__name__} does not compute rows with pictures behind a learned "
            f"prompt ({type(error).__name__}: {str(error)[:100]}): take an adapter of another kind, LoRA say"
        ) from error


def _check_causal(model: nn.Module, module: nn.Module, row: PackedBatch, expected: Expected) -> None:
    """ValueError where what a row's last token is changes the states that predict it, and those before."""
    states_SD, _ = measured_pass(model, module, _pictures().ended_otherwise(row), PLAIN)
    if not expected.agrees(states_SD):
        raise ValueError(
            f"{type(below_peft(model)).__name__} reads a row with pictures from both sides, so its tokens would be "
            "predicted by themselves: only models whose answers see what stands before them are trained on pictures"
        )


def virtual_tokens(packed: PackedBatch, rows_BL: Tensor) -> int:
    """How many tokens a PEFT adapter has put before each padded row of a model's states or logits, [B, L, ...]."""
    return rows_BL.shape[1] - _longest_row(packed)


def _longest_row(packed: PackedBatch) -> int:
    lengths: list[int] = []
    for start, end, parent in packed.segments:
        lengths.append(end - start + (lengths[parent] if parent >= 0 else 0))
    return max(lengths)


PATTERN_NAMES = re.compile("window|chunk|block|local|sparse|stride|top_?k")


def pattern_lengths(config: Any) -> list[int]:
    """Numbers of tokens after which attention changes: windows, chunks, top-k. Found in a config by their names."""
    found: set[int] = set()

    def visit(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(str(key), inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                visit(name, inner)
        elif type(value) is int and value > 1 and PATTERN_NAMES.search(name):
            found.add(value)

    visit("", config.to_dict())
    return sorted(found)


def probe_rows(network: Any, longest: int = 0) -> tuple[PackedBatch, float]:
    """Rows for a probe, and up to how many tokens of a row it speaks: three rows, two of them with a shared prompt.

    Their length is more than every pattern that a row of `longest` tokens reaches, and ten or so without one.
    """
    config = network.config.get_text_config()
    patterns = pattern_lengths(config)
    length = max([7, *(min(pattern + 4, longest) for pattern in patterns if pattern < longest)])
    ids = [(i * i + 7 * i + 3) % config.vocab_size for i in range(length + 3)]
    tree = TokenTree(ids[: length - 3], [Branch(ids[length - 3 : length]), Branch(ids[length:])])
    packed = pack([TokenTree(ids[5:7], [Branch(ids[1:3])]), tree])
    return packed.to(next(network.parameters()).device), min((p for p in patterns if p >= length), default=inf)


def _probe(model: nn.Module, module: nn.Module, longest: int) -> ForwardPlan:
    """Whether packed rows give the states of padded rows, with the last layer and the final norm narrowed or whole."""
    network = below_value_head(model)
    known, (packed, reach) = plan_of(model), probe_rows(network, longest)
    switched_off, _ = adapter_state(network)
    # else virtual tokens stand before each row, or the adapter looks for its place in each
    shares_prompts = switched_off or not (learns_prompt(network) or reads_rows(network))
    with eval_no_grad(model), uncompiled(model):
        try:
            as_now = _expected(model, module, packed)
            exact = as_now if as_now.is_exact else _expected_exactly(model, module, packed)
            enable_tree_attention(network)
            for narrow, early in product((True, False), repeat=2) if shares_prompts else ():
                plan = replace(known, packed=True, narrow=narrow, early=early, reach=reach)
                if _computes(model, module, packed, plan, as_now, exact):
                    return plan
        except PROBE_ERRORS as error:
            logger.debug("probe of %s failed: %s", type(network).__name__, error)
    logger.warning(
        "%s does not compute packed rows as it computes separate ones: it pads its rows (same results, slower).",
        type(network).__name__,
    )
    return replace(known, packed=False, narrow=False, early=False, reach=inf)


class Expected(NamedTuple):
    """What padded rows give, against which packed rows are compared."""

    states_SD: Tensor
    precision: str

    @property
    def is_exact(self) -> bool:
        return self.precision in EXACT

    def agrees(self, states_SD: Tensor) -> bool:
        tolerance = TOLERANCES[self.precision].states * float(self.states_SD.abs().max())
        return torch.allclose(states_SD, self.states_SD, rtol=0, atol=tolerance)

    def agrees_on_the_whole(self, states_SD: Tensor) -> bool:
        """By the root mean square of the difference, where nothing exact can be computed."""
        difference, own = (states_SD - self.states_SD).float().square().mean(), self.states_SD.float().square().mean()
        return float(difference.sqrt()) <= TOLERANCES[self.precision].rounded * float(own.sqrt())


def _expected(model: nn.Module, module: nn.Module, packed: PackedBatch) -> Expected:
    return Expected(*measured_pass(model, module, packed, PADDED))


def _expected_exactly(model: nn.Module, module: nn.Module, packed: PackedBatch) -> Expected | None:
    """What padded rows give in float32; None where the model cannot be run so: sharded in half precision, quantised."""
    if not runs_in_float32(model):
        return None
    try:
        with in_float32(model):
            states_SD, _ = measured_pass(model, module, packed, PADDED)
    except PROBE_ERRORS as error:
        logger.debug("%s does not run in float32: %s", type(below_value_head(model)).__name__, error)
        return None
    return Expected(states_SD, "float32") if states_SD.dtype == torch.float32 else None


def runs_in_float32(model: nn.Module) -> bool:
    """Whether `in_float32` can convert the model's weights: not where they are sharded, or quantised."""
    half = any(weight.dtype in HALF for weight in model.parameters())
    quantised = any(getattr(inner, "is_quantized", False) for inner in model.modules())
    return not quantised and not (half and holds_parts(model))


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within it passes without gradient compute in float32: without autocast, each layer with float32 weights.

    A layer's weights are converted while it is called, so one layer more is in memory.
    """
    kept: dict[Tensor, Tensor] = {}

    def restore(weights: Sequence[Tensor]) -> None:
        for weight in weights:
            if weight in kept:
                weight.data = kept.pop(weight)

    def convert(weights: Sequence[Tensor]) -> None:
        for weight in weights:
            if weight.dtype in HALF and weight not in kept:
                kept[weight] = weight.data
                weight.data = weight.data.float()

    torch_backends: Any = torch.backends
    network, backends = below_value_head(model), (torch_backends.cuda.matmul, torch_backends.mkldnn.matmul)
    rounding = [backend.fp32_precision for backend in backends]
    plain = vars(model).get("_original_forward")  # accelerate has put autocast around it
    with ExitStack() as stack:
        stack.callback(lambda: restore(list(kept)))
        stack.enter_context(torch.autocast(next(network.parameters()).device.type, enabled=False))
        if plain is not None:
            stack.enter_context(swapped_forward(model, plain))
        for backend, setting in zip(backends, rounding, strict=True):
            stack.callback(setattr, backend, "fp32_precision", setting)
            backend.fp32_precision = "ieee"
        for layer, weights in _layers(network):
            if not any(weight.dtype in HALF for weight in weights):
                continue
            before = layer.register_forward_pre_hook(lambda *call, own=weights: convert(own), prepend=True)
            after = layer.register_forward_hook(lambda *call, own=weights: restore(own), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _layers(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """The layers of a network whole, and the other modules with the weights of their own."""
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from ((layer, list(layer.parameters())) for layer in child)
        else:
            yield from _layers(child)


def measured_pass(
    model: nn.Module,
    module: nn.Module,
    packed: PackedBatch,
    plan: ForwardPlan,
    function: Callable[[Tensor], Tensor] = lambda states_SD: states_SD,
) -> tuple[Tensor, str]:
    """What a pass gives at the scored positions, and the coarser of the precisions of its products and its states."""
    precisions: list[str] = []

    def measure(states_SD: Tensor) -> Tensor:
        precisions.extend([precision_of(model), str(states_SD.dtype).removeprefix("torch.")])
        return function(states_SD)

    (result,) = _pass(model, module, packed, measure, packed.scored_S, packed.row_S, plan)
    return result, coarsest(precisions)


def _computes(
    model: nn.Module,
    module: nn.Module,
    packed: PackedBatch,
    plan: ForwardPlan,
    as_now: Expected,
    exact: Expected | None,
) -> bool:
    """Whether packed rows by this plan give what padded rows give: in the precision of now, and in float32.

    Rounding hides what separates two computations (ALiBi's biases of far keys), so float32 decides where it can.
    """
    try:
        states_SD, _ = measured_pass(model, module, packed, plan)
        if not as_now.agrees(states_SD):
            return False
        if exact is None:
            return as_now.agrees_on_the_whole(states_SD)
        if exact is as_now:
            return True
        with in_float32(model):
            states_SD, _ = measured_pass(model, module, packed, plan)
    except PROBE_ERRORS as error:
        logger.debug("probe of %s failed: %s", type(below_value_head(model)).__name__, error)
        return False
    return exact.agrees(states_SD)


# -- rows that several ranks compute together -------------------------------------------------

_shared: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""networks that compute parts of rows on several ranks as they compute whole ones"""


def check_sharing(model: nn.Module, module: nn.Module, plan: ForwardPlan, group: Any) -> None:
    """ValueError unless ranks that share a row compute what one rank computes: a few tokens, once a network.

    Collective. What else than attention lets positions see each other (a convolution, a recurrence) shows here.
    """
    network = below_value_head(model)
    if not plan.packed:
        raise ValueError(
            f"{type(network).__name__} pads its rows, and ranks share packed rows only: leave "
            "context_parallel_size out, or take a model whose attention goes through transformers' AttentionInterface"
        )
    if network in _shared:
        return
    packed, _ = probe_rows(network)
    own, inner = context_parallel.own_part(packed, group, unit=1), below_accelerate(model)
    with eval_no_grad(model):
        whole_SD, precision = measured_pass(inner, module, packed, plan)
        own_SD, _ = measured_pass(inner, module, own, plan)
    is_here_S, _ = own.piece.places(packed.scored_S)
    expected = Expected(whole_SD[is_here_S], precision)
    agrees = torch.tensor(not is_here_S.any() or expected.agrees(own_SD), dtype=torch.int, device=packed.ids_N.device)
    torch.distributed.all_reduce(agrees, torch.distributed.ReduceOp.MIN, group=group)
    if not agrees:
        raise ValueError(
            f"{type(network).__name__} does not compute parts of rows on several ranks as it computes whole rows: its "
            "positions see each other outside of attention; leave context_parallel_size out"
        )
    _shared[network] = True
