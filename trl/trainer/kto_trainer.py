"""Unpaired preference optimisation (KTO, BCO, APO-zero): each completion is labelled good or bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainingArguments

from trl.data.packing import pack
from trl.data.prompt_rows import CompletionsJob
from trl.data.records import Batch, Branch, TokenTree
from trl.data.row_job import RowJob
from trl.data.tokenize import list_codes, tokenize
from trl.data.version import code_version
from trl.generation.stopping import end_tokens
from trl.import_utils import lazy_names
from trl.legacy import absent
from trl.legacy.dpo import mean_metrics
from trl.losses.kto import UNPAIRED_LOSSES, mismatched_kl, unpaired_loss
from trl.losses.loss_sum import LossSum, Measure, masked_sum
from trl.models.forward import eval_no_grad
from trl.models.prepare import embedding_rows
from trl.models.scoring import score
from trl.models.unwrap import is_encoder_decoder
from trl.trainer.configuration import PreferenceConfig, Setting, as_config, choose, require
from trl.trainer.given_data import Prepare
from trl.trainer.objective import ObjectiveTrainer, pieces_of
from trl.trainer.overrides import check_own_losses, own_batch_loss
from trl.trainer.preparation import answer_limits, prepare, refuse_collator
from trl.trainer.references import ReferenceColumns, ReferenceConfig, choose_adapters, follows, make_reference
from trl.trainer.statistics import RewardShift

REFERENCE_COLUMNS = ("reference_logps", "reference_kl_logps")
"""the reference's log-probabilities of the completion; for the KL of the loss also of a mismatched one"""
MISMATCHED = "mismatched_ids"
"""column with another row's completion, for the KL estimate"""
MASKS = {"completion_ids": "completion_mask", MISMATCHED: "mismatched_mask"}
"""columns that say which tokens of a completion are scored; of conversations"""


@dataclass
class KTOConfig(PreferenceConfig, ReferenceConfig):
    """`TrainingArguments` and what KTO adds."""

    loss_type: str = field(default="kto")
    """kto, bco or apo_zero_unpaired"""
    desirable_weight: float = field(default=1.0)
    """weight of the desirable completions' loss"""
    undesirable_weight: float = field(default=1.0)
    """weight of the undesirable completions' loss"""
    generate_during_eval: bool = field(default=False)
    """log samples of an evaluation: not supported, raises"""

    def validate(self) -> None:
        super().validate()
        way_out = "leave it out and add a LogCompletionsCallback, which logs completions of the evaluation's prompts"
        require(self, "generate_during_eval", not self.generate_during_eval, way_out)
        choose(self, "loss_type", UNPAIRED_LOSSES)
        for name in ("desirable_weight", "undesirable_weight"):
            require(self, name, getattr(self, name) >= 0, "give a number >= 0")


@dataclass
class BCOConfig(KTOConfig):
    """`KTOConfig` with the binary classifier objective."""

    loss_type: str = field(default="bco")
    """kto, bco or apo_zero_unpaired"""


def with_mismatched(dataset: Any, name: str) -> Any:
    """Each row with the completion of the next row that has another prompt (the last rows wrap around)."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"loss_type='kto' pairs rows with other rows' completions: the {name} data must be a whole `Dataset`, "
            f"not a {type(dataset).__name__}"
        )
    other = _next_with_other(list_codes(dataset, "prompt_ids"))
    if other is None:
        raise ValueError(f"all rows of the {name} data set have one prompt: loss_type='kto' needs several for its KL")
    dataset = dataset.flatten_indices() if dataset._indices is not None else dataset
    for column, added in (("completion_ids", MISMATCHED), ("completion_mask", MASKS[MISMATCHED])):
        if column in dataset.column_names:
            taken = dataset.data.table.column(column).take(pa.array(other))
            key = Hasher.hash([dataset._fingerprint, added, code_version()])
            dataset = dataset.add_column(added, taken, new_fingerprint=key, feature=dataset.features[column])
    return dataset


def _next_with_other(prompt_R: np.ndarray) -> np.ndarray | None:
    """For each row the next one with another prompt, from the end on to the start; None where all have one. [R]"""
    count = len(prompt_R)
    ends = np.flatnonzero(prompt_R != np.roll(prompt_R, -1))  # of runs of one prompt
    if not len(ends):
        return None
    return (ends[np.searchsorted(ends, np.arange(count)) % len(ends)] + 1) % count


class UnpairedCollator:
    """Makes one token tree per row; where the loss has a KL, also trees with the mismatched completion."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        def packed(*columns: str) -> Any:
            branches = [[Branch(row[column], row.get(MASKS[column])) for column in columns] for row in rows]
            return pack([TokenTree(row["prompt_ids"], own) for row, own in zip(rows, branches, strict=True)])

        desirable_B = torch.tensor([bool(row["label"]) for row in rows])
        batch = Batch(packed=packed("completion_ids"), desirable=desirable_B)
        if MISMATCHED in rows[0]:
            batch.update(mismatched=packed(MISMATCHED), both=packed("completion_ids", MISMATCHED))
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
    config_class: type[KTOConfig] = KTOConfig
    """makes the config where `args` are plain TrainingArguments, or none"""
    beta, desirable_weight, undesirable_weight = Setting(), Setting(), Setting()
    loss_type = Setting(fixed="the rows are made for it")
    max_length, max_prompt_length = (Setting(fixed="the rows are tokenised already") for _ in range(2))

    without_gradient = frozenset({MISMATCHED})

    def __init__(
        self,
        model: nn.Module | str | None = None,
        ref_model: nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        **kwargs: Any,
    ):
        refuse_collator(self, data_collator)
        if compute_metrics is not None:
            raise ValueError("compute_metrics: completions without a pair give nothing to compare; leave it out")
        config = as_config(args, self.config_class)
        ref_model = choose_adapters(config, model, ref_model)
        model, model_init, tokenizer = prepare(
            self,
            model,
            model_init,
            config,
            processing_class=processing_class,
            tokenizer=tokenizer,
            peft_config=peft_config,
            auto_class=AutoModelForCausalLM,
            dropout=not config.disable_dropout,
            merge=True,
            quantization_config=quantization_config,
        )
        super().__init__(
            model=model,
            args=config,
            data_collator=UnpairedCollator(),
            processing_class=tokenizer,
            model_init=model_init,
            callbacks=callbacks,
            optimizers=optimizers,
            rows=self._rows(tokenizer, config, model),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.shift = RewardShift() if config.loss_type == "bco" else None
        self._columns = REFERENCE_COLUMNS if config.loss_type == "kto" else REFERENCE_COLUMNS[:1]
        self.reference = make_reference(self, ref_model, self._columns)
        self._ahead = ReferenceColumns(self, self.reference, self._columns, self._reference_sums)

    @staticmethod
    def row_job(tokenizer: Any, config: KTOConfig, model: nn.Module | None) -> RowJob:
        encoder_decoder = model is not None and is_encoder_decoder(model)
        return CompletionsJob(
            tokenizer=tokenizer,
            limits=answer_limits(config, model, encoder_decoder),
            ends=end_tokens(model, tokenizer),
            keep=REFERENCE_COLUMNS,
            is_encoder_decoder=encoder_decoder,
            learn_tool_results=config.learn_tool_results,
            embeddings=embedding_rows(model),
        )

    @staticmethod
    def _rows(tokenizer: Any, config: KTOConfig, model: nn.Module | None) -> Prepare:
        """What tokenises a data set, and adds mismatched completions where the loss has a KL."""
        job = KTOTrainer.row_job(tokenizer, config, model)

        def tokenised(dataset: Any, name: str) -> Any:
            rows = tokenize(dataset, job, name=name, num_proc=config.dataset_num_proc)[0]
            return with_mismatched(rows, name) if config.loss_type == "kto" else rows

        return tokenised

    def frozen_models(self) -> list[nn.Module]:
        return self.reference.kept

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference, if it is a separate model; None if it is the policy without its adapter."""
        return self.reference.frozen

    def extra_state(self) -> dict[str, Any]:
        """Collective: rewards that wait for the next step are taken into the mean of all ranks."""
        moved = {"reference": self.reference.state()} if follows(self) else {}
        if self.shift is None:
            return moved
        self.shift.close_step(self.accelerator)
        return {**moved, "shift": self.shift.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if self.shift is not None:
            self.shift.load(state["shift"])
        if "reference" in state:
            self.reference.load(state["reference"])

    def prepare_data(self) -> None:
        super().prepare_data()
        self._ahead.fill()

    def prepare_evaluation(self, eval_dataset: Any, name: str = "eval") -> Any:
        return self._ahead.evaluation(super().prepare_evaluation(eval_dataset, name))

    # -- a batch ------------------------------------------------------------------------------

    def count(self, batch: dict[str, Any]) -> int:
        return batch["packed"].rows

    def _sums(self, model: nn.Module, packed: Any) -> Tensor:
        return score(model, packed).logprobs_BT.sum(-1)

    def _reference_sums(self, reference: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The reference's log-probabilities of each completion, and of the mismatched one. [B] each"""
        if "both" not in batch:
            return (self._sums(reference, batch["packed"]),)
        return self._sums(reference, batch["both"]).view(-1, 2).unbind(1)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.shift is not None:
            self.shift.close_step(self.accelerator)
        self._measure(pieces_of(batches))
        return batches, count

    @torch.no_grad()
    def _measure(self, batches: list[dict[str, Any]]) -> None:
        """Write into each batch the reference's numbers and the KL estimate over all these batches and all ranks."""
        totals = torch.zeros(2, device=self.args.device)
        for batch in batches:
            batch.update({name: value.to(self.args.device) for name, value in batch.items()})
            if not set(self._columns) <= batch.keys():
                with self.reference.model() as reference:
                    if reference is None:
                        raise ValueError(f"the reference is precomputed, but the rows have no columns {self._columns}")
                    sums = self._reference_sums(reference, batch)
                batch.update(zip(self._columns, sums, strict=True))
            if "mismatched" in batch:
                with eval_no_grad(self.model):
                    policy_B = self._sums(self.model, batch["mismatched"])
                log_ratio_B = policy_B - batch[REFERENCE_COLUMNS[1]]
                if self.owns("kto_loss"):
                    batch["policy_kl_logps"] = policy_B
                if not self.only_repeats:
                    totals += torch.stack([log_ratio_B.sum(), log_ratio_B.new_tensor(len(log_ratio_B))])
        total, rows = self.accelerator.reduce(totals, "sum").unbind()
        for batch in batches:
            batch["kl"] = mismatched_kl(total, rows)

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        if self.owns("get_batch_loss_metrics"):
            return own_batch_loss(self.get_batch_loss_metrics, model, batch, self.count(batch))
        return self._loss(model, batch)

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        if "kl" not in batch:  # evaluation: the estimate is this batch's, over all ranks
            self._measure([batch])
        packed, desirable_B = batch["packed"], batch["desirable"]
        scores = score(model, packed, logits=True)
        logps_B = scores.logprobs_BT.sum(-1)
        log_ratio_B = logps_B - batch[REFERENCE_COLUMNS[0]]
        if self.shift is not None and model.training:
            self.shift.add(self.args.beta * log_ratio_B)
        if self.owns("kto_loss"):
            result = self._of_own_kto_loss(logps_B, batch)
        else:
            result = self._unpaired_loss(logps_B, log_ratio_B, batch)
        if self.args.loss_type == "kto":
            result.metrics["kl"] = (batch["kl"] * len(log_ratio_B), len(log_ratio_B))
        assert scores.logits_BT is not None
        for name, side_B in (("chosen", desirable_B), ("rejected", ~desirable_B)):
            result.metrics[f"logits/{name}"] = masked_sum(scores.logits_BT, packed.mask_BT * side_B[:, None])
        return result

    def _unpaired_loss(self, logps_B: Tensor, log_ratio_B: Tensor, batch: Mapping[str, Any]) -> LossSum:
        state = {"kto": {"kl": batch["kl"]}, "bco": {"delta": self.shift.value if self.shift else 0.0}}
        return unpaired_loss(
            self.args.loss_type,
            log_ratio_B,
            batch["desirable"],
            beta=self.args.beta,
            desirable_weight=self.args.desirable_weight,
            undesirable_weight=self.args.undesirable_weight,
            logps_B=logps_B,
            **state.get(self.args.loss_type, {}),
        )

    # -- where a subclass overrides a method of earlier releases (see `overrides.TABLE`) ------------

    _kl_at_hand: Tensor | None = None
    """the estimate over the whole optimizer step, while `kto_loss` is asked in training"""

    def _of_own_kto_loss(self, logps_B: Tensor, batch: Mapping[str, Any]) -> LossSum:
        desirable_B, reference_B = batch["desirable"], batch[REFERENCE_COLUMNS[0]]
        none = logps_B.new_zeros(0)
        kl = (batch.get("policy_kl_logps", none), batch.get(REFERENCE_COLUMNS[1], none))
        sides = [(logps_B[side_B], reference_B[side_B]) for side_B in (desirable_B, ~desirable_B)]
        self._kl_at_hand = batch.get("kl")
        try:
            given = self.kto_loss(sides[0][0], sides[1][0], kl[0], sides[0][1], sides[1][1], kl[1])
        finally:
            self._kl_at_hand = None
        total, chosen, rejected = check_own_losses("kto_loss", given, len(logps_B))
        metrics: dict[str, Measure] = {
            f"{kind}/{side}": (values.detach().sum(), len(values))
            for kind, pair in (("rewards", (chosen, rejected)), ("logps", (sides[0][0], sides[1][0])))
            for side, values in zip(("chosen", "rejected"), pair, strict=True)
        }
        return LossSum(total, len(logps_B), metrics)

    def kto_loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        policy_KL_logps: Tensor | None,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        reference_KL_logps: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(losses, chosen_rewards, rejected_rewards, kl)` of summed log-probabilities; a loss for each row.

        In training the KL is that of the whole optimizer step, as it is where nothing is overridden.
        """
        kl = self._kl_at_hand
        if kl is None and policy_KL_logps is not None and reference_KL_logps is not None:
            kl = mismatched_kl((policy_KL_logps - reference_KL_logps).detach().sum(), len(policy_KL_logps))
        kl = policy_chosen_logps.new_zeros(()) if kl is None else kl
        sides = (policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps)
        ratio_B = torch.cat(sides)
        desirable_B = torch.arange(len(ratio_B), device=ratio_B.device) < len(sides[0])
        state: dict[str, Any] = {"kto": {"kl": kl}, "bco": {"delta": self.shift.value if self.shift else 0.0}}
        name, beta = self.args.loss_type, self.args.beta
        losses_B = UNPAIRED_LOSSES[name](ratio_B, desirable_B, beta=beta, **state.get(name, {}))
        weight_B = torch.where(desirable_B, self.args.desirable_weight, self.args.undesirable_weight)
        return weight_B * losses_B, beta * sides[0].detach(), beta * sides[1].detach(), kl

    def get_batch_loss_metrics(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's mean loss and metrics; `batch` is one of the trainer's own."""
        return mean_metrics(self._loss(model, batch), "")

    def prepared_columns(self) -> frozenset[str]:
        mismatched = {MISMATCHED} if self.args.loss_type == "kto" else set()
        return frozenset({"prompt_ids", "completion_ids"} | mismatched)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        chosen, rejected = (means.get(f"rewards/{side}") for side in ("chosen", "rejected"))
        return {} if chosen is None or rejected is None else {"rewards/margins": chosen - rejected}


class BCOTrainer(KTOTrainer):
    """`KTOTrainer` with `loss_type="bco"`: binary classifier optimisation (arXiv:2404.04656)."""

    _tag_names = ("trl", "bco")
    config_class = BCOConfig


__getattr__ = lazy_names(__name__, {}, absent.refuse)[0]
