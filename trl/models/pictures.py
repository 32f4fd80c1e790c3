"""What a vision-language model is given for rows of ids with pictures among them, and how it encodes these.

A pass holds each different picture once: within `encoded_once` the model's own `get_image_features` is called for
those, and what it gives is repeated where they stand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.packing import pack
from trl.data.pictures import PictureReader
from trl.data.records import Branch, PackedBatch, TokenTree, moved_ahead
from trl.models.attention import outside_tree
from trl.models.precision import HALF
from trl.models.unwrap import below_peft, holds_parts, picture_readers

ENCODER = "get_image_features"
"""the method of a transformers model that makes states of pictures"""
AXES = "get_rope_index"
"""the method that gives positions with several axes"""


def introduce(model: nn.Module | None, reader: PictureReader | None) -> None:
    """Tell a vision-language model what reads its pictures; another model, or without a reader, stays as it is.

    ValueError where model and processor have different tokens for pictures.
    """
    if model is None or reader is None:
        return
    base = below_peft(model)
    token = getattr(getattr(base, "config", None), "image_token_id", None)
    if token is None or _owner(base, ENCODER) is None:
        return
    if token != reader.image_token_id:
        raise ValueError(
            f"processing_class: the {type(reader.processor).__name__} writes token {reader.image_token_id} for a part "
            f"of a picture, and the model's `image_token_id` is {token}: give the processor that belongs to the model"
        )
    picture_readers[base] = reader


def reader_for(model: nn.Module) -> PictureReader | None:
    """What reads the pictures of this model's rows; None: it was told of nothing."""
    return picture_readers.get(below_peft(model))


def _told(model: nn.Module) -> PictureReader:
    reader = reader_for(model)
    if reader is None:
        raise ValueError(
            f"rows have pictures, and {type(below_peft(model)).__name__} reads none: give a vision-language model, and "
            "its processor as `processing_class`"
        )
    return reader


def _owner(network: nn.Module, method: str) -> nn.Module | None:
    """The innermost module of a network that has the method: others hand the call on to it."""
    return next(
        (module for module in reversed(list(network.modules())) if callable(getattr(module, method, None))), None
    )


# -- the inputs of a pass ---------------------------------------------------------------------


def as_placeholders(model: nn.Module, ids: Tensor) -> Tensor:
    """The ids as the model knows them: its own token wherever a picture stands."""
    return torch.where(ids < 0, _told(model).image_token_id, ids)


def keywords(model: nn.Module, ids_BL: Tensor, *, repeated: bool = False) -> dict[str, Tensor]:
    """What the model's call takes beside `input_ids` for rows with pictures.

    The tensors of each different picture, in the order in which they come first; `repeated`: as often as they come,
    for a call outside of `encoded_once`.
    """
    numbers = _told(model).occurrences(ids_BL.flatten().tolist())
    return _keywords(model, ids_BL, numbers if repeated else list(dict.fromkeys(numbers)))


def _keywords(model: nn.Module, ids_BL: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
    reader, device = _told(model), ids_BL.device
    values = {name: moved_ahead(own, device) for name, own in _in_precision(model, reader.values(numbers)).items()}
    values |= reader.aligned(as_placeholders(model, ids_BL))
    return {name: own for name, own in values.items() if _takes(model, name)}


@contextmanager
def in_pass(
    model: nn.Module, packed: PackedBatch, inputs: dict[str, Any], *, padded: bool, plain: bool
) -> Iterator[dict[str, Any]]:
    """The inputs of a pass with what its pictures add, within which each different one is encoded once.

    plain: the model's own call, which encodes all of them and finds the positions itself.
    """
    if not packed.has_pictures:
        with kept_in_step(model) as values:
            yield inputs | values
        return
    reader, ids_BL = _told(model), inputs["input_ids"]
    if plain:
        inputs.pop("position_ids", None)  # it has none where an adapter learns a prompt
        values = keywords(model, ids_BL, repeated=True)
        yield inputs | values | {"input_ids": as_placeholders(model, ids_BL)}
        return
    order = [i for row in range(packed.rows) for i in packed.row_indices(row)] if padded else slice(None)
    numbers = reader.occurrences(packed.host.ids_N[order].tolist())
    if not padded:
        inputs["position_ids"] = packed_positions(model, packed)
    elif (positions := padded_positions(model, ids_BL, inputs["attention_mask"])) is not None:
        inputs["position_ids"] = positions
    different = list(dict.fromkeys(numbers))
    counts, places = [reader.count(number) for number in different], [different.index(number) for number in numbers]
    with _encoding(model, counts, places):
        yield inputs | _keywords(model, ids_BL, different) | {"input_ids": as_placeholders(model, ids_BL)}


def _takes(model: nn.Module, name: str) -> bool:
    known = inspect.signature(type(below_peft(model)).forward).parameters
    return name in known or any(own.kind is own.VAR_KEYWORD for own in known.values())


def _in_precision(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the precision of the weights that read them, where that is half of float32."""
    owner = _owner(below_peft(model), ENCODER)
    assert owner is not None
    dtype = next((weight.dtype for weight in owner.parameters() if weight.dtype.is_floating_point), torch.float32)
    narrow = dtype in HALF
    return {name: own.to(dtype) if narrow and own.is_floating_point() else own for name, own in values.items()}


def axes(model: nn.Module, ids_L: Tensor) -> Tensor | None:
    """The positions of a whole row by the model's own rule, where they have axes. [A, L]; None: they are plain."""
    owner = _owner(below_peft(model), AXES)
    if owner is None:
        return None
    reader = _told(model)
    rule = getattr(owner, AXES)
    known = inspect.signature(rule).parameters
    plain_1L = torch.where(ids_L < 0, reader.image_token_id, ids_L)[None].cpu()
    given: dict[str, Any] = {"input_ids": plain_1L, "attention_mask": torch.ones_like(plain_1L)}
    given |= reader.aligned(plain_1L)
    numbers = reader.occurrences(ids_L.tolist())
    if numbers:
        given |= reader.values(numbers, known)
    try:
        positions_A1L, _ = rule(**{name: own for name, own in given.items() if name in known})
    except (RuntimeError, IndexError, StopIteration) as error:
        raise ValueError(
            f"{type(owner).__name__} finds no positions in a row with {len(numbers)} pictures ({error}): put its own "
            "marks, such as <|vision_start|>, or text between two pictures, as its chat template does"
        ) from error
    return positions_A1L[:, 0].to(ids_L.device)  # type: ignore[no-any-return]


def packed_positions(model: nn.Module, packed: PackedBatch) -> Tensor:
    """The positions of a packed batch as its model takes them. [1, N], or [A, 1, N] where they have axes."""
    key = ("axes", type(below_peft(model)), packed.ids_N.device)
    if key not in packed.kept:
        found = packed.position_N[None]
        host = packed.host
        for row in range(packed.rows):
            index = torch.tensor(packed.row_indices(row))
            own = axes(model, host.ids_N[index])
            if own is None:
                break
            if found.ndim == 2:
                found = own.new_zeros(len(own), 1, len(packed.ids_N))
            found[:, 0, index] = own
        packed.kept[key] = found.to(packed.ids_N.device)
    return packed.kept[key]  # type: ignore[no-any-return]


def padded_positions(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor) -> Tensor | None:
    """The positions of padded rows where they have axes, 0 at padding. [A, B, L]; None: they are plain."""
    rows = [axes(model, ids[mask.bool()].cpu()) for ids, mask in zip(ids_BL, mask_BL, strict=True)]
    if rows[0] is None:
        return None
    found = torch.zeros(len(rows[0]), *ids_BL.shape, dtype=torch.long, device=ids_BL.device)
    for row, own in enumerate(rows):
        assert own is not None
        found[:, row, mask_BL[row].bool()] = own.to(found.device)
    return found


# -- each picture once ------------------------------------------------------------------------


@contextmanager
def encoded_once(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Within it the model encodes each picture that it is given by `keywords(model, ids)` once, for all its places.

    Its vision tower is called as usual: outside of the packed row, without the keywords of the text model's attention.
    """
    reader = _told(model)
    numbers = reader.occurrences(ids.flatten().tolist())
    different = list(dict.fromkeys(numbers))
    order = [different.index(number) for number in numbers]
    with _encoding(model, [reader.count(number) for number in different], order):
        yield


@contextmanager
def kept_in_step(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it a pass without pictures encodes a small one that stands nowhere, given by these keywords.

    Processes that hold parts of a vision tower, or sum its gradients, all call it in each pass.
    """
    reader = _told(model)
    number = reader.samples[0]
    device = next(below_peft(model).parameters()).device
    values = {name: own.to(device) for name, own in _in_precision(model, reader.values([number])).items()}
    with _encoding(model, [reader.count(number)], []):
        yield {name: own for name, own in values.items() if _takes(model, name)}


def needs_company(model: nn.Module) -> bool:
    """Whether other processes wait for this one's call of the vision tower, though its rows have no picture."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1 or reader_for(model) is None:
        return False
    owner = _owner(below_peft(model), ENCODER)
    assert owner is not None
    trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in _tower(owner))
    return trained or holds_parts(model)


def _tower(owner: nn.Module) -> list[nn.Parameter]:
    """The weights that read pictures: those outside of the text model and its head."""
    text = {
        id(weight)
        for weight in getattr(owner, "language_model", getattr(owner, "text_model", nn.Module())).parameters()
    }
    return [weight for weight in owner.parameters() if id(weight) not in text]


@contextmanager
def _encoding(model: nn.Module, counts: Sequence[int], order: Sequence[int]) -> Iterator[None]:
    """Within it `get_image_features` gives the states of its pictures, which have so many tokens, in this order."""
    owner: Any = _owner(below_peft(model), ENCODER)
    own: Callable[..., Any] = getattr(owner, ENCODER)
    known = inspect.signature(own).parameters
    names = [name for name, one in known.items() if one.kind is not one.VAR_KEYWORD]

    def features(*args: Any, **given: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **given}
        with outside_tree():
            output = own(**{name: value for name, value in given.items() if name in names}, return_dict=True)
        for name in list(output):
            if name not in ("last_hidden_state", "hidden_states", "attentions"):
                output[name] = _placed(output[name], counts, order)
        return output

    before = vars(owner).get(ENCODER)
    setattr(owner, ENCODER, features)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, ENCODER)
        else:
            setattr(owner, ENCODER, before)


def _placed(states: Any, counts: Sequence[int], order: Sequence[int]) -> Any:
    """What was made of the pictures, in this order; ValueError where it cannot be told whose is whose."""
    if isinstance(states, list | tuple):
        each = [one.shape[:-1].numel() if isinstance(one, Tensor) else 0 for one in states]
        if len(counts) > 1 and each == list(counts):
            chosen = [states[index] for index in order]
            return type(states)(chosen or [states[0][:0]])
        return type(states)(_placed(one, counts, order) for one in states)
    if not isinstance(states, Tensor):
        return states
    unit = states.shape[:-1].numel() // max(1, len(states))
    if states.shape[:-1].numel() != sum(counts) or any(count % unit for count in counts):
        raise ValueError(f"states of pictures have the shape {list(states.shape)} for pictures of {counts} tokens")
    if list(order) == list(range(len(counts))):
        return states
    parts = states.split([count // unit for count in counts])
    return torch.cat([parts[index] for index in order]) if order else states[:0]


# -- rows for a probe -------------------------------------------------------------------------


def picture_rows(model: nn.Module, longest: int = 0) -> PackedBatch:
    """Rows with pictures: two that share a prompt with one, one with two pictures, and one without."""
    reader = _told(model)
    vocabulary = below_peft(model).config.get_text_config().vocab_size
    words = [(i * i + 7 * i + 3) % vocabulary for i in range(40)]
    words = [word if word != reader.image_token_id else 0 for word in words]
    first, second = (reader.ids_of(number) for number in reader.samples)
    shared = TokenTree([*words[:3], *first, *words[3:5]], [Branch(words[5:8]), Branch(words[8:12])])
    several = TokenTree([words[12], *second, words[13], *first, words[14]], [Branch(words[15:17])])
    plain = TokenTree(words[17:20], [Branch(words[20:22])])
    packed = pack([shared, several, plain])
    return packed.to(next(below_peft(model).parameters()).device)


def each_alone(packed: PackedBatch) -> list[PackedBatch]:
    """The rows of a batch, each packed alone; all tokens after the prompt are scored."""
    batches = []
    for row, prompt in enumerate(packed.prompt_tokens):
        ids = packed.ids_N[torch.tensor(packed.row_indices(row), device=packed.ids_N.device)].cpu()
        batches.append(pack([TokenTree(ids[:prompt], [Branch(ids[prompt:])])]).to(packed.ids_N.device))
    return batches


def ended_otherwise(row: PackedBatch) -> PackedBatch:
    """A batch of one row with another last token."""
    ids = row.ids_N.cpu()
    (prompt,) = row.prompt_tokens
    last = ids[:1] if ids[0] != ids[-1] else ids[1:2]
    return pack([TokenTree(ids[:prompt], [Branch(torch.cat([ids[prompt:-1], last]))])]).to(row.ids_N.device)
