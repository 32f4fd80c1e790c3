"""`trl generate`: what a model answers to prompts, one JSON object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from trl.data.any_text import json_text, many
from trl.scripts.open_model import Dtype, Opened, open_model
from trl.scripts.quiet import quiet, say
from trl.scripts.sampling import Asked, MinP, Penalty, Temperature, TopK, TopP, in_words

AT_ONCE = 64
"""prompts that are sampled together, and then written"""
SEEDS = 2**20
"""distance of two seeds of a run: a prompt's own is the run's plus its place"""
ANSWERS = ("completion", "chosen", "rejected", "messages", "conversations", "text")
"""columns of a row that answer it or repeat it; the others stand in each line"""
IMAGES = ("images", "image")
"""columns with pictures"""


Split = Annotated[str | None, typer.Option(help="Split of the data set (default: test, else train).")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take the first so many rows.")]


def command(
    model: Annotated[str, typer.Argument(help="Output folder of a run, checkpoint, adapter, or model.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; none: those of --data, or of the input.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Rows with prompts: a file (.jsonl, .json, .csv, .parquet, .txt), a folder, or a Hub name."),
    ] = None,
    split: Split = None,
    limit: Limit = None,
    output: Annotated[Path | None, typer.Option(help="File of JSON lines to write (default: standard output).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")] = 1,
    image: Annotated[
        list[str] | None, typer.Option(help="File of a picture that stands before each prompt; repeatable.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(help="Put texts to the model as a user's turn (default: texts of the line only)."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instruction before each prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer, and is left out; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same line gives the same answers.")] = 0,
    dtype: Dtype = None,
) -> None:
    """Write what a model answers to prompts: of the line, of a file of rows, or of the standard input.

    Conversations are put to the model by its chat template, as in training, and so are the texts of the line and of the
    input. A text in a row is continued as it stands, as in training; --chat makes a user's turn of it.
    """
    asked = Asked(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    if prompts and data is not None:
        raise ValueError(f"--data {data}: the line has prompts too; give either")
    with quiet():
        rows, as_chat = read_prompts(prompts, data, split, limit)
        rows = with_images(rows, image or ())
        with destination(output, overwrite) as file:
            opened = open_model(model, dtype)
            check_sees(opened, rows, image or ())
            turns = Turns(as_chat if chat is None else chat, system)
            if chat:
                opened.spell_roles()
            count = 0
            for one in answered(opened, rows, asked, turns, n=n, stops=stop or (), seed=seed):
                if not count and output is not None and output.is_file():
                    file.truncate(0)
                line = {**rows[one.place], **one.columns(numbered=n > 1)}
                file.write(json_text(line) + "\n")
                file.flush()
                count += 1
    if output is not None:
        print(f"wrote {output}: {many(count, 'answer')} to {many(len(rows), 'prompt')}")


@dataclass(frozen=True)
class Turns:
    """How texts are put to a model."""

    chat: bool
    """as a user's turn, where the tokenizer has a template"""
    system: str | None = None


# -- prompts -------------------------------------------------------------------------------------


def read_prompts(
    prompts: Sequence[str] | None, data: str | None, split: str | None, limit: int | None
) -> tuple[list[dict[str, Any]], bool]:
    """Rows, and whether a text among them is a user's turn."""
    if data is not None:
        rows = [prompt_row(row, place) for place, row in enumerate(read_rows(data, split, limit))]
        return rows, Path(data).suffix == ".txt"
    given = list(prompts or ())
    if not given and not sys.stdin.isatty():
        given = [line.strip() for line in sys.stdin if line.strip()]
        if given and all(line.startswith("{") for line in given):
            return [prompt_row(_object(line, place), place) for place, line in enumerate(given[:limit])], False
    if not given:
        raise ValueError("no prompts: give them on the line, in a file with --data, or as the standard input")
    return [{"prompt": text} for text in given[:limit]], True


def read_rows(data: str, split: str | None, limit: int | None) -> Any:
    """The rows of a file, a folder or a Hub name, as a data set."""
    from trl.scripts.data_config import named_dataset, split_of

    splits = named_dataset(data, "data")
    rows = split_of(splits, split or ("test" if "test" in splits else "train"), "split")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _object(line: str, place: int) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError as error:
        raise ValueError(f"line {place + 1} of the input: it begins as a JSON object and is none ({error})") from error


def prompt_row(row: Mapping[str, Any], place: int) -> dict[str, Any]:
    """A row with its `prompt`: its own, that of its pair, or the conversation before its last answer."""
    from trl.data.columns import at_row
    from trl.data.formats import maybe_convert_to_chatml, maybe_extract_prompt

    with at_row(place, "given"):
        row = maybe_extract_prompt(maybe_convert_to_chatml(dict(row)))
        kept = {name: value for name, value in row.items() if name not in ANSWERS}
        if "prompt" in row or "query" in row:
            name = "prompt" if "prompt" in row else "query"
            value = row[name] if isinstance(row[name], str) else _turns(row, name)
            return {**kept, "prompt": value}
        if row.get("messages") is not None:
            turns = _turns(row, "messages")
            while turns and turns[-1]["role"] == "assistant":
                turns = turns[:-1]
            return {**kept, "prompt": turns}
        if isinstance(row.get("text"), str):
            return {**kept, "prompt": row["text"]}
        raise ValueError(f"it has the columns {', '.join(row)}: give it `prompt`, `messages` or `text`")


def _turns(row: Mapping[str, Any], name: str) -> list[Any]:
    """The messages of a column; those with pictures as they are, as they are read where they are tokenised."""
    from trl.data.messages import messages_of
    from trl.data.thumbnails import has_pictures

    return list(row[name]) if has_pictures(row[name]) else messages_of(row, name)


def with_images(rows: list[dict[str, Any]], images: Sequence[str]) -> list[dict[str, Any]]:
    """The rows, each with these pictures. ValueError for a file that cannot be read, before a model is loaded."""
    from trl.data.picture_files import read_picture

    for path in images:
        read_picture(path, f"--image {path}")
    if images and (place := next((i for i, row in enumerate(rows) if _shows(row)), None)) is not None:
        raise ValueError(f"--image {images[0]}: row {place} has pictures of its own; leave out --image")
    return [{**row, "images": list(images)} for row in rows] if images else rows


def _shows(row: Mapping[str, Any]) -> bool:
    """Whether a row has pictures."""
    from trl.data.thumbnails import has_pictures

    return has_pictures(row["prompt"]) or any(row.get(name) not in (None, []) for name in IMAGES)


def check_sees(opened: Opened, rows: Sequence[Mapping[str, Any]], images: Sequence[str] = ()) -> None:
    """ValueError for --image where the model reads no pictures; those of rows are left out then, and that is said."""
    from trl.data.pictures import reader_of

    if reader_of(opened.tokenizer) is not None:
        return
    if images:
        raise ValueError(
            f"--image {images[0]}: {opened.found.name} reads no pictures, as it has no processor; take a "
            "vision-language model, with the files of its processor beside it"
        )
    if any(row.get(name) not in (None, []) for row in rows for name in IMAGES):
        say(f"{opened.found.name} reads no pictures: those of the rows are left out")


# -- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a model has said to a prompt."""

    place: int
    """of the row"""
    number: int
    """of several answers to it"""
    text: str
    ids: list[int]
    finish_reason: str
    pictures: tuple[int, ...] = ()
    """of the prompt, by their numbers"""

    def columns(self, numbered: bool) -> dict[str, Any]:
        """As it stands in a line."""
        number = {"sample": self.number} if numbered else {}
        return {"completion": self.text, **number, "finish_reason": self.finish_reason, "tokens": len(self.ids)}


def answered(
    opened: Opened,
    rows: Sequence[Mapping[str, Any]],
    asked: Asked,
    turns: Turns,
    *,
    n: int = 1,
    stops: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[Answer]:
    """What the model says to the `prompt` of each row, n times, in the order of the rows."""
    from trl.data.chat import ChatTemplate
    from trl.data.pictures import pictures_among
    from trl.generation.local import make_sampler
    from trl.generation.stopping import end_tokens, without_ends
    from trl.generation.text_stream import without_stop

    tokenizer = opened.tokenizer
    ends = set(end_tokens(opened.model, tokenizer))
    if any(not isinstance(row["prompt"], str) for row in rows):
        opened.spell_roles()
    stops = (*stops, *opened.stops)
    prompts = [_put(row["prompt"], tokenizer, turns) for row in rows]
    if tokenizer.chat_template and any(not isinstance(one, str) for one in prompts):
        ends |= ChatTemplate(tokenizer, ends=sorted(ends)).end_ids
    params = asked.params(opened.model, stops, sorted(ends))
    say(f"{opened.found.name} samples with {in_words(params)}, seed {seed}")
    sampler = make_sampler(opened.model, tokenizer)
    ids = [_ids(row, prompt, tokenizer, place) for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True))]
    seen = [tuple(pictures_among(each)) for each in ids]
    check_lengths(ids, opened.model)
    for start in range(0, len(rows), AT_ONCE):
        part = range(start, min(start + AT_ONCE, len(rows)))
        seeds = tuple(seed * SEEDS + place for place in part)
        groups = sampler.sample([ids[place] for place in part], replace(params, seed=seeds), n=n)
        for place, group in zip(part, groups, strict=True):
            texts = without_ends(tokenizer, [one.ids for one in group], sorted(ends))
            for number, (one, text) in enumerate(zip(group, texts, strict=True)):
                yield Answer(place, number, without_stop(text, stops), one.ids, one.finish_reason, seen[place])


def check_lengths(ids: Sequence[Sequence[int]], model: Any) -> None:
    """Refuse what a model cannot read before any answer is written: ValueError that names the rows."""
    from trl.models.prepare import context_length
    from trl.models.unwrap import is_encoder_decoder

    context = None if is_encoder_decoder(model) else context_length(model)
    long = [place for place, prompt in enumerate(ids) if context is not None and len(prompt) >= context]
    if long:
        further = len(long) - 1
        more = f", and {further:,} further prompt{' is' if further == 1 else 's are'} too long" if further else ""
        raise ValueError(
            f"row {long[0]}: its prompt has {len(ids[long[0]]):,} tokens, the model's context {context:,}{more}: "
            "shorten or leave out what is longer; nothing was sampled"
        )


def _put(prompt: Any, tokenizer: Any, turns: Turns) -> Any:
    """The prompt as the model gets it: a text, or a conversation."""
    if isinstance(prompt, str):
        if not (turns.chat and tokenizer.chat_template):
            return prompt if turns.system is None else f"{turns.system}\n\n{prompt}"
        prompt = [{"role": "user", "content": prompt}]
    if turns.system is not None and prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": turns.system}, *prompt]
    return prompt


def _ids(row: Mapping[str, Any], prompt: Any, tokenizer: Any, place: int) -> list[int]:
    from jinja2.exceptions import TemplateError

    from trl.data.any_text import encodable
    from trl.data.columns import at_row
    from trl.rollout.prompts import prompt_ids

    images = {name: row[name] for name in IMAGES if name in row}
    with at_row(place, "given"):
        try:
            value = encodable(prompt) if isinstance(prompt, str) else prompt
            ids: list[int] = prompt_ids({**images, "prompt": value}, tokenizer).tolist()
            return ids
        except TemplateError as error:
            raise ValueError(f"the chat template does not take this conversation: {error}") from error


@contextmanager
def destination(output: Path | None, overwrite: bool) -> Iterator[TextIO]:
    """The file to write at its end, or the standard output. An error of the file is told before a model is loaded.

    What the file holds stays until the first answer; an error before it leaves no new file.
    """
    if output is None:
        yield sys.stdout
        return
    if output.is_dir():
        raise ValueError(f"--output {output}: that is a folder; name a file")
    if output.exists() and output.stat().st_size and not overwrite:
        raise ValueError(f"--output {output}: the file is there already; name another one, or add --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        new = not output.exists()
        file = output.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OSError(f"--output {output}: it cannot be written there: {error.strerror or error}") from error
    try:
        with file:
            yield file
    except BaseException:
        if new and not output.stat().st_size:
            output.unlink()
        raise
