"""The local engine on a GPU: a step of sampling is captured once as a graph of kernels and replayed.

Nothing of a step waits for the host: attention reads keys and values in pages (`kernels/paged_attention.py`), the next
token is drawn on the device, and which rows are done is looked at every few tokens. Rows take the places of finished
ones then. Shapes are static for a number of rows, which is a power of two; a graph is captured for each that comes up.

Without a GPU the same steps run one operation after another, which is how they are tested.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl.generation.engine import lay_out, next_logits
from trl.generation.kv_attention import Features, Piece, Prefill
from trl.generation.paged_cache import NOWHERE, PagedPrompt, PagedRow, Pages, pages_for
from trl.generation.rows import Row, Stepper, pick, uniforms_on_device
from trl.kernels.layers import swapped_forward
from trl.kernels.paged_attention import PAGE, Scores, Sequences, paged_attention, splits_for
from trl.kernels.pointwise import one_kernel_each

logger = logging.getLogger(__name__)

CHUNK = 16
"""steps between two looks at which rows are done"""
LEAST_ROWS = 8
Kept = dict[int, tuple[Tensor, Tensor]]
Queue = deque[tuple[PagedPrompt, Row]]


class _Reading(Prefill):
    """A pass over prompts that keeps each layer's keys and values, [H, N, D]."""

    __slots__ = ("kept",)

    def __init__(self, pieces: Any, layers: dict[int, int | None]) -> None:
        super().__init__(pieces, layers)
        self.kept: Kept = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: Features) -> Tensor:
        self.kept[layer] = key[0].to(value.dtype), value[0]
        return super().attend(layer, query, key, value, features)


class _Decoding:
    """A pass over one token of each row, which goes to a page and sees its prompt and what its row has added."""

    def __init__(self, pages: Pages, target_R: Tensor, position_R: Tensor, seen: list[Sequences], longest: int):
        self.pages, self.target_R, self.position_R, self.seen, self.longest = pages, target_R, position_R, seen, longest

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, features: Features) -> Tensor:
        heads, (rows, width) = key.shape[1], query.shape[2:]
        keys, values = self.pages.layers[layer]
        keys.view(-1, *keys.shape[2:])[self.target_R] = key[0].transpose(0, 1).to(keys.dtype)
        values.view(-1, *values.shape[2:])[self.target_R] = value[0].transpose(0, 1)
        query_RHJD = query[0].transpose(0, 1).to(values.dtype).reshape(rows, heads, -1, width)
        out = paged_attention(
            query_RHJD, keys, values, self.position_R, self.seen,
            Scores(features.scaling, features.softcap, features.window),
            None if features.sinks_H is None else features.sinks_H.view(heads, -1),
            splits=splits_for(min(rows, len(self.seen[0].length_X)), heads, self.longest, query.device),
        )  # fmt: skip
        return out.reshape(1, rows, query.shape[1], -1)


class Places:
    """The rows' state on the device, in tensors that stay where they are, and the step that moves it on."""

    def __init__(self, engine: CapturedEngine, rows: int, prompts: int, members: int):
        self.engine, self.rows, self.prompts, self.members = engine, rows, prompts, members
        device = engine.device

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.token_R, self.key_R, self.count_R, self.limit_R = (whole(rows).long() for _ in range(4))
        self.position_R, self.added_R = whole(rows), whole(rows)
        self.runs_R = whole(rows).bool()
        row_R1 = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        self.own = Sequences(whole(rows, engine.row_pages), self.added_R, whole(rows), row_R1)
        self.shared = Sequences(
            whole(prompts, engine.prompt_pages), whole(prompts), whole(prompts), whole(prompts, members)
        )
        self.seen_RV: Tensor | None = None
        """tokens of prompt and completion, for a repetition penalty"""
        self.step = whole(1).long()
        self.tokens_RC = whole(rows, CHUNK).long()
        self.numbers_2RC = whole(2, rows, CHUNK).float()
        self._hosts: dict[Tensor, Tensor] = {}
        """memory of the host from which each of them is filled"""
        self.graph: Any = None
        self.warm = False

    def forward(self) -> Tensor:
        """The last tokens go to the cache; logits of the next ones, in float32. [R, V]"""
        runs_R = self.runs_R
        page_R = self.own.pages_XC.gather(1, (self.added_R // PAGE).long()[:, None]).squeeze(1)
        target_R = torch.where(runs_R, page_R, NOWHERE).long() * PAGE + self.added_R % PAGE
        self.added_R += runs_R.int()
        state = _Decoding(self.engine.pages, target_R, self.position_R, [self.shared, self.own], self.engine.longest)
        return next_logits(self.engine.model, self.token_R[None], self.position_R.long(), state, None).float()

    def advance(self) -> None:
        """A token more for each row that runs."""
        logits_RV = self.forward()
        drawn = pick(
            logits_RV, self.engine.stepper.params, uniforms_on_device(self.key_R, self.count_R), self.seen_RV,
            self._forbidden(logits_RV), self.engine.stepper.barred,
        )  # fmt: skip
        self._append(*drawn)

    def _forbidden(self, logits_RV: Tensor) -> Tensor | None:
        params, ends = self.engine.stepper.params, self.engine.ends
        barred = self.engine.stepper.barred_before_filters
        if barred is None and (not params.min_new_tokens or not len(ends)):
            return None
        early_R1 = (self.count_R < params.min_new_tokens)[:, None]
        forbidden_RV = torch.zeros_like(logits_RV, dtype=torch.bool).index_fill(1, ends, True) & early_R1
        return forbidden_RV if barred is None else forbidden_RV.index_fill(1, barred, True)

    def _append(self, token_R: Tensor, logprob_R: Tensor, raw_R: Tensor) -> None:
        runs_R = self.runs_R
        self.token_R.copy_(torch.where(runs_R, token_R, self.token_R))
        self.tokens_RC.index_copy_(1, self.step, self.token_R[:, None])
        self.numbers_2RC.index_copy_(2, self.step, torch.stack([logprob_R, raw_R]).float()[..., None])
        self.step += 1
        self.count_R += runs_R
        self.position_R += runs_R.int()
        if self.seen_RV is not None:
            self.seen_RV.scatter_(1, self.token_R[:, None], True)
        at_end_R = (self.token_R[:, None] == self.engine.stepper.end_index).any(1)
        at_end_R &= self.count_R >= self.engine.stepper.params.min_new_tokens
        runs_R &= ~(at_end_R | (self.count_R >= self.limit_R))

    def run(self, steps: int) -> None:
        """So many steps: the first as it is, the others as a graph where there are graphs."""
        self.step.zero_()
        for _ in range(steps):
            if self.graph is not None:
                self.graph.replay()
                continue
            if self.warm and self.engine.captures:
                self._capture()
                continue
            self.advance()
            self.warm = True

    def _capture(self) -> None:
        """Capture a step and replay it; where the model cannot be captured, make it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.engine.graph_memory):
                self.advance()
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.engine.captures = False
            logger.warning(
                "%s cannot be captured as a graph (%s): a token takes longer, results are the same",
                type(self.engine.model).__name__,
                str(error).splitlines()[0],
            )
            self.advance()
            return
        self.graph = graph
        graph.replay()

    def fill(self, running: Sequence[PagedRow], steps: int) -> None:
        """Write the state of these rows, and give them pages for so many more tokens."""
        pages, prompts = self.engine.pages, list(dict.fromkeys(each.prompt for each in running))
        for each in running:
            more = pages_for(min(each.added + steps, each.row.limit)) - len(each.pages)
            if more > 0:
                each.pages += pages.take(more)
                pages.promised -= more
        rows = [each.row for each in running]
        keys = [key - 2**64 if key >= 2**63 else key for key in (row.key for row in rows)]
        starts = [len(each.prompt.ids) for each in running]
        self._set(self.token_R, [row.ids[-1] for row in rows])
        self._set(self.key_R, keys)
        self._set(self.count_R, [len(row.ids) for row in rows])
        self._set(self.limit_R, [row.limit for row in rows])
        self._set(self.added_R, [each.added for each in running])
        self._set(self.position_R, [start + each.added for start, each in zip(starts, running, strict=True)])
        self._set(self.runs_R, [True] * len(rows))
        self._set(self.own.start_X, starts)
        self._set(self.own.pages_XC, [each.pages for each in running])
        self._set(self.shared.pages_XC, [prompt.pages for prompt in prompts])
        self._set(self.shared.length_X, [len(prompt.ids) for prompt in prompts])
        places = {prompt: [r for r, each in enumerate(running) if each.prompt is prompt] for prompt in prompts}
        self._set(self.shared.member_XG, list(places.values()), fill=-1)
        if self.engine.stepper.params.repetition_penalty != 1.0:
            seen_V = torch.stack([row.seen_V for row in rows if row.seen_V is not None])
            if self.seen_RV is None:
                self.seen_RV = seen_V.new_zeros(self.rows, seen_V.shape[1])
            self.seen_RV[: len(rows)] = seen_V

    def _set(self, target: Tensor, values: Sequence[Any], fill: int = 0) -> None:
        """Copy numbers, or lists of them, into a tensor that stays where it is; `fill` behind them."""
        if target not in self._hosts:
            self._hosts[target] = torch.empty(target.shape, dtype=target.dtype, pin_memory=target.is_cuda)
        host = self._hosts[target]  # the last copy from it has ended: `read` waits for the device
        numbers = host.numpy()
        numbers.fill(fill)
        if target.dim() == 1:
            numbers[: len(values)] = values
        else:
            for index, value in enumerate(values):
                numbers[index, : len(value)] = value
        target.copy_(host, non_blocking=True)

    def read(self, running: Sequence[PagedRow]) -> list[PagedRow]:
        """Add what was sampled to the rows; returns those that still run."""
        packed = torch.cat([self.tokens_RC.double(), *self.numbers_2RC.double(), self.count_R.double()[:, None]], 1)
        numbers = packed.cpu().numpy()  # the one wait for the device
        tokens_RC, logprobs_RC, raw_RC = np.split(numbers[:, :-1], 3, axis=1)
        for place, each in enumerate(running):
            row, new = each.row, int(numbers[place, -1]) - len(each.row.ids)
            if not np.isfinite(raw_RC[place, :new]).all():
                raise FloatingPointError("the model's logits are not finite: look at its weights and its precision")
            one_by_one = self.engine.stepper.stop_strings is not None
            for part in [slice(step, step + 1) for step in range(new)] if one_by_one else [slice(0, new)]:
                row.ids += tokens_RC[place, part].astype(int).tolist()
                row.logprobs += logprobs_RC[place, part].tolist()
                row.raw_logprobs += raw_RC[place, part].tolist()
                self.engine.stepper.finish([row])
                if row.finish_reason:
                    break
            if row.seen_V is not None:
                row.seen_V[torch.tensor(row.ids[-new:], device=row.seen_V.device)] = True
        self.engine.stepper.tell([each.row for each in running])
        return [each for each in running if not each.row.finish_reason]


class CapturedEngine:
    """Samples rows with a model, to be used within `eval_no_grad(model)`, `cached_attention(model)`, `as_steps_need`.

    max_rows: rows at a time; None: as many as there is memory for, in powers of two up to 1,024.
    """

    def __init__(
        self, model: Any, stepper: Stepper, device: torch.device, *, max_rows: int | None, max_prefill_tokens: int
    ) -> None:
        self.model, self.stepper, self.device = model, stepper, device
        self.max_rows, self.max_prefill_tokens = max_rows or 1024, max_prefill_tokens
        self.captures = device.type == "cuda"
        self.graph_memory = torch.cuda.graph_pool_handle() if self.captures else None
        self.ends = stepper.end_index
        """those that the model has a logit for"""
        self.row_pages = self.prompt_pages = self.longest = 0
        self.layers: dict[int, int | None] = {}
        """the sliding window of each layer that has computed attention"""
        self._places: dict[int, Places] = {}
        self.pages: Pages

    def run(self, groups: Sequence[Sequence[Row]]) -> None:
        """Sample all rows to their end."""
        queue: Queue = deque()
        for group in groups:
            prompt = PagedPrompt(group[0].prompt, waiting=len(group))
            queue.extend((prompt, row) for row in group)
        self._begin(queue)
        running: list[PagedRow] = []
        while queue or running:
            if queue and self.max_rows - len(running) >= min(len(queue), max(1, self.max_rows // 8)):
                self._admit(queue, running)
            if not running:
                continue
            steps = min(CHUNK, max(each.row.limit - len(each.row.ids) for each in running))
            places = self._places_for(running)
            places.fill(running, steps)
            places.run(steps)
            before, running[:] = list(running), places.read(running)
            self._free([each for each in before if each.row.finish_reason])

    def forced(self, texts: Sequence[tuple[int, ...]], branches: Sequence[Sequence[int]], width: int) -> Tensor:
        """Logits of the tokens at `width` places after each text, one after another, when a branch follows it.

        [rows, width, V]; a probe asks. Branches may be shorter.
        """
        prompts = {text: PagedPrompt(list(text)) for text in texts}
        running = [PagedRow(Row(text, 0, width), prompts[text]) for text in texts]
        self._begin(deque((each.prompt, each.row) for each in running))
        self._read(list(prompts.values()))
        self.pages.promised += sum(each.owed for each in running)
        steps = [torch.stack([each.prompt.logits_V.float() for each in running])]  # type: ignore[union-attr]
        for step in range(width - 1):
            for each, branch in zip(running, branches, strict=True):
                each.row.ids.append(branch[step] if step < len(branch) else 0)
            places = self._places_for(running)
            places.fill(running, 1)
            steps.append(places.forward()[: len(running)])
        return torch.stack(steps, 1)

    def _begin(self, queue: Queue) -> None:
        """Make room for these rows."""
        limits, lengths = [row.limit for _, row in queue], [len(prompt.ids) for prompt, _ in queue]
        self.row_pages, self.prompt_pages = pages_for(max(limits)), pages_for(max(lengths))
        self.longest = max(max(lengths), max(limits))
        self.pages = self._make_pages(queue)

    def _places_for(self, running: Sequence[PagedRow]) -> Places:
        rows = max(LEAST_ROWS, _power(len(running)))
        sizes: dict[int, int] = {}
        for each in running:
            sizes[id(each.prompt)] = sizes.get(id(each.prompt), 0) + 1
        prompts, members = _power(len(sizes)), _power(max(sizes.values()))
        held = self._places.get(rows)
        if held is None or held.prompts < prompts or held.members < members:
            if held is not None:
                prompts, members = max(prompts, held.prompts), max(members, held.members)
            held = self._places[rows] = Places(self, rows, prompts, members)
        return held

    def _free(self, done: Sequence[PagedRow]) -> None:
        for each in done:
            self.pages.promised -= each.owed
            self.pages.give_back(each.pages)
            self._leave(each.prompt)

    def _leave(self, prompt: PagedPrompt) -> None:
        """One row less continues the prompt or waits to; its pages are free after the last."""
        prompt.rows.pop()
        if not prompt.rows and not prompt.waiting:
            self.pages.give_back(prompt.pages)
            prompt.pages = []

    def _admit(self, queue: Queue, running: list[PagedRow]) -> None:
        """Start as many waiting rows as there is room for: read their prompts, sample their first tokens."""
        taken: list[tuple[PagedPrompt, Row]] = []
        fresh: list[PagedPrompt] = []
        tokens, promised = 0, 0
        while queue and len(running) + len(taken) < self.max_rows:
            prompt, row = queue[0]
            is_new = prompt.logits_V is None and (not fresh or fresh[-1] is not prompt)
            needed = pages_for(row.limit) + (pages_for(len(prompt.ids)) if is_new else 0)
            if promised + needed > self.pages.unpromised:
                break
            if is_new:
                tokens += len(prompt.ids)
                if fresh and tokens > self.max_prefill_tokens:
                    break
                fresh.append(prompt)
            promised += needed
            taken.append(queue.popleft())
        if fresh:
            self._read(fresh)
        if not taken:
            return
        self.stepper.advance([row for _, row in taken], torch.stack([p.logits_V for p, _ in taken]))  # type: ignore[misc]
        for prompt, row in taken:
            prompt.waiting -= 1
            if not prompt.waiting:
                prompt.logits_V = None
            prompt.rows.append(0)
            if row.finish_reason:
                self._leave(prompt)
            else:
                running.append(PagedRow(row, prompt))
                self.pages.promised += pages_for(row.limit)

    def _make_pages(self, queue: Queue) -> Pages:
        """Pages for all rows at once, or for as many as there is memory for; a pass of a token says what one takes."""
        state, nothing = _Reading([Piece(0, 1)], self.layers), torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        logits_1V = next_logits(self.model, nothing, nothing[0], state, None)
        self.ends = self.ends[self.ends < logits_1V.shape[-1]]
        prompts = {id(prompt): pages_for(len(prompt.ids)) for prompt, _ in queue}
        wanted = sum(prompts.values()) + sum(pages_for(row.limit) for _, row in list(queue)[: self.max_rows])
        pages = Pages(state.kept, wanted)
        least = max(prompts[id(prompt)] + pages_for(row.limit) for prompt, row in queue)
        if pages.count <= least:
            raise MemoryError(
                f"the keys and values of the longest row need {least} pages of {PAGE} tokens, and there is memory for "
                f"{pages.count - 1}: give shorter completions, or free memory of the device"
            )
        return pages

    def _read(self, fresh: Sequence[PagedPrompt]) -> None:
        """Read prompts: their keys and values go to pages, and the logits that follow each are kept."""
        laid_out = lay_out(fresh, {})
        state = _Reading(laid_out.pieces, self.layers)
        ids_1N = torch.tensor([laid_out.ids], device=self.device)
        logits_PV = next_logits(
            self.model, ids_1N, laid_out.position_N(self.device), state, laid_out.last_P(self.device)
        )
        sources: list[int] = []
        targets: list[int] = []
        for prompt, piece, logits_V in zip(fresh, laid_out.own, logits_PV, strict=True):
            prompt.logits_V = logits_V
            prompt.pages = self.pages.take(pages_for(len(prompt.ids)))
            places = [*(range(piece.stem.start, piece.stem.end) if piece.stem else ()), *range(piece.start, piece.end)]
            sources += places
            targets += [prompt.pages[i // PAGE] * PAGE + i % PAGE for i in range(len(places))]
        source_N, target_N = (torch.tensor(list_, device=self.device) for list_ in (sources, targets))
        self.pages.write(state.kept, source_N, target_N)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


@contextmanager
def as_steps_need(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it a model on a GPU computes steps of few rows: with `half_weights`, by kernels of `pointwise`."""
    with half_weights(model, device), one_kernel_each(model) if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def half_weights(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it linear layers hold their weights in the precision of autocast, which else rounds them at each token.

    The copies take half of the weights' memory again. Without autocast, or with weights that are in half precision
    already, nothing changes.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    rounded = _Rounded(torch.get_autocast_dtype(device.type))
    with ExitStack() as stack:
        for module in model.modules():
            plain = type(module) is nn.Linear and "forward" not in vars(module)
            if isinstance(module, nn.Linear) and plain and module.weight.dtype == torch.float32:
                stack.enter_context(swapped_forward(module, rounded.forward_of(module)))
        # a graph must not hold what autocast caches, which is gone after it
        stack.enter_context(torch.autocast(device.type, dtype=rounded.dtype, cache_enabled=False))
        yield


class _Rounded:
    """Linear layers with their weights rounded once; an input that several of them read is rounded once too."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._last: tuple[Tensor, int, Tensor] | None = None

    def forward_of(self, linear: nn.Linear) -> Any:
        weight = linear.weight.detach().to(self.dtype)
        bias = None if linear.bias is None else linear.bias.detach().to(self.dtype)

        def forward(hidden: Tensor) -> Tensor:
            return F.linear(self._input(hidden), weight, bias)

        return forward

    def _input(self, hidden: Tensor) -> Tensor:
        if hidden.dtype == self.dtype:
            return hidden
        changes = 0 if hidden.is_inference() else hidden._version
        if self._last is None or self._last[0] is not hidden or self._last[1] != changes:
            self._last = hidden, changes, hidden.to(self.dtype)
        return self._last[2]
