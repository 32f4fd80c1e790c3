"""Learning from samples that the policy just made: prompts -> rollout -> experience -> micro-batches -> the loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from trl.data.encode import Limits
from trl.data.microbatches import collated, unasked_budget
from trl.data.packing import pack
from trl.data.prompt_rows import PromptsJob
from trl.data.records import Branch, Rollout
from trl.data.tokenize import tokenize
from trl.generation import make_sampler
from trl.generation.sampler import SamplingParams
from trl.losses.loss_sum import Aggregation, LossSum
from trl.models.forward import rows_padded
from trl.models.prepare import context_length, load_model
from trl.models.reference import Reference
from trl.models.scoring import Scores, score
from trl.rewards.named import RewardSource
from trl.rewards.panel import RewardError
from trl.rollout import report as rollout_report
from trl.rollout.episodes import Played, play
from trl.rollout.loader import Experience, PolicyBatch, RolloutLoader, RolloutState, policy_batch, prompt_trees
from trl.rollout.prompts import PromptStream
from trl.rollout.rewards import Rewards, RolloutRewards, replace_groups
from trl.trainer.configuration import as_config, processing_class_of
from trl.trainer.objective import ObjectiveTrainer, pieces_of
from trl.trainer.preparation import each_dataset, prepare_model, prepare_tokenizer
from trl.trainer.references import SyncReference
from trl.trainer.rollout_config import RolloutConfig

RolloutFunction = Callable[[list[dict[str, Any]], Any], Rollout]
"""`(a row of the data set per completion, trainer) -> Rollout`, for environments and other engines"""


class RolloutTrainer(ObjectiveTrainer):
    """A `Trainer` whose data are its own rollouts; callbacks, trackers and checkpoints work as users know them.

    An algorithm says what to learn from a rollout (`experience`) and the loss of a micro-batch (`policy_objective`).
    """

    config_class: type[RolloutConfig]
    aggregation: Aggregation = "token"
    needs_rewards = True

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
        quantization_config: Any = None,
        tokenizer: Any = None,
        rollout_func: RolloutFunction | None = None,
        environment: Any = None,
        environment_factory: Callable[[], Any] | None = None,
        tools: Sequence[Callable[..., Any]] | None = None,
    ):
        config = as_config(args, self.config_class)
        self._microbatches, self._rows = config.rollout_shape()
        if train_dataset is None:
            raise ValueError("train_dataset: on-policy training needs prompts; give rows with a column `prompt`")
        played = Played(environment, tools, environment_factory)
        if self.needs_rewards and reward_funcs is None and rollout_func is None and not played:
            raise ValueError("reward_funcs: give reward functions, or a `rollout_func` whose rollouts have rewards")
        if isinstance(model, str):
            tokenizer = tokenizer if tokenizer is not None or processing_class is not None else model
            keywords, quantization_config = config.loading_keywords(quantization_config), None
            model = load_model(model, AutoModelForCausalLM, keywords)
        tokenizer = prepare_tokenizer(processing_class_of(processing_class, tokenizer), model, config)
        model = prepare_model(
            model,
            config,
            tokenizer,
            peft_config,
            auto_class=AutoModelForCausalLM,
            owner=type(self).__name__,
            dropout=not config.disable_dropout,
            init_kwargs={},
            quantization_config=quantization_config,
        )

        job = PromptsJob(
            tokenizer=tokenizer,
            limits=Limits(max_prompt_length=config.max_prompt_length, truncation_mode="keep_end"),
            template_kwargs=config.chat_template_kwargs,
            context_length=context_length(model),
        )

        def tokenised(dataset: Any, name: str) -> Any:
            return tokenize(dataset, job, name=name, num_proc=config.dataset_num_proc)[0]

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
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "the weights are sharded (FSDP, DeepSpeed ZeRO-3), and the sampler needs them whole: train with DDP"
            )
        self.rollout_func, self.sampler = rollout_func, make_sampler(self.model, tokenizer)
        self.environment = played.prepare(self, reward_funcs)
        self.rewards: RolloutRewards | None = None
        if self.needs_rewards:
            self.rewards = RolloutRewards.of(config, reward_funcs, reward_processing_classes, self.args.device)
        self.reference: Reference | None = None
        seed = config.seed if config.data_seed is None else config.data_seed
        self.prompts = PromptStream(self.train_dataset, seed, config.shuffle_dataset)
        self.rollouts = self._loader()

    def make_reference(self, ref_model: nn.Module | str | None) -> Reference:
        """The model given, or the policy without its adapter, or a frozen copy; it moves where the config says so."""
        config, given = self.args, None
        if ref_model is not None:
            given = load_model(ref_model, AutoModelForCausalLM, config.model_init_kwargs)
            if given is not self.model:  # else `Reference` says what is wrong with that
                given = self.accelerator.prepare_model(given, evaluation_mode=True)
        reference = Reference(self.model, given)
        if config.moves_reference:
            if reference.frozen is None:
                raise ValueError("sync_ref_model=True: the policy without its adapter cannot move; give a ref_model")
            self.add_callback(SyncReference(reference, config.ref_model_mixup_alpha, config.ref_model_sync_steps))
        return reference

    # -- the verbs of an algorithm ---------------------------------------------------------------

    @abstractmethod
    def experience(
        self, rollout: Rollout, rewards: Rewards | None, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[Experience, dict[str, list[float]]]:
        """What to learn from a rollout, and columns about it (a number per completion) for the rollout's file.

        rows: of the data set, one for each group of completions.
        """

    @abstractmethod
    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        """The loss of a micro-batch's computed rows, summed; its count is that of all its rows."""

    def idle_rows_can_be_skipped(self) -> bool:
        """Whether a completion without advantage has no gradient."""
        return False

    # -- rollouts --------------------------------------------------------------------------------

    def _loader(self) -> RolloutLoader:
        prompts = self._rows // self.args.num_generations * self.args.world_size
        names = ("per_device_train_batch_size", "num_generations", "num_iterations")
        return RolloutLoader(
            self._make_experience,
            self._in_passes,
            microbatches=self._microbatches,
            iterations=self.args.num_iterations,
            length=-(-len(self.train_dataset) // prompts) * self._microbatches * self.args.num_iterations,
            shape={name: getattr(self.args, name) for name in names} | {"steps_per_generation": self._microbatches},
        )

    def get_train_dataloader(self) -> Any:
        return self.rollouts

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self.args.ignore_data_skip = True  # the rollouts keep their own place; `Trainer` would skip some more
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.args.ignore_data_skip = False

    def sampling_params(self, seed: int | tuple[int, ...]) -> SamplingParams:
        config = self.args
        further: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in (config.generation_kwargs or {}).items()}
        return SamplingParams(
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_k=config.top_k or 0,
            top_p=config.top_p,
            min_p=config.min_p or 0.0,
            repetition_penalty=config.repetition_penalty,
            seed=seed,
            **further,
        )

    def sample(
        self, rows: Sequence[Mapping[str, Any]], group: int, seed: int, places: Sequence[int] | None = None
    ) -> Rollout:
        """`group` completions of each prompt, in prompt order; log-probabilities are the policy's at `temperature`.

        places: of the rows among those of all ranks, each of which has random numbers of its own; None: equal prompts
        get equal completions.
        """
        if self.environment is not None:
            rollout = play(self, rows, group, seed, places)
            if self.args.reshapes:
                rollout.logprobs = self.measured(self.model, rollout)
        elif self.rollout_func is not None:
            rollout = self.rollout_func([dict(row) for row in rows for _ in range(group)], self)
            if len(rollout) != len(rows) * group:
                raise ValueError(f"rollout_func gave {len(rollout)} completions for {len(rows) * group} rows")
        else:
            rollout = self._sampled(rows, group, seed, places)
        if not rollout.texts:
            rollout.texts = self.processing_class.batch_decode(rollout.completions, skip_special_tokens=True)
        return rollout

    def _sampled(
        self, rows: Sequence[Mapping[str, Any]], group: int, seed: int, places: Sequence[int] | None
    ) -> Rollout:
        prompts = [list(row["prompt_ids"]) for row in rows]
        own = seed if places is None else tuple(seed * 2**20 + place for place in places)
        groups = self.sampler.sample(prompts, self.sampling_params(own), n=group)
        flat = [completion for completions in groups for completion in completions]
        reshaped = self.args.reshapes
        rollout = Rollout(
            prompts=[prompt for prompt in prompts for _ in range(group)],
            completions=[completion.ids for completion in flat],
            logprobs=[c.raw_logprobs if reshaped else c.logprobs for c in flat],
            masks=[[1] * len(completion.ids) for completion in flat],
            metadata={"truncated": [completion.finish_reason == "length" for completion in flat]},
        )
        if reshaped and self.args.temperature != 1.0:  # neither of the sampler's two is the policy at this temperature
            rollout.logprobs = self.measured(self.model, rollout)
        return rollout

    def _scored(self, rollout: Rollout, rows: Sequence[Mapping[str, Any]], group: int) -> Rewards | None:
        if self.rewards is None:
            return None
        columns = {name: [row[name] for row in rows for _ in range(group)] for name in rows[0]}
        if "prompt" not in columns:
            columns["prompt"] = self._prompt_texts(rows, group)
        return self.rewards(rollout, columns, self.state)

    def _prompt_texts(self, rows: Sequence[Mapping[str, Any]], group: int) -> list[Any]:
        texts = [row["prompt"] if "prompt" in row else self.processing_class.decode(row["prompt_ids"]) for row in rows]
        return [text for text in texts for _ in range(group)]

    def _make_experience(self, state: RolloutState) -> Experience:
        self.model.eval()  # `Trainer` switches back before each micro-batch
        with torch.no_grad():
            return self._experience(state)

    def _experience(self, state: RolloutState) -> Experience:
        group, wanted = self.args.num_generations, self._rows // self.args.num_generations
        rows, rollout, rewards = self._round(state, 0, wanted)
        if rewards is not None and self.args.dynamic_sampling:
            self._refill(state, rows, rollout, rewards)
        experience, learned = self.experience(rollout, rewards, rows)
        truncated = rollout.metadata.get("truncated", [False] * len(rollout))
        rollout_report.record(self.record, rollout, rewards, truncated, group)
        prompts = self._prompt_texts(rows, group)
        table = rollout_report.table_of(self.state.global_step, rollout, prompts, rewards, learned)
        if self.args.save_rollouts:
            self._write(state.rollouts, "rollouts", table)
        if self.args.log_completions and self.is_world_process_zero():
            rollout_report.print_table(table, self.args.num_completions_to_print, self.args.log_unique_prompts)
        return experience

    def _places(self, wanted: int) -> list[int]:
        """Which of the next prompts of all ranks are this one's: each optimizer step is of the same, however shared."""
        world, rank = self.args.world_size, self.args.process_index
        step = self.args.per_device_train_batch_size * min(self.args.gradient_accumulation_steps, self._microbatches)
        whole, cut = divmod(step, self.args.num_generations)
        stretch = wanted if cut else whole  # a group across two steps stays on one rank
        return [(i // stretch * world + rank) * stretch + i % stretch for i in range(wanted)]

    def _round(self, state: RolloutState, turn: int, wanted: int) -> tuple[list[Any], Rollout, Rewards | None]:
        """The next prompts of the stream, sampled and scored; every rank takes its own part of them."""
        group, places = self.args.num_generations, self._places(wanted)
        rows = [row for place in places for row in self.prompts.take(state.position + place, 1)]
        state.position += wanted * self.args.world_size
        rollout = self.sample(rows, group, self._seed(state.rollouts, turn), places)
        try:
            return rows, rollout, self._scored(rollout, rows, group)
        except RewardError:
            prompts = self._prompt_texts(rows, group)
            table = rollout_report.table_of(self.state.global_step, rollout, prompts, None, {})
            self._write(state.rollouts, "unscored", table)
            raise

    def _refill(self, state: RolloutState, rows: list[Any], rollout: Rollout, rewards: Rewards) -> None:
        """Dynamic sampling: groups whose rewards are all equal give their places to those of further prompts."""
        group, places = self.args.num_generations, self._places(len(rows))
        gather = gather_object if self.args.world_size > 1 else list
        for turn in range(1, self.args.dynamic_sampling_max_rounds):
            missing = (~rewards.informative_groups(group)).sum().float().to(self.args.device)
            if not self.accelerator.reduce(missing, "sum").item():  # all ranks stop together
                return
            replace_groups(rows, rollout, rewards, self._round(state, turn, len(rows)), group, places, gather)

    def _seed(self, rollout: int, turn: int = 0) -> int:
        return (self.args.seed * 1_000_003 + rollout) * 64 + turn

    def _write(self, number: int, folder: str, table: rollout_report.Columns) -> None:
        place = Path(str(self.args.output_dir)) / folder
        if self.args.world_size > 1:
            place = place / f"rank-{self.args.process_index}"
        rollout_report.write_parquet(place, number, table)

    # -- what is known of completions ------------------------------------------------------------

    def measured(self, model: Any, rollout: Rollout) -> list[list[float]]:
        """Log-probabilities of the completions under `model`, at the sampling temperature."""
        scores = self.scored(model, rollout)
        return [row[: len(ids)] for row, ids in zip(scores.logprobs_BT.tolist(), rollout.completions, strict=True)]

    @torch.no_grad()
    def scored(self, model: nn.Module, rollout: Rollout, *, entropy: bool = False) -> Scores:
        """`score` of a rollout's completions, in the micro-batches of training. [B, T], on the CPU"""
        size, width = self.args.per_device_train_batch_size, max(map(len, rollout.completions))
        pieces = []
        for start in range(0, len(rollout), size):
            branches = [Branch(ids) for ids in rollout.completions[start : start + size]]
            packed = pack(prompt_trees(rollout.prompts[start : start + size], branches)).to(self.args.device)
            with rows_padded(self.pads_rows):
                pieces.append(score(model, packed, temperature=self.args.temperature, entropy=entropy))

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]).cpu()

        entropies = [piece.entropy_BT for piece in pieces if piece.entropy_BT is not None]
        return Scores(joined([piece.logprobs_BT for piece in pieces]), joined(entropies) if entropies else None)

    # -- the loop's side -------------------------------------------------------------------------

    def least_rows(self) -> int:
        """Rows of a micro-batch to compute at least: many processes must all run the model."""
        return int(self.args.world_size > 1)

    def _in_passes(self, rows: Experience) -> dict[str, Any]:
        """A micro-batch; a single process on the CPU takes it in several forward passes."""
        budget = unasked_budget(self.args.device, self.args.world_size, mostly_scored=True)
        if budget is None or self.pads_rows:
            return self._collate(rows)
        return collated(self._collate, rows.in_pieces(budget))

    def _collate(self, rows: Experience) -> dict[str, PolicyBatch]:
        limit, skip = self.args.max_completion_length, self.idle_rows_can_be_skipped()
        return {"policy": policy_batch(rows, self.aggregation, limit, skip_idle=skip, least=self.least_rows())}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for piece in pieces_of(batches):
            piece["policy"] = piece["policy"].to(device)
        return batches, count

    def count(self, batch: dict[str, PolicyBatch]) -> Tensor:
        return batch["policy"].counted

    def objective(self, model: nn.Module, batch: dict[str, PolicyBatch]) -> LossSum:
        policy = batch["policy"]
        if not policy.packed.rows:
            return LossSum(self.nothing(model), policy.counted)
        loss = self.policy_objective(model, policy)
        return LossSum(loss.total, policy.counted, loss.metrics)

    def nothing(self, model: nn.Module) -> Tensor:
        """A zero that every trained parameter takes part in, for a micro-batch without a row to compute. []"""
        zero = torch.zeros((), device=self.args.device)
        return sum((p.flatten()[:1].sum() * 0.0 for p in model.parameters() if p.requires_grad), zero)

    def extra_state(self) -> dict[str, Any]:
        """Collective: every rank's half-used rollout."""
        mine = [dict(vars(self.rollouts.state))]
        state: dict[str, Any] = {"rollouts": gather_object(mine) if self.args.world_size > 1 else mine}
        if self.args.moves_reference and self.reference is not None and self.reference.frozen:
            state["reference"] = self.reference.frozen.state_dict()
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        ranks = state["rollouts"]
        if len(ranks) != self.args.world_size:
            raise ValueError(
                f"the checkpoint is of {len(ranks)} processes and this run has {self.args.world_size}: a half-used "
                "rollout cannot be divided; resume with as many"
            )
        self.rollouts.restore(RolloutState(**ranks[self.args.process_index]))
        if "reference" in state and self.reference is not None and self.reference.frozen is not None:
            self.reference.frozen.load_state_dict(state["reference"])

    # -- evaluation ------------------------------------------------------------------------------

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, None, None]:
        """An evaluation batch, sampled and scored; its loss is minus the mean reward."""
        rows = inputs["rows"]
        group = self.args.num_generations_eval or self.args.num_generations
        rollout = self.sample(rows, group, self._seed(-1))  # a row's draws depend on its prompt besides the seed
        rewards = self._scored(rollout, rows, group)
        truncated = rollout.metadata.get("truncated", [False] * len(rollout))

        def add(name: str, total: float, count: float) -> None:
            self.record(name, total, count, mode="eval")

        rollout_report.record(add, rollout, rewards, truncated, group)
        return self.evaluated(model, rollout, rewards, rows), None, None

    def evaluated(
        self, model: nn.Module, rollout: Rollout, rewards: Rewards | None, rows: Sequence[Mapping[str, Any]]
    ) -> LossSum:
        """The loss of an evaluation batch."""
        assert rewards is not None
        total_B = rewards.total_B()
        return LossSum(-total_B.nansum(), (~total_B.isnan()).sum())
