"""SmolLM2-135M-Instruct learns to answer sums of reasoning-gym with a bare equation: GRPO with LoRA, two rewards.

pip install reasoning-gym==0.1.25
python -m benchmarks.sums_smollm2 --seed 0 --out runs/sums-0
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.smollm2 import arguments, learn


def problems(count: int, seed: int, terms: int) -> list[dict[str, Any]]:
    """Sums and differences of digits: "State the final answer to the following arithmetic problem: 4 - 3 ="."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset("chain_sum", max_terms=terms, max_digits=1, size=count, seed=seed)
    asked = [row["question"] + "\nAnswer with an equation, such as 1 + 1 = 2." for row in drawn]
    return [
        {"prompt": [{"role": "user", "content": text}], "answer": row["answer"]}
        for text, row in zip(asked, drawn, strict=True)
    ]


def right_number(completions: list[list[dict[str, str]]], answer: list[str]) -> list[float]:
    """1 if the last number is the answer."""
    said = [re.findall(r"-?\d+", completion[-1]["content"]) for completion in completions]
    return [float(numbers[-1:] == [right]) for numbers, right in zip(said, answer, strict=True)]


def equation(completions: list[list[dict[str, str]]]) -> list[float]:
    """1 for digits with signs between them, an equals sign, a number, and nothing else."""
    form = re.compile(r"\d( [+-] \d)+ = -?\d+")
    return [float(bool(form.fullmatch(completion[-1]["content"]))) for completion in completions]


def main(argv: Sequence[str] | None = None) -> None:
    asked = arguments(__doc__, argv, tokens=20, prompts=8)
    learn(asked, problems(2000, asked.seed, terms=2), [right_number, equation])


if __name__ == "__main__":
    main()
