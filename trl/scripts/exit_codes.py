"""How a command ends: its exit code, and an error as one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

INTERRUPTED = 130
BAD_INPUT = 2
SPEAK_FOR_THEMSELVES = (ValueError, OSError, ImportError, RuntimeError, NotImplementedError)
"""errors whose text is written for users; for others the type is printed too"""


def exit_code(call: Callable[[], Any], debug: bool = False) -> int:
    """Run the call; returns its whole number, or 0, or 2 after an error, or 130 after an interruption."""
    try:
        code = call()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return fail(one_line(error))
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def one_line(error: BaseException) -> str:
    """An error as a single line that names the thing."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SPEAK_FOR_THEMSELVES):
        return text
    return f"{type(error).__name__}: {text} (an unforeseen error; --debug shows where)"


def fail(line: str) -> int:
    """Print the error; returns the exit code of bad input."""
    print(f"error: {line}", file=sys.stderr)
    return BAD_INPUT
