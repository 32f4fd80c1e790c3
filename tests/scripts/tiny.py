"""Tiny models, tokenizers and rows for the skeletons: what they would fetch from the Hub, made on the spot."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers_for_tests import CHATML, byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

QUESTIONS = ["what is one plus one", "name a color", "is it good", "say hello", "count to two", "how are you"]
ANSWERS = ["it is two", "blue is one", "yes it is", "hello to you", "one and two", "fine and you"]

PAIRED = list(zip(QUESTIONS, ANSWERS, strict=True))

TEXTS = [{"text": f"### Human: {q} ### Assistant: {a}"} for q, a in PAIRED]
PROMPTS = [{"prompt": f"{q}? "} for q in QUESTIONS]
COMPLETED = [{"prompt": f"{q}? ", "completion": a} for q, a in PAIRED]
PAIRS = [{"prompt": f"{q}? ", "chosen": a, "rejected": "no"} for q, a in PAIRED]
UNPAIRED = [row | {"label": i % 2 == 0} for i, row in enumerate(COMPLETED)]
STEPS = [
    row | {"completions": ["first this", "then that"], "labels": [True, i % 2 == 0]} for i, row in enumerate(PROMPTS)
]


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


MESSAGES = [{"messages": _turns(q, a)} for q, a in PAIRED]
CHAT_PROMPTS = [{"prompt": _turns(q, a)[:1], "solution": a} for q, a in PAIRED]
CHAT_COMPLETED = [{"prompt": _turns(q, a)[:1], "completion": _turns(q, a)[1:]} for q, a in PAIRED]
CHAT_PAIRS = [{"chosen": _turns(q, a), "rejected": _turns(q, "no")} for q, a in PAIRED]


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A token a byte; with ChatML and its end mark, or like a base model's: no template, `<|endoftext|>`."""
    return byte_tokenizer(CHATML) if chat else byte_tokenizer(None, eos="<|endoftext|>")


def model(auto_class: Any = AutoModelForCausalLM, chat: bool = True, **fields: Any) -> Any:
    """A Llama, or a T5 for `AutoModelForSeq2SeqLM`, of a few thousand random weights; the same every time."""
    torch.manual_seed(1)
    ids = {"vocab_size": 272, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2 if chat else 9}
    if auto_class is AutoModelForSeq2SeqLM:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        return auto_class.from_config(T5Config(**ids | sizes | fields))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return auto_class.from_config(LlamaConfig(**ids | sizes | {"max_position_embeddings": 2048} | fields))


def folder(name: str, auto_class: Any = AutoModelForCausalLM, chat: bool = True, **fields: Any) -> str:
    """Save such a model with its tokenizer under a name that a script then loads as if it came from the Hub."""
    model(auto_class, chat, **fields).save_pretrained(name)
    tokenizer(chat).save_pretrained(name)
    return name


def reward_folder(name: str) -> str:
    """Save a reward model: one score for a text."""
    return folder(name, AutoModelForSequenceClassification, num_labels=1)


def step_folder(name: str) -> str:
    """Save a model with two labels for each token, for process rewards."""
    return folder(name, AutoModelForTokenClassification, num_labels=2)


def data(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as splits `train` and `test` into a folder that `load_dataset(name)` reads."""
    for split, part in (("train", rows), ("test", rows[:2])):
        jsonl(f"{name}/{split}.jsonl", part)
    return name


def jsonl(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as one JSONL file."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def shell(line: str) -> None:
    """Run a line `trl ...` of a shell in this process, as the console script does."""
    from trl.cli.main import main

    sys.argv = shlex.split(line)
    try:
        main()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
