"""Attention of the local engine over its cache. It is registered with `transformers`; its state comes as a keyword.

Shape letters: X prompt slot times key/value head (or row times head), M queries, K keys, N tokens, H key/value heads,
J query heads of each key/value head, D head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from trl.generation.filters import log_partition
from trl.generation.kv_cache import PromptBlock, Prompts, Suffixes
from trl.kernels.layers import uncompiled
from trl.models.attention import attend

NAME = "trl_generation"
_NEVER = -1e30  # finite: a query whose keys are all hidden gives no NaN, and the merge gives its part no weight


@dataclass(slots=True)
class Features:
    """Properties of an architecture's attention beyond queries, keys and values."""

    scaling: float
    window: int | None
    """a key is seen if it is less than this many positions back"""
    softcap: float | None
    sinks_H: Tensor | None
    """for each head a logit that takes part in the softmax but has no value"""


class State(Protocol):
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: Features) -> Tensor:
        """query [1, H * J, N, D], key and value [1, H, N, D] -> [1, N, H * J, D]."""
        ...


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, kv_state: State | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **unused: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The function that a model calls in each layer while it samples."""
    if kv_state is None:
        raise RuntimeError(f"attention {NAME!r} belongs to the sampler: the model did not pass its state on")
    features = Features(scaling or query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    return kv_state.attend(int(module.layer_idx), query, key, value, features), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, attention)


@contextmanager
def cached_attention(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model computes its attention by the sampler's cache, layer by layer as they are written.

    Its own implementation comes back; layers that torch compiles are for passes of training. What reads pictures for
    the model keeps its own attention: its tokens are not the cache's.
    """
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    beside = _beside_text(configs[0]) if configs else set()
    try:
        for config, own in zip(configs, before, strict=True):  # a configuration hands its own on to those in it
            config._attn_implementation = own if id(config) in beside else NAME
        with uncompiled(model):
            yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _configs(model: torch.nn.Module) -> list[Any]:
    """Every configuration that names an attention implementation, parents before children."""
    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            found |= {id(config): config for config in _within(module.config) if id(config) not in found}
    return list(found.values())


def _within(config: Any) -> Iterator[Any]:
    """A configuration and those in it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            yield from _within(getattr(config, name))


def _beside_text(whole: Any) -> set[int]:
    """The ids of the configurations in this one that neither hold that of the text's decoder nor belong to it."""
    text = whole.get_text_config(decoder=True)
    of_text = {id(each) for each in _within(text)}
    holding = {id(each) for each in _within(whole) if any(inner is text for inner in _within(each))}
    return {id(each) for each in _within(whole)} - of_text - holding


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` to `end` of a pass: a prompt, the start that prompts share, or what one of those adds to it."""

    start: int
    end: int
    stem: "Piece | None" = None
    """the shared start"""
    place: tuple[PromptBlock, int] | None = None
    """where the prompt's keys and values go; None for a shared start, whose prompts keep copies of it"""
    both_ways: Sequence[tuple[int, int]] = ()
    """places in the prompt, from start to end, of tokens that see each other whichever comes first"""


@dataclass(slots=True)
class Prefill:
    """A pass over prompts, laid end to end; each attends to itself, its keys and values go into the cache."""

    pieces: Sequence[Piece]
    layers: dict[int, int | None] = field(default_factory=dict)
    """the window of each layer that has computed attention"""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: Features) -> Tensor:
        self.layers[layer] = features.window
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
        for piece in self.pieces:
            keys, values = (_of_piece(piece, each) for each in (key, value))
            if piece.place is not None:
                block, slot = piece.place
                block.write(layer, slot, keys[0], values[0])
            own = query[:, :, piece.start : piece.end]
            seen = causal_attention(own, keys, values, features, piece.both_ways)
            out[piece.start : piece.end] = seen[0].transpose(0, 1)
        return out[None]


def _of_piece(piece: Piece, keys: Tensor) -> Tensor:
    """Keys or values of the piece's tokens, after those of its stem."""
    own = keys[:, :, piece.start : piece.end]
    return own if piece.stem is None else torch.cat([_of_piece(piece.stem, keys), own], 2)


@dataclass(slots=True)
class Decode:
    """A pass over one token of each row; it attends to its prompt, which a group shares, and to its row's tokens."""

    prompts: Prompts
    suffixes: Suffixes
    layout: "Layout"
    place_R: Tensor
    """where each row's token goes in its suffix"""
    position_R: Tensor
    ragged: bool
    """whether the rows' suffixes differ in length"""
    longest: int
    """tokens of the longest prompt and suffix together"""
    biases: dict[Any, Tensor | None] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: Features) -> Tensor:
        heads, (rows, width) = key.shape[1], query.shape[2:]
        self.suffixes.write(layer, self.layout.row_R, self.place_R, key[0].transpose(0, 1), value[0].transpose(0, 1))
        query_RHJD = (query[0].transpose(0, 1) * features.scaling).to(value.dtype).reshape(rows, heads, -1, width)
        shared, shared_lse = self._prompts(layer, query_RHJD, features)
        own, own_lse = self._suffixes(layer, query_RHJD, features)
        out = torch.lerp(own, shared, torch.sigmoid(shared_lse - own_lse)[..., None].to(own.dtype))
        if features.sinks_H is not None:
            sink_HJ = features.sinks_H.float().view(heads, -1)
            out = out * torch.sigmoid(torch.logaddexp(shared_lse, own_lse) - sink_HJ)[..., None].to(out.dtype)
        return out.reshape(1, rows, query.shape[1], -1)

    def _suffixes(self, layer: int, query_RHJD: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        longest = self.suffixes.longest
        keys, values = self.suffixes.read(layer, longest)
        rows, heads, group, _ = query_RHJD.shape
        bias_R11K = self._suffix_bias(self._window(features))
        out, lse = partial_attention(
            query_RHJD.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), bias_R11K, features.softcap
        )
        return out.view(rows, heads, group, -1), lse.view(rows, heads, group)

    def _prompts(self, layer: int, query_RHJD: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        rows, heads, group, width = query_RHJD.shape
        query = query_RHJD.reshape(rows * heads, group * width)
        outs, lses = [], []
        for index, block in enumerate(self.prompts.blocks):
            keys, values = block.read(layer, self.layout.width(index))
            gathered = query.index_select(0, self.layout.gather(index, heads)).view(keys.shape[0] * heads, -1, width)
            bias = self._prompt_bias(index, group, self._window(features))
            out, lse = partial_attention(gathered, keys.flatten(0, 1), values.flatten(0, 1), bias, features.softcap)
            outs.append(out.reshape(-1, group * out.shape[-1]))
            lses.append(lse.reshape(-1, group))
        back = self.layout.scatter(heads)
        out = (torch.cat(outs) if len(outs) > 1 else outs[0]).index_select(0, back)
        lse = (torch.cat(lses) if len(lses) > 1 else lses[0]).index_select(0, back)
        return out.view(rows, heads, group, -1), lse.view(rows, heads, group)

    def _window(self, features: Features) -> int | None:
        return features.window if features.window is not None and features.window < self.longest else None

    def _suffix_bias(self, window: int | None) -> Tensor | None:
        """[R, 1, 1, K]"""
        if ("suffix", window) not in self.biases:
            hidden = None
            if self.ragged or window is not None:
                place_K = torch.arange(self.suffixes.longest, device=self.place_R.device)
                hidden = place_K > self.place_R[:, None]
                if window is not None:
                    hidden |= place_K <= self.place_R[:, None] - window
            self.biases["suffix", window] = None if hidden is None else _bias(hidden)[:, None, None]
        return self.biases["suffix", window]

    def _prompt_bias(self, index: int, group: int, window: int | None) -> Tensor | None:
        """[P, 1, 1 or M, K]"""
        if window is None:
            return self.layout.bias(index)
        if (index, group, window) not in self.biases:
            place_K = torch.arange(self.layout.width(index), device=self.position_R.device)
            position_PG = self.position_R[self.layout.slots[index]]
            outside_PGK = place_K <= position_PG[:, :, None] - window
            hidden_PGK = outside_PGK | (place_K >= self.layout.lengths[index][:, None, None])
            self.biases[index, group, window] = _bias(hidden_PGK).repeat_interleave(group, 1)[:, None]
        return self.biases[index, group, window]


class Layout:
    """Which row slots continue which prompt slots; built again only when rows start or finish."""

    def __init__(self, prompts: Prompts, rows: int, device: torch.device) -> None:
        self.row_R = torch.arange(rows, device=device)
        self.slots: list[Tensor] = []
        """of each block, [P, G] row slots; a group smaller than the largest is filled up with row 0"""
        self.lengths: list[Tensor] = []
        self._widths: list[int] = []
        self._biases: list[Tensor | None] = []
        self._gathers: dict[tuple[int, int], Tensor] = {}
        self._scatters: dict[int, Tensor] = {}
        self._spots = self._place(prompts, rows, device)

    def width(self, block: int) -> int:
        """Tokens of the block's longest prompt."""
        return self._widths[block]

    def bias(self, block: int) -> Tensor | None:
        """[P, 1, 1, K] hides the padding after shorter prompts."""
        return self._biases[block]

    def gather(self, block: int, heads: int) -> Tensor:
        """[P * H * G] the (row, head) that stands at each place of a block."""
        if (block, heads) not in self._gathers:
            slots_PG = self.slots[block]
            head_H1 = torch.arange(heads, device=slots_PG.device)[:, None]
            self._gathers[block, heads] = (slots_PG[:, None] * heads + head_H1).flatten()
        return self._gathers[block, heads]

    def scatter(self, heads: int) -> Tensor:
        """[R * H] the place of each (row, head) among those of all blocks."""
        if heads not in self._scatters:
            head_H = torch.arange(heads, device=self.row_R.device)
            start_R1, prompt_R1, group_R1, place_R1 = self._spots[:, :, None]
            self._scatters[heads] = (start_R1 * heads + (prompt_R1 * heads + head_H) * group_R1 + place_R1).flatten()
        return self._scatters[heads]

    def _place(self, prompts: Prompts, rows: int, device: torch.device) -> Tensor:
        """[4, R] of each row: the places before its block, its prompt, the block's largest group, its place in it."""
        spots = [(0, 0, 0, 0)] * rows
        start = 0
        for block in prompts.blocks:
            group = max(1, *(len(prompt.rows) for prompt in block.prompts)) if block.prompts else 1
            for slot, prompt in enumerate(block.prompts):
                for place, row in enumerate(prompt.rows):
                    spots[row] = (start, slot, group, place)
            start += len(block.prompts) * group
            filled = [[*prompt.rows, *[0] * (group - len(prompt.rows))] for prompt in block.prompts]
            self.slots.append(torch.tensor(filled, device=device))
            lengths = [len(prompt.ids) for prompt in block.prompts]
            self.lengths.append(torch.tensor(lengths, device=device))
            self._widths.append(max(lengths))
            hidden = torch.arange(max(lengths), device=device) >= self.lengths[-1][:, None]
            self._biases.append(_bias(hidden)[:, None, None] if min(lengths) < max(lengths) else None)
        return torch.tensor(spots, device=device).T


def partial_attention(
    query_XMD: Tensor, key_XKD: Tensor, value_XKD: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`(out_XMD, log_partition_XM)` of attention over a part of the keys; two parts merge by their partitions.

    bias: [X / heads, 1, 1 or M, K], the same for all heads.
    """
    scores = torch.bmm(query_XMD, key_XKD.transpose(1, 2)).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores.view(len(bias), -1, *scores.shape[1:]).add_(bias)
    probs = scores.softmax(-1)
    return torch.bmm(probs.to(value_XKD.dtype), value_XKD), log_partition(scores, probs)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, features: Features, both_ways: Sequence[tuple[int, int]] = ()
) -> Tensor:
    """Attention of a sequence's last tokens, or of all, to it: [1, heads, N, D] each. both_ways: see `Piece`."""
    new, length = query.shape[2], key.shape[2]
    window, seen = features.window, None
    if both_ways or new < length or (window is not None and window < length):
        seen = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)
        seen = seen if window is None else seen.triu(length - new + 1 - window)
        for start, end in both_ways:
            seen[max(start + new - length, 0) : max(end + new - length, 0), start:end] = True
    return attend(
        query, key, value, seen, causal=seen is None, scale=features.scaling, softcap=features.softcap,
        sinks=features.sinks_H,
    )  # fmt: skip


def _bias(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, _NEVER)
