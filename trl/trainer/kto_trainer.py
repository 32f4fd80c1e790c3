"""Unpaired preference optimisation: KTO, BCO and APO-zero on completions that are good or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainingArguments

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.data.tokenize import tokenize_unpaired
from trl.losses.kto import unpaired_loss
from trl.losses.loss_sum import LossSum
from trl.models.prepare import disable_dropout_in_model, load_model
from trl.models.reference import Reference
from trl.models.scoring import score
from trl.trainer.configuration import as_config, processing_class_of
from trl.trainer.kto_config import KTOConfig
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.preparation import each_dataset, fitting_length, prepare_model, prepare_tokenizer
from trl.trainer.reference_columns import with_reference_columns
from trl.trainer.reward_shift import RewardShift

REFERENCE_COLUMNS = ("reference_logps", "reference_kl_logps")
MISMATCHED = "mismatched_ids"
"""column with another row's completion, for the KL estimate"""


def with_mismatched(dataset: Any, name: str) -> Any:
    """Each row with the completion of the next row that has another prompt (the last rows wrap around)."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"loss_type='kto' pairs rows with other rows' completions: the {name} data set must have a length"
        )
    prompts, completions = dataset["prompt_ids"][:], dataset["completion_ids"][:]
    count = len(prompts)
    mismatched = []
    for row in range(count):
        others = (completions[(row + k) % count] for k in range(1, count) if prompts[(row + k) % count] != prompts[row])
        other = next(others, None)
        if other is None:
            raise ValueError(
                f"all rows of the {name} data set have one prompt: loss_type='kto' needs several for its KL"
            )
        mismatched.append(other)
    return dataset.add_column(MISMATCHED, mismatched)


class UnpairedCollator:
    """Tokenised rows as one tree each; beside it the trees that also hold the mismatched completion."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "packed": pack([TokenTree(row["prompt_ids"], [Branch(row["completion_ids"])]) for row in rows]),
            "desirable": torch.tensor([bool(row["label"]) for row in rows]),
        }
        if MISMATCHED in rows[0]:
            batch["mismatched"] = pack([TokenTree(row["prompt_ids"], [Branch(row[MISMATCHED])]) for row in rows])
            both = [Branch(row["completion_ids"]) for row in rows], [Branch(row[MISMATCHED]) for row in rows]
            batch["both"] = pack(
                [TokenTree(row["prompt_ids"], list(pair)) for row, *pair in zip(rows, *both, strict=True)]
            )
        for name in REFERENCE_COLUMNS:
            if name in rows[0]:
                batch[name] = torch.tensor([float(row[name]) for row in rows])
        return batch


class KTOTrainer(ObjectiveTrainer):
    """Optimise a policy on completions labelled good or not, against a reference (arXiv:2402.01306).

    Rows: `prompt`, `completion`, `label`, or preference pairs, which are taken apart. The KL estimate is taken over the
    whole optimizer step and all ranks, from completions of other rows; a batch size of 1 works.
    """

    _tag_names = ("trl", "kto")

    def __init__(
        self,
        model: nn.Module | str | None = None,
        ref_model: nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
        **kwargs: Any,
    ):
        config = as_config(args, KTOConfig)
        tokenizer = prepare_tokenizer(processing_class_of(processing_class, tokenizer), model)
        if config.pad_token is not None:
            tokenizer.pad_token = config.pad_token
        model = prepare_model(
            model,
            config,
            tokenizer,
            peft_config,
            auto_class=AutoModelForCausalLM,
            owner=type(self).__name__,
            dropout=not config.disable_dropout,
            merge=True,
        )
        length = fitting_length(config, model)

        def tokenised(dataset: Any, name: str) -> Any:
            rows = tokenize_unpaired(
                dataset,
                tokenizer,
                max_length=length,
                max_prompt_length=config.max_prompt_length,
                max_completion_length=config.max_completion_length,
                truncation_mode=config.truncation_mode,
                keep=REFERENCE_COLUMNS,
                num_proc=config.dataset_num_proc,
                name=name,
            )[0]
            return with_mismatched(rows, name) if config.loss_type == "kto" else rows

        super().__init__(
            model=model,
            args=config,
            data_collator=UnpairedCollator(),
            train_dataset=each_dataset(train_dataset, tokenised, "train"),
            eval_dataset=each_dataset(eval_dataset, tokenised, "eval"),
            processing_class=tokenizer,
            **kwargs,
        )
        self._path = None if config.padding_free else "padded"
        self.shift = RewardShift() if config.loss_type == "bco" else None
        if ref_model is not None:
            ref_model = load_model(
                ref_model, AutoModelForCausalLM, config.ref_model_init_kwargs, owner=type(self).__name__
            )
            if config.disable_dropout:
                disable_dropout_in_model(ref_model)
            ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.reference = Reference(self.model, ref_model)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference as a model of its own; None where it is the policy without its adapter."""
        return self.reference.frozen

    def extra_state(self) -> dict[str, Any]:
        return {} if self.shift is None else {"shift": self.shift.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if self.shift is not None:
            self.shift.load(state["shift"])

    def count(self, batch: dict[str, Any]) -> int:
        return batch["packed"].rows

    def _sums(self, model: nn.Module, packed: Any) -> Tensor:
        return score(model, packed, path=self._path).logprobs_BT.sum(-1)

    @torch.no_grad()
    def _reference_sums(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The reference's log-probabilities of each completion, and of the mismatched one. [B] each"""
        with self.reference.model() as reference:
            if "both" not in batch:
                return {REFERENCE_COLUMNS[0]: self._sums(reference, batch["packed"])}
            sums = self._sums(reference, batch["both"]).view(-1, 2)
            return dict(zip(REFERENCE_COLUMNS, sums.unbind(1), strict=True))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.shift is not None:
            self.shift.close_step(self.accelerator)
        return self._measured(batches), count

    @torch.no_grad()
    def _measured(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches of one optimizer step with the reference's numbers and the step's KL estimate."""
        moved = [{name: value.to(self.args.device) for name, value in batch.items()} for batch in batches]
        totals = torch.zeros(2, device=self.args.device)
        for batch in moved:
            if REFERENCE_COLUMNS[0] not in batch:
                batch.update(self._reference_sums(batch))
            if "mismatched" in batch:
                log_ratio_B = self._sums(self.model, batch["mismatched"]) - batch[REFERENCE_COLUMNS[1]]
                totals += torch.stack([log_ratio_B.sum(), log_ratio_B.new_tensor(len(log_ratio_B))])
        total, rows = self.accelerator.reduce(totals, "sum").unbind()
        for batch in moved:
            batch["kl"] = (total / rows.clamp(min=1)).clamp(min=0)
        return moved

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        if "kl" not in batch:
            batch = self._measured([batch])[0]
        log_ratio_B = self._sums(model, batch["packed"]) - batch[REFERENCE_COLUMNS[0]]
        if self.shift is not None and model.training:
            self.shift.add(self.args.beta * log_ratio_B)
        state = {"kto": {"kl": batch["kl"]}, "bco": {"delta": self.shift.value if self.shift else 0.0}}
        result = unpaired_loss(
            self.args.loss_type,
            log_ratio_B,
            batch["desirable"],
            beta=self.args.beta,
            desirable_weight=self.args.desirable_weight,
            undesirable_weight=self.args.undesirable_weight,
            **state.get(self.args.loss_type, {}),
        )
        result.metrics["kl"] = (batch["kl"] * len(log_ratio_B), len(log_ratio_B))
        return result

    def get_train_dataloader(self) -> DataLoader:
        if self.args.precompute_ref_log_probs:
            self.train_dataset = self._with_reference(self.train_dataset, self.args.per_device_train_batch_size)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if self.args.precompute_ref_log_probs and not isinstance(eval_dataset or self.eval_dataset, str | dict):
            eval_dataset = self._with_reference(eval_dataset or self.eval_dataset, self.args.per_device_eval_batch_size)
        return super().get_eval_dataloader(eval_dataset)

    def _with_reference(self, dataset: Any, size: int) -> Any:
        return with_reference_columns(
            dataset,
            REFERENCE_COLUMNS,
            self.data_collator,
            lambda batch: list(self._reference_sums(batch).values()),
            batch_size=self.args.precompute_ref_batch_size or size,
            device=self.args.device,
        )
