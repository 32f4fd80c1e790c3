"""Forward passes of the local sampler: each prompt is read once, then every pass adds a token to each row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl.generation.kv_attention import Decode, Layout, Prefill
from trl.generation.kv_cache import Prompt, Prompts, Suffixes
from trl.models.unwrap import accepts


class Engine:
    """The cache of one sampling run. Row slots are 0 .. R-1; a slot that is freed is taken by the last row.

    To be used within `eval_no_grad(model)` and `cached_attention(model)`.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.prompts = Prompts()
        self.suffixes = Suffixes()
        self.layers: dict[int, int | None] = {}
        """the sliding window of each layer that has computed attention"""
        self._owners: list[Prompt] = []
        self._layout: Layout | None = None
        self._selects = accepts(model, "logits_to_keep")

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        """Read new prompts, without padding, and keep the logits of the token that follows each."""
        ids = [token for prompt in prompts for token in prompt.ids]
        positions = [position for prompt in prompts for position in range(len(prompt.ids))]
        bounds, end = [], 0
        for prompt in prompts:
            bounds.append((end, end + len(prompt.ids)))
            end += len(prompt.ids)
        state = Prefill(bounds, self.prompts.add(prompts), self.layers)
        last_P = torch.tensor([end - 1 for _, end in bounds], device=self.device)
        logits_PV = self._forward(ids, torch.tensor(positions, device=self.device), state, last_P)
        for prompt, logits_V in zip(prompts, logits_PV, strict=True):
            prompt.logits_V = logits_V
        self._layout = None

    def start(self, prompt: Prompt) -> int:
        """The slot of a new row that continues this prompt."""
        slot = self.suffixes.add()
        prompt.rows.append(slot)
        self._owners.append(prompt)
        self._layout = None
        return slot

    def finish(self, slot: int) -> None:
        """Free a row's slot, and its prompt's slot once no row needs it. The last row moves into the free slot."""
        prompt, last = self._owners[slot], len(self._owners) - 1
        prompt.rows.remove(slot)
        if slot != last:
            moved = self._owners[slot] = self._owners[last]
            moved.rows[moved.rows.index(last)] = slot
        self._owners.pop()
        self.suffixes.remove(slot)
        self.release(prompt)
        self._layout = None

    def release(self, prompt: Prompt) -> None:
        """Drop the prompt if no row continues it and none waits to."""
        if not prompt.rows and not prompt.waiting:
            self.prompts.remove(prompt)
            self._layout = None

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; returns the logits of the next one, [R, V]."""
        suffixes = self.suffixes
        places = list(suffixes.lengths)
        starts = [len(prompt.ids) for prompt in self._owners]
        suffixes.lengths = [place + 1 for place in places]
        suffixes.reserve(len(places), suffixes.longest)
        if self._layout is None:
            self._layout = Layout(self.prompts, len(places), self.device)
        positions = [start + place for start, place in zip(starts, places, strict=True)]
        position_R = torch.tensor(positions, device=self.device)
        state = Decode(
            prompts=self.prompts, suffixes=suffixes, layout=self._layout,
            place_R=torch.tensor(places, device=self.device), position_R=position_R,
            ragged=min(places) < max(places), longest=max(positions) + 1,
        )  # fmt: skip
        return self._forward(tokens, position_R, state, None)

    def _forward(
        self, ids: Sequence[int], position_N: Tensor, state: Prefill | Decode, keep_S: Tensor | None
    ) -> Tensor:
        ids_1N = torch.tensor([ids], device=self.device)
        selected = {"logits_to_keep": keep_S} if keep_S is not None and self._selects else {}
        output = self.model(
            input_ids=ids_1N, attention_mask=torch.ones_like(ids_1N), position_ids=position_N[None],
            use_cache=False, return_dict=True, kv_state=state, **selected,
        )  # fmt: skip
        logits_NV = output.logits[0]
        return logits_NV if keep_S is None or selected else logits_NV[keep_S]
