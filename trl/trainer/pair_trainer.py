"""The base of the trainers on chosen/rejected pairs: it makes token trees of rows, and losses of log-probabilities."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.trainer_utils import EvalLoopOutput

from trl.data.batches import PADDED_PAIRS, padded_pairs, pair_columns, pair_rows_of_padded, pair_tree
from trl.data.inspect import read_out
from trl.data.packing import pack
from trl.data.prompt_rows import PairsJob
from trl.data.records import Batch
from trl.data.row_job import RowJob
from trl.data.tokenize import tokenize
from trl.generation import make_sampler
from trl.generation.sampler import SamplingParams
from trl.generation.stopping import end_tokens, without_ends
from trl.import_utils import is_wandb_available
from trl.losses.kto import mismatched_kl
from trl.losses.loss_sum import LossSum, Measure
from trl.losses.pairs import PairLogps, sum_pairs, wpo_weights
from trl.losses.preference import check_pair_options, preference_loss
from trl.models.forward import eval_no_grad
from trl.models.prepare import context_length, embedding_rows, is_peft_model
from trl.models.reference import Reference
from trl.models.scoring import Scores, score
from trl.models.unwrap import below_value_head, is_encoder_decoder
from trl.trainer.configuration import PreferenceConfig, Setting, require
from trl.trainer.objective import ObjectiveTrainer, pieces_of
from trl.trainer.preparation import answer_limits, prepare
from trl.trainer.statistics import RewardShift


@dataclass
class PairConfig(PreferenceConfig):
    """The settings that all trainers on chosen/rejected pairs share."""

    label_smoothing: float = field(default=0.0)
    """probability that a label is flipped"""
    generate_during_eval: bool = field(default=False)
    """sample completions of a random evaluation batch and log them as a table to Weights & Biases"""

    def losses(self) -> dict[str, float]:
        """Pairwise losses by name, with their weights."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The losses' own options, by their names in `losses.preference`."""
        return {"label_smoothing": self.label_smoothing or None}

    def excess_weight(self) -> float:
        """The weight of the tokens beyond the shorter completion's length (LD-DPO)."""
        return 1.0

    def weighs_pairs(self) -> bool:
        """Whether each pair has a weight: how likely it is that the policy sampled it (WPO)."""
        return False

    def validate(self) -> None:
        super().validate()
        require(self, "label_smoothing", 0 <= self.label_smoothing <= 0.5, "a probability of at most 0.5")
        given = [name for name, value in self.options().items() if value]
        check_pair_options(self.losses(), given)


NUMBERS = {
    "margin": "margin",
    "reference_chosen_logps": "reference_chosen_logps",
    "reference_rejected_logps": "reference_rejected_logps",
    "ref_chosen_logps": "reference_chosen_logps",
    "ref_rejected_logps": "reference_rejected_logps",
}
"""columns of pair rows that hold one number, and their names in a batch"""


class PairBatch(Batch):
    """A `Batch` that also answers `chosen_input_ids`, `chosen_labels`, ...: the columns of release 0.7.7, padded."""

    def __missing__(self, key: str) -> Any:
        if not self._is_padded(key):
            return super().__missing__(key)
        return padded_pairs(self["packed"])[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._is_padded(key)

    def _is_padded(self, key: object) -> bool:
        return key in PADDED_PAIRS and dict.get(self, "packed") is not None


class PairCollator:
    """Makes token trees that share their prompt, of tokenised pairs or of the batch of another collator."""

    def __init__(self, inner: Callable[[Any], Mapping[str, Any]] | None = None):
        self.inner = inner

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        present = {column: name for column, name in NUMBERS.items() if column in rows[0]}
        numbers = {name: torch.tensor([float(row[column]) for row in rows]) for column, name in present.items()}
        if self.inner is not None:
            rows = pair_rows_of_padded(self.inner([pair_columns(r) if "prompt_ids" in r else r for r in rows]))
        return PairBatch(packed=pack([pair_tree(row) for row in rows]), **numbers)


class PairTrainer(ObjectiveTrainer):
    """Preference optimisation on pairs; a subclass says where the reference's log-probabilities come from."""

    branches_per_row = 2

    def __init__(
        self,
        model: nn.Module | str | None,
        config: PairConfig,
        *,
        data_collator: Callable[[Any], Mapping[str, Any]] | None,
        train_dataset: Any,
        eval_dataset: Any,
        tokenizer: Any,
        processing_class: Any,
        peft_config: Any,
        model_init: Callable[..., nn.Module] | None = None,
        add_bos: bool | None = None,
        encoder_decoder: bool = False,
        quantization_config: Any = None,
        **kwargs: Any,
    ):
        _check_wandb(config)
        model, model_init, tokenizer = prepare(
            self,
            model,
            model_init,
            config,
            processing_class=processing_class,
            tokenizer=tokenizer,
            peft_config=peft_config,
            auto_class=AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM,
            dropout=not config.disable_dropout,
            merge=True,
            quantization_config=quantization_config,
        )
        encoder_decoder = encoder_decoder if model is None else is_encoder_decoder(model)
        job = self.row_job(tokenizer, config, model, encoder_decoder, add_bos)

        def tokenised(dataset: Any, name: str) -> Any:
            return tokenize(self.own_rows(dataset), job, name=name, num_proc=config.dataset_num_proc)[0]

        self._encoder_decoder = encoder_decoder
        super().__init__(
            model=model,
            args=config,
            data_collator=PairCollator(data_collator),
            rows=tokenised,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            model_init=model_init,
            **kwargs,
        )
        self.shift = RewardShift() if "bco_pair" in self.losses else None
        self.reference: Reference | None = None

    @staticmethod
    def row_job(
        tokenizer: Any,
        config: PairConfig,
        model: nn.Module | None,
        encoder_decoder: bool | None = None,
        add_bos: bool | None = None,
    ) -> RowJob:
        if encoder_decoder is None:
            encoder_decoder = model is not None and is_encoder_decoder(model)
        return PairsJob(
            tokenizer=tokenizer,
            limits=answer_limits(config, model, encoder_decoder),
            add_bos=add_bos,
            ends=end_tokens(model, tokenizer),
            is_encoder_decoder=encoder_decoder,
            learn_tool_results=config.learn_tool_results,
            embeddings=embedding_rows(model),
        )

    def own_rows(self, dataset: Any) -> Any:
        """The data set, tokenised where a user's method does that."""
        return dataset

    def not_with_shared_rows(self) -> dict[str, bool]:
        samples = "generate_during_eval samples whole rows"
        return {**super().not_with_shared_rows(), samples: self.args.generate_during_eval}

    def prepared_columns(self) -> frozenset[str]:
        return frozenset({"prompt_ids", "chosen_ids", "rejected_ids"})

    beta, label_smoothing = Setting(), Setting()
    max_length, max_prompt_length = (Setting(fixed="the rows are tokenised already") for _ in range(2))

    @property
    def losses(self) -> dict[str, float]:
        """Pairwise losses by name, with their weights."""
        return self.args.losses()  # type: ignore[no-any-return]

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts go to an encoder."""
        return self._encoder_decoder

    @property
    def is_peft_model(self) -> bool:
        """Whether the model has an adapter of PEFT."""
        return is_peft_model(below_value_head(self.model))

    def changed(self, name: str) -> None:
        if name == "loss_type" and ("bco_pair" in self.losses) != (self.shift is not None):
            raise ValueError(
                f"loss_type={self.args.loss_type!r}: bco_pair keeps a mean; choose it, or not, before the run"
            )

    def frozen_models(self) -> list[nn.Module]:
        return [] if self.reference is None else self.reference.kept

    def extra_state(self) -> dict[str, Any]:
        """Collective: rewards that wait for the next step are taken into the mean of all ranks."""
        if self.shift is None:
            return {}
        self.shift.close_step(self.accelerator)
        return {"shift": self.shift.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if self.shift is not None:
            self.shift.load(state["shift"])

    # -- a batch ------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.shift is not None:
            self.shift.close_step(self.accelerator)
        if "kto_pair" in self.losses:
            self._whole_step_kl(pieces_of(batches))
        return batches, count

    @torch.no_grad()
    def _whole_step_kl(self, batches: list[dict[str, Any]]) -> None:
        """kto_pair's two KL estimates over the whole optimizer step and all ranks, written into its batches."""
        totals = torch.zeros(3, device=self.args.device)
        for batch in batches:
            batch["packed"] = batch["packed"].to(self.args.device)
            with eval_no_grad(self.model):
                sums = self.policy_sums(self.model, batch)
            pair = PairLogps(*sums, *self.reference_sums(batch))
            pairs = totals.new_tensor(self.count(batch))
            if not self.only_repeats:
                totals += torch.stack([pair.chosen_ratio_B.sum(), pair.rejected_ratio_B.sum(), pairs])
        chosen, rejected, pairs = self.accelerator.reduce(totals, "sum").unbind()
        for batch in batches:
            batch["kl_chosen"], batch["kl_rejected"] = mismatched_kl(chosen, pairs), mismatched_kl(rejected, pairs)

    def count(self, batch: dict[str, Any]) -> int:
        return batch["packed"].rows // 2

    def reference_sums(self, batch: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """The reference's log-probabilities of chosen and rejected; None without one. [pairs] each"""
        return None, None

    def policy_sums(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The log-probabilities of chosen and rejected under a model. [pairs] each"""
        packed = batch["packed"]
        return self.sums(score(model, packed).logprobs_BT, packed.mask_BT)

    def loss_options(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the losses: those of the config, and numbers that this trainer measures."""
        state = {name: batch[name] for name in ("kl_chosen", "kl_rejected") if name in batch}
        if self.shift is not None:
            state["delta"] = self.shift.value
        return {**state, "beta": self.args.beta, **{k: v for k, v in self.args.options().items() if v is not None}}

    def divergence(self) -> dict[str, Any]:
        """Which divergence measures the distance to the reference; empty where there is no choice."""
        return {}

    def sums(self, logprobs_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities summed over chosen and over rejected. [pairs] each"""
        return sum_pairs(logprobs_BT[0::2], logprobs_BT[1::2], mask_BT[0::2], mask_BT[1::2], self.args.excess_weight())

    # -- the objective ------------------------------------------------------------------------

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        return self._loss(model, batch)[0]

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[LossSum, PairLogps]:
        if "kto_pair" in self.losses and "kl_chosen" not in batch:  # evaluation: this batch's, over all ranks
            self._whole_step_kl([batch])
        packed = batch["packed"]
        mask_BT = packed.mask_BT
        scores = score(model, packed, entropy=True, tops=True, logits=True, collision=self.args.weighs_pairs())
        logprobs_BT = scores.logprobs_BT
        sums, tokens = self.sums(logprobs_BT, mask_BT), (mask_BT[0::2].sum(-1), mask_BT[1::2].sum(-1))
        weight_B = None if scores.collision_BT is None else _wpo(logprobs_BT, mask_BT, scores.collision_BT)
        pair = PairLogps(*sums, *self.reference_sums(batch), *tokens)
        if self.shift is not None and model.training:
            self.shift.add(self.args.beta * torch.cat([pair.chosen_ratio_B, pair.rejected_ratio_B]))
        result = self.pair_loss(pair, batch, weight_B)
        return LossSum(result.total, result.count, result.metrics | _token_metrics(scores, mask_BT)), pair

    def pair_loss(self, pair: PairLogps, batch: Mapping[str, Any], weight_B: Tensor | None) -> LossSum:
        """The loss of pairs, summed over them. weight_B: of each pair."""
        return preference_loss(pair, self.losses, self.loss_options(batch), weight_B=weight_B, **self.divergence())

    # -- evaluation ---------------------------------------------------------------------------

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """Implicit rewards of chosen and rejected, [pairs, 2]; the label is always 0, chosen."""
        result, pair = self._loss(model, inputs)
        result = self.objective(model, inputs) if self.owns("get_batch_loss_metrics") else result
        rewards_P2 = self.args.beta * torch.stack([pair.chosen_ratio_B, pair.rejected_ratio_B], 1)
        return result, rewards_P2, torch.zeros(len(rewards_P2), device=rewards_P2.device)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if self.args.generate_during_eval:
            self._log_samples((args[0] if args else kwargs["dataloader"]).dataset)
        return super().evaluation_loop(*args, **kwargs)

    def _log_samples(self, dataset: Any) -> None:
        """Log the table `game_log`: prompts, the policy's completions, the reference's (empty without a reference)."""
        prompts = self._random_prompts(dataset)
        policy, other = self._sampled(self.model, prompts), [""] * len(prompts)
        if self.reference is not None:
            with self.reference.model() as model:
                other = other if model is None else self._sampled(model, prompts)
        if not self.accelerator.is_main_process:
            return
        import wandb

        texts = [read_out(self.tokenizer, prompt) for prompt in prompts]
        rows = [list(row) for row in zip(texts, policy, other, strict=True)]
        table = wandb.Table(columns=["Prompt", "Policy", "Ref Model"], rows=rows)
        if wandb.run is not None:
            wandb.log({"game_log": table})

    def _random_prompts(self, dataset: Any) -> list[list[int]]:
        """The prompts of one random evaluation batch; of a stream, the first ones."""
        size = self.args.eval_batch_size
        if not hasattr(dataset, "__len__"):
            return [list(row["prompt_ids"]) for row in islice(dataset, size)]
        picked = random.Random(self.state.global_step).sample(range(len(dataset)), min(len(dataset), size))
        return [list(dataset[index]["prompt_ids"]) for index in picked]

    def _sampled(self, model: Any, prompts: list[list[int]]) -> list[str]:
        """One completion of each prompt as text; the two together have at most `max_length` tokens."""
        limits = [limit for limit in (self.args.max_length, context_length(model)) if limit is not None]
        room = max(1, min(limits, default=512) - max(map(len, prompts)))
        room = min(room, self.args.max_completion_length or room)
        sampler = make_sampler(model, self.tokenizer)
        completions = sampler.sample(prompts, SamplingParams(max_new_tokens=room, seed=self.args.seed))
        ends = end_tokens(model, self.tokenizer)
        return without_ends(self.tokenizer, [group[0].ids for group in completions], ends)


def _token_metrics(scores: Scores, mask_BT: Tensor) -> dict[str, Measure]:
    """What is said of single tokens: logits of either side, entropy of both, first choices among the chosen's."""
    assert scores.logits_BT is not None
    assert scores.entropy_BT is not None
    assert scores.top_BT is not None
    chosen, rejected = mask_BT[0::2].sum(), mask_BT[1::2].sum()
    return {
        "logits/chosen": (scores.logits_BT[0::2].sum(), chosen),
        "logits/rejected": (scores.logits_BT[1::2].sum(), rejected),
        "entropy": (scores.entropy_BT.sum(), chosen + rejected),
        "mean_token_accuracy": (scores.top_BT[0::2].sum(), chosen),
    }


def _wpo(logprobs_BT: Tensor, mask_BT: Tensor, collision_BT: Tensor) -> Tensor:
    sides = (slice(0, None, 2), slice(1, None, 2))
    return wpo_weights(*(x[side] for x in (logprobs_BT, mask_BT, collision_BT) for side in sides))


def _check_wandb(config: PairConfig) -> None:
    if config.generate_during_eval and not is_wandb_available():
        raise ValueError(
            "`generate_during_eval=True` requires Weights and Biases to be installed. "
            "Please install `wandb` to resolve."
        )
