"""The collector: from a stream of prompts to rollouts with rewards, whose idle groups may be replaced.

`Ahead` has it draw rollouts before they are due, while the trainer learns from earlier ones.

Shape letters: B completions, F reward functions. A group: the completions of one prompt.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import itemgetter
from queue import SimpleQueue
from typing import Any

import torch
from accelerate.utils import gather_object

from trl.data.records import Rollout
from trl.generation.stopping import without_ends
from trl.rewards.panel import Logs, RewardError
from trl.rollout.experience import RolloutState
from trl.rollout.prompts import PromptStream, decoded, with_opened_pictures
from trl.rollout.rewards import Rewards, RolloutRewards
from trl.rollout.source import Rows, Source, with_own_prompts

logger = logging.getLogger(__name__)

Collected = tuple[list[Any], Rollout, Rewards]
"""rows of the data set (one a group), their completions, the completions' rewards"""


@dataclass
class Begun:
    """A round of sampling whose prompts are taken."""

    number: int
    """of the rollout"""
    turn: int
    """0: the first round, others are of dynamic sampling"""
    positions: list[int]
    """of its rows in the stream of prompts"""
    places: list[int]
    """of its rows among those of all ranks"""
    rows: list[Any]


class Collector:
    """Draws prompts, has a source complete them and reward functions judge the completions.

    rewards: None for an algorithm without rewards. group: completions of each prompt; one rank draws and judges all of
    them. wanted: prompts of a rollout over all ranks. places: those that this rank takes, which may be none. rounds: of
    sampling at most; in further rounds than the first, groups of equal rewards give their places to groups of further
    prompts (dynamic sampling). unscored: is told of completions whose reward functions failed. ends: tokens that end a
    completion, which their texts leave out. weights: the context in which a source draws, on ranks without rows too.
    held_out: judges of whose scores nothing is learned.
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
        held_out: RolloutRewards | None = None,
    ):
        self.source, self.rewards, self.prompts, self.tokenizer = source, rewards, prompts, tokenizer
        self.group, self.rounds, self.unscored, self.ends = group, rounds, unscored, ends
        self.weights, self.held_out = weights, held_out
        self.worker: Worker | None = None
        """the thread in which sources draw; None: the one that asks"""
        self._seed, self._wanted, self.places = seed, wanted, places
        self.gather: Callable[[list[Any]], list[Any]] = gather_object if world > 1 else list
        """the list of all ranks of each rank's list"""

    def collect(self, state: RolloutState, trainer_state: Any) -> Collected:
        """The rollout that is due; moves `state.position` on. Every rank takes its own part of the prompts."""
        begun = self.begin(state, state.rollouts)
        return self.judged(begun, self.complete(begun), state, trainer_state)

    def begin(self, state: RolloutState, number: int, turn: int = 0) -> Begun:
        """Take this rank's next prompts; moves `state.position` on."""
        positions = [state.position + place for place in self.places]
        begun = Begun(number, turn, positions, list(self.places), self.rows_at(positions))
        state.position += self._wanted
        return begun

    def rows_at(self, positions: Sequence[int]) -> list[Any]:
        """The rows at these places of the stream of prompts."""
        return [row for position in positions for row in self.prompts.take(position, 1)]

    def complete(self, begun: Begun) -> Rollout:
        """Sample a round; the texts are read later, as a tokenizer belongs to one thread."""
        with self.weights():
            return self.asked(begun)()

    def asked(self, begun: Begun) -> Callable[[], Rollout]:
        """What samples a round where the weights are at hand; nothing that ranks do together."""
        seed = self.seed(begun.number, begun.turn)
        return partial(self._sampled, begun.rows, self.group, seed, self.places)

    def judged(self, begun: Begun, rollout: Rollout, state: RolloutState, trainer_state: Any) -> Collected:
        """The rollout of a round that was sampled, its idle groups replaced; `begun` says where its rows come from."""
        rows, rollout, rewards = self._scored(begun, rollout, trainer_state)
        places = list(zip(begun.positions, rows, strict=True))
        for turn in range(1, self.rounds):
            idle = [not bool(rewards.informative_groups(self.group).all())]
            if not any(self.gather(idle)):  # all ranks stop together
                break
            more = self.begin(state, begun.number, turn)
            new_rows, new_rollout, new_rewards = self._scored(more, self.complete(more), trainer_state)
            further = list(zip(more.positions, new_rows, strict=True)), new_rollout, new_rewards
            replace_groups(places, rollout, rewards, further, self.group, self.places, self.gather)
        begun.positions, begun.rows = [position for position, _ in places], [row for _, row in places]
        self._ask_held_out(rollout, begun.rows, rewards, trainer_state)
        return begun.rows, rollout, rewards

    def _ask_held_out(self, rollout: Rollout, rows: Rows, rewards: Rewards, trainer_state: Any) -> None:
        """What held-out judges say goes to the log and the table; one that fails has no opinion."""
        if self.held_out is None:
            return
        try:
            said = self.judge(rollout, rows, self.group, trainer_state, self.held_out)
        except RewardError as error:
            logger.warning("judge: %s; nothing is logged of it for this rollout", error)
            return
        for name, scores in zip(said.names, said.scores_BF.T.tolist(), strict=True):
            rewards.logs.extra[f"judge_{name}"] = [None if score != score else score for score in scores]
            rewards.logs.metrics[f"judge/{name}/mean"] = [score for score in scores if score == score]

    def _scored(self, begun: Begun, rollout: Rollout, trainer_state: Any) -> Collected:
        self._read(rollout)
        rows = with_own_prompts(begun.rows, rollout)
        try:
            return rows, rollout, self.judge(rollout, rows, self.group, trainer_state)
        except RewardError:
            if self.unscored is not None:
                self.unscored(begun.number, rollout, self.prompt_texts(rows, self.group))
            raise

    def seed(self, rollout: int, turn: int = 0) -> int:
        """Of a round of sampling; rollout -1 is that of evaluations."""
        return (self._seed * 1_000_003 + rollout) * 64 + turn

    def draw(self, rows: Rows, group: int, seed: int, places: Sequence[int] | None = None) -> Rollout:
        """See `Source.draw`; with the completions' texts. Nobody is asked where there are no rows."""
        with self.weights():
            rollout = self._sampled(rows, group, seed, places)
        return self._read(rollout)

    def _sampled(self, rows: Rows, group: int, seed: int, places: Sequence[int] | None) -> Rollout:
        ask = partial(self.source.draw, rows, group, seed, places)
        return Rollout([], [], [], []) if not rows else ask() if self.worker is None else self.worker.do(ask)

    def _read(self, rollout: Rollout) -> Rollout:
        """The rollout with its completions' texts."""
        if len(rollout) and not rollout.texts:
            rollout.texts = without_ends(self.tokenizer, rollout.completions, self.ends)
        return rollout

    def judge(
        self, rollout: Rollout, rows: Rows, group: int, trainer_state: Any, by: RolloutRewards | None = None
    ) -> Rewards:
        """The rewards of a rollout; the rows' columns reach the reward functions by their names. by: others than those
        that are learned from."""
        rewards = self.rewards if by is None else by
        if rewards is None:
            return Rewards.none(len(rollout))
        if not rows:
            return rewards.of_nothing()
        further = with_opened_pictures(columns_of(rows, group), self.tokenizer)
        columns = {"prompt_texts": rendered(rollout, self.tokenizer), **further}
        return rewards(rollout, self.prompt_texts(rows, group), {**columns, "trainer_state": trainer_state})

    def prompt_texts(self, rows: Rows, group: int) -> list[Any]:
        """The rows' prompts, one for each completion: as they are in the data set, else decoded."""
        texts = [row["prompt"] if "prompt" in row else decoded(self.tokenizer, row["prompt_ids"]) for row in rows]
        return [text for text in texts for _ in range(group)]


class Worker:
    """A thread that makes calls one after the other; it is there from the first call until `end`."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, call: Callable[[], Any]) -> Future[Any]:
        """Have something called once all earlier calls have ended."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(self._calls,), name="rollouts", daemon=True)
            self._thread.start()
        begun: Future[Any] = Future()
        self._calls.put((begun, call))
        return begun

    def do(self, call: Callable[[], Any]) -> Any:
        """What a call gives, made in this thread; from within it at once."""
        return call() if threading.current_thread() is self._thread else self.begin(call).result()

    def end(self, wait: bool) -> None:
        """No further call is begun, and the thread ends; wait: until it has. A later `begin` starts another one."""
        thread, calls = self._thread, self._calls
        self._thread, self._calls = None, SimpleQueue()
        if thread is not None:
            calls.put(None)
            if wait:
                thread.join()

    @staticmethod
    def _run(calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
        while (next_call := calls.get()) is not None:
            future, call = next_call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # it is raised where the result is asked for
                future.set_exception(error)
            del next_call, future, call  # what was drawn belongs to who asked


@dataclass
class Waiting:
    """A rollout that is drawn before it is due."""

    begun: Begun
    version: int
    """optimizer steps that the weights had made when it was begun"""
    start: int
    """`RolloutState.position` before it"""
    sampling: Future[tuple[Rollout, float]] | None = None
    """its completions and the seconds that they took; None: they are there"""
    rollout: Rollout | None = None
    collected: Collected | None = None
    """None: not judged yet"""

    @property
    def is_plain(self) -> bool:
        """Whether a checkpoint can hold its completions without their rewards."""
        return self.rollout is not None and all(map(_is_plain, self.rollout.metadata.values()))

    def plain(self) -> dict[str, Any]:
        """Dicts of tensors and numbers, for a checkpoint; the rows are read again."""
        rollout, said = self.rollout, None
        assert rollout is not None
        columns = {entry.name: getattr(rollout, entry.name) for entry in fields(rollout)}
        columns["metadata"] = {name: column for name, column in rollout.metadata.items() if _is_plain(column)}
        if self.collected is not None:
            rewards = self.collected[2]
            said = {entry.name: getattr(rewards, entry.name) for entry in fields(rewards)}
            said["logs"] = {"extra": rewards.logs.extra, "metrics": rewards.logs.metrics}
        own = {"number": self.begun.number, "positions": self.begun.positions, "version": self.version}
        return {**own, "start": self.start, "places": self.begun.places, "rollout": columns, "rewards": said}

    @classmethod
    def of(cls, plain: Mapping[str, Any], rows_at: Callable[[Sequence[int]], list[Any]]) -> Waiting:
        """Take back what `plain` gave. rows_at: reads rows at places of the stream of prompts."""
        rollout, said = Rollout(**plain["rollout"]), plain["rewards"]
        begun = Begun(plain["number"], 0, plain["positions"], plain["places"], rows_at(plain["positions"]))
        each = cls(begun, plain["version"], plain["start"], rollout=rollout)
        if said is None:
            return each
        logs = Logs(len(rollout))
        logs.extra, logs.metrics = said["logs"]["extra"], said["logs"]["metrics"]
        collected = with_own_prompts(begun.rows, rollout), rollout, Rewards(**{**said, "logs": logs})
        return replace(each, collected=collected)


def divided_waiting(ranks: Sequence[Mapping[str, Any]], places: Sequence[int], group: int) -> dict[str, Any]:
    """The groups at `places` of a rollout that waits, from what `Waiting.plain` gave on each rank that drew it.

    Numbers that reward functions have logged go where the first group goes.
    """
    where = {place: (rank, i) for rank, one in enumerate(ranks) for i, place in enumerate(one["places"])}
    chosen = [where[place] for place in places]

    def rows(of_ranks: Sequence[Any]) -> list[Any]:
        return [value for rank, i in chosen for value in of_ranks[rank][i * group : (i + 1) * group]]

    def table(of_ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = dict.fromkeys(name for each in of_ranks for name in each)
        return {name: rows([each.get(name, []) for each in of_ranks]) for name in names}

    rollouts, rewards = [dict(one["rollout"]) for one in ranks], [one["rewards"] for one in ranks]
    metadata = table([each.pop("metadata") for each in rollouts])
    said = rewards[0]
    if said is not None:
        scores = [said["scores_BF"][:0], *(row[None] for row in rows([each["scores_BF"] for each in rewards]))]
        numbers = [each["logs"]["metrics"] for each in rewards] if 0 in places else []
        names = dict.fromkeys(name for each in numbers for name in each)
        metrics = {name: [number for each in numbers for number in each.get(name, [])] for name in names}
        late = list(zip(*(each["timed_out"] for each in rewards), strict=True))
        timed_out = [None if None in column else any(column) for column in late]
        logs = {"extra": table([each["logs"]["extra"] for each in rewards]), "metrics": metrics}
        said = {**said, "scores_BF": torch.cat(scores), "timed_out": timed_out, "logs": logs}
    own = {"positions": [ranks[rank]["positions"][i] for rank, i in chosen], "places": list(places)}
    return {**ranks[0], **own, "rollout": {**table(rollouts), "metadata": metadata}, "rewards": said}


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold it."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes | torch.Tensor)


@dataclass
class Waited:
    """How the time between two rollouts was spent, in seconds."""

    waited: float
    """the trainer waited for completions"""
    idle: float
    """nothing was sampled"""
    passed: float


class Ahead:
    """Rollouts that are drawn `staleness` rollouts before they are due, in the order in which they are learned.

    Rollout n is sampled by the weights from which the updates on rollout n - staleness start, the first ones by the
    weights of the beginning. An engine with weights of its own samples in a thread while the trainer learns, and has
    ended before it gets other weights (with `keeps`: goes on with these). Any other source draws at the same places of
    the run without a thread, which gives the same rollouts. Rewards are asked for in the trainer's thread when the
    rollout is due; but as soon as it is sampled where episodes are played or idle groups replaced.

    follow: gives the engine the weights of now, whose number is the optimizer steps that were made. apart: whether to
    draw in a thread. plays: whether episodes are played in objects that the next rollout uses again.
    """

    def __init__(
        self,
        collector: Collector,
        staleness: int,
        *,
        follow: Callable[[], None] = lambda: None,
        apart: Callable[[], bool] = lambda: False,
        keeps: bool = False,
        plays: bool = False,
    ):
        self.collector, self.staleness, self.keeps = collector, staleness, keeps
        self.waiting: deque[Waiting] = deque()
        self._follow, self._apart = follow, apart
        self._one_by_one = plays or collector.rounds > 1
        """whether a rollout is judged before the next one is begun"""
        self._worker = Worker()
        self._waited = self._sampled = 0.0
        self._since: float | None = None
        self._ended_at = 0
        """optimizer steps of the run before"""

    def due(self, state: RolloutState, trainer_state: Any) -> Waiting:
        """The rollout that is due; others are begun. Collective where rollouts or weights are."""
        self._since = self._since or time.perf_counter()
        self._count_anew(trainer_state.global_step)
        if self.keeps:
            self._follow()
        if self._one_by_one:
            self.settle(state, trainer_state)
        elif not self.keeps:
            for each in list(self.waiting):
                self._arrive(each, state)
        if not self.keeps:
            self._follow()
        while len(self.waiting) <= self.staleness:
            self._begin(state, trainer_state)
            if self._one_by_one and (self.waiting[-1].sampling is None or len(self.waiting) <= self.staleness):
                self.settle(state, trainer_state)
        self._settle(self.waiting[0], state, trainer_state)
        return self.waiting.popleft()

    def _count_anew(self, step: int) -> None:
        """Where a further run counts its steps from 0 again: the numbers of weights that the one before had made."""
        if step < self._ended_at:
            for each in self.waiting:
                each.version -= self._ended_at - step
        self._ended_at = 0

    def settle(self, state: RolloutState, trainer_state: Any) -> None:
        """Wait for what is in flight, and judge it."""
        for each in list(self.waiting):
            self._settle(each, state, trainer_state)

    def spent(self) -> Waited:
        """How the time since the last call was spent."""
        now = time.perf_counter()
        passed = now - (self._since or now)
        found = Waited(self._waited, max(0.0, passed - self._sampled), passed)
        self._waited, self._sampled, self._since = 0.0, 0.0, now
        return found

    def let_go(self, state: RolloutState, step: int) -> None:
        """At the end of a run: forget what is in flight, whose prompts are drawn again.

        The thread ends, with its call at the latest. step: the last one that was made.
        """
        self._ended_at = step
        flying = next((each for each in self.waiting if each.sampling is not None and not each.sampling.done()), None)
        if flying is not None:
            self._drop(flying, state)
        self._worker.end(wait=flying is None)

    def forget(self, state: RolloutState) -> None:
        """Drop all that waits or is in flight: it is drawn again, by the weights of then."""
        if self.waiting:
            self._drop(self.waiting[0], state)

    def rest(self, state: RolloutState, trainer_state: Any) -> None:
        """Wait for what is in flight, so that a checkpoint can hold it. Collective.

        What fails is dropped, and drawn again when it is due.
        """
        gather = self.collector.gather
        try:
            for each in list(self.waiting):  # all of them first: a judge may fail on one rank alone
                self._arrive(each, state)
            for each in list(self.waiting):
                if self._one_by_one or not each.is_plain:
                    self._settle(each, state, trainer_state)
        except Exception as error:
            if gather is not list and self.collector.rounds > 1:
                raise  # the others wait for this rank
            logger.warning("a rollout that was drawn ahead is dropped, and drawn again when it is due: %s", error)
        least = min(gather([len(self.waiting)]))
        if len(self.waiting) > least:
            self._drop(self.waiting[least], state)

    def plain_state(self) -> list[dict[str, Any]]:
        """What waits, for a checkpoint; `settle` comes before."""
        return [each.plain() for each in self.waiting]

    def takes(self, ranks: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
        """Whether this run can go on from the `plain_state`s of the ranks of a checkpoint."""
        mine, wanted = self.collector.gather(list(self.collector.places)), len(ranks[0])
        theirs = [[place for one in ranks for place in one[at]["places"]] for at in range(wanted)]
        return wanted <= self.staleness and all(sorted(places) == sorted(mine) for places in theirs)

    def restore_of(self, ranks: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Go on from the `plain_state`s of all ranks, divided anew."""
        group, places = self.collector.group, self.collector.places
        self.restore([divided_waiting(each, places, group) for each in zip(*ranks, strict=True)])

    def restore(self, waiting: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a `plain_state`."""
        self.waiting, self._ended_at = deque(Waiting.of(each, self.collector.rows_at) for each in waiting), 0

    def _begin(self, state: RolloutState, trainer_state: Any) -> None:
        start = state.position
        begun = self.collector.begin(state, state.rollouts + len(self.waiting))
        each = Waiting(begun, trainer_state.global_step, start)
        self.waiting.append(each)
        apart = self._apart()
        self.collector.worker = self._worker if apart else None
        if apart:
            each.sampling = self._worker.begin(partial(_timed, self.collector.asked(begun)))
            return
        with self._held(each, state):
            each.rollout, seconds = _timed(partial(self.collector.complete, begun))
        self._waited, self._sampled = self._waited + seconds, self._sampled + seconds

    def _arrive(self, each: Waiting, state: RolloutState) -> None:
        """Wait for completions in flight; where they fail on one rank they fail on all. Collective."""
        if each.sampling is None:
            return
        started = time.perf_counter()
        with self._held(each, state), self.collector.weights():
            each.rollout, seconds = each.sampling.result()
        each.sampling = None
        self._waited, self._sampled = self._waited + time.perf_counter() - started, self._sampled + seconds

    def _settle(self, each: Waiting, state: RolloutState, trainer_state: Any) -> None:
        """Wait for a rollout and judge it."""
        if each.collected is None:
            self._arrive(each, state)
            assert each.rollout is not None
            with self._held(each, state):
                each.collected = self.collector.judged(each.begun, each.rollout, state, trainer_state)

    @contextmanager
    def _held(self, each: Waiting, state: RolloutState) -> Iterator[None]:
        """Where the block fails, the rollout and those behind it are forgotten, and their prompts drawn again."""
        try:
            yield
        except BaseException:
            self._drop(each, state)
            raise

    def _drop(self, first: Waiting, state: RolloutState) -> None:
        while self.waiting and self.waiting[-1] is not first:
            self._forget()
        self._forget()
        state.position = first.start

    def _forget(self) -> None:
        last = self.waiting.pop()
        if last.sampling is not None:
            last.sampling.cancel()


def _timed(call: Callable[[], Rollout]) -> tuple[Rollout, float]:
    started = time.perf_counter()
    with torch.no_grad():  # which each thread has to say
        return call(), time.perf_counter() - started


def columns_of(rows: Rows, group: int = 1) -> dict[str, list[Any]]:
    """The rows' columns but their prompts, a value for each completion; None where a row lacks a column."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "prompt_ids"))
    return {name: [row.get(name) for row in rows for _ in range(group)] for name in names}


def rendered(rollout: Rollout, tokenizer: Any) -> list[str]:
    """Each prompt as the policy read it, with special tokens."""
    texts = {ids: decoded(tokenizer, ids) for ids in set(map(tuple, rollout.prompts))}
    return [texts[tuple(ids)] for ids in rollout.prompts]


LIVE = ("histories", "environments")
"""metadata that only reward functions read; such objects cannot move to another process"""


def tell_alike(rollouts: Sequence[Rollout], gather: Callable[[list[Any]], list[Any]]) -> None:
    """Leave out which words or experts an engine took where it did not say so of all rows of all ranks. Collective.

    One line says it: rows of which it is known and rows of which it is not are learned by other ratios.
    """
    for name, what in (("kept", "words the filters left"), ("experts", "experts it took")):
        told = gather([bool(getattr(each, name)) for each in rollouts if len(each)])
        if any(told) and not all(told):
            logger.warning("an engine did not say of all rows which %s: it is used for none of them", what)
            for each in rollouts:
                setattr(each, name, [])


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
    tell_alike([rollout, new_rollout], gather)
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
