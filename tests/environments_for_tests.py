"""Environments for models that say random things: whatever they say is a call."""

from __future__ import annotations

import json
import random
import time
from typing import Any

from trl.data.records import Completion
from trl.environment.base_environment import TextEnvironment
from trl.environment.episodes import Episode
from trl.environment.tool_calls import Spoken, ToolCall


class Talkative(TextEnvironment):
    """Takes whatever is said for a call of its only tool."""

    def parse_tool_call(self, text: str) -> tuple[str, str]:
        return "tool", text

    def task_end_check(self, history: Any, model_turn: bool = True) -> tuple[bool, bool]:
        full = Episode.of(history).is_full
        return full, full


class Delayed:
    """Answers with some letters of what was said, sooner or later."""

    def __init__(self, seed: int | None = None):
        self.delays = None if seed is None else random.Random(seed)

    def __call__(self, text: str) -> str:
        if self.delays is not None:
            time.sleep(self.delays.random() ** 3 * 0.03)
        return " ".join(sorted(letter for letter in text if letter.isalpha())[:3]) or "none"


def talkative(seed: int | None = None, **settings: Any) -> Talkative:
    settings = {"max_turns": 3, "generation_kwargs": {"max_new_tokens": 2}, "tool_timeout": None, **settings}
    return Talkative(None, None, {"tool": Delayed(seed)}, settings.pop("reward_fn", early), **settings)


def early(responses: list[str], **columns: Any) -> list[float]:
    return [float(sum(letter in "abcdefgh" for letter in response)) for response in responses]


class Letters:
    """Rewards letters early in the alphabet, turn by turn."""

    def __init__(self) -> None:
        self.reward = 0.0

    def reset(self, wanted: str = "a") -> None:
        self.wanted = wanted

    def tool(self, text: str) -> str:
        """Look at letters.

        Args:
            text: The letters.
        """
        self.reward += sum(letter < "h" for letter in text if letter.isalpha())
        return f"a {getattr(self, 'wanted', 'b')}"


def letters(**settings: Any) -> Talkative:
    settings = {"max_turns": 3, "generation_kwargs": {"max_new_tokens": 2}, "tool_timeout": None, **settings}
    return Talkative(None, None, environment_factory=Letters, **settings)


def everything_is_a_call(text: str) -> Spoken:
    return Spoken(text, [ToolCall("tool", {"text": text})])


class Scripted:
    """A sampler that says `script(text so far, turn)` and the end of a turn, of a chat or of a text."""

    def __init__(self, tokenizer: Any, script: Any, end: str = "<|im_end|>", opens: str = "<|im_start|>assistant"):
        self.tokenizer, self.script, self.end, self.opens = tokenizer, script, end, opens

    def sample(self, prompts: list[list[int]], params: Any, n: int = 1) -> list[list[Completion]]:
        return [[self._said(prompt, params.max_new_tokens) for _ in range(n)] for prompt in prompts]

    def _said(self, prompt: list[int], most: int) -> Completion:
        text = self.tokenizer.decode(prompt)
        said = self.script(text, text.count(self.opens) - 1) + self.end
        ids = self.tokenizer(said, add_special_tokens=False).input_ids[:most]
        return Completion(ids, [-1.0] * len(ids), [-1.0] * len(ids), "stop")


def follow(trainer: Any, script: Any) -> None:
    """Have the model say what the script says; its log-probabilities are those that it gives these words."""
    trainer.source.sampler = Scripted(trainer.processing_class, script)
    trainer.source.measure = trainer.logprobs_of


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
