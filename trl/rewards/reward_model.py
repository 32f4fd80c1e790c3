"""A trained reward model as a scorer of texts and as a reward function."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from trl.data.chat import ChatTemplate
from trl.data.encode import TextEncoder
from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.models.scoring import rewards

Text = str | list[dict[str, Any]]


class RewardModel:
    """Scores whole texts or conversations with a sequence classifier, `(score - mean) / std`.

    It tokenises and runs them as `RewardTrainer` does. `calibrate` sets mean and std from reference texts: then 0 is
    their mean and 1 is one standard deviation better. max_length: longer texts lose their end.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_length: int | None = None, batch_size: int = 32):
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        if labels is None:
            raise ValueError(f"{type(model).__name__} is no sequence classifier: load one with num_labels=1")
        if labels != 1:
            warnings.warn(
                f"num_labels={labels}: a reward model usually has 1; the reward is the mean over the labels",
                stacklevel=2,
            )
        self.model = model
        self.encoder = TextEncoder(tokenizer)
        self.max_length = max_length
        self.batch_size = batch_size
        self.mean = 0.0
        self.std = 1.0

    @torch.no_grad()
    def raw(self, texts: Sequence[Text]) -> list[float]:
        """The model's scores, not calibrated. Texts of similar length share a batch, so there is little padding."""
        was_training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device
        rendered = [text if isinstance(text, str) else self._rendered(text) for text in texts]
        rows = [self._row(ids, text) for ids, text in zip(self.encoder.encode(rendered), texts, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            packed = pack([TokenTree([], [Branch(rows[i])]) for i in chosen]).to(device)
            for i, score in zip(chosen, rewards(self.model, packed).tolist(), strict=True):
                scores[i] = score
        self.model.train(was_training)
        return scores

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.encoder.tokenizer)

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        """The conversation as text, up to the stop token of its last turn."""
        rendered = self._chat.split(messages[:-1], [messages[-1:]])
        return rendered.prompt + rendered.answers[0]

    def _row(self, ids: list[int], text: Text) -> list[int]:
        if not isinstance(text, str):  # the template writes the end of each turn
            return self.encoder.open_row(ids)[0][: self.max_length]
        head, tail = self.encoder.head, self.encoder.tail
        room = None if self.max_length is None else max(0, self.max_length - len(head) - len(tail))
        return head + ids[:room] + tail

    def score(self, texts: Sequence[Text]) -> list[float]:
        """Calibrated scores."""
        return [(score - self.mean) / self.std for score in self.raw(texts)]

    def calibrate(self, texts: Sequence[str]) -> RewardModel:
        """Give these texts mean 0 and standard deviation 1."""
        scores = torch.tensor(self.raw(texts), dtype=torch.float64)
        if len(scores) < 2 or not scores.isfinite().all() or scores.std() == 0:
            raise ValueError(
                f"cannot calibrate on {len(scores)} texts: give at least two that get different, finite scores"
            )
        self.mean, self.std = scores.mean().item(), scores.std().item()
        return self

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """The score of each prompt with its completion."""
        return self.score([_joined(*pair) for pair in zip(prompts, completions, strict=True)])


def _joined(prompt: Any, completion: Any) -> Text:
    if type(prompt) is not type(completion):
        raise ValueError("a prompt and its completion are both texts or both conversations")
    return prompt + completion
