"""Learning from samples that the policy just made: prompts -> rollout -> experience -> micro-batches -> the same loop.

An algorithm fills in `advantages` (rewards to one number a token) and `objective`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from trl.data.formats import is_conversational
from trl.data.packing import pack
from trl.data.records import Branch, Rollout
from trl.data.tokenize import tokenize_prompts
from trl.generation import make_sampler
from trl.generation.sampler import SamplingParams
from trl.losses.loss_sum import Aggregation, LossSum
from trl.losses.policy import soft_overlong_punishment
from trl.models.prepare import context_length, load_model, load_tokenizer
from trl.models.reference import Reference
from trl.models.scoring import Scores, score
from trl.rewards.panel import RewardError, RewardPanel
from trl.rewards.reward_model import RewardModel
from trl.trainer.configuration import as_config, processing_class_of
from trl.trainer.dpo_trainer import SyncReference
from trl.trainer.grpo_config import OnPolicyConfig
from trl.trainer.objective import ObjectiveTrainer
from trl.trainer.preparation import each_dataset, prepare_model, prepare_tokenizer
from trl.trainer.rollouts import (
    Experience,
    PolicyBatch,
    RolloutLoader,
    RolloutState,
    policy_batch,
    prompt_index,
    prompt_trees,
    write_rollout,
)

RewardSource = Callable[..., Any] | PreTrainedModel | str


def reward_panel(
    functions: RewardSource | Sequence[RewardSource], tokenizers: Any, timeout: float | None, device: torch.device
) -> RewardPanel:
    """Functions, reward models and folders of reward models as one panel."""
    listed = list(functions) if isinstance(functions, list | tuple) else [functions]
    given = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(listed)
    if len(given) != len(listed):
        raise ValueError(f"reward_processing_classes: {len(given)} for {len(listed)} reward functions; give one each")
    return RewardPanel([_callable(f, t, device) for f, t in zip(listed, given, strict=True)], timeout)


def _callable(source: RewardSource, tokenizer: Any, device: torch.device) -> Callable[..., Any]:
    if isinstance(source, str):
        source = load_model(source, AutoModelForSequenceClassification, {"num_labels": 1})
    if not isinstance(source, PreTrainedModel):
        return source
    tokenizer = load_tokenizer(tokenizer if tokenizer is not None else source.config._name_or_path)
    return RewardModel(source.to(device).eval().requires_grad_(False), tokenizer, max_length=context_length(source))


class OnPolicyTrainer(ObjectiveTrainer):
    """A `Trainer` whose data are its own rollouts; callbacks, trackers and checkpoints work as users know them."""

    config_class: type[OnPolicyConfig]
    aggregation: Aggregation = "token"

    def __init__(
        self,
        model: nn.Module | str,
        reward_funcs: RewardSource | Sequence[RewardSource] | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
        ref_model: nn.Module | str | None = None,
        rollout_func: Callable[[list[dict[str, Any]], OnPolicyTrainer], Rollout] | None = None,
    ):
        config = as_config(args, self.config_class)
        self._microbatches, self._rows = config.rollout_shape()
        tokenizer = prepare_tokenizer(processing_class_of(processing_class, tokenizer), model)
        if config.pad_token is not None:
            tokenizer.pad_token = config.pad_token
        if train_dataset is None:
            raise ValueError("train_dataset: on-policy training needs prompts; give rows with a column `prompt`")
        model = prepare_model(
            model,
            config,
            tokenizer,
            peft_config,
            auto_class=AutoModelForCausalLM,
            owner=type(self).__name__,
            dropout=not config.disable_dropout,
        )

        def tokenised(dataset: Any, name: str) -> Any:
            return tokenize_prompts(
                dataset,
                tokenizer,
                max_prompt_length=config.max_prompt_length,
                context_length=context_length(model),
                template_kwargs=config.chat_template_kwargs,
                num_proc=config.dataset_num_proc,
                name=name,
            )[0]

        super().__init__(
            model=model,
            args=config,
            data_collator=lambda rows: {"rows": list(rows)},
            train_dataset=each_dataset(train_dataset, tokenised, "train"),
            eval_dataset=each_dataset(eval_dataset, tokenised, "eval"),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._path = None if config.padding_free else "padded"
        self.rollout_func = rollout_func
        self.sampler = make_sampler(self.model, tokenizer)
        self.panel = None
        if reward_funcs is not None:
            self.panel = reward_panel(reward_funcs, reward_processing_classes, config.reward_timeout, self.args.device)
        self.reward_weights = self._weights(config)
        self.reference = self._reference(ref_model, config)
        self.rollouts = self._loader()
        self._checked_first = False

    # -- construction --------------------------------------------------------------------------

    def _weights(self, config: OnPolicyConfig) -> Tensor:
        count = 0 if self.panel is None else len(self.panel.functions)
        weights = config.reward_weights or [1.0] * count
        if len(weights) != count:
            raise ValueError(f"reward_weights={weights}: give one weight for each of the {count} reward functions")
        return torch.tensor(weights, dtype=torch.float32)

    def _reference(self, ref_model: nn.Module | str | None, config: OnPolicyConfig) -> Reference | None:
        if not config.beta:
            if ref_model is not None:
                raise ValueError("ref_model: beta=0 uses no reference; set beta > 0 or leave it out")
            return None
        if ref_model is not None:
            ref_model = load_model(ref_model, AutoModelForCausalLM, config.model_init_kwargs, owner=type(self).__name__)
            ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        reference = Reference(self.model, ref_model)
        if config.sync_ref_model:
            if reference.frozen is None:
                raise ValueError("sync_ref_model=True: the policy without its adapter cannot move; give a ref_model")
            self.add_callback(SyncReference(reference, config.ref_model_mixup_alpha, config.ref_model_sync_steps))
        return reference

    def _loader(self) -> RolloutLoader:
        prompts = self._rows // self.args.num_generations * self.args.world_size
        per_epoch = -(-len(self.train_dataset) // prompts) * self._microbatches * self.args.num_iterations
        return RolloutLoader(
            self._make_experience,
            self._collate,
            microbatches=self._microbatches,
            iterations=self.args.num_iterations,
            length=per_epoch,
        )

    def get_train_dataloader(self) -> Any:
        return self.rollouts

    def extra_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"rollouts": dict(vars(self.rollouts.state))}
        if self.args.sync_ref_model and self.reference is not None:
            state["reference"] = self.reference.frozen.state_dict()
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.rollouts.state = RolloutState(**state["rollouts"])
        if "reference" in state:
            self.reference.frozen.load_state_dict(state["reference"])

    # -- verbs of an algorithm -----------------------------------------------------------------

    @abstractmethod
    def advantages(self, rewards_BF: Tensor, kl_B: Tensor | None) -> Tensor:
        """Rewards of all ranks' completions by each reward function (NaN: no opinion) to advantages. [B]

        kl_B: each completion's `log policy - log reference`, summed, where there is a reference.
        """

    # -- rollouts ------------------------------------------------------------------------------

    def sampling_params(self, seed: int) -> SamplingParams:
        config = self.args
        return SamplingParams(
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_k=config.top_k or 0,
            top_p=config.top_p,
            min_p=config.min_p or 0.0,
            repetition_penalty=config.repetition_penalty,
            seed=seed,
            **{k: tuple(v) if isinstance(v, list) else v for k, v in (config.generation_kwargs or {}).items()},
        )

    def sample(self, rows: Sequence[Mapping[str, Any]], group: int, seed: int) -> Rollout:
        """`group` completions of each prompt, in prompt order."""
        if self.rollout_func is not None:
            return self.rollout_func([dict(row) for row in rows for _ in range(group)], self)
        prompts = [list(row["prompt_ids"]) for row in rows]
        groups = self.sampler.sample(prompts, self.sampling_params(seed), n=group)
        flat = [completion for completions in groups for completion in completions]
        filters = (self.args.top_k or 0, self.args.top_p, self.args.min_p or 0.0, self.args.repetition_penalty)
        plain = filters == (0, 1.0, 0.0, 1.0) and not (self.args.generation_kwargs or {}).get("min_new_tokens")
        rollout = Rollout(
            prompts=[prompt for prompt in prompts for _ in range(group)],
            completions=[completion.ids for completion in flat],
            logprobs=[c.logprobs if plain else c.raw_logprobs for c in flat],
            masks=[[1] * len(completion.ids) for completion in flat],
            metadata={"truncated": [completion.finish_reason == "length" for completion in flat]},
        )
        if not plain and self.args.temperature != 1.0:  # neither of the sampler's two is the policy at this temperature
            rollout.logprobs = self._measured(self.model, rollout, self.args.temperature)
        return rollout

    def score_rollout(self, rollout: Rollout, rows: Sequence[Mapping[str, Any]], group: int) -> Tensor:
        """What each reward function says of each completion, NaN where it has no opinion. [B, F]"""
        texts = self.processing_class.batch_decode(rollout.completions, skip_special_tokens=True)
        rollout.texts = texts
        chat = is_conversational({"prompt": rows[0]["prompt"]}) if "prompt" in rows[0] else False
        columns = {
            name: [row[name] for row in rows for _ in range(group)] for name in rows[0] if name not in ("prompt_ids", "prompt")
        }  # fmt: skip
        prompts = [row.get("prompt", "") for row in rows for _ in range(group)]
        extra = {name: values for name, values in rollout.metadata.items() if name != "truncated"}
        verdict = self.panel(
            len(texts),
            {
                **columns,
                **extra,
                "prompts": prompts,
                "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
                "completion_ids": rollout.completions,
                "trainer_state": self.state,
            },
        )
        for name, late in zip(self.panel.names, verdict.timed_out, strict=True):
            self.record(f"rewards/{name}/timed_out", float(late))
        return torch.tensor(verdict.scores, dtype=torch.float32).T

    def _make_experience(self, state: RolloutState) -> Experience:
        self.model.eval()
        with torch.no_grad():
            return self._experience(state)

    def _experience(self, state: RolloutState) -> Experience:
        group, wanted = self.args.num_generations, self._rows // self.args.num_generations
        rows, rollout, rewards_BF = self._round(state, 0, wanted)
        if self.args.dynamic_sampling:
            rows, rollout, rewards_BF = self._refilled(state, rows, rollout, rewards_BF)
        masks = rollout.masks
        truncated = rollout.metadata.get("truncated", [False] * len(rollout))
        if self.args.mask_truncated_completions:
            masks = [[0] * len(m) if cut else m for m, cut in zip(masks, truncated, strict=True)]
        reference = None
        if self.reference is not None:
            with self.reference.model() as model:
                reference = self._measured(model, rollout, self.args.temperature)
        advantages_B = self._global_advantages(rewards_BF, rollout, reference)
        self._record_rollout(rollout, rewards_BF, advantages_B, truncated, group)
        if self.args.save_rollouts or self.args.log_completions:
            self._show(state, rollout, rows, rewards_BF, advantages_B, group)
        return Experience(
            prompts=rollout.prompts,
            completions=rollout.completions,
            masks=masks,
            logprobs=rollout.logprobs,
            advantages=[[a] * len(ids) for a, ids in zip(advantages_B.tolist(), rollout.completions, strict=True)],
            reference=reference,
            weights=self.token_weights(rollout),
        )

    def _round(self, state: RolloutState, turn: int, wanted: int) -> tuple[list[Any], Rollout, Tensor]:
        """The next prompts of the stream, sampled and scored; every rank takes its own stretch of them."""
        rank, world = self.args.process_index, self.args.world_size
        first = state.position + rank * wanted
        count, shuffle = len(self.train_dataset), self.args.shuffle_dataset
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        rows = [self.train_dataset[prompt_index(first + i, count, seed, shuffle)] for i in range(wanted)]
        state.position += wanted * world
        rollout = self.sample(rows, self.args.num_generations, self._seed(state.rollouts, turn))
        try:
            return rows, rollout, self.score_rollout(rollout, rows, self.args.num_generations)
        except RewardError:
            self._write(state.rollouts, "unscored", {"text": rollout.texts, "completion_ids": rollout.completions})
            raise

    def _seed(self, rollout: int, turn: int = 0) -> int:
        return (self.args.seed * 1_000_003 + rollout) * 64 + turn

    def _refilled(
        self, state: RolloutState, rows: list[Any], rollout: Rollout, rewards_BF: Tensor
    ) -> tuple[list[Any], Rollout, Tensor]:
        """Groups whose rewards are all equal replaced by those of further prompts, `dynamic_sampling_max_rounds` at most."""
        group, wanted = self.args.num_generations, len(rows)

        def informative(rewards: Tensor) -> Tensor:
            total = (rewards.nan_to_num() @ self.reward_weights).view(-1, group)
            return (total.amax(1) - total.amin(1)) > 1e-6

        good = informative(rewards_BF)
        for turn in range(1, self.args.dynamic_sampling_max_rounds):
            missing = torch.tensor(float((~good).sum()), device=self.args.device)
            if not self.accelerator.reduce(missing, "sum").item():
                break
            new_rows, new_rollout, new_rewards = self._round(state, turn, wanted)
            fresh = [i for i, useful in enumerate(informative(new_rewards)) if useful]
            for place in [i for i, useful in enumerate(good) if not useful][: len(fresh)]:
                source = fresh.pop(0)
                rows[place], good[place] = new_rows[source], True
                _replace_group(rollout, new_rollout, place * group, source * group, group)
                rewards_BF[place * group : (place + 1) * group] = new_rewards[source * group : (source + 1) * group]
        return rows, rollout, rewards_BF

    def _global_advantages(self, rewards_BF: Tensor, rollout: Rollout, reference: list[list[float]] | None) -> Tensor:
        """This rank's advantages; statistics over the batch see the completions of all ranks."""
        if self.args.overlong_cache is not None:
            lengths_B = torch.tensor([float(len(ids)) for ids in rollout.completions])
            punishment_B = soft_overlong_punishment(
                lengths_B, self.args.max_completion_length, self.args.overlong_cache
            )
            rewards_BF = rewards_BF + punishment_B[:, None] / self.reward_weights.sum()
        kl = None
        if reference is not None:
            rows = zip(rollout.logprobs, reference, rollout.masks, strict=True)
            kl = [sum((p - q) * m for p, q, m in zip(*row, strict=True)) for row in rows]
        local = [(rewards_BF.tolist(), kl)]
        whole = gather_object(local) if self.args.world_size > 1 else local
        all_rewards_BF = torch.tensor([r for rewards, _ in whole for r in rewards])
        all_kl_B = None if kl is None else torch.tensor([k for _, kls in whole for k in kls])
        start = sum(len(rewards) for rewards, _ in whole[: self.args.process_index])
        return self.advantages(all_rewards_BF, all_kl_B)[start : start + len(rewards_BF)]

    def token_weights(self, rollout: Rollout) -> list[list[float]] | None:
        """Factors of each token's surrogate that are known when the rollout is made."""
        return None

    def _measured(self, model: nn.Module, rollout: Rollout, temperature: float) -> list[list[float]]:
        """Log-probabilities of the completions under `model`, in the micro-batches of training."""
        scores = self.scored(model, rollout, temperature)
        return [row[: len(ids)] for row, ids in zip(scores.logprobs_BT.tolist(), rollout.completions, strict=True)]

    @torch.no_grad()
    def scored(self, model: nn.Module, rollout: Rollout, temperature: float, *, entropy: bool = False) -> Scores:
        """`score` of a rollout's completions, a micro-batch at a time. [B, T]"""
        size = self.args.per_device_train_batch_size
        width = max(map(len, rollout.completions))
        pieces = []
        for start in range(0, len(rollout), size):
            branches = [Branch(ids) for ids in rollout.completions[start : start + size]]
            packed = pack(prompt_trees(rollout.prompts[start : start + size], branches)).to(self.args.device)
            pieces.append(score(model, packed, temperature=temperature, entropy=entropy, path=self._path))

        def joined(name: str) -> Tensor:
            return torch.cat(
                [nn.functional.pad(x := getattr(piece, name), (0, width - x.shape[1])) for piece in pieces]
            ).cpu()

        return Scores(joined("logprobs_BT"), joined("entropy_BT") if entropy else None)

    # -- what is shown -------------------------------------------------------------------------

    def _record_rollout(
        self, rollout: Rollout, rewards_BF: Tensor, advantages_B: Tensor, truncated: Sequence[bool], group: int
    ) -> None:
        for name, column in zip(self.panel.names if self.panel else (), rewards_BF.unbind(1), strict=True):
            known = column[~column.isnan()]
            if len(known):
                self.record(f"rewards/{name}/mean", known.sum(), len(known))
                self.record(f"rewards/{name}/std", known.std() if len(known) > 1 else 0.0)
        total = (rewards_BF.nan_to_num() @ self.reward_weights).view(-1, group)
        self.record("reward", total.sum(), total.numel())
        self.record("reward_std", total.std(1).sum() if group > 1 else 0.0, len(total))
        self.record("frac_reward_zero_std", (total.amax(1) == total.amin(1)).float().sum(), len(total))
        lengths = [len(ids) for ids in rollout.completions]
        self.record("completions/mean_length", float(sum(lengths)), len(lengths))
        self.record("completions/clipped_ratio", float(sum(truncated)), len(lengths))

    def _show(
        self,
        state: RolloutState,
        rollout: Rollout,
        rows: Sequence[Any],
        rewards_BF: Tensor,
        advantages: Tensor,
        group: int,
    ) -> None:
        prompts = [row.get("prompt", "") for row in rows for _ in range(group)]
        names = self.panel.names if self.panel else []
        rewards = {name: column.tolist() for name, column in zip(names, rewards_BF.unbind(1), strict=True)}
        texts = rollout.texts or self.processing_class.batch_decode(rollout.completions, skip_special_tokens=True)
        columns: dict[str, list[Any]] = {
            "step": [self.state.global_step] * len(rollout),
            "prompt": prompts,
            "completion": texts,
            "completion_ids": rollout.completions,
            **{f"reward_{name}": [None if math.isnan(x) else x for x in values] for name, values in rewards.items()},
            "advantage": advantages.tolist(),
        }
        if self.args.save_rollouts:
            self._write(state.rollouts, "rollouts", columns)
        if self.args.log_completions and self.is_world_process_zero():
            print_completions(columns, list(rewards), self.args.num_completions_to_print)

    def _write(self, number: int, folder: str, columns: dict[str, list[Any]]) -> None:
        place = Path(str(self.args.output_dir)) / folder
        if self.args.world_size > 1:
            place = place / f"rank-{self.args.process_index}"
        write_rollout(place, number, columns)

    # -- the loop's side -----------------------------------------------------------------------

    def idle_rows_can_be_skipped(self) -> bool:
        """Whether a completion without advantage has no gradient."""
        return not (self.args.beta and self.kl_in_loss())

    def kl_in_loss(self) -> bool:
        return False

    def _collate(self, rows: Experience) -> dict[str, PolicyBatch]:
        limit = self.args.max_completion_length
        batch = policy_batch(rows, self.aggregation, limit, skip_idle=self.idle_rows_can_be_skipped())
        return {"policy": batch}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return [{"policy": batch["policy"].to(device)} for batch in batches], count

    def count(self, batch: dict[str, PolicyBatch]) -> Tensor:
        return batch["policy"].counted

    def objective(self, model: nn.Module, batch: dict[str, PolicyBatch]) -> LossSum:
        policy = batch["policy"]
        if not policy.packed.rows:
            return LossSum(self.nothing(model), policy.counted)
        loss = self.policy_objective(model, policy)
        return LossSum(loss.total, policy.counted, loss.metrics)

    @abstractmethod
    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        """The loss of a micro-batch's computed rows, summed; its count is that of all its rows."""

    def nothing(self, model: nn.Module) -> Tensor:
        """A zero that every trained parameter takes part in, for a micro-batch without a row to compute. []"""
        return sum((p.view(-1)[:1].sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros(()))

    def check_first(self, logprobs_BT: Tensor, batch: PolicyBatch) -> None:
        """Assert at the first update that sampler and trainer agree: ratio 1 within 1e-3, approx_kl below 1e-6."""
        if self._checked_first:
            return
        self._checked_first = True
        drift_BT = ((logprobs_BT.detach() - batch.old_logprobs_BT) * batch.mask_BT).abs()
        low_precision = next(self.model.parameters()).dtype != torch.float32 or self.args.bf16 or self.args.fp16
        if not low_precision and self.rollouts.state.cursor <= self._microbatches and drift_BT.max() > 1e-3:
            raise RuntimeError(
                f"the policy's first log-probabilities differ from the sampler's by {float(drift_BT.max()):.2e}: is dropout "
                "on (disable_dropout), or was the model changed while it sampled?"
            )

    # -- evaluation ----------------------------------------------------------------------------

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """An evaluation batch: sampled and scored, its loss that of a first update."""
        rows = inputs["rows"]
        group = self.args.num_generations_eval or self.args.num_generations
        rollout = self.sample(rows, group, self._seed(-1))  # a row's draws depend on its prompt besides the seed
        rewards_BF = self.score_rollout(rollout, rows, group)
        total_B = rewards_BF.nan_to_num() @ self.reward_weights
        self.record("reward", total_B.sum(), len(total_B), mode="eval")
        for name, column in zip(self.panel.names, rewards_BF.unbind(1), strict=True):
            self.record(f"rewards/{name}/mean", column.nansum(), (~column.isnan()).sum(), mode="eval")
        lengths = [len(ids) for ids in rollout.completions]
        self.record("completions/mean_length", float(sum(lengths)), len(lengths), mode="eval")
        return LossSum(-total_B.sum(), len(total_B)), None, None


def _replace_group(rollout: Rollout, other: Rollout, to: int, source: int, group: int) -> None:
    columns = ("prompts", "completions", "logprobs", "masks", "texts")
    for mine, theirs in [(getattr(rollout, c), getattr(other, c)) for c in columns] + [
        (rollout.metadata[name], other.metadata[name]) for name in rollout.metadata
    ]:
        mine[to : to + group] = theirs[source : source + group]


def print_completions(columns: dict[str, list[Any]], rewards: list[str], most: int | None) -> None:
    """Some completions with their rewards, as a table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("prompt", "completion", *rewards, "advantage", title=f"step {columns['step'][0]}", show_lines=True)
    for i in range(min(most or len(columns["prompt"]), len(columns["prompt"]))):
        values = [columns[f"reward_{name}"][i] for name in rewards]
        shown = ["-" if value is None else f"{value:.2f}" for value in values]
        table.add_row(
            str(columns["prompt"][i])[-200:], columns["completion"][i], *shown, f"{columns['advantage'][i]:+.2f}"
        )
    Console().print(table)
