"""Prompts with pictures as vLLM takes them: a placeholder for each picture, and the pictures beside the ids.

vLLM's own processor puts a picture's tokens where the placeholder stands. What it has made of a prompt comes back with
the completions, and must be the policy's prompt to the token.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trl.data.pictures import Album, PictureReader, number_of
from trl.generation.vllm.engine import EngineError, Request


def with_placeholders(request: Request, reader: PictureReader | None) -> Request:
    """A request whose pictures are apart from its ids; one of words as it is."""
    ids = list(map(int, request.prompt))
    if min(ids) >= 0:
        return request
    if reader is None:
        raise ValueError(
            "a prompt has pictures, and the sampler does not know what reads them: give it the tokenizer of the "
            "policy's processor"
        )
    numbers = reader.occurrences(ids)
    return replace(
        request, prompt=folded(ids, numbers, reader), pictures=tuple(numbers), whole=tuple(reader.plain(ids))
    )


def folded(ids: Sequence[int], numbers: Sequence[int], reader: PictureReader) -> list[int]:
    """The ids with the placeholder instead of what the processor has written for each picture."""
    placeholder = reader.tokenizer(reader.placeholder, add_special_tokens=False, verbose=False)["input_ids"]
    made: list[int] = []
    rest = list(ids)
    for number in numbers:
        start = next(at for at, token in enumerate(rest) if token < 0)
        before, behind = _around(rest, start, reader.ids_of(number), reader.tokenizer)
        made += [*before, *placeholder]
        rest = behind
    return made + rest


def _around(ids: list[int], start: int, own: Sequence[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before and behind a picture whose first token below zero is at `start`; `own`: of it alone.

    Blanks at its edges may have become one token with those beside it.
    """
    first = next(at for at, token in enumerate(own) if token < 0)
    if ids[max(start - first, 0) :][: len(own)] == list(own):
        return ids[: start - first], ids[start - first + len(own) :]
    special = set(tokenizer.all_special_ids)
    marks = [at for at, token in enumerate(own) if token < 0 or token in special]
    lead, core, tail = own[: marks[0]], own[marks[0] : marks[-1] + 1], own[marks[-1] + 1 :]
    begin = start - (first - marks[0])
    if ids[max(begin, 0) :][: len(core)] != list(core):
        raise ValueError(f"picture {number_of(ids[start])} does not stand in the prompt as its processor writes it")

    def text_of(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), clean_up_tokenization_spaces=False)) if part else ""

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

    blank, before = text_of(lead), ids[:begin]
    taken = next(size for size in range(len(before) + 1) if text_of(before[len(before) - size :]).endswith(blank))
    kept = ids_of(text_of(before[len(before) - taken :]).removesuffix(blank))
    blank, behind = text_of(tail), ids[begin + len(core) :]
    used = next(size for size in range(len(behind) + 1) if text_of(behind[:size]).startswith(blank))
    left = ids_of(text_of(behind[:used]).removeprefix(blank))
    return before[: len(before) - taken] + kept, left + behind[used:]


def opened(number: int) -> Any:
    """The picture as the policy's processor gets it."""
    return Album.open(number)


def as_parts(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The pictures as a server takes them, by data URLs of PNG files; their numbers are what it may keep them under."""
    parts = []
    for number in numbers:
        file = io.BytesIO()
        opened(number).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "url": url, "uuid": str(number)})
    return parts


def check_read(request: Request, ids: Sequence[int] | None) -> None:
    """EngineError unless the engine has read the prompt as the policy reads it."""
    if not request.pictures or (ids is not None and list(ids) == list(request.whole)):
        return
    if ids is None:
        raise EngineError(
            "vLLM does not say how it has read the pictures of a prompt: take release 0.32, or sample without it "
            "(use_vllm=False)"
        )
    raise EngineError(
        f"vLLM reads a prompt with {len(request.pictures)} pictures as {len(ids)} tokens which are not the policy's "
        f"{len(request.whole)}: serve a folder with the policy's own processor (`processor.save_pretrained`), or "
        "sample without it (use_vllm=False)"
    )
