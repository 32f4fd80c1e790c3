"""How each trainer is built for rows with pictures, and what a model says of a row that it is given alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as t
from conformity import Case
from families import config_of, model_of, processor_of, rows
from torch import Tensor, nn

TOWER = "vision|visual"
TEXT_ONLY = r".*language_model.*\.(q_proj|v_proj)|.*text_model\.layers.*\.self_attn\.(q_proj|v_proj)"
"""the attention of the text layers; SmolVLM calls its language model `text_model`"""


def scorer_of(name: str, seed: int = 0) -> nn.Module:
    """A reward model that sees pictures."""
    config = config_of(name)
    config.num_labels = config.get_text_config().num_labels = 1
    torch.manual_seed(seed)
    model = t.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    for title, weight in model.named_parameters():
        if title.endswith("mm_input_projection_weight"):
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def of_ids(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that almost any two completions differ in."""
    return [sum(1 + own % 7 for own in ids) / 10 for ids in completion_ids]


def rewarded() -> dict[str, Any]:
    return {"reward_funcs": of_ids}


SAMPLED: dict[str, Any] = {"max_completion_length": 4, "generation_batch_size": 8}
KINDS: dict[str, tuple[str, str, str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "sft": ("SFTTrainer", "SFTConfig", "conversations", {}, dict),
    "dpo": ("DPOTrainer", "DPOConfig", "preference", {"beta": 0.3}, dict),
    "kto": ("KTOTrainer", "KTOConfig", "unpaired", {"beta": 0.3}, dict),
    "reward": ("RewardTrainer", "RewardConfig", "preference", {}, dict),
    "grpo": ("GRPOTrainer", "GRPOConfig", "prompts", {**SAMPLED, "num_generations": 2, "beta": 0.1}, rewarded),
    "rloo": ("RLOOTrainer", "RLOOConfig", "prompts", {**SAMPLED, "num_generations": 2, "beta": 0.1}, rewarded),
    "online-dpo": ("OnlineDPOTrainer", "OnlineDPOConfig", "prompts", SAMPLED, rewarded),
    "distillation": ("DistillationTrainer", "DistillationConfig", "prompts", SAMPLED, dict),
}  # fmt: skip
"""trainer, config, rows, settings, further arguments"""


def case(kind: str, family: str, targets: str = TEXT_ONLY, data: str | None = None, **settings: Any) -> Case:
    """The case of one trainer and one family; data: other rows than the trainer's usual ones."""
    trainer, config, usual, own, more = KINDS[kind]
    arguments = (lambda: {"teacher_model": model_of(family, seed=7)}) if kind == "distillation" else more
    return Case(
        trainer, config, partial(scorer_of if kind == "reward" else model_of, family), partial(rows, data or usual),
        settings={**own, **settings}, arguments=arguments, processing=partial(processor_of, family),
        task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM", targets=targets,
    )  # fmt: skip


def ppo_of(family: str, reward: Any = of_ids, **fields: Any) -> Any:
    """PPO with a value head on eight prompts."""
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    model = AutoModelForCausalLMWithValueHead.from_pretrained(model_of(family))
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.2)
    numbers = {"batch_size": 8, "mini_batch_size": 8, "ppo_epochs": 2, "steps": 8, "max_new_tokens": 4, "seed": 3}
    config = PPOConfig(learning_rate=1e-3, **{**numbers, **fields})
    return PPOTrainer(
        config, model, tokenizer=processor_of(family), dataset=rows("prompts"), data_collator=list, reward_funcs=reward
    )


def alone(model: Any, processor: Any, text: str, images: list[Any], more: list[int] | None = None) -> Tensor:
    """The log-probability of each id behind the first, as the model's own call of this row has it: [L - 1].

    more: ids behind those of the text, each of them text.
    """
    inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False)
    behind = torch.tensor([more or []], dtype=torch.long)
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            filler = behind if name == "input_ids" else torch.full_like(behind, int(name == "attention_mask"))
            inputs[name] = torch.cat([inputs[name], filler], dim=1)
    ids_L = inputs["input_ids"][0]
    logits_LV = model(**inputs).logits[0]
    return logits_LV[:-1].log_softmax(-1).gather(-1, ids_L[1:, None])[:, 0]


def length_of(processor: Any, text: str, images: list[Any]) -> int:
    """How many ids the text has with its pictures."""
    inputs = processor(text=[text], images=[images] if images else None, add_special_tokens=False)
    return len(inputs["input_ids"][0])


def outside_pictures(processor: Any, text: str, images: list[Any]) -> list[bool]:
    """For each id of the text with its pictures whether it is none of what the processor put in for one."""
    if not images:
        return [True] * length_of(processor, text, images)
    inputs = processor(text=[text], images=[images], add_special_tokens=False, return_text_replacement_offsets=True)
    placed, last, whole = inputs["text_replacement_offsets"][0], 0, ""
    for one in placed:
        whole, last = whole + text[last : one["span"][0]] + one["replacement"], one["span"][1]
    read = processor.tokenizer(whole + text[last:], add_special_tokens=False, return_offsets_mapping=True)
    assert read["input_ids"] == inputs["input_ids"][0]
    spans = [one["new_span"] for one in placed]
    return [all(end <= first or start >= last for first, last in spans) for start, end in read["offset_mapping"]]


def answer_of(model: Any, processor: Any, row: dict[str, Any], column: str = "completion") -> Tensor:
    """The log-probabilities of the tokens of an answer, to its end token: what the text has beyond the prompt."""
    prompt = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
    whole = processor.apply_chat_template(row["prompt"] + row[column]).removesuffix("\n")
    logps = alone(model, processor, whole, row["images"])
    return logps[length_of(processor, prompt, row["images"]) - 1 :]


def norm_of(loss: Tensor, model: nn.Module) -> float:
    """The norm of the gradient of a loss."""
    model.zero_grad()
    loss.backward()
    grads = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
    return float(torch.stack(grads).norm())
