"""The collector: from a stream of prompts to rollouts with rewards, whose idle groups may be replaced.

Shape letters: B completions, F reward functions. A group: the completions of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any

from accelerate.utils import gather_object

from trl.data.records import Rollout
from trl.generation.stopping import without_ends
from trl.rewards.panel import RewardError
from trl.rollout.experience import RolloutState
from trl.rollout.prompts import PromptStream
from trl.rollout.rewards import Rewards, RolloutRewards
from trl.rollout.source import Rows, Source, with_own_prompts

Collected = tuple[list[Any], Rollout, Rewards]
"""rows of the data set (one a group), their completions, the completions' rewards"""


class Collector:
    """Draws prompts, has a source complete them and reward functions judge the completions.

    rewards: None for an algorithm without rewards. group: completions of each prompt; one rank draws and judges all of
    them. wanted: prompts of a rollout over all ranks. places: those that this rank takes, which may be none. rounds: of
    sampling at most; in further rounds than the first, groups of equal rewards give their places to groups of further
    prompts (dynamic sampling). unscored: is told of completions whose reward functions failed. ends: tokens that end a
    completion, which their texts leave out. weights: the context in which a source draws, on ranks without rows too.
    """

    def __init__(
        self,
        source: Source,
        rewards: RolloutRewards | None,
        prompts: PromptStream,
        tokenizer: Any,
        *,
        seed: int,
        group: int,
        wanted: int,
        places: Sequence[int],
        rounds: int = 1,
        world: int = 1,
        unscored: Callable[[int, Rollout, list[Any]], None] | None = None,
        ends: Sequence[int] = (),
        weights: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.source, self.rewards, self.prompts, self.tokenizer = source, rewards, prompts, tokenizer
        self.group, self.rounds, self.unscored, self.ends = group, rounds, unscored, ends
        self.weights = weights
        self._seed, self._wanted, self._places = seed, wanted, places
        self.gather: Callable[[list[Any]], list[Any]] = gather_object if world > 1 else list
        """the list of all ranks of each rank's list"""

    def collect(self, state: RolloutState, trainer_state: Any) -> Collected:
        """The rollout that is due; moves `state.position` on. Every rank takes its own part of the prompts."""
        rows, rollout, rewards = self._round(state, 0, trainer_state)
        for turn in range(1, self.rounds):
            idle = [not bool(rewards.informative_groups(self.group).all())]
            if not any(self.gather(idle)):  # all ranks stop together
                break
            further = self._round(state, turn, trainer_state)
            replace_groups(rows, rollout, rewards, further, self.group, self._places, self.gather)
        return rows, rollout, rewards

    def _round(self, state: RolloutState, turn: int, trainer_state: Any) -> Collected:
        rows = [row for place in self._places for row in self.prompts.take(state.position + place, 1)]
        state.position += self._wanted
        rollout = self.draw(rows, self.group, self.seed(state.rollouts, turn), self._places)
        rows = with_own_prompts(rows, rollout)
        try:
            return rows, rollout, self.judge(rollout, rows, self.group, trainer_state)
        except RewardError:
            if self.unscored is not None:
                self.unscored(state.rollouts, rollout, self.prompt_texts(rows, self.group))
            raise

    def seed(self, rollout: int, turn: int = 0) -> int:
        """Of a round of sampling; rollout -1 is that of evaluations."""
        return (self._seed * 1_000_003 + rollout) * 64 + turn

    def draw(self, rows: Rows, group: int, seed: int, places: Sequence[int] | None = None) -> Rollout:
        """See `Source.draw`; with the completions' texts. Nobody is asked where there are no rows."""
        with self.weights():
            rollout = self.source.draw(rows, group, seed, places) if rows else Rollout([], [], [], [])
        if rows and not rollout.texts:
            rollout.texts = without_ends(self.tokenizer, rollout.completions, self.ends)
        return rollout

    def judge(self, rollout: Rollout, rows: Rows, group: int, trainer_state: Any) -> Rewards:
        """The rewards of a rollout; the rows' columns reach the reward functions by their names."""
        if self.rewards is None:
            return Rewards.none(len(rollout))
        if not rows:
            return self.rewards.of_nothing()
        columns = {"prompt_texts": rendered(rollout, self.tokenizer), **columns_of(rows, group)}
        return self.rewards(rollout, self.prompt_texts(rows, group), {**columns, "trainer_state": trainer_state})

    def prompt_texts(self, rows: Rows, group: int) -> list[Any]:
        """The rows' prompts, one for each completion: as they are in the data set, else decoded."""
        texts = [row["prompt"] if "prompt" in row else self.tokenizer.decode(row["prompt_ids"]) for row in rows]
        return [text for text in texts for _ in range(group)]


def columns_of(rows: Rows, group: int = 1) -> dict[str, list[Any]]:
    """The rows' columns but their prompts, a value for each completion; None where a row lacks a column."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "prompt_ids"))
    return {name: [row.get(name) for row in rows for _ in range(group)] for name in names}


def rendered(rollout: Rollout, tokenizer: Any) -> list[str]:
    """Each prompt as the policy read it, with special tokens."""
    texts = {ids: str(tokenizer.decode(list(ids))) for ids in set(map(tuple, rollout.prompts))}
    return [texts[tuple(ids)] for ids in rollout.prompts]


LIVE = ("histories", "environments")
"""metadata that only reward functions read; such objects cannot move to another process"""


def replace_groups(
    rows: list[Any],
    rollout: Rollout,
    rewards: Rewards,
    further: Collected,
    group: int,
    places: Sequence[int] | None = None,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> None:
    """Replace groups of equal rewards by informative ones of `further`; changes the first three arguments.

    places: of the groups among those of all ranks; gather: makes the list of all ranks of each rank's list. Groups move
    in the order of their places, so the result does not depend on the number of ranks.
    """
    new_rows, new_rollout, new_rewards = further
    extra = _same_columns(rewards, new_rewards, gather)
    places = range(len(rows)) if places is None else places
    for name in LIVE:
        rollout.metadata.pop(name, None)
    here = {place: slice(i * group, (i + 1) * group) for i, place in enumerate(places)}
    useful, fresh = (of.informative_groups(group).tolist() for of in (rewards, new_rewards))
    holes = gather([place for place, kept in zip(places, useful, strict=True) if not kept])
    theirs = [*_columns(new_rollout, rollout), *(new_rewards.logs.extra[name] for name in extra)]
    ours = [*_columns(rollout, rollout), *(rewards.logs.extra[name] for name in extra)]
    taken = [
        (place, row, [column[here[place]] for column in theirs], new_rewards.scores_BF[here[place]])
        for place, row, wanted in zip(places, new_rows, fresh, strict=True)
        if wanted
    ]
    moved = dict(zip(sorted(holes), sorted(gather(taken), key=itemgetter(0)), strict=False))
    for i, place in enumerate(places):
        if place in moved:
            _, rows[i], columns, rewards.scores_BF[here[place]] = moved[place]
            for mine, values in zip(ours, columns, strict=True):
                if mine:
                    mine[here[place]] = values


def _same_columns(rewards: Rewards, further: Rewards, gather: Callable[[list[Any]], list[Any]]) -> list[str]:
    """The columns that any rank's reward functions have logged, which all rewards then have; numbers are added up."""
    logs = (rewards.logs, further.logs)
    names = sorted(set(gather([name for each in logs for name in each.extra])))
    for each, of in zip(logs, (rewards, further), strict=True):
        each.extra = {name: each.extra.get(name, [None] * len(of.scores_BF)) for name in names}
    for name, numbers in further.logs.metrics.items():
        rewards.logs.metrics.setdefault(name, []).extend(numbers)
    return names


def _columns(rollout: Rollout, like: Rollout) -> list[list[Any]]:
    """The columns of a rollout, its metadata in the order of another rollout's."""
    names = ("prompts", "completions", "logprobs", "masks", "texts", "rewards", "kept", "experts")
    return [*(getattr(rollout, name) for name in names), *(rollout.metadata[name] for name in like.metadata)]
