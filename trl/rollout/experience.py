"""Experience: what is learned from a rollout, as tensors, and the loader that hands it out in micro-batches.

Shape letters: B completions, T tokens of the longest one, P tokens of a prompt. Masks: 1 = counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.microbatches import balanced_pieces, runs_of_groups
from trl.data.packing import PackedRow, join, pack, rows_alone
from trl.data.records import Branch, PackedBatch, Rollout, TensorRecord, TokenTree
from trl.losses.loss_sum import counted
from trl.rollout.prompts import part_of


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows of numbers, filled up with zeros on the right. [B, T]"""
    tensors = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True) if tensors else torch.zeros(0, 0)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """[b, t, ...] tensors below each other, filled up with zeros to the widest. [B, T, ...]"""
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (0, width - part.shape[1])) for part in parts])


def group_numbers(prompts: Sequence[Tensor]) -> list[int]:
    """For each prompt the number of its group: a group is a run of equal prompts."""
    numbers: list[int] = []
    for row, prompt in enumerate(prompts):
        same = row > 0 and (prompt is prompts[row - 1] or torch.equal(prompt, prompts[row - 1]))
        numbers.append(numbers[-1] + (not same) if row else 0)
    return numbers


@dataclass(frozen=True)
class PolicyBatch(TensorRecord):
    """A micro-batch: completions packed below their prompts, and numbers for each of their tokens. [B, T] each."""

    packed: PackedBatch
    counted: Tensor
    """[] what the loss is divided by; rows that are not computed are counted too"""
    mask_BT: Tensor
    old_logprobs_BT: Tensor
    advantages_BT: Tensor
    reference_BT: Tensor | None = None
    weight_BT: Tensor | None = None
    values_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    sampled_BT: Tensor | None = None
    """the sampler's log-probabilities, before the first update since it sampled"""
    behaviour_BT: Tensor | None = None
    """log-probabilities of the policy that sampled, by which the surrogate is weighed; None: it is not"""
    teacher_tokens_BTK: Tensor | None = None
    teacher_BTK: Tensor | None = None
    own_pass: bool = False
    """whether this pass, before the first update, gives the old log-probabilities in place of `old_logprobs_BT`"""
    only_runs: bool = False
    """whether its rows have no gradient and are computed only because other ranks run a pass; they have no metrics"""


@dataclass(frozen=True)
class Experience(TensorRecord):
    """A row for each completion: its tokens, and what is known or learned of each of them. `[B, T]`, 0 where no token.

    Only the rows' tokens and mask are always there; `of` reads them from a rollout, an algorithm adds the rest.
    """

    prompts: list[Tensor]
    """[P] each, on the CPU"""
    completions: list[Tensor]
    """[T] each, on the CPU"""
    mask_BT: Tensor
    """1 where the policy sampled the token and learns from it"""
    old_logprobs_BT: Tensor | None = None
    """under the policy that sampled, at the sampling temperature"""
    sampled_BT: Tensor | None = None
    """the same as the sampler computed them, where its precision is too coarse to learn from them"""
    behaviour_BT: Tensor | None = None
    """those of the engine or of the older weights that sampled, by which the surrogate is weighed; None: it is not"""
    advantages_BT: Tensor | None = None
    reference_BT: Tensor | None = None
    """the reference's log-probabilities"""
    weight_BT: Tensor | None = None
    """factors of the surrogate"""
    values_BT: Tensor | None = None
    """the critic's, before the update"""
    returns_BT: Tensor | None = None
    teacher_tokens_BTK: Tensor | None = None
    """the teacher's likeliest tokens at each place"""
    teacher_BTK: Tensor | None = None
    """their log-probabilities"""
    packed_rows: list[PackedRow] | None = None
    """each row packed by the mask, see `packed_once`"""
    kept: list[Any] | None = None
    """for each token of a row the words that it was chosen from, [] where from all; None: all tokens were"""
    experts: list[Any] | None = None
    """[P + T, L, C] each, or fewer tokens: the experts that an engine's mixture took; None: not known"""

    @classmethod
    def of(cls, rollout: Rollout, **columns: Any) -> Experience:
        """The rows of a rollout with further columns. `advantages` [B]: one number for all tokens of a row."""
        rows = cls(
            prompts=[torch.tensor(ids, dtype=torch.long) for ids in rollout.prompts],
            completions=[torch.tensor(ids, dtype=torch.long) for ids in rollout.completions],
            mask_BT=padded(rollout.masks),
            old_logprobs_BT=padded(rollout.logprobs) if rollout.logprobs or not len(rollout) else None,
            kept=rollout.kept or None,
            experts=[torch.as_tensor(rows, dtype=torch.int16) for rows in rollout.experts] or None,
        )
        advantages_B = columns.pop("advantages", None)
        if advantages_B is not None:
            columns["advantages_BT"] = rows.per_token(advantages_B)
        return replace(rows, **columns)

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(ids) for ids in self.completions]

    def per_token(self, numbers_B: Tensor) -> Tensor:
        """The number of each row at all its tokens. [B, T]"""
        width = max(self.lengths, default=0)
        inside_BT = torch.arange(width) < torch.tensor(self.lengths)[:, None]
        return torch.where(inside_BT, numbers_B.to(torch.float32)[:, None], 0.0)

    def select(self, rows: Sequence[int] | Tensor) -> Experience:
        """These rows, as wide as their longest completion."""
        index = torch.as_tensor(rows, dtype=torch.long)
        chosen = index.tolist()
        width = max((len(self.completions[row]) for row in chosen), default=0)
        columns = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        tensors = {k: v[index.to(v.device), :width] for k, v in columns.items() if isinstance(v, Tensor)}
        names = [name for name, column in columns.items() if isinstance(column, list)]
        ragged = {name: [columns[name][row] for row in chosen] for name in names}
        return Experience(**{**columns, **tensors, **ragged})

    @classmethod
    def below(cls, parts: Sequence[Experience]) -> Experience:
        """The rows of the parts, one part after the other; those without a row may lack columns."""
        filled = [part for part in parts if len(part)] or parts[:1]
        columns: dict[str, Any] = {}
        for entry in fields(cls):
            values = [getattr(part, entry.name) for part in filled]
            known = sum(value is not None for value in values)
            if 0 < known < len(values):
                raise ValueError(
                    f"experience: {entry.name} is known of {known} of {len(values)} parts of a rollout (of its ranks): "
                    "let `experience` give all of them the same columns"
                )
            if isinstance(values[0], Tensor):
                columns[entry.name] = joined(values)
            elif values[0] is not None:
                columns[entry.name] = [row for value in values for row in value]
        return cls(**columns)

    def dealt(self, rank: int, world: int, steps: int, of_step: int, together: int = 1) -> Experience:
        """The rows that one of `world` ranks learns from, in `steps` micro-batches of equally many rows.

        An optimizer step, of `of_step` micro-batches on each rank, takes the same rows whatever the number of ranks.
        Runs of `together` rows stay in one micro-batch. Where rows are too few, others fill it up that do not count.
        """
        units, cells = len(self) // together, world * steps
        width = -(-units // cells) * together
        chosen, counts = list[int](), list[bool]()
        for step in range(steps):
            part = part_of((step // of_step * world + rank) * of_step + step % of_step, cells, units)
            own = [row for unit in part for row in range(unit * together, (unit + 1) * together)]
            chosen += own + [0] * (width - len(own))
            counts += [True] * len(own) + [False] * (width - len(own))
        share = self.select(chosen)
        return share if all(counts) else replace(share, mask_BT=share.mask_BT * torch.tensor(counts)[:, None])

    def cut(self, max_tokens: int, *, whole_groups: bool = False) -> list[Experience]:
        """The rows in pieces of about `max_tokens` tokens, equally full. `whole_groups`: equal prompts in a run stay
        together and their prompt counts once; the rows keep their order."""
        prompts = [len(ids) for ids in self.prompts]
        pieces: Sequence[Sequence[int]]
        if whole_groups:
            pieces = runs_of_groups(group_numbers(self.prompts), self.lengths, prompts, max_tokens)
        else:
            pieces = balanced_pieces([p + t for p, t in zip(prompts, self.lengths, strict=True)], max_tokens)
        return [self.select(piece) for piece in pieces]

    def packed_once(self) -> Experience:
        """The same rows, packed by the mask they have now; all micro-batches are put together from that."""
        packed_rows = rows_alone([TokenTree(prompt, [branch]) for prompt, branch in self._branches(masked=True)])
        return replace(self, packed_rows=packed_rows)

    def packed(self, *, masked: bool = True) -> PackedBatch:
        """The rows as one packed batch, runs of equal prompts as trees; `masked`: only what counts is scored."""
        groups = group_numbers(self.prompts)
        if masked and self.packed_rows:
            return self._with_choices(join(self.packed_rows, groups))
        runs = groupby(zip(groups, self._branches(masked), strict=True), key=itemgetter(0))
        trees = ([pair for _, pair in run] for _, run in runs)
        return self._with_choices(pack(TokenTree(tree[0][0], [branch for _, branch in tree]) for tree in trees))

    def _with_choices(self, packed: PackedBatch) -> PackedBatch:
        """The batch with what is known of its tokens' words and experts. Of a shared prompt the first row decides."""
        if self.kept is not None:
            places = zip(packed.row_S.tolist(), packed.slot_S.tolist(), strict=True)
            words = [torch.as_tensor(self.kept[row][slot], dtype=torch.int32) for row, slot in places]
            width = max([1, *map(len, words)])
            choices_SK = torch.full((len(words), width), -1, dtype=torch.int32)
            for row_K, each in zip(choices_SK, words, strict=True):
                row_K[: len(each)] = each
            packed = replace(packed, choices_SK=choices_SK)
        if self.experts:
            experts_NLC = torch.full((len(packed.ids_N), *self.experts[0].shape[1:]), -1, dtype=torch.int16)
            for row in reversed(range(packed.rows)):
                index = torch.tensor(packed.row_indices(row)[: len(self.experts[row])])
                experts_NLC[index] = self.experts[row][: len(index)]
            packed = replace(packed, experts_NLC=experts_NLC)
        return packed

    def _branches(self, masked: bool) -> Iterator[tuple[Tensor, Branch]]:
        """The prompt and the branch of each row."""
        for prompt, ids, mask_T in zip(self.prompts, self.completions, self.mask_BT, strict=True):
            yield prompt, Branch(ids, mask_T[: len(ids)] if masked else None)

    def batch(self, count: Tensor | None = None) -> PolicyBatch:
        """All rows as a micro-batch; `count`: what its loss is divided by, where that is not the number of tokens."""
        if self.old_logprobs_BT is None or self.advantages_BT is None:
            raise ValueError("experience: it needs old_logprobs_BT and advantages_BT before it can be learned from")
        return PolicyBatch(
            packed=self.packed(),
            counted=counted(self.mask_BT, "token") if count is None else count,
            mask_BT=self.mask_BT,
            old_logprobs_BT=self.old_logprobs_BT,
            advantages_BT=self.advantages_BT,
            reference_BT=self.reference_BT,
            weight_BT=self.weight_BT,
            values_BT=self.values_BT,
            returns_BT=self.returns_BT,
            sampled_BT=self.old_logprobs_BT if self.sampled_BT is None else self.sampled_BT,
            behaviour_BT=self.behaviour_BT,
            teacher_tokens_BTK=self.teacher_tokens_BTK,
            teacher_BTK=self.teacher_BTK,
        )


@dataclass(frozen=True)
class RolloutShape:
    """The settings that a rollout is made for."""

    per_device_train_batch_size: int
    num_generations: int
    num_iterations: int
    steps_per_generation: int
    """micro-batches of one rollout"""

    @property
    def rows(self) -> int:
        """Completions of one rollout."""
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def passes(self) -> int:
        """How many micro-batches are handed out of each rollout."""
        return self.steps_per_generation * self.num_iterations

    def learned_later(self, accumulation: int) -> range:
        """The rows that are learned after the first update on their rollout too; accumulation: micro-batches of one."""
        if self.num_iterations > 1:
            return range(0 if accumulation % self.passes else self.rows, self.rows)
        return range(min(accumulation * self.per_device_train_batch_size, self.rows), self.rows)


@dataclass
class RolloutState:
    """Where the stream of rollouts stands."""

    position: int = 0
    """prompts drawn so far, over all ranks"""
    rollouts: int = 0
    """rollouts made so far"""
    cursor: int = 0
    """micro-batches of the current rollout that were handed out"""
    experience: Experience | None = None
    """the current rollout; None before the first"""

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields."""
        return [entry.name for entry in fields(cls)]

    def plain(self) -> dict[str, Any]:
        """Dicts of tensors and numbers, for a checkpoint."""
        if self.experience is None:
            return dict(vars(self))
        kept = {name: column for name, column in vars(self.experience).items() if name != "packed_rows"}
        return {**vars(self), "experience": kept}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> RolloutState:
        """Take back what `plain` gave."""
        experience = plain["experience"]
        if experience and "mask_BT" not in experience:
            raise ValueError(
                "the checkpoint stands in the midst of a rollout in an older format; resume from one after the "
                "end of a rollout"
            )
        return cls(**{**plain, "experience": Experience(**experience) if experience else None})


@dataclass(frozen=True)
class Division:
    """How the rows of a rollout lie on ranks: an optimizer step takes the next rows of each rank, rank after rank."""

    shape: RolloutShape
    of_step: int
    """micro-batches of an optimizer step on each rank, at most as many as a rollout has; 0: not known"""
    world: int

    @property
    def rows_of_step(self) -> int:
        """Completions that an optimizer step learns from on each rank."""
        return self.shape.per_device_train_batch_size * self.of_step

    @property
    def steps(self) -> int:
        """Optimizer steps of one pass over a rollout."""
        return self.shape.steps_per_generation // self.of_step

    @property
    def rows(self) -> int:
        """Completions of a rollout on all ranks."""
        return self.shape.rows * self.world

    def fits(self, other: Division) -> bool:
        """Whether optimizer steps take the same rows in both."""
        return (self.rows_of_step * self.world, self.steps) == (other.rows_of_step * other.world, other.steps)


def divided_anew(
    ranks: Sequence[dict[str, Any]], made: Division, own: Division, rank: int, moves_back: bool = True
) -> tuple[dict[str, Any], str]:
    """What one of the ranks of now goes on with of the ranks' `plain_state`s, and what became of a half-used rollout.

    Where optimizer steps take the same rows in both divisions, the rest of the rollout is divided among the ranks of
    now. Else it is dropped, and those of its prompts that nobody has learned from are drawn again; moves_back: whether
    they are known, which they are not where groups were replaced.
    """
    first = ranks[0]
    cursor, shape = first["cursor"], {"shape": asdict(own.shape)}
    if not first["experience"] or cursor == made.shape.passes:
        return {**first, **shape, "experience": None, "cursor": own.shape.passes}, ""
    group = made.shape.num_generations
    if (group, made.shape.num_iterations) != (own.shape.num_generations, own.shape.num_iterations):
        return first, ""  # which `RolloutLoader.restore` refuses
    parts = [RolloutState.of({name: one[name] for name in RolloutState.names()}).experience for one in ranks]
    equal = all(part is not None and len(part) == made.shape.rows for part in parts)
    if equal and made.of_step and own.fits(made) and not cursor % made.of_step:
        width, mine = made.rows_of_step, own.rows_of_step
        steps = [range(step * width, (step + 1) * width) for step in range(made.steps)]
        whole = Experience.below([part.select(rows) for rows in steps for part in parts if part is not None])
        places = [(step * own.world + rank) * mine + row for step in range(own.steps) for row in range(mine)]
        state = RolloutState.of({name: first[name] for name in RolloutState.names()})
        state = replace(state, experience=whole.select(places), cursor=cursor // made.of_step * own.of_step)
        return {**state.plain(), **shape}, "is divided anew"
    seen = min(cursor, made.shape.steps_per_generation) * made.shape.per_device_train_batch_size * made.world
    left = made.rows // group - seen // group if moves_back else 0
    position = first["position"] - left
    again = f"{left} of its prompts, which nobody learned from, are drawn again"
    said = "is dropped: " + (again if moves_back else "groups were replaced in it, so its prompts do not come again")
    return {**first, **shape, "experience": None, "cursor": own.shape.passes, "position": position}, said


class RolloutLoader:
    """Endless micro-batches of fresh rollouts, which `Trainer` reads like a data set.

    A rollout is made when its first micro-batch is asked for, so it sees the weights after the last optimizer step.
    make: `(state) -> Experience` samples and scores a rollout and moves `state.position` on.
    """

    def __init__(
        self,
        make: Callable[[RolloutState], Experience],
        collate: Callable[[Experience], Any],
        shape: RolloutShape,
        length: int | None,
    ):
        self.make, self.collate, self.shape, self._length = make, collate, shape, length
        self.state = RolloutState()

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("a stream of prompts has no length")
        return self._length

    @property
    def is_used_up(self) -> bool:
        """Whether the next micro-batch is the first one of a new rollout."""
        return self.state.experience is None or self.state.cursor == self.shape.passes

    def plain_state(self) -> dict[str, Any]:
        """The state and the shape, for a checkpoint."""
        return {**self.state.plain(), "shape": asdict(self.shape)}

    def restore(self, plain: dict[str, Any]) -> None:
        """Go on from a `plain_state`; ValueError if it has a half-used rollout that other settings made."""
        theirs = RolloutShape(**plain["shape"])
        state = {name: value for name, value in plain.items() if name != "shape"}
        if not state["experience"] or state["cursor"] == theirs.passes:
            self.state = RolloutState.of({**state, "experience": None})
            return
        for name, value in asdict(self.shape).items():
            if (made_with := getattr(theirs, name)) != value:
                raise ValueError(
                    f"{name}={value}: the checkpoint stands in the midst of a rollout that was made with "
                    f"{made_with}; resume with that, or from a checkpoint after the end of a rollout"
                )
        self.state = RolloutState.of(state)

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self.is_used_up:
                made = self.make(self.state)
                self.state.experience = made.packed_once() if self.shape.num_iterations > 1 else made
                self.state.rollouts, self.state.cursor = self.state.rollouts + 1, 0
            current = self.state.experience
            assert current is not None
            size = -(-len(current) // self.shape.steps_per_generation)
            start = self.state.cursor % self.shape.steps_per_generation * size
            self.state.cursor += 1
            yield self.collate(current.select(range(start, min(start + size, len(current)))))
