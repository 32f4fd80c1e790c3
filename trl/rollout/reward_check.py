"""Before training: what reward functions pay for answers that nobody wants, against the policy's own samples.

The functions are called in a process of their own, which may not open a connection to another machine: what they
remember, count or draw stays as it was, and one that hangs or crashes ends nothing.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from trl.data.any_text import console, encodable
from trl.data.records import Rollout
from trl.models.weight_files import writing
from trl.rewards.panel import RewardError
from trl.rewards.reward_model import RewardModel
from trl.rollout.rewards import RolloutRewards

logger = logging.getLogger(__name__)

FILE = "reward_check.json"
PROMPTS, COPIES = 4, 4
"""prompts that are tried, and at most so many of the policy's own samples of each"""
SECONDS = 60.0
"""after which the functions are left alone"""
OWN = "own samples"
FILLER = "There are many things that could be said about this, and each of them can be said in more than one way. "


@dataclass
class Tried:
    """What one kind of answer earned, as means over the prompts; None: no function had an opinion."""

    kind: str
    example: str
    rewards: dict[str, float | None]
    total: float | None


@dataclass
class RewardCheck:
    """A table of the kinds of answers, and what is wrong with the rewards."""

    tried: list[Tried] = field(default_factory=list)
    weaknesses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """what was not tried, and why"""

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def lines(self) -> Iterator[str]:
        """The table for a terminal, a line a kind."""
        names = list(self.tried[0].rewards) if self.tried else []
        width = max([len(each.kind) for each in self.tried], default=0)
        for each in self.tried:
            parts = [f"{name} {shown(each.rewards[name])}" for name in names] if len(names) > 1 else []
            yield f"  {each.kind:{width}}  {'  '.join([f'reward {shown(each.total)}', *parts])}"


def shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"


def trivial_answers(prompt: Any, longest: int) -> dict[str, str]:
    """Answers to a prompt, a text or a conversation, that cost no thought. longest: tokens of an answer."""
    asked = prompt if isinstance(prompt, str) else next(
        (_text_of(turn.get("content")) for turn in reversed(prompt) if turn.get("role") == "user"), ""
    )  # fmt: skip
    return {
        "empty": "", "constant": "Yes.", "echoed prompt": asked,
        "very long": FILLER * (1 + longest // 8), "repeated word": "the " * max(8, longest // 2),
    }  # fmt: skip


def _text_of(content: Any) -> str:
    """What a message says; of one in parts the texts."""
    if not isinstance(content, list):
        return str(content)
    parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
    return "\n".join(part for part in parts if isinstance(part, str))


def trivial_rollouts(
    prompts: Sequence[Any], prompt_ids: Sequence[Sequence[int]], tokenizer: Any, longest: int, end: int | None
) -> dict[str, Rollout]:
    """A rollout of each kind of trivial answer, an answer a prompt; they end as the policy's would."""
    made: dict[str, Rollout] = {}
    answers = [trivial_answers(prompt, longest) for prompt in prompts]
    for kind in answers[0] if answers else ():
        rows = [tokenizer(answer[kind], add_special_tokens=False)["input_ids"] for answer in answers]
        cut = [len(row) >= longest for row in rows]
        ends = [] if end is None else [end]
        whole = [row[:longest] if late else [*row, *ends] for row, late in zip(rows, cut, strict=True)]
        made[kind] = Rollout(
            prompts=[list(ids) for ids in prompt_ids],
            completions=whole,
            logprobs=[],
            masks=[[1] * len(row) for row in whole],
            texts=[
                tokenizer.decode(row[:longest]) if late else answer[kind]
                for answer, row, late in zip(answers, rows, cut, strict=True)
            ],
            metadata={"truncated": cut},
        )
    return made


def tell(check: RewardCheck, folder: Path) -> None:
    """Print the table, warn of weaknesses, and keep both in the run's folder."""
    if check.tried:
        screen = console()
        screen.print("What answers earn before training:", highlight=False)
        for line in check.lines():
            screen.print(line, markup=False, highlight=False)
    for line in check.weaknesses:
        logger.warning("reward: %s", line)
    for line in check.notes:
        logger.warning("check_rewards: %s", line)
    with writing(folder) as beside:
        (beside / FILE).write_text(encodable(check.as_json()), encoding="utf-8")


Judge = Callable[[RolloutRewards, Rollout, int], Any]
"""`(rewards, rollout, completions of each prompt) -> Rewards`"""


def check_rewards(
    rewards: RolloutRewards, rollouts: Mapping[str, tuple[Rollout, int]], judge: Judge, *, servers: bool = False
) -> RewardCheck:
    """Try reward functions on rollouts, each with its completions of a prompt; `OWN` are the policy's samples.

    servers: whether functions may ask other machines.
    """
    found = RewardCheck()
    here, aside = _parts(rewards)
    said: dict[str, dict[str, list[float]]] = {kind: {} for kind in rollouts}
    if here is not None:  # reward models: they remember nothing, and the device is this process's
        for kind, (rollout, copies) in rollouts.items():
            said[kind] |= _columns(judge(here, rollout, copies))
    if aside is not None:
        for name, (scores, why) in _aside(aside, rollouts, judge, servers).items():
            if why:
                found.notes.append(f"{name} was not tried: {why}")
            for kind, numbers in scores.items():
                said[kind][name] = numbers
    weights = dict(zip(rewards.names, rewards.weights_F.tolist(), strict=True))
    names = [name for name in rewards.names if all(name in columns for columns in said.values())]
    for kind, (rollout, _) in rollouts.items() if names else ():
        means = {name: _mean(said[kind][name]) for name in names}
        known = {name: mean for name, mean in means.items() if mean is not None}
        total = sum(weights[name] * mean for name, mean in known.items()) if known else None
        example = rollout.texts[0][:200] if rollout.texts else ""
        found.tried.append(Tried(kind, example, means, total))
    found.weaknesses = silent(found.tried) + weaknesses(found.tried)
    return found


def silent(tried: Sequence[Tried]) -> list[str]:
    """A line for each function that said nothing of any answer, as one does that lacks its `return`."""
    names = tried[0].rewards if tried else ()
    return [
        f"{name} gave None for each of these answers{own}: of answers like them nothing is learned by it"
        for own in [", the policy's own among them" if any(each.kind == OWN for each in tried) else ""]
        for name in names
        if all(each.rewards[name] is None for each in tried)
    ]


def weaknesses(tried: Sequence[Tried]) -> list[str]:
    """A line for each trivial kind of answer that earns more than the policy's own samples, the best first.

    Without samples, for a kind that earns more than all the others.
    """
    own = next((each.total for each in tried if each.kind == OWN), None)
    others = [each for each in tried if each.kind != OWN and each.total is not None]
    others.sort(key=lambda each: -(each.total or 0.0))
    if own is not None:
        better = [each for each in others if (each.total or 0.0) > own + 1e-6 * max(1.0, abs(own))]
        return [
            f"{each.kind} answers earn {shown(each.total)}, the policy's own samples {shown(own)}: training may end "
            "there"
            for each in better
        ]
    if len(others) > 1 and (others[0].total or 0.0) > (others[1].total or 0.0) + 1e-6:
        return [f"{others[0].kind} answers earn {shown(others[0].total)}, more than other trivial ones"]
    return []


def _mean(numbers: Sequence[float]) -> float | None:
    known = [number for number in numbers if not math.isnan(number)]
    return sum(known) / len(known) if known else None


def _columns(rewards: Any) -> dict[str, list[float]]:
    return dict(zip(rewards.names, rewards.scores_BF.T.tolist(), strict=True))


def _parts(rewards: RolloutRewards) -> tuple[RolloutRewards | None, RolloutRewards | None]:
    """What is asked in this process (reward models), and what in one of its own."""
    panel = rewards.panel
    if panel is None:
        return None, None
    if type(rewards) is not RolloutRewards:  # a user's method judges by the whole panel
        return None, rewards
    models = [isinstance(function, RewardModel) for function in panel.functions]
    if not any(models):
        return None, rewards
    return rewards.of([i for i, is_model in enumerate(models) if is_model]), (
        None if all(models) else rewards.of([i for i, is_model in enumerate(models) if not is_model])
    )


# -- a process of its own -----------------------------------------------------------------------

Said = dict[str, tuple[dict[str, list[float]], str]]
"""of each function its scores by kind, and why it has none"""


def _aside(rewards: RolloutRewards, rollouts: Mapping[str, tuple[Rollout, int]], judge: Judge, servers: bool) -> Said:
    """What functions say in processes of their own, one each: what one does is not held against another."""
    assert rewards.panel is not None
    if "fork" not in multiprocessing.get_all_start_methods():
        why = "this system has no processes that begin as a copy of this one"
        return {name: ({}, why) for name in rewards.names}
    if type(rewards) is not RolloutRewards:
        return _in_copy(rewards, rollouts, judge, servers)
    said: Said = {}
    for index in range(len(rewards.panel.functions)):
        said |= _in_copy(rewards.of([index]), rollouts, judge, servers)
    return said


def _in_copy(rewards: RolloutRewards, rollouts: Mapping[str, tuple[Rollout, int]], judge: Judge, servers: bool) -> Said:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings():  # Python 3.12 warns of threads, which the copy does not have
        warnings.simplefilter("ignore", DeprecationWarning)
        copy = multiprocessing.get_context("fork").Process(
            target=_in_child, args=(theirs, rewards, rollouts, judge, servers), daemon=True
        )
        copy.start()
    theirs.close()
    why = f"it had not answered after {SECONDS:g} s"
    try:
        if ours.poll(SECONDS):
            columns, why = ours.recv()
            if not why:
                return {name: ({kind: of[name] for kind, of in columns.items()}, "") for name in rewards.names}
    except (EOFError, OSError):
        why = "its process ended"
    finally:
        ours.close()
        copy.kill()
        copy.join()
    return {name: ({}, why) for name in rewards.names}


def _in_child(
    pipe: Connection, rewards: RolloutRewards, rollouts: Mapping[str, tuple[Rollout, int]], judge: Judge, servers: bool
) -> None:
    """The copy: it says nothing in the terminal, opens no connection, and ends without the parent's last words."""
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        torch.set_num_threads(1)
        with offline(not servers) as asked:
            columns = {kind: _columns(judge(rewards, *each)) for kind, each in rollouts.items()}
        pipe.send(({}, _asks(asked)) if asked else (columns, ""))
    except RewardError as error:
        pipe.send(({}, _asks(asked) if asked else str(error).splitlines()[0]))
    except BaseException as error:
        pipe.send(({}, f"{type(error).__name__}: {error}".splitlines()[0]))
    finally:
        pipe.close()
        os._exit(0)


def _asks(addresses: Sequence[str]) -> str:
    return f"it asks {addresses[0]}, which may cost money; check_rewards='all' tries it too"


@contextmanager
def offline(flag: bool) -> Iterator[list[str]]:
    """Within it no socket of Python is connected to another machine; yields the addresses that were asked for."""
    asked: list[str] = []
    if not flag:
        yield asked
        return
    plain, lookup = socket.socket, socket.getaddrinfo

    class Guarded(socket.socket):
        def connect(self, address: Any) -> None:
            refuse(address[0] if isinstance(address, tuple) else None)
            super().connect(address)

        def connect_ex(self, address: Any) -> int:
            refuse(address[0] if isinstance(address, tuple) else None)
            return super().connect_ex(address)

    def refuse(host: Any) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and name not in ("localhost", "::1", "", "0.0.0.0") and not str(name).startswith("127."):
            asked.append(str(name))
            raise ConnectionRefusedError(f"no connection to {name} while rewards are tried")

    def looked_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return lookup(host, *args, **kwargs)

    socket.socket, socket.getaddrinfo = Guarded, looked_up  # type: ignore[misc]
    try:
        yield asked
    finally:
        socket.socket, socket.getaddrinfo = plain, lookup  # type: ignore[misc]
