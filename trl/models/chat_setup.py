"""Gives a tokenizer a chat template, and the model the tokens that the template needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import AddedToken

from trl.models.prepare import read_tokenizer
from trl.models.sharded import gathered
from trl.models.unwrap import below_accelerate, below_value_head, holds_parts, own_pace

SIMPLE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""`User: ...`, a blank line, `Assistant: ...`: for base models without tokens for roles"""


@dataclass(frozen=True)
class ChatMlSpecialTokens:
    """The tokens of ChatML, `<|im_start|>role ... <|im_end|>`, and its template."""

    bos_token: str = "<|im_start|>"
    eos_token: str = "<|im_end|>"
    pad_token: str = "<|im_end|>"

    @property
    def chat_template(self) -> str:
        """The Jinja template."""
        return (
            f"{{% for message in messages %}}{self.bos_token}{{{{ message['role'] }}}}\n"
            f"{{{{ message['content'] }}}}{self.eos_token}\n{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{self.bos_token}assistant\n{{% endif %}}"
        )


def setup_chat_format(
    model: Any, tokenizer: Any, format: str = "chatml", resize_to_multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Give a base model and its tokenizer ChatML: template, tokens as BOS, EOS and padding, and rows for new tokens.

    Both are changed in place and returned. `resize_to_multiple_of`: the embedding gets a multiple of so many rows.
    """
    if format != "chatml":
        raise ValueError(f"format={format!r}: 'chatml' is the one there is; for others use clone_chat_template")
    if tokenizer.chat_template is not None:
        raise ValueError(
            "tokenizer: it has a chat template already; leave setup_chat_format out, or set "
            "`tokenizer.chat_template = None` first"
        )
    tokens = ChatMlSpecialTokens()
    marks = (tokens.bos_token, tokens.eos_token)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], special_tokens=True)
    for name in ("bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, name, getattr(tokens, name))
    tokenizer.chat_template = tokens.chat_template
    _resize(model, tokenizer, resize_to_multiple_of)
    _tell(model, tokenizer, ("bos_token_id", "eos_token_id", "pad_token_id"))
    return model, tokenizer


def clone_chat_template(
    model: Any, tokenizer: Any, source_tokenizer_path: str, resize_to_multiple_of: int | None = 64
) -> tuple[Any, Any, list[int]]:
    """Give a tokenizer the chat template, the added tokens and the EOS token of another one, and the model their rows.

    source_tokenizer_path: a folder or Hub name. Model and tokenizer are changed in place and returned, with the ids of
    the tokens that came from the source. Rows of the embedding beyond them get tokens `<|extra_0|>`, ... of their own,
    so that tokenizer and embedding have one size.
    """
    source = read_tokenizer(source_tokenizer_path)
    if source.chat_template is None:
        raise ValueError(f"source_tokenizer_path={source_tokenizer_path!r}: that tokenizer has no chat template")
    known = tokenizer.get_vocab()
    tokens = {token.content: token for _, token in sorted(source.added_tokens_decoder.items())}
    if source.eos_token is not None:
        tokens.setdefault(source.eos_token, AddedToken(source.eos_token, special=True))
    new = [token for content, token in tokens.items() if content not in known]
    tokenizer.add_tokens(new)
    added = [tokenizer.convert_tokens_to_ids(token.content) for token in new]
    tokenizer.chat_template = source.chat_template
    tokenizer.eos_token = source.eos_token or tokenizer.eos_token
    rows = _resize(model, tokenizer, resize_to_multiple_of)
    tokenizer.add_tokens([AddedToken(f"<|extra_{i}|>", special=True) for i in range(rows - len(tokenizer))])
    _tell(model, tokenizer, ("eos_token_id",))
    return model, tokenizer, added


def get_training_chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template: the trainers find what the assistant says in any template, unchanged."""
    return tokenizer.chat_template


def template_at(path: str) -> str:
    """The chat template of a Jinja file, or of the tokenizer in a folder or of a Hub name."""
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    beside = path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith((".jinja", ".jinja2", ".txt"))
    if beside and not os.path.isdir(path):
        raise ValueError(
            f"chat_template_path={path!r}: there is no such file; give a file with a Jinja template, or the folder or "
            "Hub name of a tokenizer"
        )
    template = read_tokenizer(path).chat_template
    if template is None:
        raise ValueError(f"chat_template_path={path!r}: the tokenizer there has no chat template; name another")
    return str(template)


@contextmanager
def unwrap_model_for_generation(model: nn.Module, accelerator: Any) -> Iterator[Any]:
    """The model below DDP and compilation, whose `generate` can be called; weights in parts are gathered meanwhile.

    Collective at the start where weights are sharded; then each process generates as much as it likes.
    """
    inner = below_accelerate(accelerator.unwrap_model(model))
    with gathered(model):
        if not holds_parts(inner):
            yield inner
            return
        own, was_own = inner.generate, "generate" in vars(inner)
        inner.generate = partial(own, **own_pace(inner))
        try:
            yield inner
        finally:
            del inner.generate
            if was_own:
                inner.generate = own


def _resize(model: Any, tokenizer: Any, multiple: int | None) -> int:
    """Give the embedding rows for all tokens, never fewer than it has; the number of rows."""
    inner = below_value_head(model)
    rows = int(inner.get_input_embeddings().num_embeddings)
    wanted = max(len(tokenizer), rows)
    wanted = wanted if multiple is None else -(-wanted // multiple) * multiple
    if wanted != rows:
        inner.resize_token_embeddings(wanted)
    return wanted


def _tell(model: Any, tokenizer: Any, names: tuple[str, ...]) -> None:
    """Write the tokenizer's ids into the model's configs."""
    inner = below_value_head(model)
    for config in (inner.config, getattr(inner, "generation_config", None)):
        for name in names if config is not None else ():
            setattr(config, name, getattr(tokenizer, name))
