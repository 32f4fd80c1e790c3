"""The child process of `verifier`: it compares each answer that arrives on its standard input with a solution.

This is a script that imports nothing from the package. It says "ready" when it is. A request is a line of JSON,
`[text, solution, seconds]`. It is answered with the line "read" once the solution is read, and then "right", "wrong",
or "none" where the solution is no mathematics. A request that takes more than its seconds of CPU time ends the process,
whatever code of C runs then.
"""

import json
import logging
import os
import re
import signal
import sys
from typing import Any, TextIO

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MEMORY = 4 * 2**30
"""bytes that verification may take beyond what is in use at the start"""


FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "log", "ln", "lg",
    "exp", "sqrt", "abs", "min", "max", "gcd", "lcm", "mod", "det", "dim", "deg", "inf", "sup", "lim", "pi", "infty",
    "alpha", "beta", "gamma", "delta", "theta", "lambda", "sigma", "omega", "phi", "psi",
}  # fmt: skip
LETTERS = tuple(map(set, ("abcd", "xyzwt", "pqrs", "mnk", "ijk", "uvw", "rst")))
"""letters that stand for numbers together"""


def is_prose(text: str) -> bool:
    r"""Whether a text has words in it, which LaTeX would read as products of letters (`Paris`, but not `2ab` or `xy`).

    Between signs and digits a word has more than three letters; alone, any two letters that are not often multiplied.
    """
    plain = re.sub(r"\\((text|math|mbox|operatorname)[a-z]*\s*\{[^{}]*\}|[a-zA-Z]+)", " + ", text)
    words = [word.lower() for word in re.findall(r"[^\W\d_]{2,}", plain)]
    signs = re.search(r"[\d+*/^=<>|{}\\-]", plain) is not None
    names = [word for word in words if word not in FUNCTIONS]
    if signs:
        return any(len(word) > 3 for word in names)
    return any(len(word) > 3 or not any(set(word) <= letters for letters in LETTERS) for word in names)


def judge(text: str, solution: str, answers: TextIO) -> str:
    extraction = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    limits: dict[str, Any] = {"extraction_config": extraction, "parsing_timeout": None}
    gold = parse(solution, **limits) or (not is_prose(solution) and parse(f"${solution}$", **limits))
    if not gold:
        return "none"
    print("read", file=answers, flush=True)
    return "right" if verify(gold, parse(text, **limits), timeout_seconds=None) else "wrong"


def limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as numbers:
            in_use = int(numbers.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = in_use + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    except (ImportError, OSError, ValueError):  # not Linux
        pass


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its signals are off
    limit_memory()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        text, solution, seconds = json.loads(line)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            said = judge(text, solution, answers)
        except Exception:  # MemoryError among them
            said = "wrong"
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(said, file=answers, flush=True)


if __name__ == "__main__":
    main()
