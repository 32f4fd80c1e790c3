"""What is read of a pass: log-probabilities, entropies, values and scores, at the positions that somebody reads.

The head works in chunks of scored positions: `[S, V]` logits never exist whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trl.data.packing import pack
from trl.data.records import Branch, PackedBatch, TokenTree
from trl.kernels.head_blocks import BlockLogprobs
from trl.kernels.head_tiles import LinearLogprobs
from trl.kernels.step_memory import place_of
from trl.models.forward import (
    PADDED,
    PROBE_ERRORS,
    encoder_decoder_inputs,
    eval_no_grad,
    in_module,
    is_encoder,
    measured_pass,
    own_part,
    padded_inputs_of,
    padded_pass,
    probe_rows,
    virtual_tokens,
)
from trl.models.precision import TOLERANCES, coarsest
from trl.models.unwrap import below_accelerate, below_peft, below_value_head, is_encoder_decoder, runs_in_step

CHUNK_ELEMENTS = 3 * 2**21
"""logits that exist at a time (24 MiB in float32: glibc takes larger blocks from the system anew each time)"""


def chunk_rows(vocabulary: int) -> int:
    """Scored positions whose logits exist at a time."""
    return max(16, CHUNK_ELEMENTS // vocabulary)


@dataclass(frozen=True)
class Head:
    """An output embedding and what the model does to its logits afterwards.

    `project` is the module's own forward, for a function that runs inside a call of the module (`in_head`).
    """

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    """logits are multiplied by it (cohere's `logit_scale`, falcon_h1's `lm_head_multiplier`, granite's
    `1 / logits_scaling`)"""
    softcap: float | None = None
    """then softcap * tanh(logits / softcap) (gemma2, gemma3, recurrent_gemma)"""
    project: Callable[[Tensor], Tensor] | None = None
    """None: the module is called, with its hooks"""

    @property
    def linear(self) -> nn.Linear | None:
        """The module if it computes `nn.Linear`, as the classes that FSDP makes of it do; an adapter does not."""
        plain = isinstance(self.module, nn.Linear) and type(self.module).forward is nn.Linear.forward
        return self.module if plain else None  # type: ignore[return-value]

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """[S, V] in float32."""
        logits = (self.project or self.module)(hidden_SD).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: Any) -> Head:
    """The head of a transformers or PEFT model; ValueError where it has none."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise ValueError(f"{type(model).__name__} has no language-model head (`get_output_embeddings()` is None)")
    config = model.config.get_text_config()
    scale = float(_first_of(config, "logit_scale", "lm_head_multiplier") or 1.0)
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling
    softcap = _first_of(config, "final_logit_softcapping", "logits_soft_cap")
    return Head(module, config.vocab_size, scale, softcap)


def _first_of(config: Any, *names: str) -> float | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)


_checked: WeakKeyDictionary[nn.Module, dict[bool, Head]] = WeakKeyDictionary()
"""by network: its head as it was when its logits were those of the model; with all ranks in step, and each alone"""


def check_head(model: nn.Module, head: Head) -> None:
    """ValueError unless the head says all that the model does to its logits: a pass of a few tokens, once a model."""
    network = below_value_head(model)
    together = runs_in_step(network)
    known = _checked.setdefault(network, {})
    if known.get(together) == head:
        return
    states: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        states.append(output.detach().clone())  # what follows may write into it

    hook = head.module.register_forward_hook(keep)
    try:
        with eval_no_grad(model):
            outputs.append(padded_pass(below_accelerate(model), _few_tokens(network)).logits)
        differs = _differ(replace(head, project=lambda logits: logits).logits(states[0]), outputs[0], states[0].dtype)
    except PROBE_ERRORS:  # the pass that was asked for says what is wrong
        differs = False
    finally:
        hook.remove()
    if differs:
        raise ValueError(
            f"{type(below_peft(network)).__name__} changes its logits after `{type(head.module).__name__}`, its head, "
            "in a way that is not known here (a factor, a soft-cap, words that it forbids), so its log-probabilities "
            "would be wrong: set what does so in its config to nothing, or let the module that "
            "`get_output_embeddings()` returns do it"
        )
    known[together] = head


def _few_tokens(network: nn.Module) -> PackedBatch:
    """A row of three tokens: for more, MKL keeps a buffer as long as the process lives, 5 MB for 32,000 words."""
    device, ids = next(network.parameters()).device, probe_rows(network)[0].ids_N[:3].cpu()
    return pack([TokenTree(ids[:1], [Branch(ids[1:])])]).to(device)


def _differ(ours: Tensor, own: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits differ by more than rounding them, in this type, does. Weights that are broken say nothing."""
    if ours.shape != own.shape or not ours.isfinite().all():
        return False
    precision = coarsest(str(each).removeprefix("torch.") for each in (dtype, own.dtype))
    return not torch.allclose(ours, own.float(), rtol=0, atol=TOLERANCES[precision].logits * float(ours.abs().max()))


def map_logits(
    head: Head, hidden_SD: Tensor, function: Callable[..., tuple[Tensor, ...]], *columns_S: Tensor
) -> tuple[Tensor, ...]:
    """`function(logits_chunk, *column_chunks)` for every chunk of positions, joined again.

    Logits are computed again in the backward pass. The first axis of the tensors that `function` returns is the chunk.
    """

    def of_chunk(hidden: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        return function(head.logits(hidden), *columns)

    rows = chunk_rows(head.vocabulary)
    pieces = [
        checkpoint(of_chunk, *piece, use_reentrant=False) if torch.is_grad_enabled() else of_chunk(*piece)
        for piece in zip(*(column.split(rows) for column in (hidden_SD, *columns_S)), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def entropy_of(logits: Tensor, log_z: Tensor | None = None) -> Tensor:
    """Entropy of softmax(logits) over the last axis, in nats; a logit of -inf adds 0."""
    log_z = torch.logsumexp(logits, -1) if log_z is None else log_z
    finite = logits.clamp(min=torch.finfo(logits.dtype).min)
    return log_z - ((logits - log_z[..., None]).exp() * finite).sum(-1)


def logprobs_and_entropy(
    head: Head, hidden_SD: Tensor, target_S: Tensor, temperature: float = 1.0, choices_SK: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the targets and the entropies, both differentiable; 1 where no token is likelier. [S], [S], [S]

    choices_SK: see `PackedBatch`; the probabilities are those among these words.
    """

    def measure(logits: Tensor, targets: Tensor, *choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits / temperature
        if choices:
            logits = _among(logits, choices[0].long())
        log_z = torch.logsumexp(logits, -1)
        chosen = logits.gather(1, targets[:, None]).squeeze(1)
        tops = (chosen >= logits.detach().amax(-1)).to(logits.dtype)
        return chosen - log_z, entropy_of(logits, log_z), tops

    columns = [target_S] if choices_SK is None else [target_S, choices_SK]
    logprobs, entropies, tops = map_logits(head, hidden_SD, measure, *columns)
    return logprobs, entropies, tops


def _among(logits: Tensor, choices: Tensor) -> Tensor:
    """The logits, so low that nothing is left of them for all words but the choices; a row without choices stays.

    They are finite: an entropy's gradient would be 0 times infinity.
    """
    out = torch.ones_like(logits, dtype=torch.bool)
    column = torch.where(choices >= 0, choices, choices[:, :1].clamp(min=0))  # what fills up stands for the first
    out.scatter_(1, column, value=False)
    return logits.masked_fill(out & (choices[:, :1] >= 0), torch.finfo(logits.dtype).min / 2)


def token_logprobs(
    head: Head,
    hidden_SD: Tensor,
    target_S: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    choices_SK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the targets (differentiable); their entropies (zeros unless asked for), and 1 where no token is likelier
    than the target, both detached. [S], [S], [S] float32

    choices_SK: see `PackedBatch`; the probabilities are those among these words.
    """
    if choices_SK is None and (module := head.linear) is not None:
        given = (hidden_SD, module.weight, module.bias, target_S, head, temperature, entropy, torch.is_grad_enabled())
        if hidden_SD.device.type != "cpu":
            return BlockLogprobs.apply(*given)  # type: ignore[no-any-return]
        return LinearLogprobs.apply(*given, place_of(module.weight))  # type: ignore[no-any-return]
    logprobs, entropies, tops = logprobs_and_entropy(head, hidden_SD, target_S, temperature, choices_SK)
    return logprobs, entropies.detach(), tops


def mean_logits(head: Head, hidden_SD: Tensor) -> Tensor:
    """Mean of each position's logits over the vocabulary, detached. [S]"""
    with torch.no_grad():
        if (module := head.linear) is not None and head.softcap is None:
            bias = 0.0 if module.bias is None else module.bias.float().mean()
            return (hidden_SD.float() @ module.weight.float().mean(0) + bias) * head.scale
        return map_logits(head, hidden_SD, lambda logits: (logits.mean(-1),))[0]


def target_lift(head: Head, hidden_SD: Tensor, target_S: Tensor) -> Tensor:
    """Each target's logit above the mean over the vocabulary, differentiable. [S] float32"""
    if (module := head.linear) is not None and head.softcap is None:
        away_SD = module.weight[target_S].float() - module.weight.float().mean(0)
        bias = 0.0 if module.bias is None else module.bias[target_S].float() - module.bias.float().mean()
        return ((hidden_SD.float() * away_SD).sum(-1) + bias) * head.scale

    def measure(logits: Tensor, targets: Tensor) -> tuple[Tensor]:
        return (logits.gather(1, targets[:, None]).squeeze(1) - logits.mean(-1),)

    return map_logits(head, hidden_SD, measure, target_S)[0]


def log_collision(head: Head, hidden_SD: Tensor) -> Tensor:
    """`log sum_v p(v)^2` of each position: the log-probability of an average sample, detached. [S]"""
    with torch.no_grad():
        return map_logits(head, hidden_SD, lambda logits: ((2 * logits.log_softmax(-1)).logsumexp(-1),))[0]


# -- a batch ----------------------------------------------------------------------------------


def in_head(
    model: nn.Module, packed: PackedBatch, function: Callable[[Head, Tensor], Tensor | Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """`function(head, states_SD)` on the states that predict the scored tokens, inside the head's own call.

    The function returns one or several tensors whose first axis is S.
    """
    head = head_of(below_value_head(model))
    check_head(model, head)
    inside = replace(head, project=head.module.forward)
    return in_module(model, head.module, packed, lambda states_SD: function(inside, states_SD))


def scored_states(model: nn.Module, packed: PackedBatch) -> tuple[Head, Tensor]:
    """The head and the states that predict the scored tokens, for passes without gradient. Head, [S, D]"""
    (states_SD,) = in_head(model, packed, lambda head, states_SD: states_SD)
    return head_of(below_value_head(model)), states_SD


def plain_forward(
    model: nn.Module, packed: PackedBatch, function: Callable[[Head, Tensor], Tensor]
) -> tuple[Tensor, str]:
    """What `in_head` gives for padded rows, the reference of each probe, and the precision inside the forward."""
    head = head_of(below_value_head(model))
    inside = replace(head, project=head.module.forward)
    return measured_pass(model, head.module, packed, PADDED, lambda states_SD: function(inside, states_SD))


@dataclass(frozen=True)
class Scores:
    """Numbers for the scored tokens; 0 where a position is not scored."""

    logprobs_BT: Tensor
    entropy_BT: Tensor | None = None
    values_BT: Tensor | None = None
    top_BT: Tensor | None = None
    """1 where no token is likelier than the scored one"""
    logits_BT: Tensor | None = None
    """mean logit over the vocabulary"""
    collision_BT: Tensor | None = None
    """log-probability of an average sample"""
    lift_BT: Tensor | None = None
    """the scored token's logit above the mean over the vocabulary, for smoothed labels"""


def score(
    model: nn.Module,
    packed: PackedBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
    values: bool = False,
    tops: bool = False,
    logits: bool = False,
    collision: bool = False,
    lift: bool = False,
) -> Scores:
    """Log-probabilities of the scored tokens, and on demand the other numbers of `Scores`. [B, T] each

    A token's value is the one at the position that predicts it. `entropy_gradient` makes the entropies
    differentiable, at the price of a second pass through the head. The tops cost nothing; entropies without gradient
    cost a product of numbers and a sum for each tile of logits, whose probabilities are there.
    """
    packed = own_part(packed)
    v_head = below_accelerate(model).v_head if values else None
    asked = {
        "logprobs_BT": True, "entropy_BT": entropy or entropy_gradient, "values_BT": values, "top_BT": tops,
        "logits_BT": logits, "collision_BT": collision, "lift_BT": lift,
    }  # fmt: skip
    names = [name for name, wanted in asked.items() if wanted]

    def measure(head: Head, states_SD: Tensor) -> list[Tensor]:
        if entropy_gradient:
            found = logprobs_and_entropy(head, states_SD, packed.target_S, temperature, packed.choices_SK)
        else:
            found = token_logprobs(
                head, states_SD, packed.target_S, temperature=temperature, entropy=entropy, choices_SK=packed.choices_SK
            )
        columns = dict(zip(("logprobs_BT", "entropy_BT", "top_BT"), found, strict=True))
        if v_head is not None:
            columns["values_BT"] = v_head(states_SD[None]).float().squeeze(0).squeeze(-1)
        if logits:
            columns["logits_BT"] = mean_logits(head, states_SD.detach())
        if collision:
            columns["collision_BT"] = log_collision(head, states_SD)
        if lift:
            columns["lift_BT"] = target_lift(head, states_SD, packed.target_S)
        return [columns[name] for name in names]

    columns_S = in_head(model, packed, measure)
    return Scores(**{name: packed.spread(column_S) for name, column_S in zip(names, columns_S, strict=True)})


def logits_and_labels(model: nn.Module, packed: PackedBatch) -> tuple[Tensor, Tensor]:
    """Whole logits of the padded rows, for metrics that need them, and labels (-100 where nothing is scored).

    [B, L, V] and [B, L], a label at its own token; [B, T, V] and [B, T] of an encoder-decoder's answers.
    """
    if is_encoder_decoder(model):
        logits, place = model(**encoder_decoder_inputs(model, packed)).logits, packed.slot_S
    else:
        logits = model(**padded_inputs_of(model, packed)).logits
        place = packed.position_N[packed.scored_S] + 1 + virtual_tokens(packed, logits)
    labels = torch.full(logits.shape[:2], -100, device=logits.device)
    labels[packed.row_S, place] = packed.target_S
    return logits, labels


def classifier_of(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into scores, in models for sequence or token classification."""
    network = below_peft(model)
    for name in ("score", "classifier", "classification_head"):
        if isinstance(getattr(network, name, None), nn.Module):
            return getattr(network, name)  # type: ignore[no-any-return]
    raise ValueError(f"{type(network).__name__} has no score head: load it with AutoModelForSequenceClassification")


def scores_at(model: nn.Module, packed: PackedBatch, index_S: Tensor, row_S: Tensor) -> Tensor:
    """The score head's outputs at packed positions, for causal models (value models, process rewards). [S, labels]"""
    module = classifier_of(model)
    own = module.forward
    packed, whole = own_part(packed), len(index_S)
    if packed.piece is not None:
        is_here_S, index_S = packed.piece.places(index_S)
        row_S = row_S[is_here_S]
    with _padding_named(below_peft(model)):
        (scores_SC,) = in_module(model, module, packed, lambda states_SD: own(states_SD).float(), index_S, row_S)
    if packed.piece is None:
        return scores_SC
    return packed.piece.summed(scores_SC.new_zeros(whole, scores_SC.shape[1]).index_put((is_here_S,), scores_SC))  # type: ignore[no-any-return]


@contextmanager
def _padding_named(network: Any) -> Iterator[None]:
    """A classifier that names no padding token takes padded rows; its own choice of the last token is not read."""
    config = network.config.get_text_config()
    unnamed = getattr(config, "pad_token_id", 0) is None
    if unnamed:
        config.pad_token_id = 0
    try:
        yield
    finally:
        if unnamed:
            config.pad_token_id = None


def check_shared(model: nn.Module) -> None:
    """ValueError unless the ranks of `rows_shared` compute rows of this model together; a pass of a few tokens."""
    network = below_value_head(model)
    packed, _ = probe_rows(network)
    with eval_no_grad(model):
        if hasattr(network, "get_output_embeddings") and network.get_output_embeddings() is not None:
            scored_states(model, own_part(packed))
        else:
            scores_at(model, packed, packed.scored_S, packed.row_S)


def rewards(model: nn.Module, packed: PackedBatch) -> Tensor:
    """The reward of each row: the mean over its labels, of which reward models usually have one. [B]"""
    return label_rewards(model, packed).mean(-1)


def label_rewards(model: nn.Module, packed: PackedBatch) -> Tensor:
    """Each row's rewards, read at its last real token; encoders read them where they always do. [B, labels]"""
    if is_encoder(model) or is_encoder_decoder(model):
        inputs = padded_inputs_of(model, packed)
        return model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits.float()  # type: ignore[no-any-return]
    rows = torch.arange(packed.rows, device=packed.ids_N.device)
    return scores_at(model, packed, packed.last_B, rows)
