"""DPO as release 0.7.7 computed it: pairs tokenised jointly, padded to one width, with whole logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trl.data.encode import Ids
from trl.legacy.collators import pad_to_length
from trl.losses.loss_sum import Extreme, LossSum
from trl.losses.pairs import PairLogps
from trl.losses.preference import PAIR_LOSSES, pair_options
from trl.models.unwrap import is_encoder_decoder

Encoded = dict[str, Ids]


# --- rows -------------------------------------------------------------------------------------------------------


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
    split_of: Callable[[str, str], Encoded],
) -> Encoded:
    alone = tokenizer(prompt, add_special_tokens=False)
    sides = {
        "": {"prompt_input_ids": list(alone["input_ids"]), "prompt_attention_mask": list(alone["attention_mask"])},
        **{name: split_of(prompt, answer) for name, answer in answers.items()},
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
    split_of: Callable[[str, str], Encoded] | None = None,
) -> dict[str, Any]:
    """A row with the texts `prompt`, `chosen` and `rejected` as columns of ids, masks and labels.

    Causal: BOS before the prompt (where the tokenizer has one), EOS after the answers; where prompt + longer answer
    exceed `max_length`, first the prompt is cut to `max_prompt_length`, then the answers to the rest.
    split_of: tokenises prompt and answer; None: `build_tokenized_answer`.
    """
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(feature[name], str):
            raise ValueError(f"{name} should be an str but got {type(feature[name])}")
    prompt, answers = feature["prompt"], {name: feature[name] for name in ("chosen", "rejected")}
    if is_encoder_decoder:
        limit = max_length if max_target_length is None else max_target_length
        return _encoder_decoder_row(tokenizer, prompt, answers, limit, max_prompt_length, model)
    split_of = split_of or partial(build_tokenized_answer, tokenizer)
    return _causal_row(
        tokenizer, prompt, answers, max_length, max_prompt_length, truncation_mode, label_pad_token_id, split_of
    )


# --- batches ----------------------------------------------------------------------------------------------------


def concatenated_inputs(
    batch: Mapping[str, Any],
    is_encoder_decoder: bool = False,
    label_pad_token_id: int = -100,
    padding_value: int = 0,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Chosen rows, then rejected rows, padded to one width: `concatenated_{input_ids, attention_mask, labels}`.

    Encoder-decoders get their prompt's ids twice, and the labels of both.
    """
    sides = ("chosen", "rejected")
    width = max(batch[f"{side}_{'labels' if is_encoder_decoder else 'input_ids'}"].shape[1] for side in sides)

    def pad_of(key: str) -> int:
        if "labels" in key or is_encoder_decoder:
            return label_pad_token_id
        return padding_value if key.endswith("_input_ids") else 0

    joined: dict[str, Tensor] = {}
    for side in sides:
        for key, value in batch.items():
            if not key.startswith(side) or not isinstance(value, Tensor) or value.dim() != 2:
                continue
            name = key.replace(side, "concatenated", 1)
            padded = pad_to_length(value, width, pad_of(key))
            joined[name] = torch.cat([joined[name], padded]) if name in joined else padded
    if is_encoder_decoder:
        joined["concatenated_input_ids"] = batch["prompt_input_ids"].repeat(2, 1)
        joined["concatenated_attention_mask"] = batch["prompt_attention_mask"].repeat(2, 1)
    return joined if device is None else {name: value.to(device) for name, value in joined.items()}


def get_batch_logps(
    logits: Tensor,
    labels: Tensor,
    average_log_prob: bool = False,
    label_pad_token_id: int = -100,
    is_encoder_decoder: bool = False,
) -> Tensor:
    """Log-probability of each row's labels, summed (or averaged) over those that are not padding. [B]"""
    if logits.shape[:-1] != labels.shape:
        raise ValueError("Logits (batch and sequence length dim) and labels must have the same shape.")
    if not is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != label_pad_token_id
    targets = labels.masked_fill(~counts, 0)
    logprobs = logits.log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2) * counts
    return logprobs.sum(-1) / counts.sum(-1) if average_log_prob else logprobs.sum(-1)


def concatenated_forward(
    model: nn.Module,
    batch: Mapping[str, Any],
    label_pad_token_id: int = -100,
    padding_value: int = 0,
    join: Callable[..., dict[str, Tensor]] = concatenated_inputs,
    logps_of: Callable[..., Tensor] = get_batch_logps,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(chosen_logps, rejected_logps, chosen_logits, rejected_logits)` with one forward of both sides.

    join, logps_of: what makes one batch of the two sides, and log-probabilities of logits.
    """
    encoder_decoder = is_encoder_decoder(model)
    device = next(model.parameters()).device
    joined = join(
        batch, is_encoder_decoder=encoder_decoder, label_pad_token_id=label_pad_token_id, padding_value=padding_value,
        device=device,
    )  # fmt: skip
    labels = joined["concatenated_labels"]
    inputs = {"input_ids": joined["concatenated_input_ids"], "attention_mask": joined["concatenated_attention_mask"]}
    if encoder_decoder:
        inputs["labels"] = labels
    logits = model(**inputs, use_cache=False).logits.float()
    logps = logps_of(
        logits, labels, average_log_prob=False, label_pad_token_id=label_pad_token_id,
        is_encoder_decoder=encoder_decoder,
    )  # fmt: skip
    pairs = batch["chosen_labels"].shape[0]
    return logps[:pairs], logps[pairs:], logits[:pairs], logits[pairs:]


def pair_losses(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    losses: Mapping[str, float],
    options: Mapping[str, Any],
    reference_free: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(losses, chosen_rewards, rejected_rewards)` of the summed log-probabilities of chosen and rejected.

    losses: names with their weights. The rewards are measured against the reference, also where the losses are not.
    """
    pair = PairLogps(*policy) if reference_free else PairLogps(*policy, *reference)
    total = policy[0].new_zeros(())
    for name, weight in losses.items():
        own = {key: value for key, value in options.items() if key in pair_options(name)}
        total = total + weight * PAIR_LOSSES[name](pair, **own)
    chosen, rejected = (options["beta"] * (ours - its).detach() for ours, its in zip(policy, reference, strict=True))
    return total, chosen, rejected


def mean_metrics(result: LossSum, prefix: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss, and the mean of each metric under `prefix` + its name."""
    means: dict[str, Tensor] = {}
    for name, value in result.metrics.items():
        if isinstance(value, Extreme):
            means[prefix + name] = value.value
            continue
        total, count = value if isinstance(value, tuple) else (value, result.count)
        means[prefix + name] = total / count
    return result.mean, means
