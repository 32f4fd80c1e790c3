"""Makes reward functions of what a user gives: names, reward models, their folders, judges of pairs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trl.data.user_functions import Begun, in_order
from trl.models.prepare import context_length, load_model, load_tokenizer
from trl.models.unwrap import below_accelerate, below_peft
from trl.rewards.math_answers import accuracy_reward, exact_match_reward, reasoning_accuracy_reward
from trl.rewards.panel import RewardError, RewardFunction, RewardPanel
from trl.rewards.reward_model import RewardModel
from trl.rewards.sentiment import sentiment_reward
from trl.rewards.texts import (
    read_out,
    repetition_penalty,
    text_of,
    think_answer_format_reward,
    think_format_reward,
)

RewardSource: TypeAlias = Callable[..., Any] | nn.Module | str
Judge = Callable[[list[Any], list[list[Any]]], Sequence[int]]
"""`f(prompts, pairs) -> 0 (the first is better), 1 (the second) or -1 (no opinion), one for each pair`"""

REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy_reward,
    "exact_match": exact_match_reward,
    "reasoning_accuracy": reasoning_accuracy_reward,
    "repetition": repetition_penalty(),
    "sentiment": sentiment_reward,
    "think_answer_format": think_answer_format_reward,
    "think_format": think_format_reward,
}
"""name -> `f(prompts, completions, completion_ids, **columns) -> one number or None each`"""


def reward_named(
    name: str, tokenizer: Any = None, device: torch.device | str = "cpu", like: torch.dtype | None = None
) -> RewardFunction:
    """An entry of `REWARDS`, `package.module:function`, the folder (or hub name) of a reward model, or a judge's URL.

    like: the dtype of a reward model's weights; None: as they were saved.
    """
    if name in REWARDS:
        return REWARDS[name]
    if name.startswith(("http://", "https://")):
        from trl.rewards.served_judge import ServedJudge

        return ServedJudge(name)
    module, colon, function = name.partition(":")
    if colon and not Path(name).exists():
        return _imported(name, module, function)
    if not Path(name).exists() and "/" not in name:
        raise ValueError(
            f"reward_funcs={name!r}: no folder of that name; choose one of {', '.join(REWARDS)}, "
            "`package.module:function`, a reward model's folder, or the URL of a judge's server"
        )
    model = load_model(name, AutoModelForSequenceClassification, {"num_labels": 1}, frozen=True, like=like)
    return of_model(model, name if tokenizer is None else tokenizer, device)


def _imported(name: str, module: str, function: str, field: str = "reward_funcs") -> Callable[..., Any]:
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field}={name!r}: {error}; give `package.module:function`") from error
    if not callable(found):
        raise ValueError(f"{field}={name!r}: not a function")
    return found  # type: ignore[no-any-return]


def judge_named(name: str) -> Judge | Any:
    """The judge of pairs at `package.module:name`: a function, or an object of a class."""
    module, _, function = name.partition(":")
    found = _imported(name, module, function, "judge")
    return found() if isinstance(found, type) else found


def of_model(model: Any, tokenizer: Any, device: torch.device | str) -> RewardModel:
    """A reward model as a reward function; tokenizer None: the one in the model's folder."""
    tokenizer = load_tokenizer(tokenizer if tokenizer is not None else model.config._name_or_path)
    return RewardModel(model.to(device).eval().requires_grad_(False), tokenizer, max_length=context_length(model))


def reward_panel(
    functions: RewardSource | Sequence[RewardSource],
    tokenizers: Any = None,
    timeout: float | Sequence[float | None] | None = None,
    device: torch.device | str = "cpu",
    like: torch.dtype | None = None,
) -> RewardPanel:
    """One panel of functions, names, reward models and folders. `tokenizers`: of the models, one each or for all.

    like: see `reward_named`.
    """
    listed: list[Any] = list(functions) if isinstance(functions, list | tuple) else [functions]
    given = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(listed)
    if len(given) != len(listed):
        raise ValueError(f"reward_processing_classes: {len(given)} for {len(listed)} reward functions; give one each")

    def function_of(source: RewardSource, tokenizer: Any) -> RewardFunction:
        if isinstance(source, str):
            return reward_named(source, tokenizer, device, like)
        if isinstance(source, nn.Module) and isinstance(below_peft(source), PreTrainedModel):
            return of_model(below_accelerate(source), tokenizer, device)
        return source

    return RewardPanel([function_of(s, t) for s, t in zip(listed, given, strict=True)], timeout)


def pairwise(judge: Judge | Any) -> Callable[..., list[float | None]]:
    """A reward function on groups of two: 1 for the better completion, 0 for the other, None for both if undecided.

    judge: a function of the type `Judge`, or an object whose method `judge` is one. Such a method reads texts: of a
    conversation the turns as `User: ...`, and of its completions what the assistant says.
    """
    if isinstance(judge, type):
        raise ValueError(f"judge: {judge.__name__} is a class; give an object, {judge.__name__}()")
    decide, reads_texts = getattr(judge, "judge", judge), hasattr(judge, "judge")
    if not callable(decide):
        raise ValueError(
            f"judge={judge!r}: give a function (prompts, pairs) -> choices, or an object with one, `judge`"
        )

    def judged(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        asked = list(prompts[::2])
        pairs = [list(completions[i : i + 2]) for i in range(0, len(completions), 2)]
        if reads_texts:
            asked = [prompt if isinstance(prompt, str) else read_out(prompt) + "Assistant:" for prompt in asked]
            pairs = [[text_of(said) for said in pair] for pair in pairs]
        given = Begun(partial(decide, asked, pairs)).result()
        try:
            choices = in_order(given)
        except TypeError as error:
            raise RewardError(f"the judge gave {error}") from None
        if len(choices) != len(pairs) or not set(choices) <= {-1, 0, 1}:
            raise RewardError(f"the judge gave {choices} for {len(pairs)} pairs: give 0, 1 or -1 (no opinion) for each")
        return [score for choice in choices for score in (_CHOICES[choice])]

    judged.__name__ = getattr(judge, "__name__", type(judge).__name__)
    return judged


_CHOICES: dict[int, tuple[float | None, float | None]] = {0: (1.0, 0.0), 1: (0.0, 1.0), -1: (None, None)}
