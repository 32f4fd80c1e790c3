"""A character language model of 0.3 M parameters, and its imitation of a few traces."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Sequence

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl import SFTConfig, SFTTrainer, set_seed

MARKS = ("<request>", "<call>", "<response>", "<submit>")
"""of a text environment"""


def character_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A token a character; marks and `words` are one token each."""
    characters = [*string.ascii_letters, *string.digits, *" +-*/=.,:?!<>()\n"]
    names = ["<pad>", "<eos>", "?", *MARKS, *words, *characters]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(dict.fromkeys(names))}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(name, normalized=False) for name in (*MARKS, *words)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="?", model_max_length=256
    )


def character_model(
    tokenizer: PreTrainedTokenizerFast, width: int = 128, spread: float = 0.02, dropout: float = 0.1
) -> LlamaForCausalLM:
    """spread: of the first weights. A wider one than usual lets a small model see sooner what answers are for."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        attention_dropout=dropout, initializer_range=spread,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trace_row(tokenizer: PreTrainedTokenizerFast, pieces: Sequence[str]) -> dict[str, list[int]]:
    """A trace whose pieces are by turns not the model's (the question, answers of tools) and the model's own."""
    ids, mask = [], []
    for place, piece in enumerate(pieces):
        encoded = tokenizer(piece)["input_ids"]
        ids += encoded
        mask += [place % 2] * len(encoded)
    return {"input_ids": ids, "completion_mask": mask}


def imitate(
    tokenizer: PreTrainedTokenizerFast,
    traces: Sequence[Sequence[str]],
    seed: int,
    steps: int,
    *,
    learning_rate: float = 3e-3,
    weight_decay: float = 1.0,
    most_rows: int = 120,
    **shape: float,
) -> LlamaForCausalLM:
    """A new model that says what the model says in the traces, each in pieces as `trace_row` takes them.

    most_rows: of a batch. shape: of `character_model`.
    """
    set_seed(seed)
    model = character_model(tokenizer, **shape)
    rows = Dataset.from_list([trace_row(tokenizer, pieces) for pieces in traces])
    with tempfile.TemporaryDirectory() as scratch:
        numbers = SFTConfig(
            output_dir=scratch, per_device_train_batch_size=min(len(traces), most_rows), max_steps=steps,
            learning_rate=learning_rate, lr_scheduler_type="cosine", weight_decay=weight_decay, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=seed,
        )  # fmt: skip
        SFTTrainer(model, numbers, train_dataset=rows, processing_class=tokenizer).train()
    return model


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
