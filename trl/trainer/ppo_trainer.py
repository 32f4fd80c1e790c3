"""Proximal policy optimisation of language models (arXiv:1707.06347, arXiv:1909.08593), driven by `step` or `train`."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from trl.core import PPODecorators, convert_to_scalar, entropy_from_logits, set_seed, stats_to_np
from trl.data.microbatches import unasked_budget
from trl.generation.plain_generate import respond_at_lengths
from trl.generation.stopping import end_tokens
from trl.kernels.step_memory import in_place, kept_memory
from trl.legacy import ppo_padded
from trl.losses.advantages import token_rewards
from trl.losses.kl import KL_PENALTIES
from trl.losses.loss_sum import LossSum
from trl.models.forward import eval_mode
from trl.models.modeling_base import PreTrainedModelWrapper, create_reference_model
from trl.models.prepare import equalise
from trl.models.reference import Reference
from trl.models.unwrap import below_accelerate
from trl.rewards.named import RewardSource
from trl.rollout.measure import (
    PACKED_TOKENS,
    ActorCritic,
    Measured,
    PPOBatch,
    Sample,
    advantages,
    measure,
    pack_samples,
    ppo_batch,
)
from trl.trainer import checkpoints, ppo_loop, ppo_setup, ppo_statistics
from trl.trainer.base import BaseTrainer
from trl.trainer.configuration import processing_class_of
from trl.trainer.model_card import PPO_CARD, write_model_card
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.ppo_environment import check_environment
from trl.trainer.ppo_inputs import checked_batch, samples_of, show_tokens
from trl.trainer.ppo_objective import terms
from trl.trainer.statistics import AdaptiveKLController, FixedKLController, RunningMoments
from trl.trainer.tally import Tally
from trl.trainer.update import leave_zeros, optimizer_step

if TYPE_CHECKING:
    from datasets import Dataset

STATE, OLD_RANDOM_STATE = "trainer_state.pt", "random_state-{rank}.pt"
"""files of a checkpoint; the second one is release 1.0.0's"""


class PPOTrainer(BaseTrainer):
    """Trains a language model with a value head against scores of its responses.

    ref_model: what the KL is measured from. None: a frozen copy of the model as it is, sharing the layers before
    `num_shared_layers`; for a PEFT model, the model with its adapter switched off.
    value_model: a model with a score head (num_labels=1) as critic; the policy's own value head then rests.
    reward_funcs: what `train()` scores responses with: functions, their names, reward models or their folders; their
    sum counts. reward_processing_classes: tokenizers of the reward models.
    environment: who plays in `train()`, such as a `TextEnvironment`; an episode's score is the sum of its rewards.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "ppo"]

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: PreTrainedModelWrapper | None = None,
        ref_model: PreTrainedModelWrapper | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: torch.utils.data.Dataset | Dataset | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: LRScheduler | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        value_model: nn.Module | None = None,
        reward_funcs: RewardSource | Sequence[RewardSource] | None = None,
        reward_processing_classes: Any = None,
        environment: Any = None,
    ):
        super().__init__(config)
        tokenizer = processing_class_of(processing_class, tokenizer)
        ppo_setup.check_arguments(config, model, ref_model, tokenizer, dataset, lr_scheduler, num_shared_layers)
        assert config is not None
        assert model is not None
        set_seed(config.seed)
        self.config: PPOConfig = config
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.accelerator = ppo_setup.make_accelerator(config)
        self.is_encoder_decoder = hasattr(model, "is_encoder_decoder")
        self.is_peft_model = getattr(model, "is_peft_model", False)
        self.is_distributed = self.accelerator.num_processes > 1
        self.current_device = self.accelerator.device
        ppo_setup.complete_config(config, self)
        ppo_setup.start_trackers(self.accelerator, config)
        reference: nn.Module | None = ref_model
        if reference is None and not self.is_peft_model:
            equalise(model)
            reference = create_reference_model(model, num_shared_layers=num_shared_layers)
        self._prepare(model, value_model, reference, optimizer, data_collator, lr_scheduler)
        adaptive = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        self.kl_ctl: Any = adaptive if config.adap_kl_ctrl else FixedKLController(config.init_kl_coef)
        self.running = RunningMoments(self.accelerator)
        self.current_step = self.logged_steps = self.data_position = 0
        self.highest_reward = -float("inf")
        self._reward_funcs, self._reward_tokenizers = reward_funcs, reward_processing_classes
        self.environment = environment
        if environment is not None:
            check_environment(self, environment, reward_funcs)
        PPODecorators.optimize_device_cache = config.optimize_device_cache
        if self.accelerator.process_index:  # each process samples with its own seed
            set_seed(config.seed + 1_000_003 * self.accelerator.process_index)

    def _prepare(
        self, model: Any, value_model: Any, ref_model: Any, optimizer: Any, data_collator: Any, lr_scheduler: Any
    ) -> None:
        """Put everything on the device and under accelerate."""
        if value_model is not None:
            ppo_setup.check_critic(model, value_model, optimizer)
        trained = [model] if value_model is None else [model, value_model]
        self._parameters = [p for each in trained for p in each.parameters() if p.requires_grad]
        optimizer = ppo_setup.make_optimizer(self.config, self._parameters) if optimizer is None else optimizer
        lr_scheduler = ppo_setup.make_scheduler(self.config, optimizer, lr_scheduler)
        collator = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)
        self.model = model  # `prepare_dataloader` asks for its arguments
        dataloader = None if self.dataset is None else self.prepare_dataloader(self.dataset, data_collator)
        self.model, self.optimizer, self.data_collator, self.dataloader, self.lr_scheduler = self.accelerator.prepare(
            model, optimizer, collator, dataloader, lr_scheduler
        )
        self.value_model = None if value_model is None else self.accelerator.prepare(value_model)
        self.ref_model = None if ref_model is None else self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.reference = Reference(self.model, self.ref_model)
        self.actor = ActorCritic(self.model, self.value_model, self.config.temperature)

    @property
    def processing_class(self) -> Any:
        """The tokenizer, by its newer name."""
        return self.tokenizer

    def prepare_dataloader(
        self, dataset: torch.utils.data.Dataset | Dataset, data_collator: Callable[[list[Any]], Any] | None = None
    ) -> torch.utils.data.DataLoader:
        """A loader of whole, shuffled batches; not yet under accelerate."""
        return ppo_setup.make_dataloader(dataset, data_collator, below_accelerate(self.model), self.config)

    # --- sampling ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Responses to queries; with `generate_ref_response` a pair, the second by the reference.

        A 1-d tensor gives a tensor [1, L], a list of 1-d tensors a list of 1-d tensors. `batch_size` queries at a
        time; `length_sampler` draws `max_new_tokens` for each of those batches. Each response ends with its first end
        token; encoder-decoders' begin with the start token and never contain the prompt. Keywords are those of
        transformers' `generate`; a missing one is the model's `generation_config`'s, so that without any it is greedy.
        """
        single = isinstance(query_tensor, Tensor)
        queries: list[Tensor] = [query_tensor] if isinstance(query_tensor, Tensor) else list(query_tensor)
        if any(not isinstance(query, Tensor) or query.ndim != 1 for query in queries):
            raise ValueError(
                "query_tensor must be a tensor of shape (`seq_len`) or a list of tensors of shape (`seq_len`)"
            )
        if self.config.temperature != 1:
            generation_kwargs.setdefault("temperature", self.config.temperature)
        queries = [query.to(self.current_device) for query in queries]

        def responses_of(model: Any) -> Any:
            responses = respond_at_lengths(
                model, self.tokenizer, queries, batch_size, length_sampler, generation_kwargs
            )
            if return_prompt and not self.is_encoder_decoder:
                responses = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
            return responses[0][None] if single else responses

        policy = below_accelerate(self.model)
        with eval_mode(policy, checkpointing=True):
            response = responses_of(policy)
        if not generate_ref_response:
            return response
        with self.reference.model() as reference:
            return response, responses_of(below_accelerate(reference or policy))

    # --- a step -----------------------------------------------------------------------------------------------------

    @PPODecorators.empty_device_cache()
    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """`ppo_epochs` passes over a batch of responses and their scores; the statistics of it.

        response_masks: 1 where the policy chose the token, for responses that hold text of others (tools).
        """
        clock = ppo_statistics.Clock()
        queries, responses, scores, response_masks = self._step_safety_checker(
            self.config.batch_size, queries, responses, scores, response_masks
        )
        scores_B = self._shaped(torch.stack([score.float() for score in scores]), responses)
        config: Any = below_accelerate(self.model).config
        start = config.decoder_start_token_id if self.is_encoder_decoder else None
        samples = samples_of(queries, responses, response_masks, start)
        memory = kept_memory(self.current_device)
        gradients = in_place(self.current_device, self.accelerator.num_processes)
        with eval_mode(*self.actor.models, checkpointing=True), self.accelerator.autocast(), memory, gradients:
            measured = self._measure(samples)
            clock.lap("forward_pass")
            penalty_BT = -self.kl_ctl.value * measured.kl_BT
            rewards_BT = token_rewards(scores_B, measured.kl_BT, measured.mask_BT, self.kl_ctl.value)
            clock.lap("compute_rewards")
            batch = ppo_batch(self.accelerator, samples, measured, rewards_BT, **self._gae_numbers())
            clock.lap("compute_advantages")
            train_stats = self._update(batch)
            clock.lap("optimize_step")
        stats = self.record_step_stats(
            self.kl_ctl.value, logprobs=measured.logprobs_BT, ref_logprobs=measured.reference_BT,
            masks=measured.mask_BT, scores=scores_B, non_score_reward=penalty_BT, train_stats=train_stats,
            queries=queries, responses=responses,
        )  # fmt: skip
        stats = stats_to_np(self.gather_stats(stats))
        clock.lap("calc_stats")
        self.kl_ctl.update(stats["objective/kl"], self.config.batch_size * self.accelerator.num_processes)
        stats |= {"ppo/learning_rate": self.optimizer.param_groups[0]["lr"], **clock.stats()}
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return stats if self.config.log_with == "wandb" else convert_to_scalar(stats)

    def _step_safety_checker(
        self,
        batch_size: int,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        masks: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
        """The lists on the trainer's device, scores 0-d; ValueError for what is not a batch."""
        return checked_batch(batch_size, queries, responses, scores, masks, self.current_device)

    def _shaped(self, scores_B: Tensor, responses: Sequence[Tensor]) -> Tensor:
        """Scores as the step learns from them: EOS trick, best-so-far push, scaling, normalising, clipping."""
        config = self.config
        if config.missing_eos_penalty is not None:
            ends = {*end_tokens(self.model, self.tokenizer), *ppo_setup.stop_tokens(config, self.tokenizer)}
            ended = torch.tensor([len(row) > 0 and int(row[-1]) in ends for row in responses], device=scores_B.device)
            scores_B = torch.where(ended, scores_B, -config.missing_eos_penalty)
        self._push_if_best(scores_B)
        if config.use_score_scaling:
            self.running.update(scores_B)
            if config.use_score_norm:
                scores_B = scores_B - self.running.mean
            scores_B = scores_B / (self.running.std + torch.finfo(scores_B.dtype).eps)
        if config.score_clip is not None:
            scores_B = scores_B.clamp(-config.score_clip, config.score_clip)
        return scores_B

    def _push_if_best(self, scores_B: Tensor) -> None:
        """Every `compare_steps` steps: push the model if these scores are the best so far. The first are only kept."""
        self.current_step += 1
        if not self.config.push_to_hub_if_best_kwargs or (self.current_step - 1) % self.config.compare_steps:
            return
        mean = self.accelerator.reduce(scores_B.mean(), "mean").item()
        if mean > self.highest_reward:
            first, self.highest_reward = self.highest_reward == -float("inf"), mean
            if not first and self.accelerator.is_main_process:
                self.push_to_hub(**self.config.push_to_hub_if_best_kwargs)

    @property
    def _budget(self) -> int | None:
        return unasked_budget(self.current_device, self.accelerator.num_processes)

    def _measure(self, samples: Sequence[Sample]) -> Measured:
        """Processes must make equally many passes, so only a single one may fill them up with tokens."""
        return measure(
            self.actor, self.reference, samples, kl_penalty=self.config.kl_penalty, rows=self.config.mini_batch_size,
            tokens=0 if self.is_distributed else self._budget or PACKED_TOKENS, device=self.current_device,
        )  # fmt: skip

    def _gae_numbers(self) -> dict[str, Any]:
        return {"gamma": self.config.gamma, "lam": self.config.lam, "whiten_rewards": self.config.whiten_rewards}

    def _update(self, batch: PPOBatch) -> dict[str, Tensor]:
        """Epochs x optimizer steps x micro-batches; the mean statistics of all optimizer steps."""
        history: list[dict[str, Tensor]] = []
        ratios: list[Tensor] = []
        for _ in range(self.config.ppo_epochs):
            order = np.random.permutation(len(batch.samples))
            for rows in np.split(order, len(order) // (self.config.backward_batch_size or 1)):
                parts = np.split(rows, self.config.gradient_accumulation_steps)
                pieces = batch.cut([part.tolist() for part in parts], self._budget)
                history.append(self._optimizer_step(pieces, ratios, first=not history))
            if self._early_stop(history[-1]["policy_kl"]):
                break
        leave_zeros(self._parameters)
        means = {name: torch.stack([each[name] for each in history]).mean() for name in history[0]}
        return ppo_statistics.seed_keys(means) | ppo_statistics.batch_keys(
            batch.old_values_BT, batch.returns_BT, batch.advantages_BT, batch.mask_BT, torch.cat(ratios)
        )

    def _optimizer_step(self, pieces: Sequence[PPOBatch], ratios: list[Tensor], first: bool) -> dict[str, Tensor]:
        def accept(means: Mapping[str, Tensor]) -> bool:
            if first:
                ppo_statistics.check_on_policy(means, self.accelerator, self.model)
            return self._ratio_is_sane(means["ratio"])

        return optimizer_step(
            self.accelerator, self.actor.models, self.optimizer, pieces,
            lambda piece: self.actor.within_forward(lambda actor: self._objective(actor, piece, ratios)),
            lambda piece: piece.mask_BT.sum(),
            parameters=self._parameters, max_grad_norm=self.config.max_grad_norm, accept=accept,
        )  # fmt: skip

    def _objective(self, actor: ActorCritic, piece: PPOBatch, ratios: list[Tensor]) -> LossSum:
        """Clipped surrogate plus `vf_coef` times clipped value loss, summed over tokens."""
        scores = actor(pack_samples(piece.samples).to(self.current_device), entropy=True)
        assert scores.values_BT is not None
        assert scores.entropy_BT is not None
        ratios.append((scores.logprobs_BT.detach() - piece.old_logprobs_BT)[piece.mask_BT > 0].exp())
        policy, value = terms(
            self.config,
            piece.old_logprobs_BT, piece.old_values_BT, scores.values_BT, scores.logprobs_BT, piece.mask_BT,
            piece.advantages_BT, piece.returns_BT, scores.entropy_BT,
        )  # fmt: skip
        return policy.plus(value)

    def _ratio_is_sane(self, ratio: Tensor) -> bool:
        if ratio.item() <= self.config.ratio_threshold:
            return True
        warnings.warn(
            f"The average ratio of batch ({ratio.item():.2f}) exceeds threshold {self.config.ratio_threshold:.2f}. "
            "Skipping batch."
        )
        return False

    def _early_stop(self, policykl: Tensor | float) -> bool:
        """Whether the policy has moved too far in this step, on the mean of all processes."""
        if not self.config.early_stopping:
            return False
        moved = self.accelerator.reduce(torch.as_tensor(policykl, device=self.current_device).float(), "mean").item()
        if moved <= 1.5 * self.config.target_kl:
            return False
        self.optimizer.zero_grad(set_to_none=False)
        return True

    # --- the pieces of a step on padded tensors, for scripts that put their own together ------------------------------

    def prepare_model_inputs(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> dict[str, Tensor]:
        """Padded model inputs of queries and responses, no labels. [B, L]"""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        build = ppo_padded.encoder_decoder_inputs if self.is_encoder_decoder else ppo_padded.causal_inputs
        inputs = build(queries, responses, pad or 0, self.tokenizer.padding_side)
        return {name: column.to(self.current_device) for name, column in inputs.items()}

    def batched_forward_pass(
        self,
        model: nn.Module,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        model_inputs: Mapping[str, Tensor],
        return_logits: bool = False,
        response_masks: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(log-probabilities, logits or None, values, mask of the response's tokens), `mini_batch_size` rows at a time.

        [B, L - 1], [B, L - 1, V], [B, L - 1], [B, L - 1]: position p is about token p + 1. Without dropout.
        """
        columns = []
        with eval_mode(model, checkpointing=True):
            for start in range(0, len(queries), self.config.mini_batch_size):
                rows = slice(start, start + self.config.mini_batch_size)
                inputs = {name: column[rows] for name, column in model_inputs.items()}
                logprobs, logits, values = ppo_padded.forward_chunk(
                    model, inputs, self.config.temperature, self.is_encoder_decoder
                )
                columns.append((logprobs, values, *((logits,) if return_logits else ())))
        attention = model_inputs["decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"]
        mask = ppo_padded.response_mask(attention, queries, responses, response_masks, self.is_encoder_decoder)
        parts = [torch.cat(each) for each in zip(*columns, strict=True)]
        return parts[0], parts[2] if return_logits else None, parts[1], mask

    def compute_rewards(  # type: ignore[override]
        self, scores: Tensor | Sequence[Tensor], logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(rewards, their KL part): `-kl_coef KL` at every position, the score at the last that counts. [B, T]

        For `kl_penalty="full"` the log-probabilities are those of the whole vocabulary, [B, T, V].
        """
        kl_BT = self._kl_penalty(logprobs, ref_logprobs)
        scores_B = torch.stack([torch.as_tensor(score, device=kl_BT.device).flatten()[0] for score in scores])
        return token_rewards(scores_B, kl_BT, masks, self.kl_ctl.value), -self.kl_ctl.value * kl_BT

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        """The penalty `config.kl_penalty` of each token."""
        return KL_PENALTIES[self.config.kl_penalty](logprob, ref_logprob)

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(masked values, whitened advantages, returns), [B, T] each."""
        return advantages(self.accelerator, values, rewards, mask, **self._gae_numbers())

    def loss(  # type: ignore[override]
        self, old_logprobs: Tensor, values: Tensor, logits: Tensor, vpreds: Tensor, logprobs: Tensor, mask: Tensor,
        advantages: Tensor, returns: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """(policy loss, `vf_coef` times value loss, statistics) of a minibatch; losses 0 where the ratio explodes."""
        entropy = entropy_from_logits(logits)
        policy, value = terms(self.config, old_logprobs, values, vpreds, logprobs, mask, advantages, returns, entropy)
        sane = float(self._ratio_is_sane(policy.metrics["ratio"][0] / policy.metrics["ratio"][1]))
        tally = Tally(self.current_device)
        tally.add_loss(policy.plus(value))
        stats = ppo_statistics.seed_keys(tally.tensors()) | ppo_statistics.batch_keys(
            values, returns, advantages, mask, (logprobs - old_logprobs).detach()[mask > 0].exp()
        )
        return policy.mean * sane, value.mean * sane, stats

    @PPODecorators.empty_device_cache()
    def train_minibatch(
        self, old_logprobs: Tensor, values: Tensor, logprobs: Tensor, logits: Tensor, vpreds: Tensor, mask: Tensor,
        advantages: Tensor, returns: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Backward pass and optimizer step of a minibatch; accumulates inside `accelerator.accumulate`."""
        policy, value, stats = self.loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        self.accelerator.backward(policy + value)
        if self.config.max_grad_norm is not None and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self._parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return stats

    # --- a whole run --------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: bool | str | os.PathLike[str] | None = None,
        callback: Callable[[int, dict[str, Any], dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """`total_ppo_epochs` steps on prompts of the data set; the last step's statistics.

        resume_from_checkpoint: a folder, or True for the newest in `output_dir` (from the start if there is none yet).
        callback: called behind each step with its number, its statistics and its batch (texts, scores, tokens).
        """
        panel = ppo_loop.panel_of(self, self._reward_funcs, self._reward_tokenizers)
        if self.config.output_dir is not None:
            checkpoints.clean_up(self.config.output_dir)
        found = checkpoints.find(resume_from_checkpoint, self.config.output_dir, is_old=_is_old_checkpoint)
        if found is not None:
            self._resume(found)
        return ppo_loop.run(self, panel, callback)

    def save_checkpoint(self, step: int) -> None:
        """Save `checkpoint-N` of a run, and remove the oldest ones."""
        assert self.config.output_dir is not None
        folder = Path(self.config.output_dir, f"{checkpoints.PREFIX}{step}")
        self.save_state(folder)
        if self.accelerator.is_main_process:
            limit = self.config.save_total_limit
            checkpoints.keep_newest(self.config.output_dir, limit, keep=[folder], is_old=_is_old_checkpoint)

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        """Rows of the data set for each step of the run that is left, in an order that `load_state` takes up again."""
        return ppo_loop.batches(self)

    def save_state(self, directory: str | os.PathLike[str]) -> None:
        """Save all that the next step depends on, and the model as `save_pretrained` does, whole or not at all."""
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise NotImplementedError(
                f"save_state does not gather weights that {kind.value} has spread: use `trainer.accelerator.save_state`"
            )
        checkpoints.save_checkpoint(Path(directory), self._write_state, self.describe_run(), step=self.data_position)

    def _write_state(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            checkpoints.write_state(folder / STATE, self._state())
            below_accelerate(self.model).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def load_state(self, directory: str | os.PathLike[str]) -> None:
        """Go on exactly where `save_state` was called, in a trainer that was built in the same way."""
        folder = Path(directory)
        if folder.is_dir() and not any((folder / name).is_file() for name in (STATE, checkpoints.MANIFEST)):
            raise ValueError(f"{str(directory)!r} holds no {STATE}: give a folder that `save_state` or `train` wrote")
        found = checkpoints.find(folder, None, is_old=_is_old_checkpoint)
        assert found is not None
        self._resume(found)

    def _resume(self, found: checkpoints.Checkpoint) -> None:
        run = self.describe_run()
        checkpoints.check_identity(found, run, self.accelerator.num_processes)
        allowed = [] if found.manifest else checkpoints.numpy_globals()
        self._restore(checkpoints.read_state(found.folder / STATE, allowed=allowed))
        checkpoints.check_settings(found, run)
        own = (checkpoints.RANDOM_STATE if found.manifest else OLD_RANDOM_STATE).format(
            rank=self.accelerator.process_index
        )
        checkpoints.set_random_state(checkpoints.read_state(found.folder / own, allowed=allowed))

    def describe_run(self) -> checkpoints.Run:
        """What a checkpoint of this run is compared with when a later run resumes from it."""
        rows = self.config.batch_size * self.accelerator.num_processes
        return checkpoints.describe_run(
            type(self).__name__, self.model, self.config.to_dict(), fixed={"rows in a step": rows}, dataset=self.dataset
        )

    def _state(self) -> dict[str, Any]:
        """What all processes have in common."""
        return {
            "weights": {name: _trained(model) for name, model in self._models().items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "kl_coef": self.kl_ctl.value,
            "running": {name: getattr(self.running, name) for name in ("mean", "std", "var", "count")},
            "counters": {name: getattr(self, name) for name in ("current_step", "logged_steps", "data_position")},
            "highest_reward": self.highest_reward,
            "reference": _sums(self.ref_model),
            "world_size": self.accelerator.num_processes,
        }

    def _models(self) -> dict[str, nn.Module]:
        models = {"model": self.model, "value_model": self.value_model}
        return {name: model for name, model in models.items() if model is not None}

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Put a state back; ValueError, before anything changes, if the trainer was built differently."""
        if state["world_size"] != self.accelerator.num_processes:
            raise ValueError(
                f"the checkpoint was written by {state['world_size']} processes, this run has "
                f"{self.accelerator.num_processes}: resume with as many"
            )
        if not _same_sums(state["reference"], _sums(self.ref_model)):
            raise ValueError(
                "the reference model is not the one of the checkpoint: build the trainer from the model that training "
                "started with, `load_state` brings the trained weights"
            )
        if (state["scheduler"] is None) != (self.lr_scheduler is None):
            raise ValueError(
                "lr_scheduler: the checkpoint was written with one and this trainer has none, or the reverse"
            )
        own = {name: _trained(model) for name, model in self._models().items()}
        for name in sorted({*own, *state["weights"]}):
            if odd := sorted(own.get(name, {}).keys() ^ state["weights"].get(name, {}).keys()):
                raise ValueError(
                    f"{name} trains other weights than the checkpoint's ({odd[0]!r} is only in one of them)"
                )
        with torch.no_grad():
            for name, weights in own.items():
                for key, parameter in weights.items():
                    parameter.copy_(state["weights"][name][key])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["scheduler"])
        self.kl_ctl.value = state["kl_coef"]
        for name, value in state["running"].items():
            setattr(self.running, name, value)
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.highest_reward = state["highest_reward"]

    # --- reports ----------------------------------------------------------------------------------------------------

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """Statistics of a step from its parts, see `ppo_statistics.step_stats`."""
        return ppo_statistics.step_stats(kl_coef, **data)

    def gather_stats(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        """Over all processes: numbers averaged, distributions laid together."""
        return ppo_statistics.gathered(self.accelerator, stats) if self.is_distributed else dict(stats)

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor],
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Send a step's statistics, `env/reward_*` and (wandb) a table of the batch's columns to the tracker."""
        ppo_statistics.log_stats(self, stats, batch, rewards, columns_to_log)

    def create_model_card(self, path: str, model_name: str | None = "TRL Model") -> None:
        """Write `README.md`; without a Hub account at hand, a warning instead."""
        write_model_card(path, model_name, PPO_CARD)

    def _save_pretrained(self, save_directory: Any) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)
        self.create_model_card(str(save_directory))

    def _show_tokens(self, tokens: Tensor, masks: Tensor) -> None:
        """Print tokens in two colours, by their mask."""
        show_tokens(self.tokenizer, tokens, masks)


def _is_old_checkpoint(folder: Path) -> bool:
    """Whether release 1.0.0 wrote a folder: its random states had another name, and it had no manifest."""
    return (folder / STATE).is_file() and (folder / OLD_RANDOM_STATE.format(rank=0)).is_file()


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in below_accelerate(model).named_parameters() if p.requires_grad}


@torch.no_grad()
def _sums(model: nn.Module | None) -> list[float] | None:
    """The sum of each parameter, which tell one model from another."""
    if model is None:
        return None
    parameters = list(below_accelerate(model).parameters())
    wide = [(p.cpu() if p.device.type == "mps" else p).double().sum() for p in parameters]  # MPS has no float64
    return torch.stack([total.to(wide[0].device) for total in wide]).tolist()


def _same_sums(one: list[float] | None, other: list[float] | None) -> bool:
    """Whether two lists of sums are of the same model, but for the order in which sums were taken."""
    if one is None or other is None or len(one) != len(other):
        return one is other
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(one, other, strict=True))
