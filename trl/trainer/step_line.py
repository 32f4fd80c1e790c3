"""What is logged at a step as one line that a person can read, and how numbers are written there and in reports."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trl.trainer.metrics import with_advice
from trl.trainer.run_record import peak_device_memory, peak_memory

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

SHOWN: tuple[tuple[str, str], ...] = (
    ("reward", "reward"),
    ("rewards/accuracies", "accuracy"),
    ("accuracy", "accuracy"),
    ("rewards/margins", "margin"),
    ("margin", "margin"),
    ("kl", "KL"),
    ("completions/mean_length", "length"),
    ("completions/clipped_ratio", "cut"),
    ("loss", "loss"),
    ("mean_token_accuracy", "accuracy"),
    ("objective/scores", "score"),
    ("objective/kl", "KL"),
    ("loss/policy_avg", "policy loss"),
    ("loss/value_avg", "value loss"),
    ("learning_rate", "lr"),
    ("lr", "lr"),
)
"""metrics of a line in their order, and their names there; a name is used once"""
SPREADS = {"reward": "reward_std"}
"""metric -> what stands behind it as its spread"""
TWINS = {"score": "reward"}
"""label -> another one that says the same, where that was used"""
SHARES = frozenset({"completions/clipped_ratio"})
OF_SPEED = ("_runtime", "_per_second", "num_tokens", "epoch", "total_flos")
"""ends of names that a line of an evaluation leaves out"""
SEVERAL = 6
"""metrics of a line where none of `SHOWN` was logged"""
PATIENCE = 2
"""logs in a row with a number that is not healthy, before a line says so"""


def short(value: Any) -> str:
    """A number in few digits: 2.31, 8e-6, 1,920."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000 or (size >= 1 and float(value).is_integer()):
        return f"{value:,.0f}"
    if size >= 1e-3:
        return f"{value:.3g}"
    if not size:
        return "0"
    digits, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else (f"{value:.1e}").split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def duration(seconds: float) -> str:
    """4:10, or 1:02:03."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def gibibytes(count: float) -> str:
    """1.3 GiB, or 240 MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def held() -> str:
    """The most memory that was held so far, of the GPU where there is one; empty where that is not known."""
    device = peak_device_memory()
    most = peak_memory() if device is None else device
    return gibibytes(most) if most else ""


def read(logs: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """The metrics of a line, as label and text. before: what stands before their names in the logs."""
    used: set[str] = set()
    for name, label in SHOWN:
        value = logs.get(before + name)
        if value is None or label in used or TWINS.get(label) in used:
            continue
        used.add(label)
        if name in SHARES:
            if value:
                yield label, f"{value:.0%}"
            continue
        spread = logs.get(before + SPREADS.get(name, ""))
        yield label, short(value) + (f" ± {short(spread)}" if name in SPREADS and spread is not None else "")


def numbers(found: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Labels and texts as parts of a line."""
    for label, text in found:
        yield f"{text} {label}" if text.endswith("%") else f"{label} {text}"


class Clock:
    """Speeds of a run, by what its logs say and the time between them."""

    def __init__(self, step: int, last: int, tokens: float):
        self.first, self.last = step, last
        self._began = self._logged = time.perf_counter()
        self._tokens = tokens
        self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """Leave out the seconds of an evaluation."""
        self._began += seconds
        self._logged += seconds

    def read(self, step: int, tokens: float | None) -> Iterator[str]:
        """Tokens a second since the last log, and how long the rest of the run will take."""
        now = time.perf_counter()
        if tokens is not None and tokens > self._tokens and now > self._logged:
            yield f"{short(round((tokens - self._tokens) / (now - self._logged)))} tok/s"
            self._tokens = tokens
        self._logged = now
        memory = held()
        if memory:
            yield memory
        if self.first < step < self.last:
            yield f"{duration((now - self._began) / (step - self.first) * (self.last - step))} left"

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began


def training_line(step: int, logs: Mapping[str, Any], clock: Clock) -> str:
    """`step 20/300 · loss 2.31 · lr 8e-6 · 1,920 tok/s · 1.3 GiB · 4:10 left`."""
    named = list(numbers(read(logs))) or [f"{name} {short(value)}" for name, value in logs.items()][:SEVERAL]
    return " · ".join([f"step {step}/{clock.last}", *named, *clock.read(step, logs.get("num_tokens"))])


def evaluated(logs: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """What stands before the names of an evaluation, and its metrics; also those that no line of training has."""
    names = [name for name in logs if not name.endswith(OF_SPEED)]
    before = next((name.removesuffix("loss") for name in names if name.endswith("_loss")), "eval_")
    shown = {before + name for name, _ in SHOWN} | {before + name for name in SPREADS.values()}
    others = [name for name in names if name not in shown and isinstance(logs[name], int | float)]
    return before, dict(read(logs, before)) | {name.removeprefix(before): short(logs[name]) for name in others}


def evaluation_line(step: int, logs: Mapping[str, Any]) -> str:
    """The metrics of an evaluation, and how long it took."""
    before, found = evaluated(logs)
    runtime = logs.get(f"{before}runtime")
    parts = numbers(found.items())
    return " · ".join([f"evaluation after step {step}", *parts, *([] if runtime is None else [duration(runtime)])])


def folded(line: str, width: int) -> str:
    """The line in several where it is wider than that, broken between its parts."""
    first, *parts = line.split(" · ")
    rows = [first]
    for part in parts:
        if len(rows[-1]) + len(f" · {part}") <= width:
            rows[-1] += f" · {part}"
        else:
            rows.append(f"  {part}")
    return "\n".join(rows)


def narrowed(line: str, width: int) -> str:
    """The line without the memory and the time left where it is too wide with them: the bar shows both."""
    parts = line.split(" · ")
    while len(" · ".join(parts)) > width and parts[-1].endswith((" left", "GiB", "MiB")):
        parts.pop()
    return " · ".join(parts)


def last_line(step: int, logs: Mapping[str, Any], first: int = 0) -> str:
    """What is logged when training ends. first: the step that it went on from."""
    if step == first:
        return f"trained nothing: the run is at step {step:,}"
    steps = f"{step - first:,} step{'' if step - first == 1 else 's'}"
    count = steps if not first else f"{steps}, to step {step:,},"
    took, memory = duration(float(logs.get("train_runtime", 0.0))), held()
    return f"trained {count} in {took} · mean loss {short(logs.get('train_loss'))}" + (f" · {memory}" if memory else "")


def follows(args: TrainingArguments, state: TrainerState) -> str:
    """What comes between the next steps of training: `evaluation at 50`; empty where nothing does before their end."""
    kinds = (("evaluation", args.eval_strategy, state.eval_steps), ("checkpoint", args.save_strategy, state.save_steps))
    found = []
    for name, strategy, every in kinds:
        if strategy == "steps" and every:
            at = min((state.global_step // int(every) + 1) * int(every), state.max_steps)  # both come at the end too
            found.append((at, name))
    at, name = min(found, key=lambda one: one[0], default=(0, ""))
    return f"{name} at {at:,}" if at > state.global_step else ""


class Advice:
    """Says once what to do about a number that stays outside of what is healthy."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def of(self, logs: Mapping[str, Any]) -> Iterator[str]:
        """The lines that these logs give rise to."""
        for name, value in logs.items():
            found = with_advice(name, value)
            self._seen[name] = self._seen.get(name, 0) + 1 if found else min(self._seen.get(name, 0), 0)
            if found and self._seen[name] == PATIENCE:
                yield f"note: {name} {short(value)}: {found.advice}"
                self._seen[name] = -(10**9)
