"""A teacher behind a server of vLLM: what it says of tokens that it did not write, and completions of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trl.generation.sampler import Sampler
from trl.generation.vllm.client import ServerEngine
from trl.generation.vllm.engine import Engine, EngineError, Request
from trl.generation.vllm.sampler import VLLMSampler, check_release

logger = logging.getLogger(__name__)
PROBED = 512
"""tokens of the text by which two tokenizers are compared"""


@dataclass
class ServedTeacher:
    """A model of an engine, asked for the log-probabilities of given completions.

    top: of how many of its likeliest tokens at each place; 0: of the completion's token alone; -1: of all.
    """

    engine: Engine
    tokenizer: Any
    top: int
    adapter: str | None = None
    """name of the adapter that is the teacher; None: the model itself"""

    @classmethod
    def at(cls, url: str, tokenizer: Any, top: int, name: str | None = None, wait: float = 240.0) -> ServedTeacher:
        """The teacher at an address; EngineError where it serves no such name, ValueError where it reads other tokens.

        name: of one of the server's adapters, or of its model; None: its model.
        """
        engine = ServerEngine(url, wait=wait, api_key=os.environ.get("VLLM_API_KEY"))
        about = engine.about()
        check_release(about)
        own = {about.model, about.model.rstrip("/").rsplit("/", 1)[-1]}
        if name is not None and name not in own and name not in about.adapters:
            served = ", ".join([about.model, *about.adapters])
            raise EngineError(f"teacher_model: the server at {url} has no {name!r}; it has {served}")
        check_tokens(engine, tokenizer)
        return cls(engine, tokenizer, top, name if name in about.adapters else None)

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt with its completion: scoring a row makes one token more."""
        longest = self.engine.about().max_model_len
        return None if longest is None else longest - 1

    def sampler(self) -> Sampler:
        """Completions by the teacher."""
        engine = self.engine if self.adapter is None else _OfAdapter(self.engine, self.adapter)
        return VLLMSampler(engine, None, self.tokenizer)  # type: ignore[arg-type]

    def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], vocabulary: int
    ) -> tuple[Tensor | None, Tensor]:
        """Tokens [B, T, K], best first, and their log-probabilities; 0 where a completion has ended.

        With `top` 0: None, and the log-probabilities of the completions' own tokens [B, T]. vocabulary: of the student;
        tokens beyond it are left out.
        """
        rows = [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
        if any(min(row, default=0) < 0 for row in rows):
            raise ValueError(
                "teacher_model: prompts have pictures, which a teacher behind a server is not shown: load it here "
                "(teacher_model=a model, or its folder)"
            )
        found = self.engine.prompt_logprobs(rows, self.top, self.adapter)
        asked = [
            entries[len(entries) - len(ids) :] for entries, ids in zip(found, completions, strict=True)
        ]  # of the completions
        width = max(map(len, completions), default=0)
        if self.top == 0:
            own = torch.zeros(len(rows), width)
            for row, (entries, ids) in enumerate(zip(asked, completions, strict=True)):
                own[row, : len(ids)] = torch.tensor([entry[token] for entry, token in zip(entries, ids, strict=True)])
            return None, own
        best = [[_best(entry, self.top, vocabulary) for entry in entries] for entries in asked]
        known = min((len(entry) for entries in best for entry in entries), default=0)
        tokens, logprobs = torch.zeros(len(rows), width, known, dtype=torch.long), torch.zeros(len(rows), width, known)
        for row, entries in enumerate(best):
            if entries:
                pairs = torch.tensor([entry[:known] for entry in entries], dtype=torch.float64)
                tokens[row, : len(entries)], logprobs[row, : len(entries)] = pairs[..., 0].long(), pairs[..., 1].float()
        return tokens, logprobs


def _best(entry: dict[int, float], top: int, vocabulary: int) -> list[tuple[int, float]]:
    """The `top` likeliest tokens that the student has too, best first; in the order of tokens where all are known."""
    held = [(token, logprob) for token, logprob in entry.items() if token < vocabulary]
    if top < 0:
        return sorted(held)
    return sorted(held, key=lambda each: (-each[1], each[0]))[:top]


@dataclass
class _OfAdapter:
    """An engine whose completions are by one of its adapters."""

    engine: Engine
    adapter: str

    def generate(self, requests: Sequence[Request]) -> Any:
        return self.engine.generate([replace(each, adapter=self.adapter) for each in requests])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def check_tokens(engine: Engine, tokenizer: Any) -> None:
    """ValueError where the engine's tokenizer reads a text of many tokens in another way."""
    special = set(tokenizer.all_special_ids)
    plain = [token for token in range(len(tokenizer)) if token not in special]
    text = tokenizer.decode(plain[:: max(1, len(plain) // PROBED)])
    ours, theirs = tokenizer.encode(text, add_special_tokens=False), engine.tokenized(text)
    if theirs is None:
        logger.warning("teacher_model: its server has no tokenizer, so nothing says that it reads the student's tokens")
        return
    if ours != theirs:
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours) - 1)
        read = [ids[place] if place < len(ids) else "nothing" for ids in (theirs, ours)]
        raise ValueError(
            f"teacher_model: of a text of {len(ours)} tokens its tokenizer reads {read[0]} where the student's reads "
            f"{read[1]}: both must read the same tokens; serve a teacher with the student's tokenizer"
        )
