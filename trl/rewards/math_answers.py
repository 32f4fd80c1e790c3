"""Whether a completion's mathematical answer equals the solution, by the symbolic verifier `math-verify`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from trl.rewards.texts import Completion, text_of
from trl.rewards.verifier import SECONDS, same_answers


def same_answer(text: str, solution: str, seconds: float = SECONDS) -> bool | None:
    r"""Whether the answer in `text` (the last `\boxed{}`, or else formula or number) equals the solution's.

    None: the solution cannot be parsed, which is not the writer's fault. `seconds`: of CPU time; what takes longer is
    stopped and is not the same.
    """
    return same_answers([(text, solution)], seconds)[0]


def accuracy_reward(
    completions: Sequence[Completion], solution: Sequence[str], *, verify_seconds: float = SECONDS, **columns: Any
) -> list[float | None]:
    """1 for the right answer, 0 for a wrong one or none, None where the row's `solution` cannot be parsed.

    An answer that takes more than `verify_seconds` to verify counts as wrong.
    """
    texts = [text_of(completion) for completion in completions]
    same = same_answers([(text, str(gold)) for text, gold in zip(texts, solution, strict=True)], verify_seconds)
    return [None if right is None else float(right) for right in same]


def reasoning_accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[str],
    reasoning_delimiters: Sequence[str] | None = None,
    *,
    verify_seconds: float = SECONDS,
    **columns: Any,
) -> list[float | None]:
    """`accuracy_reward` of what follows the last of the delimiters (None: `</think>`); 0 where there is none."""
    delimiters = ["</think>"] if reasoning_delimiters is None else list(reasoning_delimiters)
    if isinstance(reasoning_delimiters, str) or not delimiters or not all(delimiters):
        raise ValueError(f"reasoning_delimiters={reasoning_delimiters!r}: give a list of texts that end the reasoning")
    end = re.compile(".*(?:" + "|".join(re.escape(each) for each in delimiters) + ")", re.DOTALL)
    texts = [text_of(completion) for completion in completions]
    answers = [text[found.end() :] if (found := end.match(text)) else "" for text in texts]
    return accuracy_reward(answers, solution, verify_seconds=verify_seconds)


def exact_match_reward(completions: Sequence[Completion], solution: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion equals the row's `solution` apart from white space around both; else 0."""
    return [float(text_of(c).strip() == str(s).strip()) for c, s in zip(completions, solution, strict=True)]


def get_cosine_scaled_reward(
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_len: int = 1000,
) -> Callable[..., list[float | None]]:
    """A reward function on the row's `solution`: a short right answer is worth more, a short wrong one less.

    The cosine reward of arXiv:2502.03373, from length 0 (`max_value_correct`, `min_value_wrong`) to `max_len`
    (`min_value_correct`, `max_value_wrong`), where it stays. Lengths are those of the texts in characters. None where
    the solution cannot be parsed.
    """
    if max_len < 1:
        raise ValueError(f"max_len={max_len}: give a number of characters >= 1")

    def cosine_scaled_reward(
        completions: Sequence[Completion], solution: Sequence[str], **columns: Any
    ) -> list[float | None]:
        def scaled(text: str, right: float | None) -> float | None:
            if right is None:
                return None
            start, end = (max_value_correct, min_value_correct) if right else (min_value_wrong, max_value_wrong)
            angle = math.pi * min(len(text) / max_len, 1.0)
            return end + 0.5 * (start - end) * (1.0 + math.cos(angle))

        texts = [text_of(completion) for completion in completions]
        return [scaled(text, right) for text, right in zip(texts, accuracy_reward(texts, solution), strict=True)]

    return cosine_scaled_reward
