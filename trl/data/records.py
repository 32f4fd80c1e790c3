"""The records that modules hand to each other: token trees, packed batches, completions and rollouts.

Shape letters: B rows, T scored positions of the longest row, N packed tokens, S scored tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record", bound="TensorRecord")
Ids = Sequence[int] | Tensor
"""token ids, or one number for each of them, as a list or a 1-d tensor; ids below zero are of pictures"""


def moved_ahead(x: Tensor, device: Any) -> Tensor:
    """A tensor on the device; nothing waits until what the device does now is done."""
    device = torch.device(device)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)


class TensorRecord:
    """A frozen dataclass of tensors; accelerate and `Trainer` move it to a device by `to`."""

    def to(self: Record, device: Any, non_blocking: bool = False) -> Record:
        """The same record with every tensor on `device`, which nothing waits for."""
        moved = {}
        for name in (f.name for f in fields(self)):  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, Tensor):
                moved[name] = moved_ahead(value, device)
            elif hasattr(value, "to"):
                moved[name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)  # type: ignore[type-var]

    def pin_memory(self: Record) -> Record:
        """The same record in memory from which a device reads by itself; torch's data loader asks for it."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        pinned = {name: value.pin_memory() for name, value in held.items() if hasattr(value, "pin_memory")}
        return replace(self, **pinned)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class Branch:
    """One row of a batch: a token sequence that continues its tree's prompt."""

    ids: Ids
    scored: Ids | None = None
    """1 for tokens whose log-probability is computed; None: all of them"""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A prompt and the sequences that continue it: chosen/rejected, a group of G, or one text with an empty prompt."""

    prompt: Ids
    branches: Sequence[Branch]


class Segment(NamedTuple):
    """`[start, end)` of the packed tokens; it sees its `parent` segment (-1: none) whole and itself causally."""

    start: int
    end: int
    parent: int


@dataclass(frozen=True)
class PackedBatch(TensorRecord):
    """Token trees laid end to end, without padding; a shared prompt is stored once.

    Row b of the batch is the b-th branch in order. Scored token s has its target `target_S[s]` predicted at packed
    position `scored_S[s]`, and stands at `[row_S[s], slot_S[s]]` of a `[B, T]` tensor.
    """

    ids_N: Tensor
    position_N: Tensor
    """position of each token in its own sequence, prompt included"""
    segments: tuple[Segment, ...]
    scored_S: Tensor
    target_S: Tensor
    row_S: Tensor
    slot_S: Tensor
    """index of the token within its branch"""
    last_B: Tensor
    """packed index of each row's last token"""
    row_segment: tuple[int, ...]
    """index into `segments` of the segment that ends each row"""
    prompt_tokens: tuple[int, ...]
    """how many tokens of each row came before its branch"""
    width: int
    """T: tokens of the longest branch"""
    choices_SK: Tensor | None = None
    """the words that each scored token was chosen from, filled up with -1; a row of -1: from all. None: all were"""
    experts_NLC: Tensor | None = None
    """the experts of a mixture that each packed token goes to in each layer; -1: the router's own. None: so are all"""
    piece: Any = None
    """None: the batch is whole; else what this rank holds of it (`kernels.context_parallel.Piece`)"""
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """what was laid out of this batch and passes over it share, on any device"""

    def to(self, device: Any, non_blocking: bool = False) -> PackedBatch:
        if "host" not in self.kept:
            self.kept["host"] = replace(self, kept={})
        return super().to(device, non_blocking)

    def on_host(self, field: Tensor) -> Tensor:
        """A field of the batch as it was before the batch was moved to a device, so that reading it waits for nothing.

        Another tensor comes back as it is.
        """
        name = self.named(field)
        return getattr(self.host, name) if name else field

    @property
    def host(self) -> PackedBatch:
        """The batch as it was before it was moved to a device."""
        return self.kept.get("host", self)  # type: ignore[no-any-return]

    @property
    def has_pictures(self) -> bool:
        """Whether some of the tokens are of pictures."""
        if "has_pictures" not in self.kept:
            self.kept["has_pictures"] = bool((self.host.ids_N < 0).any())
        return self.kept["has_pictures"]  # type: ignore[no-any-return]

    def named(self, field: Tensor) -> str:
        """The name of a field that holds indices; "" for another tensor."""
        return next((name for name in INDICES if getattr(self, name) is field), "")

    @property
    def rows(self) -> int:
        return len(self.row_segment)

    @property
    def mask_BT(self) -> Tensor:
        """1 where a position is scored."""
        return self.spread(torch.ones(len(self.row_S), device=self.row_S.device))

    def row_indices(self, row: int) -> list[int]:
        """Packed indices of the row's tokens, prompt first."""
        chain, segment = [], self.row_segment[row]
        while segment >= 0:
            chain.append(self.segments[segment])
            segment = self.segments[segment].parent
        return [i for start, end, _ in reversed(chain) for i in range(start, end)]

    def spread(self, values_S: Tensor) -> Tensor:
        """Scored values in their places of a zero `[B, T]`, those of other ranks too (differentiable)."""
        spread_BT = torch.zeros(self.rows, self.width, dtype=values_S.dtype, device=values_S.device)
        spread_BT = spread_BT.index_put((self.row_S, self.slot_S), values_S)
        return spread_BT if self.piece is None else self.piece.summed(spread_BT)  # type: ignore[no-any-return]


INDICES = ("scored_S", "last_B", "row_S", "target_S")
"""fields of a packed batch that are read on the host"""


class Batch(dict[str, Any]):
    """A batch of a collator. Beside its own keys it answers `input_ids`, `attention_mask` and `labels`: its rows padded
    on the right with 0, made when they are asked for. [B, L] each; -100 where a label does not count.
    """

    def __missing__(self, key: str) -> Any:
        packs = _packs(self)
        if key not in ROWS or not packs:
            also = f", and {', '.join(ROWS)} (its rows, padded)" if packs else ""
            raise KeyError(f"{key!r}: this batch holds {', '.join(self)}{also}")
        rows = [_padded_rows(packed)[key] for packed in packs]
        width = max(part.shape[1] for part in rows)
        fill = -100 if key == "labels" else 0
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in rows])

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (key in ROWS and bool(_packs(self)))

    def get(self, key: str, default: Any = None) -> Any:  # `dict.get` does not ask `__missing__`
        return self[key] if key in self else default  # noqa: SIM401


ROWS = ("input_ids", "attention_mask", "labels")


def _packs(batch: Batch) -> list[PackedBatch]:
    held = [dict.get(piece, "packed", dict.get(piece, "policy")) for piece in dict.get(batch, "pieces") or [batch]]
    return [getattr(each, "packed", each) for each in held if each is not None]


def _padded_rows(packed: PackedBatch) -> dict[str, Tensor]:
    index = [torch.tensor(packed.row_indices(row), device=packed.ids_N.device) for row in range(packed.rows)]
    if not index:
        return dict.fromkeys(ROWS, packed.ids_N.new_zeros(0, 0))
    pad = torch.nn.utils.rnn.pad_sequence
    mask_BL = pad([torch.ones_like(row) for row in index], batch_first=True)
    ids_BL = packed.ids_N[pad(index, batch_first=True)] * mask_BL
    labels_BL = torch.full_like(ids_BL, -100)
    labels_BL[packed.row_S, packed.position_N[packed.scored_S] + 1] = packed.target_S
    return dict(zip(ROWS, (ids_BL, mask_BL, labels_BL), strict=True))


@dataclass
class Completion:
    """One completion by a sampler; the last three fields are those of an engine with weights of its own."""

    ids: list[int]
    """sampled tokens, the stop token included"""
    logprobs: list[float]
    """of the distribution that was really sampled (temperature and filters applied)"""
    raw_logprobs: list[float]
    """of the model itself, at temperature 1; nan where an engine does not say them"""
    finish_reason: str
    """"stop" (an end token or stop string) or "length" (cut at the limit)"""
    versions: tuple[VersionSpan, ...] = ()
    """which weights sampled which tokens; (): the model's own of that moment"""
    kept: list[list[int]] | None = None
    """for each token the ids that top-k and top-p left to choose from; None: not known, or all"""
    experts: Any = None
    """for each token read or written, layer and choice the expert that a mixture took; None: not known"""


class VersionSpan(NamedTuple):
    """Tokens `[start, end)` of a completion were sampled by the weights with this stamp."""

    version: str
    start: int
    end: int


@dataclass
class Rollout:
    """Completions in the order of their prompts; those of one prompt follow each other."""

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[list[float]]
    """of each completion token under the policy that sampled it; 0 where the token was not sampled; [] if unknown"""
    masks: list[list[int]]
    """1 = the policy sampled this token"""
    rewards: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    metadata: dict[str, list[Any]] = field(default_factory=dict)
    """one list per column, a value per completion"""
    kept: list[Any] = field(default_factory=list)
    """of each completion: for each token the ids that the filters left to choose from, [] where all; [] if unknown"""
    experts: list[Any] = field(default_factory=list)
    """of each completion: `Completion.experts`; [] if unknown"""

    def __len__(self) -> int:
        return len(self.completions)
