"""The local engine: samples with the trainer's own model, in its precision and with its adapters."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from trl.data.pictures import read_by
from trl.data.records import Completion
from trl.generation.captured import CapturedEngine, as_steps_need
from trl.generation.engine import Engine, check_shown, has_pictures, picture_tokens
from trl.generation.kv_attention import cached_attention
from trl.generation.kv_cache import Prompt
from trl.generation.packed_weights import packed_weights
from trl.generation.probe import BOTH_WAYS, NOT_HERE, NotLocal, how_it_reads_pictures, refuse_unsuitable
from trl.generation.rows import Row, Stepper, make_rows
from trl.generation.sampler import Sampler, SamplingParams
from trl.generation.stopping import StopStrings, end_tokens
from trl.generation.transformers_sampler import TransformersSampler
from trl.models.forward import eval_no_grad, introduce, plan_of
from trl.models.prepare import context_length
from trl.models.unwrap import below_value_head

logger = logging.getLogger(__name__)
_STEPS_WORTH_PACKING = 8
MOST_ROWS = 128
"""completions in progress at a time on a CPU, unless another number is given"""
Queue = deque[tuple[Prompt, Row]]
OnTokens = Callable[[Sequence[Row]], None]


def make_sampler(
    model: Any, tokenizer: Any = None, *, max_rows: int | None = None, on_tokens: OnTokens | None = None
) -> Sampler:
    """The local engine where it computes what the model computes; else `model.generate`, which is said once a model."""
    is_new = plan_of(model).samples_locally is None
    try:
        return LocalSampler(model, tokenizer, max_rows=max_rows, on_tokens=on_tokens)
    except NotLocal as error:
        if is_new:
            logger.warning("%s. It samples by its own `generate`, which is slower.", error)
    return TransformersSampler(model, tokenizer, max_rows=max_rows or MOST_ROWS)


class LocalSampler:
    """Samples with a causal language model, a PEFT model (its active adapter) or a value-head wrapper of either.

    A prompt is read once for all its completions, and so is what prompts have in common at their start; waiting rows
    take the places of finished ones. Its pictures are encoded then; where the engine does not read them as the model
    does, `TransformersSampler` samples the prompts that have some. A model whose attention cannot be replaced raises
    `NotLocal`: `make_sampler` then takes `TransformersSampler`.

    max_rows: completions in progress at a time; bounds the memory for keys and values. None: 128, and on a GPU as many
    as it has memory for. max_prefill_tokens: prompt tokens in one forward pass. captured: whether `CapturedEngine`
    samples, which a GPU is for; None: it does so there. on_tokens: is called while `sample` runs, with the rows that
    have got tokens; a row's `ids` are what it has so far, and its `finish_reason` is empty while it runs.
    """

    exact = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_rows: int | None = None,
        max_prefill_tokens: int = 8192,
        captured: bool | None = None,
        on_tokens: OnTokens | None = None,
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: give 1 or more")
        if max_prefill_tokens < 1:
            raise ValueError(f"max_prefill_tokens={max_prefill_tokens}: give 1 or more")
        refuse_unsuitable(model)
        self.model = below_value_head(model)
        self.tokenizer = read_by(tokenizer)
        introduce(self.model, self.tokenizer)
        self.captured = next(self.model.parameters()).device.type == "cuda" if captured is None else captured
        self.max_rows = max_rows or (None if self.captured else MOST_ROWS)
        self.max_prefill_tokens = max_prefill_tokens
        self.on_tokens = on_tokens
        self._said = False
        """that prompts with pictures are not captured"""

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt, in the order of the prompts."""
        check_shown(prompts, picture_tokens(self.model))
        pictured = [has_pictures(ids) for ids in prompts]
        reading = how_it_reads_pictures(self.model) if any(pictured) else None
        if reading == NOT_HERE:
            return sampled_apart(self._otherwise(), self, pictured, prompts, params, n)
        return self._sample(prompts, params, n, reading)

    def _otherwise(self) -> Sampler:
        return TransformersSampler(
            self.model, self.tokenizer, max_rows=self.max_rows or MOST_ROWS, on_tokens=self.on_tokens
        )

    def _sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int, reading: str | None
    ) -> list[list[Completion]]:
        """By the engine; reading: how it reads pictures, None where there are none."""
        device = next(self.model.parameters()).device
        groups = make_rows(prompts, params, n, context_length(self.model))
        ends = end_tokens(self.model, self.tokenizer, params.stop_token_ids)
        stepper = Stepper(params, ends, StopStrings.of(params, self.tokenizer), device, self.on_tokens)
        stepper.bar(picture_tokens(self.model))
        packs = params.max_new_tokens >= _STEPS_WORTH_PACKING
        weights = packed_weights(self.model) if packs else nullcontext()
        with eval_no_grad(self.model), cached_attention(self.model):
            if self.captured and not params.say_kept and self._is_captured(reading):
                with as_steps_need(self.model, device):
                    CapturedEngine(
                        self.model, stepper, device, max_rows=self.max_rows, max_prefill_tokens=self.max_prefill_tokens
                    ).run(groups)
            else:
                with weights:
                    self._run(groups, stepper, Engine(self.model, device, both_ways=reading == BOTH_WAYS))
        return [[row.completion() for row in group] for group in groups]

    def _is_captured(self, reading: str | None) -> bool:
        """Whether these prompts take the engine of a GPU; those with pictures do not, which is said once."""
        if reading is not None and not self._said:
            logger.warning("prompts with pictures are sampled step by step, without graphs: same results, slower")
            self._said = True
        return reading is None

    def _run(self, groups: Sequence[Sequence[Row]], stepper: Stepper, engine: Engine) -> None:
        queue: Queue = deque()
        for group in groups:
            prompt = Prompt(group[0].prompt, waiting=len(group))
            queue.extend((prompt, row) for row in group)
        running: list[Row] = []
        while queue or running:
            while queue and self._worth_filling(len(queue), len(running)):
                self._admit(queue, running, stepper, engine)
            if running:
                stepper.advance(running, engine.decode([row.ids[-1] for row in running]))
                _drop_finished(running, engine)

    def _worth_filling(self, waiting: int, running: int) -> bool:
        """Reading few prompts at a time is slow: waiting rows start once an eighth of the rows is free."""
        most = self.max_rows or MOST_ROWS
        return most - running >= min(waiting, max(1, most // 8))

    def _admit(self, queue: Queue, running: list[Row], stepper: Stepper, engine: Engine) -> None:
        """Start as many waiting rows as there is room for: read their prompts, sample their first tokens."""
        taken: list[tuple[Prompt, Row]] = []
        fresh: list[Prompt] = []
        tokens = 0
        while queue and len(running) + len(taken) < (self.max_rows or MOST_ROWS):
            prompt = queue[0][0]
            if prompt.logits_V is None and (not fresh or fresh[-1] is not prompt):
                tokens += len(prompt.ids)
                if fresh and tokens > self.max_prefill_tokens:
                    break
                fresh.append(prompt)
            taken.append(queue.popleft())
        if fresh:
            engine.prefill(fresh)
        logits_RV = torch.stack([prompt.logits_V for prompt, _ in taken if prompt.logits_V is not None])
        stepper.advance([row for _, row in taken], logits_RV)
        for prompt, row in taken:
            prompt.waiting -= 1
            if not prompt.waiting:
                prompt.logits_V = None
            if not row.finish_reason:
                engine.start(prompt)
                running.append(row)
        for prompt in {prompt for prompt, _ in taken}:
            engine.release(prompt)


def sampled_apart(
    one: Sampler,
    other: Sampler,
    mine: Sequence[bool],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    n: int,
) -> list[list[Completion]]:
    """The prompts that are `mine` sampled by one sampler, the rest by another, with the numbers that one would draw."""
    if params.seed is None:
        params = replace(params, seed=int(torch.randint(2**62, ())))
    groups: list[list[Completion]] = [[] for _ in prompts]
    for sampler, is_mine in ((one, True), (other, False)):
        places = [place for place, flag in enumerate(mine) if flag == is_mine]
        seed = tuple(params.seed[place] for place in places) if isinstance(params.seed, tuple) else params.seed
        made = sampler.sample([prompts[place] for place in places], replace(params, seed=seed), n) if places else []
        for place, group in zip(places, made, strict=True):
            groups[place] = group
    return groups


def _drop_finished(running: list[Row], engine: Engine) -> None:
    for slot in range(len(running) - 1, -1, -1):
        if running[slot].finish_reason:
            engine.finish(slot)
            last = running.pop()
            if slot < len(running):
                running[slot] = last
