"""How each trainer is built for the conformity suite: one entry a trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers_for_tests import word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
)

WORDS = "abcdefghijklmnopqrstuvwxyz"


@cache
def tokenizer() -> Any:
    return word_tokenizer()


def config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip


def causal_lm(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config())


def reward_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config(num_labels=1))


def text(length: int, start: int) -> str:
    return " ".join(WORDS[(start * 5 + i * (1 + start % 3)) % 26] for i in range(length))


def texts() -> Dataset:
    return Dataset.from_dict({"text": [text(3 + 2 * (i % 4), i) for i in range(8)]})


def pairs() -> Dataset:
    rows = range(8)
    return Dataset.from_dict(
        {
            "prompt": [text(2 + i % 3, i) + " " for i in rows],
            "chosen": [text(2 + i % 4, i + 1) for i in rows],
            "rejected": [text(1 + i % 3, i + 9) for i in rows],
        }
    )


def unpaired() -> Dataset:
    rows = range(8)
    return Dataset.from_dict(
        {
            "prompt": [text(2 + i % 3, i) + " " for i in rows],
            "completion": [text(2 + i % 4, i + 1) for i in rows],
            "label": [i % 3 > 0 for i in rows],
        }
    )


def steps() -> Dataset:
    rows = range(8)
    return Dataset.from_dict(
        {
            "prompt": [text(2 + i % 3, i) + " " for i in rows],
            "completions": [[text(1 + i % 2, i + k) for k in range(1 + i % 3)] for i in rows],
            "labels": [[(i + k) % 2 == 0 for k in range(1 + i % 3)] for i in rows],
        }
    )


def step_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForTokenClassification.from_config(config(num_labels=2))


@dataclass(frozen=True)
class Case:
    """What the suite needs to build one trainer."""

    trainer: str
    config: str
    model: Callable[[], torch.nn.Module]
    rows: Callable[[], Dataset]
    settings: dict[str, Any] = field(default_factory=dict)
    """config fields for every test of this case"""
    arguments: Callable[[], dict[str, Any]] = dict
    """further constructor arguments"""
    wrong: dict[str, Any] = field(default_factory=dict)
    """a wrong value of each field that has one"""
    packs: bool = True
    """whether `padding_free` exists"""
    task_type: str = "CAUSAL_LM"
    not_with_lora: tuple[str, ...] = ()
    """settings that make no sense with an adapter"""


CASES: dict[str, Case] = {
    "sft": Case(
        "SFTTrainer", "SFTConfig", causal_lm, texts,
        wrong={"loss_type": "x", "truncation_mode": "x", "packing_strategy": "x", "max_length": 0,
               "dataset_batch_size": 0, "dataset_kwargs": {"x": 1}, "remove_unused_columns": True,
               "dataset_num_proc": 0, "num_of_sequences": 5},
    ),
    "sft-dft": Case("SFTTrainer", "SFTConfig", causal_lm, texts, settings={"loss_type": "dft"}),
    "sft-packing": Case(
        "SFTTrainer", "SFTConfig", causal_lm, texts, settings={"packing": True, "max_length": 12, "eval_packing": False}
    ),
    "reward": Case(
        "RewardTrainer", "RewardConfig", reward_model, pairs, settings={"center_rewards_coefficient": 0.1},
        wrong={"max_length": 0, "center_rewards_coefficient": -1.0}, task_type="SEQ_CLS",
    ),
    **{
        f"dpo-{loss}": Case("DPOTrainer", "DPOConfig", causal_lm, pairs, settings={"loss_type": loss, "beta": 0.3})
        for loss in ("sigmoid", "ipo")
    },
    "dpo-many": Case(
        "DPOTrainer", "DPOConfig", causal_lm, pairs,
        settings={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "ld_alpha": 0.5, "use_weighting": True,
                  "f_divergence_type": "js_divergence", "label_smoothing": 0.1, "sync_ref_model": True,
                  "ref_model_sync_steps": 1, "max_length": 8},
        wrong={"loss_type": "kto", "loss_weights": [1.0], "beta": -1.0, "label_smoothing": 0.7, "truncation_mode": "x",
               "max_length": 0, "ld_alpha": 2.0, "f_divergence_type": "x", "f_alpha_divergence_coef": 0.3,
               "ref_model_mixup_alpha": 0.0, "ref_model_sync_steps": 0, "rpo_alpha": -1.0,
               "precompute_ref_batch_size": 4},
        not_with_lora=("sync_ref_model", "ref_model_sync_steps"),
    ),
    "dpo-state": Case("DPOTrainer", "DPOConfig", causal_lm, pairs, settings={"loss_type": ["bco_pair", "kto_pair"]}),
    "kto": Case(
        "KTOTrainer", "KTOConfig", causal_lm, unpaired, settings={"beta": 0.3, "desirable_weight": 1.5},
        wrong={"loss_type": "x", "beta": -1.0, "desirable_weight": -1.0, "undesirable_weight": -1.0, "max_length": 0,
               "truncation_mode": "x", "precompute_ref_batch_size": 2},
    ),
    "kto-bco": Case("KTOTrainer", "KTOConfig", causal_lm, unpaired, settings={"loss_type": "bco", "max_length": 8}),
    "prm": Case(
        "PRMTrainer", "PRMConfig", step_model, steps, task_type="TOKEN_CLS",
        wrong={"max_length": 0, "max_completion_length": 0},
    ),
    "orpo": Case("ORPOTrainer", "ORPOConfig", causal_lm, pairs, wrong={"label_smoothing": 0.1}),
    "cpo": Case("CPOTrainer", "CPOConfig", causal_lm, pairs, wrong={"loss_type": "robust", "cpo_alpha": -1.0}),
    "simpo": Case("SimPOTrainer", "SimPOConfig", causal_lm, pairs, wrong={"gamma": -1.0}),
    "alphapo": Case("SimPOTrainer", "SimPOConfig", causal_lm, pairs, settings={"alpha": 0.5}),
}  # fmt: skip


def build(name: str, directory: Path, lora: bool = False, **overrides: Any) -> Any:
    """The case's trainer with `overrides` in its config."""
    import trl

    case = CASES[name]
    settings: dict[str, Any] = {
        "output_dir": str(directory), "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 3,
        "lr_scheduler_type": "constant", **case.settings, **overrides,
    }  # fmt: skip
    arguments = case.arguments()
    if lora:
        settings = {key: value for key, value in settings.items() if key not in case.not_with_lora}
        from peft import LoraConfig

        arguments["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type=case.task_type, init_lora_weights="gaussian"
        )
    rows = case.rows()
    return getattr(trl, case.trainer)(
        model=arguments.pop("model", None) or case.model(),
        args=getattr(trl, case.config)(**settings),
        train_dataset=rows,
        eval_dataset=arguments.pop("eval_dataset", rows.select(range(3))),
        processing_class=tokenizer(),
        **arguments,
    )


def history(trainer: Any, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}
