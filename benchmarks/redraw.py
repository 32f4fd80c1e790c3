"""Draw the plots of docs/ again, from the numbers that lie there: python benchmarks/redraw.py

Of `random_walks_grpo.png` and `ddpo_*.png` no numbers were kept; their scripts draw them after a run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # some scripts are run as files, others as modules

import calculator  # noqa: E402
import guess_number  # noqa: E402
import random_walks  # noqa: E402
import reversed_words  # noqa: E402
import staleness  # noqa: E402
import vision_digits  # noqa: E402

from benchmarks import report, smollm2  # noqa: E402


def redraw(docs: Path, out: Path) -> list[Path]:
    """Draw into the same places below `out`; returns the files."""
    (out / "results").mkdir(parents=True, exist_ok=True)
    jobs = {
        "random_walks_ppo": random_walks, "calculator": calculator, "reversed_words": reversed_words,
        "guess_number": guess_number, "staleness": staleness, "vision_digits": vision_digits,
    }  # fmt: skip
    for name, job in jobs.items():
        job.plot(json.loads((docs / "results" / f"{name}.json").read_text()), out / "results" / f"{name}.svg")
    smollm2.draw(docs / "results" / "real_words.jsonl", out / "results" / "real_words.svg")
    report.chart(json.loads((docs / "benchmarks.json").read_text()), out / "benchmarks.svg")
    return [*(out / "results" / f"{name}.svg" for name in [*jobs, "real_words"]), out / "benchmarks.svg"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    print(*redraw(HERE.parent / "docs", parser.parse_args().out), sep="\n")
