"""What every trainer on chosen/rejected pairs shares: rows to token trees, log-probabilities to a table of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.trainer_utils import EvalLoopOutput

from trl.data.batches import pair_columns, pair_rows_of_padded, pair_tree
from trl.data.packing import pack
from trl.data.tokenize import tokenize_preference
from trl.import_utils import is_wandb_available
from trl.losses.loss_sum import LossSum
from trl.losses.pairs import PairLogps, sum_pairs, wpo_weights
from trl.losses.preference import preference_loss
from trl.models.forward import eval_no_grad, in_head
from trl.models.head import Head, log_collision, mean_logits, token_logprobs
from trl.models.scoring import score
from trl.models.unwrap import is_encoder_decoder
from trl.trainer.dpo_config import PairConfig
from trl.trainer.objective import ObjectiveTrainer, pieces_of
from trl.trainer.preparation import answer_length, each_dataset, equip
from trl.trainer.reward_shift import RewardShift

NUMBERS = {
    "margin": "margin",
    "reference_chosen_logps": "reference_chosen_logps",
    "reference_rejected_logps": "reference_rejected_logps",
    "ref_chosen_logps": "reference_chosen_logps",
    "ref_rejected_logps": "reference_rejected_logps",
}
"""columns of pair rows that are one number each, and their names in a batch"""


class PairCollator:
    """Tokenised pairs, or what another collator made of them, as token trees that share their prompt."""

    def __init__(self, inner: Callable[[Any], Mapping[str, Any]] | None = None):
        self.inner = inner

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        present = {column: name for column, name in NUMBERS.items() if column in rows[0]}
        numbers = {name: torch.tensor([float(row[column]) for row in rows]) for column, name in present.items()}
        if self.inner is not None:
            rows = pair_rows_of_padded(self.inner([pair_columns(r) if "prompt_ids" in r else r for r in rows]))
        return {"packed": pack([pair_tree(row) for row in rows]), **numbers}


class PairTrainer(ObjectiveTrainer):
    """Preference optimisation on pairs; a subclass says where the reference's log-probabilities come from."""

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
        model, model_init, tokenizer = equip(
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
        length = answer_length(config, model, encoder_decoder)

        def tokenised(dataset: Any, name: str) -> Any:
            return tokenize_preference(
                dataset,
                tokenizer,
                max_length=length,
                max_prompt_length=config.max_prompt_length,
                max_completion_length=config.max_completion_length,
                truncation_mode=config.truncation_mode,
                add_bos=add_bos,
                is_encoder_decoder=encoder_decoder,
                num_proc=config.dataset_num_proc,
                name=name,
            )[0]

        super().__init__(
            model=model,
            args=config,
            data_collator=PairCollator(data_collator),
            train_dataset=each_dataset(train_dataset, tokenised, "train"),
            eval_dataset=each_dataset(eval_dataset, tokenised, "eval"),
            processing_class=tokenizer,
            model_init=model_init,
            **kwargs,
        )
        self._encoder_decoder = encoder_decoder
        self.losses, self.ld_alpha, self.weighs = config.losses(), 1.0, False
        self.shift = RewardShift() if "bco_pair" in self.losses else None

    def extra_state(self) -> dict[str, Any]:
        return {} if self.shift is None else {"shift": self.shift.state()}

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
            batch["packed"] = packed = batch["packed"].to(self.args.device)
            with eval_no_grad(self.model):
                sums = self.sums(score(self.model, packed).logprobs_BT, packed.mask_BT)
            pair = PairLogps(*sums, *self.reference_sums(batch))
            pairs = totals.new_tensor(self.count(batch))
            totals += torch.stack([pair.chosen_ratio_B.sum(), pair.rejected_ratio_B.sum(), pairs])
        chosen, rejected, pairs = self.accelerator.reduce(totals, "sum").unbind()
        for batch in batches:
            batch["kl_chosen"] = (chosen / pairs.clamp(min=1)).clamp(min=0)
            batch["kl_rejected"] = (rejected / pairs.clamp(min=1)).clamp(min=0)

    def count(self, batch: dict[str, Any]) -> int:
        return batch["packed"].rows // 2

    def reference_sums(self, batch: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """The reference's log-probabilities of chosen and rejected; None without one. [pairs] each"""
        return None, None

    def loss_options(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the losses read besides the pair."""
        state = {name: batch[name] for name in ("kl_chosen", "kl_rejected") if name in batch}
        if self.shift is not None:
            state["delta"] = self.shift.value
        return {**state, "beta": self.args.beta, **{k: v for k, v in self.args.options().items() if v is not None}}

    def divergence(self) -> dict[str, Any]:
        """How distance to the reference is measured, where that is a choice."""
        return {}

    def sums(self, logprobs_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities summed over chosen and over rejected. [pairs] each"""
        return sum_pairs(logprobs_BT[0::2], logprobs_BT[1::2], mask_BT[0::2], mask_BT[1::2], self.ld_alpha)

    # -- the objective ------------------------------------------------------------------------

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        return self._loss(model, batch)[0]

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[LossSum, PairLogps]:
        if "kto_pair" in self.losses and "kl_chosen" not in batch:  # evaluation: this batch's, over all ranks
            self._whole_step_kl([batch])
        packed = batch["packed"]
        mask_BT = packed.mask_BT

        def measure(head: Head, states_SD: Tensor) -> list[Tensor]:
            logprobs_S, _ = token_logprobs(head, states_SD, packed.target_S)
            collision = [log_collision(head, states_SD)] if self.weighs else []
            return [logprobs_S, mean_logits(head, states_SD.detach()), *collision]

        logprobs_BT, logits_BT, *collision_BT = (packed.spread(numbers) for numbers in in_head(model, packed, measure))
        sums, tokens = self.sums(logprobs_BT, mask_BT), (mask_BT[0::2].sum(-1), mask_BT[1::2].sum(-1))
        pair = PairLogps(*sums, *self.reference_sums(batch), *tokens)
        if self.shift is not None and model.training:
            self.shift.add(self.args.beta * torch.cat([pair.chosen_ratio_B, pair.rejected_ratio_B]))
        weight_B = _wpo(logprobs_BT, mask_BT, *collision_BT) if self.weighs else None
        result = preference_loss(pair, self.losses, self.loss_options(batch), weight_B=weight_B, **self.divergence())
        for side, name in enumerate(("chosen", "rejected")):
            result.metrics[f"logits/{name}"] = (logits_BT[side::2].sum(), mask_BT[side::2].sum())
        return result, pair

    # -- evaluation ---------------------------------------------------------------------------

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """Implicit rewards of chosen and rejected, [pairs, 2]; the label is always 0, chosen."""
        result, pair = self._loss(model, inputs)
        rewards_P2 = self.args.beta * torch.stack([pair.chosen_ratio_B, pair.rejected_ratio_B], 1)
        return result, rewards_P2, torch.zeros(len(rewards_P2), device=rewards_P2.device)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if self.args.generate_during_eval:
            from trl.trainer.eval_samples import log_samples

            log_samples(self, args[0] if args else kwargs["dataloader"])
        return super().evaluation_loop(*args, **kwargs)


def _wpo(logprobs_BT: Tensor, mask_BT: Tensor, collision_BT: Tensor) -> Tensor:
    sides = (slice(0, None, 2), slice(1, None, 2))
    return wpo_weights(*(x[side] for x in (logprobs_BT, mask_BT, collision_BT) for side in sides))


def _check_wandb(config: PairConfig) -> None:
    if config.generate_during_eval and not is_wandb_available():
        raise ValueError(
            "`generate_during_eval=True` requires Weights and Biases to be installed. "
            "Please install `wandb` to resolve."
        )
