"""Samples by `model.generate`: for encoder-decoders and other models that the local engine cannot run.

`generate` keeps the cache and runs the model; a logits processor chooses the tokens by the step that the local engine
uses too. So both engines give the same completions from the same seed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from trl.data.pictures import read_by
from trl.data.records import Completion
from trl.generation.engine import check_shown, has_pictures, picture_tokens, pictured_inputs
from trl.generation.probe import generates
from trl.generation.rows import Row, Stepper, make_rows
from trl.generation.sampler import SamplingParams
from trl.generation.stopping import StopStrings, end_tokens
from trl.kernels.layers import uncompiled
from trl.models.forward import eval_no_grad, introduce
from trl.models.prepare import context_length
from trl.models.unwrap import below_peft, below_value_head, is_encoder_decoder, learns_prompt, own_pace, reads_rows


class TransformersSampler:
    """Samples with any `transformers` model that has `generate`; `LocalSampler` is faster where it can run.

    Completions of encoder-decoders leave out the decoder's start tokens.
    max_rows: completions in a call of `generate`. on_tokens: as for `LocalSampler`.
    """

    exact = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_rows: int = 128,
        on_tokens: Callable[[Sequence[Row]], None] | None = None,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: give 1 or more")
        self.model = below_value_head(model)
        if not getattr(below_peft(self.model), "can_generate", lambda: False)():
            raise ValueError(f"{type(below_peft(self.model)).__name__} has no `generate`: give a model that has one")
        self.tokenizer = read_by(tokenizer)
        introduce(self.model, self.tokenizer)
        self.max_rows = max_rows
        self.on_tokens = on_tokens

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt, in the order of the prompts."""
        base = below_peft(self.model)
        encodes = is_encoder_decoder(self.model)
        context = None if encodes else context_length(self.model)
        check_shown(prompts, picture_tokens(self.model))
        groups = make_rows(prompts, params, n, context)
        device = next(self.model.parameters()).device
        ends = end_tokens(self.model, self.tokenizer, params.stop_token_ids)
        stepper = Stepper(params, ends, StopStrings.of(params, self.tokenizer), device, self.on_tokens)
        stepper.bar(picture_tokens(self.model))
        by_length = sorted((row for group in groups for row in group), key=lambda row: len(row.prompt))
        with eval_no_grad(self.model), uncompiled(self.model), _PlainConfig(base):
            for rows in self._batches(by_length, context):
                self._generate(rows, stepper, encodes, device)
        return [[row.completion() for row in group] for group in groups]

    def _batches(self, rows: list[Row], context: int | None) -> Iterator[list[Row]]:
        """Rows that run together: `generate` continues all until the last is done, and none may exceed the context.

        Virtual tokens stand before the padding, so only prompts of one length run together behind them; nor do others
        where padding changes what is computed.
        """
        batch: list[Row] = []
        alike = learns_prompt(self.model) or not generates(self.model).behind_padding
        for row in rows:
            steps = max([row.limit, *(one.limit for one in batch)])
            too_long = batch and context is not None and len(row.prompt) + steps > context
            other = alike and batch and len(row.prompt) != len(batch[0].prompt)
            if len(batch) == self.max_rows or too_long or other:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _generate(self, rows: list[Row], stepper: Stepper, encodes: bool, device: torch.device) -> None:
        width = max(len(row.prompt) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(0, len(row.prompt)) if encodes else slice(width - len(row.prompt), width)
            ids[index, place] = torch.tensor(row.prompt)
            mask[index, place] = 1
        # PEFT's own `generate` adds the virtual tokens of an adapter, but with a cache it loses them after the first
        # token, because transformers has renamed the cache. So it runs without one. It also finds where an adapter that
        # begins at certain tokens does so. Other adapters are layers.
        virtual, base = learns_prompt(self.model), below_peft(self.model)
        ids, mask = ids.to(device), mask.to(device)
        pictured = any(has_pictures(row.prompt) for row in rows)
        inputs = pictured_inputs(self.model, ids, mask) if pictured else {"input_ids": ids, "attention_mask": mask}
        model: Any = self.model if virtual or reads_rows(self.model) else base
        prefix = base.register_forward_pre_hook(_only_the_prefix, with_kwargs=True) if virtual else None
        try:
            model.generate(
                **inputs, max_new_tokens=max(row.limit for row in rows), do_sample=False,
                use_cache=generates(self.model).with_cache and not virtual,
                logits_processor=LogitsProcessorList([_Choose(rows, stepper)]),
                stopping_criteria=StoppingCriteriaList([_Done(rows)]), **own_pace(model),
            )  # fmt: skip
        finally:
            if prefix is not None:
                prefix.remove()


def _only_the_prefix(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before each step PEFT hands over a learned prefix anew; what the step before made of its own would hide it."""
    if kwargs.get("past_key_values") is not None:
        kwargs.pop("cache", None)
    return args, kwargs


class _Choose(LogitsProcessor):
    """Adds a token to each running row, and makes `generate` take that token."""

    def __init__(self, rows: list[Row], stepper: Stepper) -> None:
        self.rows = rows
        self.stepper = stepper

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        running = [index for index, row in enumerate(self.rows) if not row.finish_reason]
        index_A = torch.tensor(running, device=scores.device)
        tokens = self.stepper.advance([self.rows[index] for index in running], scores[index_A])
        forced = torch.full_like(scores, -torch.inf)
        forced[:, 0] = 0.0
        forced[index_A, 0] = -torch.inf
        forced[index_A, torch.tensor(tokens, device=scores.device)] = 0.0
        return forced


class _Done(StoppingCriteria):
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        return torch.tensor([bool(row.finish_reason) for row in self.rows], device=input_ids.device)


class _PlainConfig:
    """Within it, the model's `generation_config` holds only token ids: the sampler's parameters replace the rest."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = self.model.generation_config
        self.model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=self.before.bos_token_id, decoder_start_token_id=self.before.decoder_start_token_id,
            pad_token_id=0,
        )  # fmt: skip

    def __exit__(self, *error: object) -> None:
        self.model.generation_config = self.before
