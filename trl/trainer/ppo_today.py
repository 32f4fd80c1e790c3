"""What a PPO run of today's form adds to the steps: its models, metrics under today's names, callbacks and samples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from trl.models.modeling_base import PreTrainedModelWrapper
from trl.models.modeling_value_head import AutoModelForCausalLMWithValueHead
from trl.models.prepare import enable_gradient_checkpointing, is_peft_model, load_model
from trl.models.scoring import classifier_of
from trl.rollout import report
from trl.trainer.configuration import PostTrainingConfig
from trl.trainer.preparation import prepare_model

METRICS = {
    "objective/kl": "objective/kl",
    "objective/entropy": "objective/entropy",
    "objective/scores": "ppo/mean_scores",
    "policy/approxkl_avg": "ppo/policy/approxkl",
    "policy/clipfrac_avg": "ppo/policy/clipfrac",
    "loss/policy_avg": "ppo/loss/policy",
    "val/clipfrac_avg": "ppo/val/clipfrac",
    "policy/entropy_avg": "ppo/policy/entropy",
    "lr": "ppo/learning_rate",
}
"""today's name -> key of the statistics of a step"""


# --- what a trainer is built from ---------------------------------------------------------------------------------


def policy_of(
    model: Any, arguments: PostTrainingConfig, tokenizer: Any, peft_config: Any = None, adapter: str | None = None
) -> PreTrainedModelWrapper:
    """The policy, loaded where it is given by name, with its adapter, behind a value head.

    adapter: the one to train, of a PEFT model with several.
    """
    if isinstance(model, str):
        model = load_model(model, AutoModelForCausalLM, arguments.loading_keywords(), whole=peft_config is None)
    if isinstance(model, PreTrainedModelWrapper):
        if peft_config is not None:
            raise ValueError("peft_config: the model has a value head already; give the language model alone")
        wrapped = model
    else:
        _check_model("model", model)
        owner, auto = "PPOTrainer", AutoModelForCausalLM
        inner = prepare_model(
            model, arguments, tokenizer, peft_config, auto_class=auto, owner=owner, dropout=False, init_kwargs={}
        )
        wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(inner)
    if adapter is not None:
        _use_adapter(wrapped, adapter)
    if arguments.gradient_checkpointing:
        kwargs: Any = arguments.gradient_checkpointing_kwargs
        enable_gradient_checkpointing(wrapped, kwargs)
    return wrapped


def reference_of(
    model: Any, policy: Any, like: torch.dtype | None, arguments: PostTrainingConfig
) -> PreTrainedModelWrapper | None:
    """The reference behind a value head that nothing reads, stored `like` where it is given by name; None stays so."""
    if model is None or isinstance(model, PreTrainedModelWrapper):
        return model
    if isinstance(model, nn.Module) and model is policy:
        raise ValueError("ref_model: it is the policy itself; leave it out for a frozen copy, or load it again")
    if isinstance(model, str):
        model = load_model(model, AutoModelForCausalLM, arguments.loading_keywords(), frozen=True, like=like)
    _check_model("ref_model", model)
    return AutoModelForCausalLMWithValueHead.from_pretrained(model)


def _check_model(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: got {type(model).__name__}; give a causal language model, a folder or a Hub name")


def _use_adapter(wrapped: Any, adapter: str) -> None:
    inner = wrapped.pretrained_model
    if not is_peft_model(inner) or adapter not in inner.peft_config:
        held = ", ".join(inner.peft_config) if is_peft_model(inner) else "none"
        raise ValueError(f"model_adapter_name={adapter!r}: the model has no such adapter (it has {held})")
    inner.set_adapter(adapter)


def reads_tokens(reward_model: Any) -> bool:
    """Whether it is a model with a score head, which can read the policy's tokens."""
    if not isinstance(reward_model, nn.Module):
        return False
    try:
        classifier_of(reward_model)
    except ValueError:
        return False
    return True


# --- metrics ------------------------------------------------------------------------------------------------------


def todays_metrics(
    stats: Mapping[str, Any], *, vf_coef: float, ended: int, episode: int, seconds: float
) -> dict[str, float]:
    """The statistics of a step under today's names. ended: responses that hold an end token. seconds: of the run."""
    ratios = np.asarray(stats["ppo/policy/ratio"], dtype=np.float64)
    penalty = float(stats["ppo/mean_non_score_reward"]) * float(stats["tokens/responses_len_mean"])
    return {
        **{name: float(stats[key]) for name, key in METRICS.items()},
        **{name: float(value) for name, value in stats.items() if name.startswith("sampling/")},
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": float(stats["ppo/mean_scores"]) + penalty,
        "loss/value_avg": float(stats["ppo/loss/value"]) / (vf_coef or 1.0),
        "val/ratio": float(ratios.mean()),
        "val/ratio_var": float(ratios.var(ddof=1)) if ratios.size > 1 else 0.0,
        "val/num_eos_tokens": ended,
        "episode": episode,
        "eps": int(episode / max(seconds, 1e-9)),
    }


def holds_end(response: Tensor, end: int | None, stops: Sequence[int]) -> bool:
    """Whether a response holds the end token, or stops at a stop token."""
    ids = response.tolist()
    return (end is not None and end in ids) or (bool(ids) and ids[-1] in stops)


# --- callbacks ----------------------------------------------------------------------------------------------------


class Progress:
    """Where a run stands, for callbacks of transformers; they say when to log, to evaluate, to save and to stop."""

    def __init__(self, arguments: PostTrainingConfig, callbacks: Sequence[TrainerCallback] | None, **parts: Any):
        """parts: `model`, `processing_class`, `optimizer` and `lr_scheduler`."""
        self.arguments = arguments
        quiet = [] if arguments.disable_tqdm else [PrinterCallback()]
        self.handler = CallbackHandler([DefaultFlowCallback(), *quiet, *(callbacks or ())], **parts)
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_local_process_zero = arguments.local_process_index == 0
        self.state.is_world_process_zero = arguments.process_index == 0
        self.started, self.first = time.perf_counter(), 0
        self.control = self.handler.on_init_end(arguments, self.state, self.control)

    def begin(self, updates: int, done: int, updates_of_epoch: float) -> None:
        self.state.max_steps, self.state.global_step = updates, done
        self.state.num_train_epochs = max(1, round(updates / updates_of_epoch))
        self.state.compute_steps(self.arguments, updates)
        self.started, self.first, self._per_epoch = time.perf_counter(), done, updates_of_epoch
        self.control = self.handler.on_train_begin(self.arguments, self.state, self.control)

    def begin_update(self) -> None:
        self.control = self.handler.on_step_begin(self.arguments, self.state, self.control)

    def end_update(self) -> None:
        """The callbacks' say about this update; the end of a pass over the prompts asks those of epochs too."""
        before, self.state.global_step = self.state.global_step, self.state.global_step + 1
        self.state.epoch = self.state.global_step / self._per_epoch
        self.control = self.handler.on_step_end(self.arguments, self.state, self.control)
        if int(before / self._per_epoch) < int(self.state.epoch):
            self.control = self.handler.on_epoch_end(self.arguments, self.state, self.control)

    def log(self, logs: dict[str, float]) -> None:
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.handler.on_log(self.arguments, self.state, self.control, dict(logs))

    def evaluated(self, metrics: dict[str, float]) -> None:
        self.control = self.handler.on_evaluate(self.arguments, self.state, self.control, metrics)

    def saved(self) -> None:
        self.control = self.handler.on_save(self.arguments, self.state, self.control)

    @property
    def shows_steps(self) -> bool:
        """Whether a callback shows how far the run is."""
        from trl.trainer.callbacks import RichProgressCallback  # with it come `Trainer` and `datasets`, 80 MB

        return any(isinstance(each, RichProgressCallback) for each in self.handler.callbacks)

    def end(self) -> None:
        self.control = self.handler.on_train_end(self.arguments, self.state, self.control)


def print_samples(columns: Mapping[str, Sequence[Any]]) -> None:
    """Prompts, responses and scores on the console."""
    samples = zip(*columns.values(), strict=True)
    report.print_samples("completions", ((query, said, {"score": f"{score:.3f}"}) for query, said, score in samples))
