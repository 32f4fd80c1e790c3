"""A row that is being sampled, and the step that all engines share: it takes logits and adds a token to each row."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trl.data.records import Completion
from trl.generation.filters import filter_logits, inverse_cdf, log_partition, logprobs_of
from trl.generation.sampler import SamplingParams
from trl.generation.stopping import StopStrings

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(eq=False, slots=True)
class Row:
    """A completion that is being sampled."""

    prompt: Sequence[int]
    key: int
    """64 bits; with the step they determine the row's random numbers"""
    limit: int
    """most tokens it may get"""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    """empty while the row runs"""
    kept: list[list[int]] = field(default_factory=list)
    """for each token those that were left to choose from; only where that is asked for"""
    seen_V: Tensor | None = None
    """True for tokens of prompt and completion; kept only for the repetition penalty"""

    def completion(self) -> Completion:
        return Completion(self.ids, self.logprobs, self.raw_logprobs, self.finish_reason, kept=self.kept or None)


def make_rows(prompts: Sequence[Sequence[int]], params: SamplingParams, n: int, context: int | None) -> list[list[Row]]:
    """The n rows of each prompt. `context`: most tokens of prompt and completion together."""
    if n < 1:
        raise ValueError(f"n={n}: give the number of completions of each prompt, 1 or more")
    seeds = _seeds(params.seed, len(prompts))
    copies: Counter[int] = Counter()
    rows = []
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{index}] is empty: give at least one token, such as the beginning-of-text token")
        if context is not None and len(prompt) >= context:
            raise ValueError(f"prompts[{index}] has {len(prompt)} tokens, the model's context {context}: shorten it")
        limit = params.max_new_tokens if context is None else min(params.max_new_tokens, context - len(prompt))
        stream = _hash(np.asarray(prompt, dtype=np.int64).tobytes() + str(seeds[index]).encode())
        rows.append([Row(prompt, (stream + copies[stream] + copy) % 2**64, limit) for copy in range(n)])
        copies[stream] += n
    return rows


def _seeds(seed: int | tuple[int, ...] | None, prompts: int) -> Sequence[int]:
    if isinstance(seed, tuple):
        if len(seed) != prompts:
            raise ValueError(f"seed holds {len(seed)} numbers for {prompts} prompts: give one for each, or one for all")
        return seed
    return [int(torch.randint(2**62, ())) if seed is None else seed] * prompts


def uniforms(keys: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """A number in [0, 1) for each (key, step): two rounds of the SplitMix64 finaliser (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        state = _mix(np.array(keys, dtype=np.uint64) + _GOLDEN)
        state = _mix(state + (np.array(steps, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Stepper:
    """Adds one token to each row: filters, draws, records both log-probabilities, and finds the rows that are done."""

    def __init__(
        self,
        params: SamplingParams,
        end_tokens: Sequence[int],
        stop_strings: StopStrings | None,
        device: torch.device,
        on_tokens: Callable[[Sequence[Row]], None] | None = None,
    ) -> None:
        """on_tokens: is told the rows that have got tokens; a step adds one, and on a GPU several steps are told."""
        self.params, self.on_tokens = params, on_tokens
        self.end_tokens = frozenset(end_tokens)
        self.stop_strings = stop_strings
        self.end_index = torch.tensor(sorted(end_tokens), dtype=torch.long, device=device)
        self.barred: Tensor | None = None

    def bar(self, tokens: Sequence[int]) -> None:
        """These are never sampled: a picture's token without a picture has no meaning.

        Log-probabilities are of the distribution with them, as a trainer computes them, unless filters choose the
        words: then they are not among the chosen.
        """
        if tokens:
            self.barred = torch.tensor(tokens, dtype=torch.long, device=self.end_index.device)

    @property
    def barred_before_filters(self) -> Tensor | None:
        params = self.params
        return self.barred if params.top_k or params.top_p < 1 or params.min_p else None

    def advance(self, rows: Sequence[Row], logits_RV: Tensor) -> list[int]:
        """Pick a token for each row and append it; returns the tokens. No row may be done already."""
        tokens_R, logprobs_R, raw_R = self.pick(rows, logits_RV.float())
        tokens = tokens_R.tolist()
        for row, token, logprob, raw in zip(rows, tokens, logprobs_R.tolist(), raw_R.tolist(), strict=True):
            if not math.isfinite(raw):
                raise FloatingPointError("the model's logits are not finite: look at its weights and its precision")
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.raw_logprobs.append(raw)
            if row.seen_V is not None:
                row.seen_V[token] = True
        self.finish(rows)
        self.tell(rows)
        return tokens

    def tell(self, rows: Sequence[Row]) -> None:
        """Tell whoever listens that these rows have got tokens."""
        if self.on_tokens is not None:
            self.on_tokens(rows)

    def pick(self, rows: Sequence[Row], logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(tokens_R, logprobs_R, raw_logprobs_R)`: under the sampled distribution, and under the model's own."""
        reshapes = self.params.reshapes
        seen_RV = self._seen(rows, logits_RV) if reshapes else None
        forbidden_RV = self._forbidden(rows, logits_RV) if reshapes else None
        if self.params.say_kept:
            filtered_RV = filter_logits(logits_RV, self.params, seen_RV, forbidden_RV)
            for row, left_V in zip(rows, (filtered_RV > -torch.inf).cpu(), strict=True):
                row.kept.append([] if left_V.all() else left_V.nonzero().flatten().tolist())
        uniform_R = self._uniforms(rows, logits_RV.device)
        return pick(logits_RV, self.params, uniform_R, seen_RV, forbidden_RV, self.barred)

    def _uniforms(self, rows: Sequence[Row], device: torch.device) -> Tensor:
        drawn = uniforms([row.key for row in rows], [len(row.ids) for row in rows])
        return torch.from_numpy(drawn.astype(np.float32) if device.type == "mps" else drawn).to(device)

    def _seen(self, rows: Sequence[Row], logits_RV: Tensor) -> Tensor | None:
        if self.params.repetition_penalty == 1.0:
            return None
        for row in rows:
            if row.seen_V is None:
                row.seen_V = torch.zeros(logits_RV.shape[-1], dtype=torch.bool, device=logits_RV.device)
                seen = [token for token in (*row.prompt, *row.ids) if token >= 0]  # a picture is no word
                row.seen_V[torch.tensor(seen, dtype=torch.long, device=logits_RV.device)] = True
        return torch.stack([row.seen_V for row in rows if row.seen_V is not None])

    def _forbidden(self, rows: Sequence[Row], logits_RV: Tensor) -> Tensor | None:
        early, barred = [len(row.ids) < self.params.min_new_tokens for row in rows], self.barred_before_filters
        ends = any(early) and bool(self.end_tokens)
        if not ends and barred is None:
            return None
        forbidden_RV = torch.zeros_like(logits_RV, dtype=torch.bool)
        if ends:
            known = self.end_index[self.end_index < logits_RV.shape[-1]]  # old scripts name one that never comes
            forbidden_RV[:, known] = torch.tensor(early, device=logits_RV.device)[:, None]
        return forbidden_RV if barred is None else forbidden_RV.index_fill(1, barred, True)

    def finish(self, rows: Sequence[Row]) -> None:
        """Say of each row whether its last token ended it, and why."""
        for row in rows:
            if len(row.ids) >= self.params.min_new_tokens and row.ids[-1] in self.end_tokens:
                row.finish_reason = "stop"
        if self.stop_strings is not None:
            running = [r for r in rows if not r.finish_reason and len(r.ids) >= self.params.min_new_tokens]
            for row, found in zip(running, self.stop_strings.found([r.ids for r in running]), strict=True):
                row.finish_reason = "stop" if found else ""
        for row in rows:
            if not row.finish_reason and len(row.ids) >= row.limit:
                row.finish_reason = "length"


def pick(
    logits_RV: Tensor,
    params: SamplingParams,
    uniform_R: Tensor,
    seen_RV: Tensor | None,
    forbidden_RV: Tensor | None,
    barred: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Stepper.pick`; nothing waits for the device. seen_RV, forbidden_RV: see `filter_logits`; barred: `bar`."""

    def without(values_RV: Tensor, nothing: float) -> Tensor:
        return values_RV if barred is None else values_RV.index_fill(1, barred, nothing)

    probs_RV = logits_RV.softmax(-1)
    if not params.reshapes:
        tokens_R = inverse_cdf(without(probs_RV, 0.0), uniform_R)
        logprobs_R = logprobs_of(tokens_R, probs_RV)
        return tokens_R, logprobs_R, logprobs_R
    raw_R = -log_partition(logits_RV, probs_RV)
    filtered_RV = filter_logits(logits_RV, params, seen_RV, forbidden_RV)
    if params.temperature == 0:
        tokens_R = without(filtered_RV, -torch.inf).argmax(-1)
        logprobs_R = torch.zeros_like(raw_R)
    else:
        probs_RV = filtered_RV.softmax(-1)
        tokens_R = inverse_cdf(without(probs_RV, 0.0), uniform_R)
        logprobs_R = logprobs_of(tokens_R, probs_RV)
    return tokens_R, logprobs_R, raw_R + logits_RV.gather(1, tokens_R[:, None]).squeeze(1)


def uniforms_on_device(key_R: Tensor, step_R: Tensor) -> Tensor:
    """`uniforms` by operations of the device; the keys are their 64 bits as int64. [R] float64"""
    state = _mix_on_device(key_R + _SIGNED_GOLDEN)
    state = _mix_on_device(state + (step_R + 1) * _SIGNED_GOLDEN)
    return _shifted(state, 11).double() * 2.0**-53


def _mix_on_device(state: Tensor) -> Tensor:
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """int64 shifted right as if it had no sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """64 bits as a number with a sign."""
    return number - 2**64 if number >= 2**63 else number


_SIGNED_GOLDEN = _signed(int(_GOLDEN))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
