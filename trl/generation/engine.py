"""Forward passes of the local sampler: each prompt is read once, then every pass adds a token to each row.

Prompts that begin alike, such as the conversations of a group after their tools have answered, are read as one up to
where they part.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trl.generation.kv_attention import Decode, Layout, Piece, Prefill, State
from trl.generation.kv_cache import Prompt, PromptBlock, Prompts, Suffixes
from trl.models.unwrap import accepts, reads_pictures

_LEAST_SAVED = 32
"""fewer tokens are not worth a piece of their own"""


class Engine:
    """The cache of one sampling run. Row slots are 0 .. R-1; a slot that is freed is taken by the last row.

    To be used within `eval_no_grad(model)` and `cached_attention(model)`. both_ways: whether the tokens of a picture
    see each other whichever comes first.
    """

    def __init__(self, model: Any, device: torch.device, *, both_ways: bool = False) -> None:
        self.model = model
        self.device = device
        self.both_ways = both_ways
        self.prompts = Prompts()
        self.suffixes = Suffixes()
        self.layers: dict[int, int | None] = {}
        """the sliding window of each layer that has computed attention"""
        self._owners: list[Prompt] = []
        self._layout: Layout | None = None

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        """Read new prompts, without padding, and keep the logits of the token that follows each."""
        places = dict(zip(prompts, self.prompts.add(prompts), strict=True))
        for prompt in prompts:
            if has_pictures(prompt.ids):
                prompt.axes_AN = _pictures().axes(self.model, torch.tensor(prompt.ids, device=self.device))
        laid_out = lay_out(prompts, places, both_ways=self.both_ways)
        state = Prefill(laid_out.pieces, self.layers)
        logits_PV = self._forward(laid_out.ids, laid_out.position_N(self.device), state, laid_out.last_P(self.device))
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
        ahead = [prompt.ahead for prompt in self._owners]
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
        told_R = position_R + torch.tensor(ahead, device=self.device) if any(ahead) else position_R
        return self._forward(tokens, told_R, state, None)

    def _forward(
        self, ids: Sequence[int], position_N: Tensor, state: Prefill | Decode, keep_S: Tensor | None
    ) -> Tensor:
        ids_1N = torch.tensor([ids], device=self.device)
        with shown_pictures(self.model, ids, ids_1N) as (readable_1N, keywords):
            return next_logits(self.model, readable_1N, position_N, state, keep_S, **keywords)


def has_pictures(ids: Sequence[int]) -> bool:
    """Whether some of a prompt's tokens are of pictures."""
    return min(ids, default=0) < 0


def picture_tokens(model: Any) -> tuple[int, ...]:
    """The words of a model that reads pictures which stand for these and mean nothing in a text."""
    reader = _pictures().reader_for(model) if reads_pictures(model) else None
    return () if reader is None else (reader.image_token_id,)


def check_shown(rows: Sequence[Sequence[int]], tokens: Sequence[int], name: str = "prompts") -> None:
    """ValueError for a row with one of the tokens that stand for a part of a picture: they do not say of which."""
    for index, ids in enumerate(rows):
        for token in tokens:
            if token in ids:
                raise ValueError(
                    f"{name}[{index}] has the token {token}, which stands for a part of a picture and does not say of "
                    "which: put the picture's own tokens there (`trl.data.pictures.PictureReader.tokens`), or take it "
                    "out"
                )


def pictured_inputs(model: Any, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
    """What `generate` reads of rows with pictures, which are encoded for each row."""
    shown = _pictures().keywords(model, ids_BL, repeated=True)
    return {**shown, "input_ids": _pictures().as_placeholders(model, ids_BL), "attention_mask": mask_BL}


def _pictures() -> Any:
    from trl.models import pictures  # which prompts of text do without

    return pictures


@contextmanager
def shown_pictures(model: Any, ids: Sequence[int], ids_1N: Tensor) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Ids that the model knows, and keywords with the pictures among them; each is encoded once within it."""
    if not has_pictures(ids):
        yield ids_1N, {}
        return
    with _pictures().encoded_once(model, ids_1N):
        yield _pictures().as_placeholders(model, ids_1N), _pictures().keywords(model, ids_1N)


def next_logits(
    model: Any, ids_1N: Tensor, position_N: Tensor, state: State, keep_S: Tensor | None, **keywords: Any
) -> Tensor:
    """A packed pass with the attention of `state`: the logits of all tokens, or of `keep_S`. [N or S, V]

    position_N: [A, N] where positions have axes. keywords: of pictures.
    """
    selected = {"logits_to_keep": keep_S} if keep_S is not None and accepts(model, "logits_to_keep") else {}
    output = model(
        input_ids=ids_1N, attention_mask=torch.ones_like(ids_1N), position_ids=position_N.unsqueeze(-2),
        use_cache=False, return_dict=True, kv_state=state, **selected, **keywords,
    )  # fmt: skip
    logits_NV: Tensor = output.logits[0]
    return logits_NV if keep_S is None or selected else logits_NV[keep_S]


@dataclass
class LaidOut:
    """Prompts end to end, the starts that they share once."""

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[Prompt, int, int]] = field(default_factory=list)
    """where the tokens come from"""
    pieces: list[Piece] = field(default_factory=list)
    own: list[Piece] = field(default_factory=list)
    """of each prompt the piece that ends with its last token"""

    def position_N(self, device: torch.device) -> Tensor:
        """The places of the tokens in their prompts; [A, N] where one of these has pictures with axes."""
        axes = [None if prompt.axes_AN is None else prompt.axes_AN[:, start:end] for prompt, start, end in self.spans]
        places = [place for _, start, end in self.spans for place in range(start, end)]
        plain_N = torch.tensor(places, device=device)
        number = next((len(own) for own in axes if own is not None), 0)
        if not number:
            return plain_N
        parts = plain_N.split([end - start for _, start, end in self.spans])
        filled = [part.expand(number, -1) if own is None else own for own, part in zip(axes, parts, strict=True)]
        return torch.cat(filled, 1)

    def last_P(self, device: torch.device) -> Tensor:
        """The place of each prompt's last token in the pass."""
        return torch.tensor([piece.end - 1 for piece in self.own], device=device)


def lay_out(
    prompts: Sequence[Prompt], places: Mapping[Prompt, tuple[PromptBlock, int]], *, both_ways: bool = False
) -> LaidOut:
    """A pass over new prompts, without padding. places: where in a cache of blocks they go, if they go there."""
    found = LaidOut()

    def read(prompt: Prompt, start: int, end: int, **of_piece: Any) -> Piece:
        mutual = [run for run in _runs(prompt.ids) if run[1] <= end] if both_ways else ()
        piece = Piece(len(found.ids), len(found.ids) + end - start, both_ways=mutual, **of_piece)
        found.ids.extend(prompt.ids[start:end])
        found.spans.append((prompt, start, end))
        found.pieces.append(piece)
        return piece

    own: dict[Prompt, Piece] = {}
    for shared, members in _alike(prompts):
        stem = read(members[0], 0, shared) if shared else None
        for prompt in members:
            own[prompt] = read(prompt, shared, len(prompt.ids), stem=stem, place=places.get(prompt))
    found.own = [own[prompt] for prompt in prompts]
    return found


def _alike(prompts: Sequence[Prompt]) -> list[tuple[int, list[Prompt]]]:
    """Prompts that begin alike, with how many tokens they share; 0 for one alone. All keep a token of their own."""
    texts = [list(prompt.ids) for prompt in prompts]
    runs: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(texts)), key=texts.__getitem__):  # those that begin alike are neighbours now
        if runs:
            shared, members = runs[-1]
            common = min(shared, _common(texts[members[0]], texts[index]), len(texts[index]) - 1)
            common = min(_before_picture(texts[each], common) for each in (members[0], index))
            if len(members) * common >= max((len(members) - 1) * shared, _LEAST_SAVED):
                runs[-1] = common, [*members, index]
                continue
        runs.append((_before_picture(texts[index], len(texts[index]) - 1), [index]))
    runs.sort(key=lambda run: min(run[1]))
    return [(shared if len(run) > 1 else 0, [prompts[i] for i in run]) for shared, run in runs]


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """From where to where the tokens of pictures stand."""
    edges = [at for at in range(len(ids) + 1) if (at < len(ids) and ids[at] < 0) != (at > 0 and ids[at - 1] < 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _before_picture(ids: Sequence[int], place: int) -> int:
    """The place, or the start of the picture in whose midst it is."""
    while 0 < place < len(ids) and ids[place] < 0 and ids[place - 1] < 0:
        place -= 1
    return place


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the start that are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
