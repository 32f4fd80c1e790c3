"""`trl chat`: talk to a model in the terminal."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trl.scripts.exit_codes import BAD_INPUT
from trl.scripts.open_model import Dtype, Opened, open_model
from trl.scripts.quiet import quiet, say
from trl.scripts.sampling import Asked, MinP, Penalty, Temperature, TopK, TopP, in_words

if TYPE_CHECKING:
    from trl.generation.sampler import SamplingParams

HELP = {
    "/clear": "forget what was said",
    "/system TEXT": "begin anew with this instruction; without TEXT: without one",
    "/image FILE": "show this picture with the next turn; several are shown together",
    "/seed N": "same question, same answer; without N: another one each time",
    "/help": "show these lines",
    "/exit": "end, as Ctrl-D does",
}


def command(
    model: Annotated[str, typer.Argument(help="Output folder of a run, checkpoint, adapter, or model.")],
    system: Annotated[str | None, typer.Option(help="Instruction that stands before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Annotated[int | None, typer.Option(help="Make answers reproducible.")] = None,
    dtype: Dtype = None,
) -> int:
    """Talk to a model, which answers word by word as it samples. /help lists the commands; Ctrl-C stops an answer.

    Lines that are piped in are what the user says, one after another; the answers alone go to the standard output.
    The exit code is 2 where one of them could not be answered.
    """
    asked = Asked(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    with quiet():
        opened = open_model(model, dtype)
        talk = Chat(opened, asked, system, seed, Wrapped(written) if sys.stdout.isatty() else written)
        if sys.stdin.isatty():
            _converse(talk, model)
        else:
            _read_through(talk)
    return BAD_INPUT if talk.refused and not sys.stdin.isatty() else 0


class Chat:
    """A conversation with a model.

    write: gets an answer piece by piece.
    """

    def __init__(
        self, opened: Opened, asked: Asked, system: str | None, seed: int | None, write: Callable[[str], None]
    ) -> None:
        from trl.data.chat import ChatTemplate
        from trl.generation.stopping import end_tokens

        self.opened, self.seed, self.write = opened, seed, write
        self.tokenizer = opened.tokenizer
        opened.spell_roles()
        known = end_tokens(opened.model, self.tokenizer)
        self.ends = tuple(sorted({*known, *ChatTemplate(self.tokenizer, ends=known).end_ids}))
        self.params: SamplingParams = asked.params(opened.model, opened.stops, self.ends)
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[bytes] = []
        """files that the next turn shows"""
        self.refused = 0
        """turns that could not be put to the model"""
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget what was said. ValueError where the template takes no instruction."""
        self.messages, self.pictures, self.system = [], [], system
        if system is None:
            return
        self.messages = [{"role": "system", "content": system}]
        try:
            self._prompt([{"role": "user", "content": "?"}])
        except ValueError:
            self.messages, self.system = [], None
            raise

    def _prompt(self, more: list[dict[str, Any]]) -> list[int]:
        from jinja2.exceptions import TemplateError

        from trl.data.pictures import reader_of
        from trl.rollout.prompts import prompt_ids

        messages = self.messages + more
        if reader_of(self.tokenizer) is not None:
            shown: list[int] = prompt_ids({"prompt": messages}, self.tokenizer).tolist()
            return shown
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template does not take this conversation: {error}") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def answer(self, said: str) -> None:
        """Answer a turn. What was said before Ctrl-C is kept. ValueError where the turn cannot be put to the model."""
        from trl.data.any_text import encodable
        from trl.generation.local import make_sampler
        from trl.generation.text_stream import TextStream
        from trl.models.prepare import context_length
        from trl.models.unwrap import is_encoder_decoder

        turn: dict[str, Any] = {"role": "user", "content": encodable(said)}
        if self.pictures:
            shown = [{"type": "image", "image": content} for content in self.pictures]
            turn["content"] = [*shown, {"type": "text", "text": turn["content"]}]
        prompt = self._prompt([turn])
        context = None if is_encoder_decoder(self.opened.model) else context_length(self.opened.model)
        if context is not None and len(prompt) >= context:
            raise ValueError(
                f"the conversation has {len(prompt):,} tokens with this turn, the model's context {context:,}: shorten "
                "the turn; /clear begins anew"
            )
        self.pictures = []
        stream = TextStream(self.tokenizer, self.ends, self.params.stop_strings)
        got: list[Any] = []

        def on_tokens(rows: Any) -> None:
            got[:] = rows
            self.write(stream.push(rows[0].ids, bool(rows[0].finish_reason)))

        sampler = make_sampler(self.opened.model, self.tokenizer, on_tokens=on_tokens)
        try:
            sampler.sample([prompt], replace(self.params, seed=self.seed))
        finally:
            if got:
                self.write(stream.push(got[0].ids, finished=True) + "\n")
                self.messages += [turn, {"role": "assistant", "content": stream.text}]
        if got[0].finish_reason == "length":
            say(f"the answer was cut after {len(got[0].ids):,} tokens (--max-new-tokens)")

    def show(self, path: str) -> None:
        """Keep a picture for the next turn. ValueError where it, or any picture, cannot be read."""
        from trl.data.picture_files import open_picture, read_picture
        from trl.data.pictures import reader_of

        if reader_of(self.tokenizer) is None:
            raise ValueError(f"/image: {self.opened.found.name} reads no pictures, as it has no processor")
        if not path:
            raise ValueError("/image: say which file")
        content = read_picture(path, f"/image {path}")
        self.pictures.append(content)
        width, height = open_picture(content).size
        say(f"{path} ({width}x{height}) is shown with the next turn")

    def obey(self, line: str) -> bool:
        """Do what a command says; whether the conversation goes on. ValueError for a command that is none."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/exit", "/quit"):
            return False
        if word in ("/clear", "/system"):
            self.begin(self.system if word == "/clear" else rest or None)
            say("the conversation begins anew")
        elif word == "/image":
            self.show(rest)
        elif word == "/seed":
            if rest and not rest.lstrip("-").isdigit():
                raise ValueError(f"/seed {rest}: give a whole number, or nothing")
            self.seed = int(rest) if rest else None
        elif word == "/help":
            for name, meaning in HELP.items():
                print(f"{name:13} {meaning}", file=sys.stderr)
        else:
            raise ValueError(f"{word}: there is no such command; /help lists them")
        return True

    def take(self, line: str) -> bool:
        """A line of the user: a command, or a turn to answer; whether the conversation goes on."""
        line = line.strip()
        if not line:
            return True
        try:
            if line.startswith("/"):
                return self.obey(line)
            self.answer(line)
        except ValueError as error:
            self.refused += not line.startswith("/")
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return True


def written(text: str) -> None:
    """Show a piece of an answer at once; whatever a model writes, a terminal obeys none of it."""
    from trl.data.any_text import console, visible

    if text:
        console().print(visible(text), end="", markup=False, highlight=False, emoji=False, soft_wrap=True)
        sys.stdout.flush()


class Wrapped:
    """Breaks an answer between words where the terminal ends; so a word is shown when it is whole."""

    def __init__(self, show: Callable[[str], None], width: int | None = None) -> None:
        self.show, self.width = show, width
        self.word, self.column = "", 0

    def __call__(self, text: str) -> None:
        shown: list[str] = []
        width = self.width or shutil.get_terminal_size().columns
        for letter in text:
            if letter.isspace():
                shown.append(self._word(width))
                if letter == "\n" or self.column < width:
                    shown.append(letter)
                self.column = 0 if letter == "\n" else self.column + 1
            else:
                self.word += letter
                if len(self.word) >= width:  # as in languages without blanks
                    shown.append(self._word(width))
        self.show("".join(shown))

    def _word(self, width: int) -> str:
        """The word that is whole now, on the next line where this one has no room for it."""
        from rich.cells import cell_len

        word, self.word = self.word, ""
        breaks = bool(self.column) and self.column + cell_len(word) > width
        self.column = (0 if breaks else self.column) + cell_len(word)
        return f"\n{word}" if breaks else word


def _read_through(talk: Chat) -> None:
    """Answer the lines that are piped in."""
    for line in sys.stdin:
        if not talk.take(line):
            return


def _converse(talk: Chat, name: str) -> None:
    """Ask and answer at a terminal."""
    from rich.console import Console

    from trl.data.any_text import fitting

    colour = Console().color_system is not None
    seed = "" if talk.seed is None else f", seed {talk.seed}"
    line = f"{name} · {in_words(talk.params)}{seed} · /help lists commands, Ctrl-C stops an answer, Ctrl-D ends"
    print(fitting(line, sys.stdout))
    for line in _asked(colour):
        try:
            if not talk.take(line):
                return
        except KeyboardInterrupt:
            say("stopped")


def _asked(colour: bool) -> Iterator[str]:
    """The lines that are typed; Ctrl-D ends them, and so does Ctrl-C twice."""
    with suppress(ImportError):  # arrow keys and the lines before
        import readline  # noqa: F401
    prompt = "\001\033[1;36m\002you>\001\033[0m\002 " if colour and os.name != "nt" else "you> "
    stopped = False
    while True:
        try:
            line = input(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if stopped:
                return
            stopped = True
            say("Ctrl-C once more ends it, and so does /exit")
            continue
        stopped = False
        yield line
