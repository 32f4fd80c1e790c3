"""Live progress of a job with several stages; without a terminal, one line for each stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

QUIET_SECONDS = 15.0
"""least time between two lines if there is no terminal for bars"""


class Stage:
    """One bar: `advance` moves it and shows the newest figures next to it."""

    def __init__(self, bars: RichProgress, title: str, total: int):
        self._bars = bars
        self._title = title
        self._task = bars.add_task(title, total=total, figures="")
        self._figures: dict[str, float] = {}
        self._done = 0
        self._total = total
        self._last_line = time.perf_counter()

    def advance(self, steps: int = 1, figures: Mapping[str, float] | None = None) -> None:
        self._figures |= figures or {}
        self._done += steps
        shown = "  ".join(f"{name} [bold]{value:.2f}[/]" for name, value in self._figures.items())
        self._bars.update(self._task, advance=steps, figures=shown)
        if self._bars.disable and self._done < self._total and time.perf_counter() - self._last_line > QUIET_SECONDS:
            self._last_line = time.perf_counter()
            self._bars.console.print(f"{self._title} {self._done}/{self._total}  {shown}", highlight=False)

    def shorten(self) -> None:
        """Mark the stage as complete: it ended early."""
        self._bars.update(self._task, total=self._bars.tasks[self._task].completed)


class Progress:
    """One bar below the other for the stages, and lines of text above them."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self.seconds: dict[str, float] = {}
        self._bars = RichProgress(
            TextColumn("[bold cyan]{task.description:<10}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """A bar for the work of the block; `seconds` keeps its time."""
        start = time.perf_counter()
        if not self.console.is_terminal:
            self.say(f"{title} ...")
        yield Stage(self._bars, title, total)
        self.seconds[title] = time.perf_counter() - start


class StageCallback(TrainerCallback):
    """Moves a stage's bar at each log of a `Trainer`, and keeps the losses."""

    def __init__(self, stage: Stage, shown: Mapping[str, str]):
        self.stage = stage
        self.shown = shown
        """name in the log -> name next to the bar"""
        self.losses: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.stage.advance()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
        self.stage.advance(0, {name: float(logs[key]) for key, name in self.shown.items() if key in logs})
