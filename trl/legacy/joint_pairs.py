"""Preference pairs by joint tokenisation of prompt + answer: the seed's rows for DPO, and the way from them to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl.data.encode import Ids

Encoded = dict[str, Ids]


def build_tokenized_answer(tokenizer: Any, prompt: str, answer: str) -> Encoded:
    """The ids of prompt + answer tokenised as one text, split into prompt and answer.

    Where the prompt's last token would merge with the answer's first, the split moves one token to the left.
    """
    whole = tokenizer(prompt + answer, add_special_tokens=False)
    alone: Ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids, mask = list(whole["input_ids"]), list(whole["attention_mask"])
    split = len(alone)
    if ids[:split] != alone:
        split -= 1
    return {
        "prompt_input_ids": ids[:split],
        "prompt_attention_mask": mask[:split],
        "input_ids": ids[split:],
        "attention_mask": mask[split:],
    }


def _cut_prompt(side: Encoded, limit: int, mode: str) -> None:
    for key in ("prompt_input_ids", "prompt_attention_mask"):
        if mode == "keep_start":
            side[key] = side[key][:limit]
        elif mode == "keep_end":
            side[key] = side[key][-limit:]
        else:
            raise ValueError(f"Unknown truncation mode: {mode}. Should be 'keep_start' or 'keep_end'")


def _causal_row(
    tokenizer: Any,
    prompt: str,
    answers: Mapping[str, str],
    max_length: int,
    max_prompt_length: int,
    truncation_mode: str,
    label_pad_token_id: int,
) -> Encoded:
    alone = tokenizer(prompt, add_special_tokens=False)
    sides = {
        "": {"prompt_input_ids": list(alone["input_ids"]), "prompt_attention_mask": list(alone["attention_mask"])},
        **{name: build_tokenized_answer(tokenizer, prompt, answer) for name, answer in answers.items()},
    }
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for name, side in sides.items():
        if bos is not None and side["prompt_input_ids"][:1] != [bos]:
            side["prompt_input_ids"] = [bos, *side["prompt_input_ids"]]
            side["prompt_attention_mask"] = [1, *side["prompt_attention_mask"]]
        if name and eos is not None and side["input_ids"][-1:] != [eos]:
            side["input_ids"] = [*side["input_ids"], eos]
            side["attention_mask"] = [*side["attention_mask"], 1]
    longest = max(len(sides[name]["input_ids"]) for name in answers)
    for side in sides.values():
        if len(side["prompt_input_ids"]) + longest > max_length:
            _cut_prompt(side, max_prompt_length, truncation_mode)
    row: Encoded = {}
    for name in answers:
        side = sides[name]
        if len(side["prompt_input_ids"]) + longest > max_length:
            room = max(0, max_length - max_prompt_length)
            side["input_ids"], side["attention_mask"] = side["input_ids"][:room], side["attention_mask"][:room]
        head = side["prompt_input_ids"]
        row[f"{name}_input_ids"] = head + side["input_ids"]
        row[f"{name}_attention_mask"] = side["prompt_attention_mask"] + side["attention_mask"]
        row[f"{name}_labels"] = [label_pad_token_id] * len(head) + side["input_ids"]
    return row | sides[""]


def _encoder_decoder_row(
    tokenizer: Any, prompt: str, answers: Mapping[str, str], max_target_length: int, max_prompt_length: int, model: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, answer in answers.items():
        ids = tokenizer(answer, truncation=True, max_length=max_target_length, add_special_tokens=True)["input_ids"]
        row[f"{name}_labels"] = list(ids)
    encoded = tokenizer(prompt, truncation=True, max_length=max_prompt_length, add_special_tokens=True)
    row["prompt_input_ids"] = list(encoded["input_ids"])
    row["prompt_attention_mask"] = list(encoded["attention_mask"])
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        import torch

        for name in answers:
            labels = torch.tensor([row[f"{name}_labels"]])
            row[f"{name}_decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)[0].tolist()
    return row


def tokenize_row(
    feature: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
    max_target_length: int | None = None,
    truncation_mode: str = "keep_end",
    label_pad_token_id: int = -100,
    is_encoder_decoder: bool = False,
    model: Any = None,
) -> dict[str, Any]:
    """A row with the texts `prompt`, `chosen` and `rejected` as the seed's columns of ids, masks and labels.

    Causal: BOS before the prompt (where the tokenizer has one), EOS after the answers; where prompt + longer answer
    exceed `max_length`, first the prompt is cut to `max_prompt_length`, then the answers to what is left.
    """
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(feature[name], str):
            raise ValueError(f"{name} should be an str but got {type(feature[name])}")
    prompt, answers = feature["prompt"], {name: feature[name] for name in ("chosen", "rejected")}
    if is_encoder_decoder:
        limit = max_length if max_target_length is None else max_target_length
        return _encoder_decoder_row(tokenizer, prompt, answers, limit, max_prompt_length, model)
    return _causal_row(tokenizer, prompt, answers, max_length, max_prompt_length, truncation_mode, label_pad_token_id)
