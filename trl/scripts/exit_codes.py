"""How a command ends: its exit code, and an error as one line."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trl.data.any_text import fitting

INTERRUPTED = 130
BAD_INPUT = 2
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""environment variable of a process that torchrun has started: where the launcher reads its error"""
SPEAK_FOR_THEMSELVES = (ValueError, OSError, ImportError, RuntimeError, NotImplementedError)
"""errors whose text is written for users; for others the type is printed too"""
POINTERS = (
    (r"row \d+ of the .*data set", "`trl {job} --help` shows a row"),
    (r"the \S+ data set (has none of the columns|lacks the column)", "`trl {job} --help` shows a row"),
    (r"dataset: of its columns .* none is read", "`trl {job} --help` shows a row"),
    (r"all [\d,]+ (rows|pairs) of the \S+ data set (are|have)", "`trl inspect {seen}` with these settings shows them"),
    (r"reward function .* failed: ", "--debug shows where"),
)
"""beginning of an error of a training command -> where its user finds more"""
_MEMORY = re.compile(r"\w+ (backend |error: )?out of memory|.{0,80}DefaultCPUAllocator")
"""how torch says it of a GPU and of main memory"""
_ASKED = re.compile(r"to allocate ([\d.]+) ?([KMGT]iB|bytes)", re.IGNORECASE)


class Pointer(str):
    """A note of an error that stands at the end of its line."""


def exit_code(call: Callable[[], Any], debug: bool = False) -> int:
    """Run the call; returns its whole number, or 0, or 2 after an error, or 130 after an interruption."""
    try:
        code = call()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if os.environ.get(ERROR_FILE):
            from trl.trainer.ranks import record_error

            record_error(error)
        return fail(one_line(error))
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def one_line(error: BaseException) -> str:
    """An error as a single line that names the thing."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and text.startswith("[Errno"):
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    pointers = [note for note in getattr(error, "__notes__", ()) if isinstance(note, Pointer)]
    if is_of_memory(error):
        asked = _ASKED.search(text)
        text = "out of memory" + (f", as {_size(asked[1], asked[2])} more were asked for" if asked else "")
    elif not isinstance(error, SPEAK_FOR_THEMSELVES):
        text = f"{type(error).__name__}: {text}"
        pointers.append(Pointer("an unforeseen error; --debug shows where"))
    return f"{text} ({'; '.join(pointers)})" if pointers else text


def is_of_memory(error: BaseException) -> bool:
    """Whether the memory of this process or of its GPU did not suffice."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_MEMORY.match(str(error))))


def _size(number: str, unit: str) -> str:
    return f"{float(number) / 2**30:,.1f} GiB" if unit == "bytes" else f"{number} {unit}"


@contextmanager
def pointing(job: str, lengths: str = "--max_length") -> Iterator[None]:
    """End the line of an error in a training command with where more is said. lengths: settings that bound memory."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        found = next((words for beginning, words in POINTERS if re.match(beginning, text)), None)
        if is_of_memory(error):
            found = (
                f"a smaller {lengths} takes less, and so does --per_device_train_batch_size with more "
                "--gradient_accumulation_steps, which changes no number"
            )
        if found is not None:
            error.add_note(Pointer(found.format(job=job, seen="grpo" if job == "ppo" else job)))
        raise


def fail(line: str) -> int:
    """Print the error; returns the exit code of bad input."""
    print(fitting(f"error: {line}", sys.stderr), file=sys.stderr)
    return BAD_INPUT
