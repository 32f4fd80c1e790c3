"""Rollouts as training data: sampled lazily, so that each sees the weights after the last optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from trl.data.microbatches import runs_of_groups
from trl.data.packing import pack
from trl.data.records import Branch, PackedBatch, TensorRecord, TokenTree
from trl.losses.loss_sum import Aggregation, counted


@dataclass
class Experience:
    """What to learn from a rollout: a row per completion, in plain lists, so that a checkpoint can hold it."""

    prompts: list[list[int]]
    completions: list[list[int]]
    masks: list[list[int]]
    """1 = the policy sampled this token and learns from it"""
    logprobs: list[list[float]]
    """under the policy that sampled, at the sampling temperature"""
    advantages: list[list[float]]
    """one for each token"""
    reference: list[list[float]] | None = None
    """the reference's log-probabilities, where the objective needs them"""
    weights: list[list[float]] | None = None
    """factors of the surrogate's tokens"""

    def __len__(self) -> int:
        return len(self.completions)

    def select(self, indices: Iterable[int]) -> Experience:
        chosen = list(indices)
        columns: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        picked: dict[str, Any] = {k: None if v is None else [v[i] for i in chosen] for k, v in columns.items()}
        return Experience(**picked)

    def in_pieces(self, max_tokens: int) -> list[Experience]:
        """The rows in pieces of about `max_tokens` tokens; those below one prompt stay together."""
        lengths, shared = ([len(ids) for ids in rows] for rows in (self.completions, self.prompts))
        return [self.select(run) for run in runs_of_groups(self.prompts, lengths, shared, max_tokens)]

    def is_idle(self, row: int) -> bool:
        """Whether no counted token of the row has an advantage."""
        return not any(a and m for a, m in zip(self.advantages[row], self.masks[row], strict=True))


@dataclass(frozen=True)
class PolicyBatch(TensorRecord):
    """A micro-batch of completions below their prompts, with what the objective needs of each token. [B, T] each."""

    packed: PackedBatch
    mask_BT: Tensor
    old_logprobs_BT: Tensor
    advantages_BT: Tensor
    counted: Tensor
    """[] what the loss is divided by, rows that are not computed included"""
    reference_BT: Tensor | None = None
    weight_BT: Tensor | None = None


def padded(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """Rows with zeros behind them. [B, width]"""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float32).view(
        len(rows), width
    )


def prompt_trees(prompts: Sequence[list[int]], branches: Sequence[Branch]) -> list[TokenTree]:
    """Rows as trees; a run of equal prompts shares one."""
    rows = zip(prompts, branches, strict=True)
    return [
        TokenTree(prompt, [branch for _, branch in group]) for prompt, group in groupby(rows, key=lambda row: row[0])
    ]


def policy_batch(
    rows: Experience, how: Aggregation, max_tokens: int, *, skip_idle: bool, least: int = 0
) -> PolicyBatch:
    """The rows packed, but for those that cannot matter: they are counted, not computed.

    Those are rows without a counted token and, with `skip_idle`, without an advantage. least: rows to compute at least
    (many processes must all run the model, or they wait for each other's gradients forever).
    """
    whole = max(map(len, rows.completions), default=0)
    total = counted(padded(rows.masks, whole), how, max_tokens)
    live = [i for i in range(len(rows)) if any(rows.masks[i]) and not (skip_idle and rows.is_idle(i))]
    kept = rows.select(live or range(min(least, len(rows))))
    width = max(map(len, kept.completions), default=0)
    branches = [Branch(ids, mask) for ids, mask in zip(kept.completions, kept.masks, strict=True)]
    return PolicyBatch(
        packed=pack(prompt_trees(kept.prompts, branches)),
        mask_BT=padded(kept.masks, width),
        old_logprobs_BT=padded(kept.logprobs, width),
        advantages_BT=padded(kept.advantages, width),
        counted=total,
        reference_BT=None if kept.reference is None else padded(kept.reference, width),
        weight_BT=None if kept.weights is None else padded(kept.weights, width),
    )


@dataclass
class RolloutState:
    """Where the stream of rollouts stands."""

    position: int = 0
    """prompts drawn so far, over all ranks"""
    rollouts: int = 0
    """rollouts made so far"""
    cursor: int = 0
    """micro-batches of the current rollout that were handed out"""
    experience: dict[str, Any] = field(default_factory=dict)
    """the current rollout; empty before the first"""
    shape: dict[str, Any] = field(default_factory=dict)
    """settings that the current rollout was made for, by their names"""


class RolloutLoader:
    """Endless micro-batches of fresh rollouts, for `Trainer` to read like a data set.

    make: `(state) -> Experience` samples and scores a rollout and moves `state.position` on. Each rollout is handed
    out `iterations` times, `microbatches` at a time. shape: see `RolloutState`.
    """

    def __init__(
        self,
        make: Callable[[RolloutState], Experience],
        collate: Callable[[Experience], Any],
        *,
        microbatches: int,
        iterations: int,
        length: int,
        shape: dict[str, Any] | None = None,
    ):
        self.make, self.collate = make, collate
        self.microbatches, self.iterations, self._length = microbatches, iterations, length
        self.state = RolloutState(shape=shape or {})

    def __len__(self) -> int:
        return self._length

    def restore(self, state: RolloutState) -> None:
        """Go on where `state` was; ValueError if it is in the midst of a rollout that other settings made."""
        mine, theirs = self.state.shape, state.shape
        used = state.cursor == theirs.get("steps_per_generation", 0) * theirs.get("num_iterations", 0)
        for name, value in mine.items():
            if name in theirs and theirs[name] != value and not used:
                raise ValueError(
                    f"{name}={value}: the checkpoint stands in the midst of a rollout that was made with "
                    f"{theirs[name]}; resume with that, or from a checkpoint behind the end of a rollout"
                )
        self.state = replace(state, experience={} if used else state.experience, shape=mine)

    def __iter__(self) -> Iterator[Any]:
        while True:
            if not self.state.experience or self.state.cursor == self.microbatches * self.iterations:
                experience = self.make(self.state)
                self.state.experience = dict(vars(experience))
                self.state.rollouts, self.state.cursor = self.state.rollouts + 1, 0
            current = Experience(**self.state.experience)
            size = -(-len(current) // self.microbatches)
            start = self.state.cursor % self.microbatches * size
            self.state.cursor += 1
            yield self.collate(current.select(range(start, min(start + size, len(current)))))
