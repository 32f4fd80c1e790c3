"""What every trainer on chosen/rejected pairs shares: rows to token trees, log-probabilities to a table of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trl.data.batches import pair_rows_of_padded, pair_tree
from trl.data.packing import pack
from trl.data.tokenize import tokenize_preference
from trl.losses.loss_sum import LossSum
from trl.losses.pairs import PairLogps, sum_pairs, wpo_weights
from trl.losses.preference import preference_loss
from trl.models.head import log_collision, mean_logits, token_logprobs
from trl.models.scoring import is_encoder_decoder, score, scored_states
from trl.trainer.configuration import processing_class_of
from trl.trainer.dpo_config import PairConfig
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.preparation import each_dataset, fitting_length, prepare_model, prepare_tokenizer
from trl.trainer.reward_shift import RewardShift

NUMBERS = ("margin", "reference_chosen_logps", "reference_rejected_logps")
"""columns of pair rows that are one number each"""


class PairCollator:
    """Tokenised pairs, or what another collator made of them, as token trees that share their prompt."""

    def __init__(self, inner: Callable[[Any], Mapping[str, Any]] | None = None):
        self.inner = inner

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self.inner is not None:
            rows = pair_rows_of_padded(self.inner(rows))
        numbers = {name: torch.tensor([float(r[name]) for r in rows]) for name in NUMBERS if name in rows[0]}
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
        **kwargs: Any,
    ):
        tokenizer = prepare_tokenizer(processing_class_of(processing_class, tokenizer), model)
        if config.pad_token is not None:
            tokenizer.pad_token = config.pad_token

        def prepared(given: nn.Module | str) -> nn.Module:
            return prepare_model(
                given,
                config,
                tokenizer,
                peft_config,
                auto_class=AutoModelForCausalLM,
                owner=type(self).__name__,
                dropout=not config.disable_dropout,
                merge=True,
            )

        model = None if model is None else prepared(model)
        encoder_decoder = model is not None and is_encoder_decoder(model)
        length = fitting_length(config, model)
        if encoder_decoder and length == type(config).__dataclass_fields__["max_length"].default:
            length = None  # it bounds prompt + answer, which an encoder-decoder holds apart

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
            model_init=None if model_init is None else lambda *trial: prepared(model_init(*trial)),
            **kwargs,
        )
        self._path = None if config.padding_free else "padded"
        self.losses, self.ld_alpha, self.weighs = config.losses(), 1.0, False
        self.shift = RewardShift() if "bco_pair" in self.losses else None

    def extra_state(self) -> dict[str, Any]:
        return {} if self.shift is None else {"shift": self.shift.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if self.shift is not None:
            self.shift.load(state["shift"])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.shift is not None:
            self.shift.close_step(self.accelerator)
        if "kto_pair" in self.losses:
            self._whole_step_kl(batches)
        return batches, count

    @torch.no_grad()
    def _whole_step_kl(self, batches: list[dict[str, Any]]) -> None:
        """kto_pair's two KL estimates over the whole optimizer step and all ranks, written into its batches."""
        totals = torch.zeros(3, device=self.args.device)
        for batch in batches:
            batch["packed"] = batch["packed"].to(self.args.device)
            packed = batch["packed"]
            chosen_B, rejected_B = self.sums(score(self.model, packed, path=self._path).logprobs_BT, packed.mask_BT)
            pair = PairLogps(chosen_B, rejected_B, *self.reference_sums(batch))
            totals += torch.stack(
                [pair.chosen_ratio_B.sum(), pair.rejected_ratio_B.sum(), totals.new_tensor(len(chosen_B))]
            )
        chosen, rejected, pairs = self.accelerator.reduce(totals, "sum").unbind()
        for batch in batches:
            batch["kl_chosen"], batch["kl_rejected"] = (chosen / pairs).clamp(min=0), (rejected / pairs).clamp(min=0)

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

    def sums(self, logprobs_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities summed over chosen and over rejected. [pairs] each"""
        return sum_pairs(logprobs_BT[0::2], logprobs_BT[1::2], mask_BT[0::2], mask_BT[1::2], self.ld_alpha)

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossSum:
        return self._loss(model, batch)[0]

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[LossSum, PairLogps]:
        packed = batch["packed"]
        mask_BT = packed.mask_BT
        head, states_SD = scored_states(model, packed, self._path)
        logprobs_BT = packed.spread(token_logprobs(head, states_SD, packed.target_S)[0])
        chosen_B, rejected_B = self.sums(logprobs_BT, mask_BT)
        pair = PairLogps(
            chosen_B, rejected_B, *self.reference_sums(batch), mask_BT[0::2].sum(-1), mask_BT[1::2].sum(-1)
        )
        weight_B = None
        if self.weighs:
            collision_BT = packed.spread(log_collision(head, states_SD))
            chosen, rejected = slice(0, None, 2), slice(1, None, 2)
            weight_B = wpo_weights(
                *(x[side] for x in (logprobs_BT, mask_BT, collision_BT) for side in (chosen, rejected))
            )
        if self.shift is not None and model.training:
            ratios = torch.cat([pair.chosen_ratio_B, pair.rejected_ratio_B])
            self.shift.add(self.args.beta * ratios)
        result = preference_loss(pair, self.losses, self.loss_options(batch), weight_B=weight_B, **self.divergence())
        logits_BT = packed.spread(mean_logits(head, states_SD.detach()))
        for side, name in enumerate(("chosen", "rejected")):
            tokens = mask_BT[side::2].sum()
            result.metrics[f"logits/{name}"] = (logits_BT[side::2].sum(), tokens)
        return result, pair

    def divergence(self) -> dict[str, Any]:
        """How distance to the reference is measured, where that is a choice."""
        return {}

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, Tensor | None, Tensor | None]:
        """Implicit rewards of chosen and rejected, [pairs, 2]; the label is always 0, chosen."""
        result, pair = self._loss(model, inputs)
        rewards_P2 = self.args.beta * torch.stack([pair.chosen_ratio_B, pair.rejected_ratio_B], 1)
        return result, rewards_P2, torch.zeros(len(rewards_P2), device=rewards_P2.device)
