"""What `PPOTrainer` is built from: checked arguments, accelerator, data loader, optimizer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedTokenizerBase

from trl.models.modeling_base import PreTrainedModelWrapper
from trl.models.modeling_value_head import SUPPORTED_ARCHITECTURES
from trl.models.prepare import check_vocabulary
from trl.models.scoring import classifier_of
from trl.trainer.optim import TFAdam
from trl.trainer.ppo_config import PPOConfig


def check_arguments(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, dataset: Any, lr_scheduler: Any, num_shared_layers: Any
) -> None:
    """ValueError for what is of the wrong kind, warnings for what is left out."""
    if not isinstance(config, PPOConfig):
        raise ValueError(f"config must be a PPOConfig, got {type(config)}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "tokenizer must be a PreTrainedTokenizerBase like a PreTrainedTokenizer or a PreTrainedTokenizerFast, "
            f"got {type(tokenizer)}"
        )
    supported = f"supported architectures are: {SUPPORTED_ARCHITECTURES}"
    if not isinstance(model, PreTrainedModelWrapper):
        raise ValueError(f"model must be a PreTrainedModelWrapper, got {type(model)} - {supported}")
    check_vocabulary(model, tokenizer)
    if ref_model is not None and not isinstance(ref_model, PreTrainedModelWrapper):
        raise ValueError(f"ref_model must be a PreTrainedModelWrapper or `None`, got {type(ref_model)} - {supported}")
    if dataset is not None and not isinstance(dataset, torch.utils.data.Dataset) and not _of_datasets(dataset):
        raise ValueError(f"dataset must be a torch.utils.data.Dataset or datasets.Dataset, got {type(dataset)}")
    if lr_scheduler is not None and not isinstance(lr_scheduler, LRScheduler):
        raise ValueError(f"lr_scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {type(lr_scheduler)}")
    if ref_model is None and num_shared_layers is not None and model.is_peft_model:
        raise ValueError(f"num_shared_layers={num_shared_layers}: a PEFT model is its own reference, nothing is copied")
    if ref_model is not None and num_shared_layers is not None:
        warnings.warn("num_shared_layers is ignored when ref_model is provided", UserWarning)
    if dataset is None:
        warnings.warn(
            "No dataset is provided. Make sure to set config.batch_size to the correct value before training.",
            UserWarning,
        )
    if config.push_to_hub_if_best_kwargs and "repo_id" not in config.push_to_hub_if_best_kwargs:
        raise ValueError("You have to specify repo_id in order to push the model to the hub!")


def make_accelerator(config: PPOConfig) -> Accelerator:
    """The accelerator of a config; the scheduler moves once per PPO step, however many processes there are."""
    keywords = {"step_scheduler_with_optimizer": False, **config.accelerator_kwargs}
    return Accelerator(
        log_with=config.log_with,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        project_config=ProjectConfiguration(**config.project_kwargs),
        **keywords,
    )


def start_trackers(accelerator: Accelerator, config: PPOConfig) -> None:
    numbers = config.to_dict()
    accelerator.init_trackers(
        config.tracker_project_name,
        config=numbers if config.log_with == "tensorboard" else {"trl_ppo_trainer_config": numbers},
        init_kwargs=config.tracker_kwargs,
    )


def check_critic(model: Any, value_model: nn.Module, optimizer: Optimizer | None) -> None:
    """A critic of its own must have a score head and be trained; the policy's value head then rests."""
    classifier_of(value_model)
    model.v_head.requires_grad_(False)
    if optimizer is not None:
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in trained for parameter in value_model.parameters()):
            raise ValueError("optimizer: it holds no parameter of the `value_model`, which would never be trained")


def make_optimizer(config: PPOConfig, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Adam as `adam_style` says; torch's in one pass over memory where all of it is on the CPU."""
    rate, eps = config.learning_rate, config.adam_epsilon
    if config.adam_style == "tf":
        return TFAdam(parameters, lr=rate, eps=eps)
    fused = all(each.device.type == "cpu" and each.is_floating_point() for each in parameters)
    return Adam(parameters, lr=rate, eps=eps, fused=fused or None)


def make_scheduler(config: PPOConfig, optimizer: Optimizer, given: LRScheduler | None) -> LRScheduler | None:
    """The scheduler given, or a linear fall to 0 over the run if `anneal_learning_rate`."""
    if not config.anneal_learning_rate:
        return given
    if given is not None:
        raise ValueError("anneal_learning_rate=True: an `lr_scheduler` is given too; choose one of them")
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / config.total_ppo_epochs))


def complete_config(config: PPOConfig, trainer: Any) -> None:
    """Write down what is only known at run time."""
    processes = trainer.accelerator.num_processes
    config.is_encoder_decoder = trainer.is_encoder_decoder
    config.is_peft_model = trainer.is_peft_model
    config.world_size = processes
    config.global_backward_batch_size = (config.backward_batch_size or 1) * processes
    config.global_batch_size = config.batch_size * processes
    if processes > 1 and trainer.dataset is None:
        warnings.warn(
            "No dataset is provided. With several processes prepare your own dataloader with "
            "`trainer.accelerator.prepare(dataloader)`, or all of them train on the same prompts.",
            UserWarning,
        )


def stop_tokens(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id of `stop_token`; ValueError if it is not a single token."""
    if config.stop_token is None:
        return []
    ids = tokenizer.encode(config.stop_token, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"stop_token={config.stop_token!r}: the tokenizer makes {len(ids)} tokens of it; give one token"
        )
    return list(ids)


def _of_datasets(dataset: Any) -> bool:
    from datasets import Dataset  # 80 MB that a script without a data set does not need

    return isinstance(dataset, Dataset)


def make_dataloader(
    dataset: Any,
    data_collator: Callable[[list[Any]], Any] | None,
    model: nn.Module,
    config: PPOConfig,
) -> torch.utils.data.DataLoader:
    """Whole shuffled batches; columns that nobody takes are dropped, see `remove_unused_columns`.

    The order is drawn from the config's seed, apart from what is drawn for sampling.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise ValueError("dataset: rows are drawn by their place, a stream has none; give a map-style data set")
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError("dataset: it has no rows; give prompts")
    if _of_datasets(dataset) and config.remove_unused_columns:
        taken = {*inspect.signature(model.forward).parameters, "label", "prompt", "query", "response"}
        unused = [name for name in dataset.column_names if name not in taken]
        if len(unused) == len(dataset.column_names):
            raise ValueError(
                f"dataset: of its columns {unused} none is read; give it `input_ids`, `prompt` or `query`, or set "
                "remove_unused_columns=False"
            )
        dataset = dataset.remove_columns(unused)
    return torch.utils.data.DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=data_collator,
        generator=torch.Generator().manual_seed(config.seed),
    )


def columns_of(rows: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A collator that only turns rows into columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}
