"""Whether an engine samples by the policy's weights: some completions of its own, scored by the trainer's forward pass.

An engine may answer success and keep old weights, or a part of them. Its stamp says what it was told, not what it has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from trl.data.packing import pack
from trl.data.pictures import PictureReader
from trl.data.records import Branch, Completion, TokenTree
from trl.generation.vllm.engine import Engine, EngineError, Request
from trl.generation.vllm.pictures import with_placeholders
from trl.generation.vllm.sync import everywhere, on_all
from trl.models.forward import eval_no_grad
from trl.models.precision import EXACT, TOLERANCES, coarsest, precision_of
from trl.models.scoring import score
from trl.models.unwrap import below_peft, below_value_head

logger = logging.getLogger(__name__)

ROWS, PROMPT, TOKENS = 4, 256, 16
"""completions of each check, most tokens of a prompt, tokens of a completion"""
MEAN, COARSE, LARGEST = 20.0, 5.0, 20.0
"""how far log-probabilities may be apart on average, by `Tolerance.ratio` of an exact precision or another; and at the
worst token, by that average. Two programs in float32 differ by 1e-6 to 1e-5; in bfloat16 by some 1e-2, and at rare
tokens by 1"""
HALF_NAMES = {"half": "float16", "float": "float32"}


class MismatchError(EngineError):
    """An engine samples by other weights than the policy's, whatever it says."""


class Apart(NamedTuple):
    """How far two computations of the same log-probabilities are apart."""

    tokens: int
    mean: float
    """of the absolute differences"""
    largest: float
    token: int
    """the one at which they differ most"""


def apart(own: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], ids: Sequence[Sequence[int]]) -> Apart:
    """Compare the log-probabilities of the same tokens."""
    pairs = [
        (abs(a - b) if math.isfinite(a - b) else math.inf, token)
        for ours, others, row in zip(own, theirs, ids, strict=True)
        for a, b, token in zip(ours, others, row, strict=True)
    ]
    if not pairs:
        return Apart(0, 0.0, 0.0, -1)
    largest, token = max(pairs)
    return Apart(len(pairs), math.fsum(size for size, _ in pairs) / len(pairs), largest, token)


def _end_of(prompt: list[int], most: int) -> list[int]:
    """The last tokens of a prompt; all of one with pictures, which cannot be cut anywhere."""
    return prompt if min(prompt, default=0) < 0 else prompt[-most:]


def logprobs_of(model: nn.Module, prompts: list[list[int]], ids: list[list[int]]) -> list[list[float]]:
    """The model's log-probabilities of completions at temperature 1, in one pass. Collective where it is sharded."""
    packed = pack(TokenTree(prompt, [Branch(row)]) for prompt, row in zip(prompts, ids, strict=True))
    with eval_no_grad(model):
        logprobs_BT = score(model, packed.to(next(model.parameters()).device)).logprobs_BT.float().cpu()
    return [row_T[: len(row)].tolist() for row_T, row in zip(logprobs_BT, ids, strict=True)]


def _computes_in(model: nn.Module) -> str:
    """The precision of the model's pass; accelerate's autocast lies around its `forward`."""
    around = (model, below_value_head(model), below_peft(model))
    return "bfloat16" if any("_original_forward" in vars(each) for each in around) else precision_of(model)


@dataclass
class Verification:
    """Checks an engine after each push of weights, or every k-th. Collective: `score` may be.

    Its completions follow the prompts that were sampled last, so that what an engine keeps of them is checked too.
    """

    score: Callable[[list[list[int]], list[list[int]]], list[list[float]]]
    """the trainer's own log-probabilities of completions, given prompts, at `temperature`"""
    precision: Callable[[], str]
    """in which the trainer computes: a key of `TOLERANCES`"""
    vocabulary: int
    every: int = 1
    """of the pushes; 0: none"""
    temperature: float = 1.0
    tolerance: float | None = None
    """how far they may be apart on average, in nats; None: as the precisions allow"""
    dtype: str | None = None
    """in which the engine computes; None: not known, maybe in 16 bits"""
    tied: bool = False
    """whether the policy's head is its embeddings"""
    own_engines: bool = False
    """whether each rank has an engine of its own"""
    context: int | None = None
    """most tokens of a prompt and its completion"""
    reader: PictureReader | None = None
    """what reads the pictures of prompts"""
    prompts: list[list[int]] = field(default_factory=list)
    """those that were sampled last"""
    pushes: int = 0
    last: Apart | None = None
    """what the last check has found"""

    @classmethod
    def of(cls, model: nn.Module, vocabulary: int | None, **given: Any) -> Verification:
        """Of a policy by its own forward pass; given: further fields."""
        network = below_peft(model)
        head, embeddings = network.get_output_embeddings(), network.get_input_embeddings()
        tied = head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", 0)
        return cls(partial(logprobs_of, model), partial(_computes_in, model), vocabulary or 100, tied=tied, **given)

    def saw(self, prompts: Sequence[Sequence[int]]) -> None:
        """Remember some of the prompts that are sampled."""
        self.prompts = [_end_of(list(map(int, prompt)), PROMPT) for prompt in prompts[:ROWS]]

    def __call__(self, engine: Engine, version: str, adapter: str | None) -> None:
        """MismatchError, on all ranks, where the engine samples by other weights than the policy's of now."""
        due = self.every > 0 and self.pushes % self.every == 0
        self.pushes += 1
        if not due:
            return
        if self.dtype is None:
            with suppress(EngineError):  # of this rank alone; who is away is said below, on all of them
                self.dtype = engine.settings().dtype
        prompts, answers = everywhere(
            "ask vLLM for completions", lambda: self._asked(engine, adapter), each=self.own_engines
        )
        ids, theirs = [one.ids for one in answers], [one.logprobs for one in answers]
        self._agree(self._stray(answers, version))
        self.last = apart(self.score(prompts, ids), theirs, ids)
        self._agree(self._said(self.last))

    def _asked(self, engine: Engine, adapter: str | None) -> tuple[list[list[int]], list[Completion]]:
        """Prompts, and a completion of each by the engine."""
        room = min(TOKENS, (self.context or 2 * TOKENS) // 2)
        most = PROMPT if self.context is None else min(PROMPT, self.context - room)
        prompts = [_end_of(prompt, most) for prompt in (self.prompts + self._some_prompts())[:ROWS]]
        params = {
            "n": 1, "max_tokens": room, "temperature": self.temperature, "logprobs": 0, "ignore_eos": True,
            "detokenize": False, "seed": self.pushes,
        }  # fmt: skip
        asked = [with_placeholders(Request(prompt, params, adapter), self.reader) for prompt in prompts]
        return prompts, [self._until_picture(one) for [one] in engine.generate(asked)]

    def _until_picture(self, one: Completion) -> Completion:
        """The completion up to a token that stands for a part of a picture, which no pass could read."""
        token = -1 if self.reader is None else self.reader.image_token_id
        end = one.ids.index(token) if token in one.ids else len(one.ids)
        return replace(one, ids=one.ids[:end], logprobs=one.logprobs[:end], raw_logprobs=one.raw_logprobs[:end])

    def _agree(self, said: str | None) -> None:
        """MismatchError, on all ranks, with what the first rank says that says something."""
        first = next((text for text in on_all(said) if text is not None), None)
        if first is not None:
            raise MismatchError(first)

    @staticmethod
    def _stray(answers: Sequence[Completion], version: str) -> str | None:
        found = sorted({span.version for one in answers for span in one.versions} - {version})
        if not found:
            return None
        return (
            f"after the weights {version!r} were given, vLLM samples by {found[0]!r}: another run may use it; give "
            "each run an engine of its own"
        )

    def _some_prompts(self) -> list[list[int]]:
        """Tokens that mean nothing, for the first check: before it only probes were sampled."""
        return [[(17 + 31 * row + 7 * place) % self.vocabulary for place in range(8)] for row in range(ROWS)]

    def limits(self) -> tuple[float, float, str]:
        """How far log-probabilities may be apart on average and at the worst token, and in which precision."""
        engines = HALF_NAMES.get(self.dtype or "bfloat16", self.dtype or "bfloat16").removeprefix("torch.")
        name = coarsest([self.precision(), engines if engines in TOLERANCES else "bfloat16"])
        mean = (MEAN if name in EXACT else COARSE) * TOLERANCES[name].ratio
        mean = mean if self.tolerance is None else self.tolerance
        return mean, mean * LARGEST, name

    def _said(self, found: Apart) -> str | None:
        """What is wrong; None: nothing."""
        mean, largest, name = self.limits()
        if found.mean <= mean and found.largest <= largest:
            return None
        return (
            f"vLLM does not sample by the policy's weights: the log-probabilities of {found.tokens} tokens that it "
            f"sampled are {found.mean:.2g} away from the trainer's on average and {found.largest:.2g} at most (token "
            f"{found.token}), where {name} allows {mean:.1g} and {largest:.1g}. {self._cause()}"
        )

    def _cause(self) -> str:
        if self.tied:
            return (
                "The policy's head is its embeddings, and for some models vLLM keeps the old head on a CPU: serve a "
                "copy with a head of its own (`trl vllm-serve --untie-embeddings`), train a LoRA adapter, or sample "
                "without vLLM (use_vllm=False)"
            )
        known = self.dtype is not None and self.precision() in EXACT
        coarse = "; or it computes in fewer bits (--dtype), then say so by vllm_verify_tolerance" if known else ""
        return (
            "Does it serve another model or a quantised one, or does its log say 'Failed to load weights'? Send the "
            f"weights another way (vllm_weight_sync), or sample without vLLM (use_vllm=False){coarse}"
        )
