"""What a training command lets its user hear: the lines of the run, and none that libraries say of themselves."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl.data.any_text import fitting

LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "peft", "tokenizers", "torch", "transformers")
"""whose own deprecated names are no business of a user of the command"""
WARNINGS = (
    "You passed a model_id to the",  # a command's model always is a name
    "'pin_memory' argument is set as true",  # there is no accelerator
)
"""beginnings of warnings that are of no use to a user of the command"""
NOTICES = (
    "Token indices sequence length is longer",  # rows are cut to `max_length`
    "The following generation flags are not valid",  # of the model's own generation config
    "The tokenizer has new PAD/BOS/EOS tokens",  # the trainer sets them
    "Caching is incompatible with gradient checkpointing",
    "`use_cache=True` is incompatible with",
)
"""the same of what transformers logs"""
_NO_ROWS = re.compile(r"There seems not to be a single sample in your epoch_iterator, stopping training at step (\d+)")
_REPORT = re.compile(r"(\w+) LOAD REPORT from: (.*)")
_REPORTED = re.compile(r"^(\S.*?) +\| (MISSING|UNEXPECTED|MISMATCH|CONVERSION)\b", re.MULTILINE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
LM_HEADS = ("lm_head.", "embed_out.")
"""weights of a language model that a classifier made of it has no place for"""
NAMED = 4
"""names of weights that a line holds"""


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, bars of libraries are for terminals only, and go when they are done; warnings are lines of ours.

    All is as it was afterwards. What a user has said of bars with HF_HUB_DISABLE_PROGRESS_BARS or
    HF_DATASETS_DISABLE_PROGRESS_BARS stands.
    """
    with _warnings_as_notes(), _notices_sifted(), _lines_folded(), _bars(sys.stderr.isatty()):
        yield


SECRETS = ("--api-key", "--hf-token")
"""options of servers whose values are shown to nobody"""


def without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command as they may stand in a terminal or a log: `***` for keys."""
    shown: list[str] = []
    secret = False
    for word in words:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            secret = name.replace("_", "-") in SECRETS
            shown.append(f"{name}=***" if secret and equals else word)
        else:
            shown.append("***" if secret else word)
    return shown


# -- warnings ------------------------------------------------------------------------------------


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    with warnings.catch_warnings():
        for beginning in WARNINGS:
            warnings.filterwarnings("ignore", re.escape(beginning))
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"({'|'.join(LIBRARIES)})(\.|$)")
        warnings.showwarning = _note
        yield


def _note(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
    """A warning as one line, with the library that says it where that is not ours."""
    parts = Path(filename).parts
    library = f"{parts[parts.index('site-packages') + 1]}: " if "site-packages" in parts[:-1] else ""
    say(f"{'' if library == 'trl: ' else library}{message}")


def say(text: str) -> None:
    """Print a line for the user on stderr; of several processes the first one does."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(fitting(f"note: {' '.join(text.split())}", sys.stderr), file=sys.stderr)


# -- what transformers logs ----------------------------------------------------------------------


@contextmanager
def _notices_sifted() -> Iterator[None]:
    import transformers  # noqa: F401  # which makes the handlers

    handlers = list(logging.getLogger("transformers").handlers)
    for handler in handlers:
        handler.addFilter(_is_useful)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if text.startswith(NOTICES):
        return False
    ends = _NO_ROWS.match(text)
    line = f"no row is left to train on: the run ends at step {ends[1]}" if ends else weights_line(text)
    if line and not hasattr(record, "told"):  # each handler asks
        say(line)
        record.told = True
    return line is None


def weights_line(text: str) -> str | None:
    """A report on loaded weights as one line, empty where it says nothing; None for another text.

    None also for weights of a wrong shape: an error follows, and refers to the report.
    """
    plain = _COLOURS.sub("", text)
    head, rows = _REPORT.search(plain), _REPORTED.findall(plain)
    if head is None or not {status for _, status in rows} <= {"MISSING", "UNEXPECTED"}:
        return None
    expected = LM_HEADS if head[1].endswith(CLASSIFIERS) else ()
    parts = [
        f"{words}: {_listed(names)}"
        for status, words in (("MISSING", "missing, so made anew"), ("UNEXPECTED", "not used"))
        if (names := [name for name, what in rows if what == status and not name.startswith(expected)])
    ]
    return f"weights of {head[2].strip()}: {'; '.join(parts)}" if parts else ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


class _Fitting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return fitting(super().format(record), sys.stderr)


@contextmanager
def _lines_folded() -> Iterator[None]:
    """What our modules log fits a terminal, where no handler of the user's takes it."""
    last = logging.lastResort
    before = None if last is None else last.formatter
    if last is not None:
        last.setFormatter(_Fitting())
    try:
        yield
    finally:
        if last is not None:
            last.setFormatter(before)


# -- bars ----------------------------------------------------------------------------------------


@contextmanager
def _bars(terminal: bool) -> Iterator[None]:
    """Of transformers, the Hub's downloads and datasets."""
    import datasets
    from transformers.utils import logging as of_transformers

    switches: list[tuple[str, Callable[[], bool], Callable[[], None], Callable[[], None]]] = [
        ("HF_HUB_DISABLE_PROGRESS_BARS", of_transformers.is_progress_bar_enabled,
         of_transformers.disable_progress_bar, of_transformers.enable_progress_bar),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", lambda: not datasets.are_progress_bars_disabled(),
         datasets.disable_progress_bars, datasets.enable_progress_bars),
    ]  # fmt: skip
    off = [(stop, go) for name, is_on, stop, go in switches if not terminal and is_on() and name not in os.environ]
    bar: Any = datasets.utils.tqdm
    whole, earlier = bar.__init__, of_transformers.set_tqdm_hook(_gone_when_done)
    bar.__init__ = functools.partialmethod(whole, leave=False)
    for stop, _ in off:
        stop()
    try:
        yield
    finally:
        bar.__init__ = whole
        of_transformers.set_tqdm_hook(earlier)
        for _, go in off:
            go()


def _gone_when_done(make: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """A bar of transformers; none while rich shows the bars of training, where each state of it would be a line."""
    from rich.file_proxy import FileProxy

    hidden = {"disable": True} if isinstance(sys.stderr, FileProxy) else {}
    return make(*args, **{**keywords, "leave": False, **hidden})
