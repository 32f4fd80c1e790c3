"""The child process of `math_answers`: it compares each answer that arrives on its standard input with a solution.

This is a script that imports nothing from the package. A request is a line of JSON, `[text, solution, seconds]`; the
answers are lines too: "?" once the solution is read, then "right", "wrong", or "none" where it is no mathematics. A
request that takes more than its seconds of CPU time ends the process, whatever code of C is running then.
"""

import json
import logging
import resource
import signal
import sys
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MEMORY = 4 * 2**30
"""bytes beyond what is in use at the start"""


def verdict(text: str, solution: str) -> str:
    extraction = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    limits: dict[str, Any] = {"extraction_config": extraction, "parsing_timeout": None}
    gold = parse(solution, **limits) or parse(f"${solution}$", **limits)
    print("?", flush=True)
    if not gold:
        return "none"
    return "right" if verify(gold, parse(text, **limits), timeout_seconds=None) else "wrong"


def main() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its signals are off
    for name, most in (("RLIMIT_AS", MEMORY), ("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0)):
        pass
    for line in sys.stdin:
        text, solution, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            said = verdict(text, solution)
        except Exception:
            said = "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(said, flush=True)


if __name__ == "__main__":
    main()
