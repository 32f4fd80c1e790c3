"""The language model of the quickstart: the user's, or a tiny one from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trl.import_utils import pip_install
from trl.models.prepare import context_length
from trl.quickstart.recipe import Recipe

TINY_VOCABULARY = 2048
Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def open_model(name: str | Path) -> Pair:
    """Load a causal language model and its tokenizer from a folder or the Hub, and check that they can be trained."""
    if str(name).startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"--model {name}: there is no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # missing files, unknown types, damaged weights and more
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"--model {name}: cannot be read as a causal language model ({reason}); give a folder written by "
            "`save_pretrained` with its tokenizer, or a name on the Hub"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer has no EOS token, so the model could not learn to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens but the model only {rows} embeddings: they "
            "do not belong together"
        )
    return model, tokenizer


def check_length(model: PreTrainedModel, recipe: Recipe, name: str) -> None:
    """ValueError if a line does not fit into the model's context."""
    limit = context_length(model)
    if limit is not None and limit < recipe.line_tokens:
        raise ValueError(
            f"--model {name}: it has {limit} positions, and lines are up to {recipe.line_tokens} tokens long; take a "
            "model with a longer context"
        )


def tiny_model(lines: Sequence[str]) -> Pair:
    """A Llama with about a million untrained weights, and a byte-level BPE of 2,048 tokens learned from the lines."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(
        lines, vocab_size=TINY_VOCABULARY, special_tokens=["<pad>", "<end>"], show_progress=False, min_frequency=2
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<end>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def adapters(model: nn.Module, share: float) -> Any:
    """A LoRA of rank 16 on every linear layer of the topmost `share` of the blocks; None for a share of 0."""
    if share == 0:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"the quickstart trains adapters with peft: {pip_install('peft')}") from error
    linear = {
        name.rsplit(".", 1)[1]: type(module).__name__
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
    }
    blocks: int = model.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    first = blocks - max(1, round(share * blocks))
    return LoraConfig(
        r=16, lora_alpha=32, target_modules=sorted(linear), layers_to_transform=list(range(first, blocks)),
        task_type="CAUSAL_LM",
        fan_in_fan_out="Conv1D" in linear.values(),
    )  # fmt: skip
