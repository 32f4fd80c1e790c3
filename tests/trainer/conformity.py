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
    settings = {
        "vocab_size": len(tokenizer()), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **more})


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


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [text(2 + i % 3, i) for i in range(8)], "wanted": list(WORDS[:8])})


def answered() -> Dataset:
    return Dataset.from_dict({"prompt": [text(2 + i % 3, i) for i in range(8)], "completion": list(WORDS[:8])})


def early_letters(completions: list[str], **columns: Any) -> list[float]:
    """How many of the first letters of the alphabet a completion has."""
    return [float(sum(letter in "abcdefgh" for letter in completion.split())) for completion in completions]


def shortness(completion_ids: list[list[int]], wanted: list[str], **columns: Any) -> list[float | None]:
    """Short is good; no opinion of every fifth word wanted."""
    return [None if w == "e" else -0.3 * len(ids) for ids, w in zip(completion_ids, wanted, strict=True)]


def two_rewards() -> dict[str, Any]:
    return {"reward_funcs": [early_letters, shortness]}


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
    smallest: int = 1
    """rows of a micro-batch at least"""
    not_with_lora: tuple[str, ...] = ()
    """settings that make no sense with an adapter"""
    processing: Callable[[], Any] | None = None
    targets: Any = ("q_proj", "v_proj")
    """the modules that get an adapter: names, or a regular expression"""


CASES: dict[str, Case] = {
    "sft": Case(
        "SFTTrainer", "SFTConfig", causal_lm, texts,
        wrong={"loss_type": "x", "truncation_mode": "x", "packing_strategy": "x", "max_length": 0,
               "dataset_batch_size": 0, "dataset_kwargs": {"x": 1},
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
    "cpo": Case(
        "CPOTrainer", "CPOConfig", causal_lm, pairs,
        wrong={"loss_type": "robust", "cpo_alpha": -1.0, "simpo_gamma": 0.1, "alpha": 0.1},
    ),
    "simpo": Case("SimPOTrainer", "SimPOConfig", causal_lm, pairs, wrong={"gamma": -1.0}),
    "alphapo": Case("SimPOTrainer", "SimPOConfig", causal_lm, pairs, settings={"alpha": 0.5}),
    "grpo": Case(
        "GRPOTrainer", "GRPOConfig", causal_lm, prompts, settings={"num_generations": 4, "max_completion_length": 6},
        arguments=lambda: {"reward_funcs": early_letters},
        wrong={"loss_type": "x", "num_generations": 1, "num_generations_eval": 0, "max_completion_length": 0,
               "max_prompt_length": 0, "steps_per_generation": 0, "generation_batch_size": 3, "num_iterations": 0,
               "temperature": 0.0, "top_p": 0.0, "top_k": -1, "min_p": 2.0, "repetition_penalty": 0.0,
               "generation_kwargs": {"x": 1}, "beta": -1.0, "reward_weights": [1.0, 2.0], "reward_timeout": 0.0,
               "overlong_cache": 7, "dynamic_sampling_max_rounds": 65, "ref_model_mixup_alpha": 0.0,
               "ref_model_sync_steps": 0, "sync_ref_model": True, "num_completions_to_print": 2,
               "log_unique_prompts": True, "ignore_data_skip": True, "epsilon": 0.0, "gather": "x",
               "sampling_max_rows": 0,
               "epsilon_high": -1.0, "delta": 1.1, "importance_sampling_level": "x", "scale_rewards": "x",
               "advantage": "x", "multi_objective_aggregation": "x", "kl_estimator": "k2", "kl_placement": "reward",
               "use_bias_correction_kl": True, "sapo_temperature_neg": 2.0, "sapo_temperature_pos": 2.0,
               "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0, "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0,
               "entropy_target": 0.1, "entropy_coef_delta": 0.1,
               "entropy_coef_min": 0.1, "entropy_coef_max": 0.1,
               "top_entropy_quantile": 0.0, "off_policy_mask_threshold": 0.0, "auto_find_batch_size": True},
    ),
    "grpo-many": Case(
        "GRPOTrainer", "GRPOConfig", causal_lm, prompts, arguments=two_rewards,
        settings={"num_generations": 4, "max_completion_length": 6, "loss_type": "grpo", "beta": 0.1,
                  "num_iterations": 2, "generation_batch_size": 16, "sync_ref_model": True, "ref_model_sync_steps": 1,
                  "top_entropy_quantile": 0.6, "entropy_coef": 0.01, "use_adaptive_entropy": True,
                  "entropy_target": 4.7, "entropy_coef_delta": 0.01, "epsilon_high": 0.28, "delta": 4.0,
                  "scale_rewards": "batch", "reward_weights": [1.0, 0.5], "dynamic_sampling": True,
                  "overlong_cache": 2, "temperature": 0.9, "top_k": 50},
        not_with_lora=("sync_ref_model", "ref_model_sync_steps"),
    ),
    "grpo-gspo": Case(
        "GRPOTrainer", "GRPOConfig", causal_lm, prompts, arguments=two_rewards,
        settings={"num_generations": 4, "max_completion_length": 6, "importance_sampling_level": "sequence",
                  "loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.2, "kl_placement": "reward",
                  "num_iterations": 2, "generation_batch_size": 16},
    ),
    "grpo-cispo": Case(
        "GRPOTrainer", "GRPOConfig", causal_lm, prompts, arguments=two_rewards,
        settings={"num_generations": 4, "max_completion_length": 6, "loss_type": "cispo", "num_iterations": 3,
                  "multi_objective_aggregation": "normalize_then_sum", "advantage": "leave_one_out"},
        wrong={"epsilon": 0.1, "delta": 3.0},
    ),
    "online-dpo": Case(
        "OnlineDPOTrainer", "OnlineDPOConfig", causal_lm, prompts, arguments=two_rewards,
        settings={"max_completion_length": 6, "num_iterations": 2, "generation_batch_size": 16,
                  "dynamic_sampling": True, "dynamic_sampling_max_rounds": 9},
        wrong={"loss_type": "kto_pair", "beta": 0.0, "num_generations": 1, "per_device_train_batch_size": 3},
        smallest=2,
    ),
    "raft": Case(
        "RAFTTrainer", "RAFTConfig", causal_lm, prompts, arguments=two_rewards,
        settings={"max_completion_length": 6, "num_generations": 4, "keep_best": 2, "min_reward": -1.0},
        wrong={"keep_best": 5},
    ),
    "distillation": Case(
        "DistillationTrainer", "DistillationConfig", causal_lm, prompts,
        arguments=lambda: {"teacher_model": causal_lm(seed=7)},
        settings={"max_completion_length": 6, "beta": 0.5, "num_iterations": 2},
        wrong={"beta": 2.0, "lmbda": -1.0, "teacher_model_name_or_path": "x"},
    ),
    "gkd": Case(
        "GKDTrainer", "GKDConfig", causal_lm, answered, arguments=lambda: {"teacher_model": causal_lm(seed=7)},
        settings={"max_completion_length": 6},
    ),
    "rloo": Case(
        "RLOOTrainer", "RLOOConfig", causal_lm, prompts, arguments=two_rewards,
        settings={"max_completion_length": 6, "num_iterations": 2, "beta": 0.1, "normalize_advantages": True},
        wrong={"num_generations": 1, "epsilon": 0.0, "epsilon_high": 0.0, "reward_clip_range": (1.0, -1.0)},
    ),
}  # fmt: skip


def build(case: str | Case, directory: Path, lora: bool = False, args: Any = None, **overrides: Any) -> Any:
    """The trainer of a case, or of its name, with `overrides` in its config; or with `args` as its config."""
    import trl

    case = CASES[case] if isinstance(case, str) else case
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
            r=4,
            target_modules=case.targets if isinstance(case.targets, str) else list(case.targets),
            task_type=case.task_type,
            init_lora_weights="gaussian",
        )
    rows = case.rows()
    return getattr(trl, case.trainer)(
        model=arguments.pop("model", None) or case.model(),
        args=getattr(trl, case.config)(**settings) if args is None else args,
        train_dataset=rows,
        eval_dataset=arguments.pop("eval_dataset", rows.select(range(3))),
        processing_class=(case.processing or tokenizer)(),
        **arguments,
    )


def history(trainer: Any, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}
