"""Rewards for the form of a text: tags, patterns, length, repetition."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

Reward = Callable[..., list[float]]
Completion = str | Sequence[dict[str, Any]]
THINK = "<think>"
THINKING = re.compile(r"\s*<think>(?!.*<think>)(.*?)</think>(.+)", re.DOTALL)
ANSWERING = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)


class EpisodeText(str):
    """The text of an episode behind its prompt, answers of tools included; `turns`: what the policy wrote of it."""

    turns: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str, turns: Sequence[str]) -> EpisodeText:
        """The text with its turns."""
        made = cls(text)
        made.turns = tuple(turns)
        return made


def text_of(completion: Completion) -> str:
    """The policy's last words: the completion if it is a text, its last own turn, or its last own message."""
    if isinstance(completion, EpisodeText):
        return completion.turns[-1] if completion.turns else ""
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = said[-1].get("content") if said else ""
    if isinstance(content, list | tuple):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "")


def read_out(prompt: Any) -> str:
    """A prompt as text: of a conversation the turns, by the simple template for models without tokens for roles."""
    if isinstance(prompt, str):
        return prompt
    said = [(turn["role"].capitalize(), text_of([{**turn, "role": "assistant"}])) for turn in prompt]
    return "".join(f"{role}: {text}\n\n" for role, text in said)


def _with_thoughts(completions: Sequence[Completion], columns: dict[str, Any]) -> list[str]:
    """The texts with the `<think>` that the prompt ends with: a row's `prompts`, or as the template renders it."""
    asked = [columns.get(name) or [""] * len(completions) for name in ("prompts", "prompt_texts")]
    texts = []
    for completion, prompt, rendered in zip(completions, *asked, strict=True):
        text = text_of(completion)
        if not isinstance(prompt, str):  # a conversation may end with the beginning of the answer
            prompt = text_of(prompt[-1:]) if prompt else ""
        opened = any(before.rstrip().endswith(THINK) for before in (prompt, rendered))
        texts.append(THINK + text if opened and not text.lstrip().startswith(THINK) else text)
    return texts


def think_format_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 for a text that thinks in one pair of `<think>` tags and then says something, else 0.

    The prompt may hold the first tag, at its end.
    """
    return [float(THINKING.fullmatch(text) is not None) for text in _with_thoughts(completions, columns)]


def think_answer_format_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 for `<think>...</think> <answer>...</answer>` and nothing else, each tag once; else 0.

    The prompt may hold the first tag, at its end.
    """
    return [float(ANSWERING.fullmatch(text) is not None) for text in _with_thoughts(completions, columns)]


def pattern_reward(pattern: str, *, whole: bool = False) -> Reward:
    """A reward function: 1 where the regular expression is found (`whole`: where it is the whole text), else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r}: {error}; give a regular expression") from None

    def pattern_found(completions: Sequence[Completion], **columns: Any) -> list[float]:
        match = compiled.fullmatch if whole else compiled.search
        return [float(match(text_of(completion)) is not None) for completion in completions]

    return pattern_found


def length_penalty(most: int, *, slope: float = 1.0) -> Reward:
    """A reward function: 0 up to `most` tokens, then it falls linearly, by `slope` for each further `most` tokens."""
    if most < 1:
        raise ValueError(f"most={most}: give a number of tokens >= 1")

    def length(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [-slope * max(0, len(ids) - most) / most for ids in completion_ids]

    return length


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Reward:
    """A reward function: DAPO's soft overlong punishment, eq. 13 of arXiv:2503.14476; 0 down to -1."""
    if not 0 < soft_punish_cache <= max_completion_len:
        raise ValueError(f"soft_punish_cache={soft_punish_cache}: must lie in (0, {max_completion_len}]")

    def soft_overlong_punishment(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        start = max_completion_len - soft_punish_cache
        return [min(0.0, max(-1.0, (start - len(ids)) / soft_punish_cache)) for ids in completion_ids]

    return soft_overlong_punishment


def repeated_share(items: Sequence[Any], size: int) -> float:
    """Share of the runs of `size` items that repeat an earlier run; 0 if there is no run. In [0, 1)"""
    runs = [tuple(items[i : i + size]) for i in range(len(items) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def repetition_penalty(size: int = 3, most: float = 1.0) -> Reward:
    """A reward function: `-most` times the share of runs of `size` words that repeat an earlier run."""
    if size < 1:
        raise ValueError(f"size={size}: give a number of words >= 1")

    def repetition(completions: Sequence[Completion], **columns: Any) -> list[float]:
        return [-most * repeated_share(text_of(completion).lower().split(), size) for completion in completions]

    return repetition


def get_repetition_penalty_reward(ngram_size: int, max_penalty: float) -> Reward:
    """A reward function: `max_penalty`, at most 0, times the share of runs of words that repeat an earlier run.

    The N-gram penalty of arXiv:2502.03373. A text shorter than `ngram_size` words has reward 0.
    """
    if max_penalty > 0:
        raise ValueError(f"max_penalty={max_penalty}: it is added to the reward; give a number of at most 0")
    if ngram_size < 1:
        raise ValueError(f"ngram_size={ngram_size}: give a number of words >= 1")
    penalty = repetition_penalty(ngram_size, -max_penalty)
    penalty.__name__ = "repetition_penalty_reward"
    return penalty
