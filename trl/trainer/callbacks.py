"""Callbacks that scripts add to a trainer: completions in a table, a progress bar, moving references and averages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl.data.any_text import console, visible
from trl.data.chat import ChatTemplate
from trl.data.formats import is_conversational
from trl.data.inspect import read_out
from trl.generation import make_sampler
from trl.generation.generate_kwargs import sampling_params
from trl.generation.sampler import is_exact
from trl.generation.stopping import end_tokens, without_ends
from trl.models.forward import eval_no_grad
from trl.models.reference import Reference
from trl.models.sharded import gathered, held_part, reshard, whole
from trl.models.unwrap import below_accelerate, below_value_head, is_fsdp2, is_sharded
from trl.rollout.report import print_samples
from trl.trainer.run_folder import RunListener
from trl.trainer.step_line import (
    Advice,
    Clock,
    evaluated,
    evaluation_line,
    folded,
    follows,
    held,
    last_line,
    narrowed,
    read,
    short,
    training_line,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class SyncRefModelCallback(TrainerCallback):
    """TR-DPO (arXiv:2404.09656): moves a reference model towards the policy every `args.ref_model_sync_steps` steps.

    By `args.ref_model_mixup_alpha`, the share of the policy. `accelerator`: unwraps the policy, where it is given.
    """

    def __init__(self, ref_model: nn.Module, accelerator: Accelerator | None = None):
        if ref_model is None:
            raise ValueError("ref_model: None cannot move; give the trainer a reference model of its own")
        self.ref_model, self.accelerator = ref_model, accelerator

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name in ("ref_model_sync_steps", "ref_model_mixup_alpha"):
            if not hasattr(args, name):
                raise ValueError(f"{name}: SyncRefModelCallback reads it from the config, and yours has no such field")
        if state.global_step % args.ref_model_sync_steps == 0:
            policy = kwargs["model"]
            policy = policy if self.accelerator is None else self.accelerator.unwrap_model(policy)
            self.sync_target_model(policy, self.ref_model, args.ref_model_mixup_alpha)

    @staticmethod
    def sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        """The target becomes alpha * model + (1 - alpha) * target."""
        Reference(model, target_model).sync(alpha)


class RichProgressCallback(TrainerCallback, RunListener):
    """Shows how far training and its evaluations are, and what is logged, in one line each; on the first process only.

    A terminal gets progress bars below the lines (unless `disable_tqdm` is set), a file or a pipe the lines alone. What
    stays outside of what is healthy is advised on once.
    """

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._console: Console | None = None
        self._clock, self._advice = Clock(0, 0, 0), Advice()

    def _advance(self, name: str, total: int | None, to: int | None = None, follows: str = "") -> None:
        """Move a bar, which is made when it is first moved, to a place or by one. Beside it stands what follows."""
        if self.progress is None:
            return
        beside: dict[str, Any] = {"held": held(), "follows": follows}
        if name not in self._bars:
            self._bars[name] = self.progress.add_task(name, total=total, **beside)
        self.progress.update(self._bars[name], completed=to, advance=1 if to is None else None, **beside)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        counted = state.num_input_tokens_seen if args.include_num_input_tokens_seen == "no" else 0
        self._clock, self._advice = Clock(state.global_step, state.max_steps, counted), Advice()
        self._console = console()  # its own: a failed run may hold another
        if not self._console.is_terminal or args.disable_tqdm:
            return
        name, held_now, next_one = map(
            TextColumn, ("{task.description}", "{task.fields[held]}", "{task.fields[follows]}")
        )
        time_left = TimeRemainingColumn(compact=True), TextColumn("left")
        columns = (name, BarColumn(24), MofNCompleteColumn(), *time_left, held_now, next_one)
        self.progress, self._bars = Progress(*columns, console=self._console, transient=True), {}
        self.progress.start()
        self._advance("training", state.max_steps, state.global_step, follows(args, state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self._advance("training", state.max_steps, state.global_step, follows(args, state))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loader: Any = kwargs.get("eval_dataloader")
        self._advance("evaluation", len(loader) if hasattr(loader, "__len__") else None)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None and "evaluation" in self._bars:
            self.progress.remove_task(self._bars.pop("evaluation"))

    on_predict = on_evaluate

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if self._console is None or not logs:
            return
        if "train_runtime" in logs:
            self._say(last_line(state.global_step, logs, self._clock.first))
            return
        runtime = [value for name, value in logs.items() if name.endswith("_runtime")]
        if runtime:
            self._clock.pause(runtime[0])
            self._say(evaluation_line(state.global_step, logs))
            return
        self._say(training_line(state.global_step, logs, self._clock))
        for line in self._advice.of(logs):
            self._say(line)

    def _say(self, line: str) -> None:
        if self._console is not None:
            terminal, width = self._console.is_terminal, self._console.width
            line = narrowed(line, width) if self.progress is not None else line
            line = visible(folded(line, width) if terminal else line)
            self._console.print(line, markup=False, highlight=False, soft_wrap=not terminal)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end_run(None)

    def end_run(self, error: BaseException | None) -> None:
        """Take the bars away, after an error too: the terminal gets its cursor back."""
        if self.progress is not None:
            self.progress.stop()
            self.progress, self._bars = None, {}


class NotebookColumns(TrainerCallback):
    """Makes the table that transformers shows in a notebook say what the step line says: reward, KL, lengths, ...

    A row for each log, and what an evaluation found in columns of its own. shown: transformers' callback, which writes
    its line first and is overwritten.
    """

    def __init__(self, shown: Any):
        self.shown = shown
        self._rows: dict[int, dict[str, Any]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rows = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "train_runtime" in logs:
            return
        if any(name.endswith("_runtime") for name in logs):
            before, found = evaluated(logs)
            who = " ".join(["Validation", before.removeprefix("eval_").rstrip("_")]).strip()
        else:
            who, found = "", dict(read(logs))
        titles = {"loss": "Training Loss", "lr": "Learning Rate"} if not who else {"loss": f"{who} Loss"}
        named = {
            titles.get(name) or f"{who} {name[:1].upper()}{name[1:]}".strip(): text for name, text in found.items()
        }
        epoch = getattr(self.shown, "first_column", "Step") == "Epoch"
        first = {"Epoch": short(round(state.epoch or 0.0, 2))} if epoch else {"Step": state.global_step}
        self._rows[state.global_step] = {**first, **self._rows.get(state.global_step, {}), **named}
        self._put()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._put(now=True)

    def _put(self, now: bool = False) -> None:
        """Give the table its rows; it is shown at its next update, or now."""
        table = getattr(self.shown, "training_tracker", None)
        if table is None or not self._rows:
            return
        columns = sorted(dict.fromkeys(name for row in self._rows.values() for name in row), key=_is_validation)
        table.inner_table = [columns, *([row.get(name, "") for name in columns] for row in self._rows.values())]
        if now:
            table.display()


def _is_validation(title: str) -> bool:
    return title.startswith("Validation")


class LogCompletionsCallback(TrainerCallback):
    """Samples completions of evaluation prompts and logs them as a table `completions`.

    To Weights & Biases and to Comet where the config reports there; to the terminal where it reports to neither.
    generation_config: as for `generate`; None: the model's own. num_prompts: the first so many prompts; None: all.
    freq: optimizer steps between two tables; None: `eval_steps`.
    """

    def __init__(
        self,
        trainer: Trainer,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        freq: int | None = None,
    ):
        if trainer.eval_dataset is None:
            raise ValueError("trainer: it has no eval_dataset, whose prompts are completed; give it one")
        for name, value in (("num_prompts", num_prompts), ("freq", freq)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give a number >= 1, or None")
        self.trainer, self.generation_config, self.num_prompts, self.freq = (
            trainer, generation_config, num_prompts, freq
        )  # fmt: skip
        self.table: list[tuple[int, str, str]] = []
        """step, prompt and completion of all rows so far"""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.freq is None and not args.eval_steps:  # the state's own default is a number
            raise ValueError("freq=None: the config has no eval_steps; say after how many steps completions are logged")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % int(self.freq or state.eval_steps) == 0:
            rows = self._completed(state.global_step)
            self.table += rows
            if state.is_world_process_zero:
                self._show(rows, args.report_to)

    def _completed(self, step: int) -> list[tuple[int, str, str]]:
        """Step, prompt and completion of each prompt. Every process samples all, as a sharded model needs."""
        trainer = self.trainer
        tokenizer = trainer.tokenizer
        prompts = prompts_of(trainer.eval_dataset, tokenizer, self.num_prompts)
        asked = {} if self.generation_config is None else {"generation_config": self.generation_config}
        model = below_accelerate(trainer.model)
        params = sampling_params(model, asked, seed=int(trainer.args.seed) + step)
        if params is None:
            raise ValueError(
                "generation_config: a setting of it is none of sampling (beams, penalties of n-grams); use do_sample, "
                "temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens and min_new_tokens"
            )
        own: Any = getattr(trainer, "sampler", None)
        if own is not None and not is_exact(own):  # it samples here as it does for the rollouts
            rollouts: Any = trainer
            rollouts.follow()
            with rollouts.weights_for_sampling():
                groups = own.sample(prompts, params)
        else:
            with eval_no_grad(model), gathered(model):
                groups = make_sampler(model, tokenizer).sample(prompts, params)
        texts = without_ends(tokenizer, [group[0].ids for group in groups], end_tokens(model, tokenizer))
        asked_texts = [read_out(tokenizer, prompt) for prompt in prompts]
        return [(step, *row) for row in zip(asked_texts, texts, strict=True)]

    def _show(self, rows: Sequence[tuple[int, str, str]], report_to: Sequence[str]) -> None:
        columns = ["step", "prompt", "completion"]
        if "wandb" in report_to:
            import wandb

            if wandb.run is not None:
                wandb.log({"completions": wandb.Table(columns=columns, data=[list(row) for row in self.table])})
        if "comet_ml" in report_to:
            import comet_ml

            if (experiment := comet_ml.get_running_experiment()) is not None:
                experiment.log_table("completions.csv", tabular_data=self.table, headers=columns)
        if not {"wandb", "comet_ml"} & set(report_to):
            title = f"completions after step {rows[0][0]}" if rows else "completions"
            print_samples(title, ((prompt, text, {}) for _, prompt, text in rows))


def prompts_of(dataset: Any, tokenizer: Any, most: int | None) -> list[list[int]]:
    """The ids of the first prompts of an evaluation set, of the first one of several; ValueError where it has none."""
    rows = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    prompts: list[list[int]] = []
    for row in rows:
        if most is not None and len(prompts) == most:
            break
        prompts.append(_prompt_of(row, tokenizer))
    return prompts


def _prompt_of(row: dict[str, Any], tokenizer: Any) -> list[int]:
    if row.get("prompt_ids") is not None:
        return list(row["prompt_ids"])
    if row.get("prompt") is not None:
        if is_conversational(row):
            return list(tokenizer(ChatTemplate(tokenizer).prompt(row["prompt"]), add_special_tokens=False)["input_ids"])
        return list(tokenizer(row["prompt"])["input_ids"])
    start = next((i for i, learned in enumerate(row.get("loss_mask", ())) if learned), 0)
    if start <= 1:  # no prompt that a completion follows; the first token is never learned
        raise ValueError(
            f"eval_dataset: a row with the columns {sorted(row)} has no prompt; LogCompletionsCallback completes rows "
            "with `prompt`"
        )
    return list(row["input_ids"][:start])


class BEMACallback(TrainerCallback):
    """Keeps a bias-corrected moving average of the trained weights (BEMA, arXiv:2508.00180).

    At step t, a multiple of `update_freq` beyond `update_after`, with theta_0 the weights at `update_after`:

        beta_t = max((lag + multiplier * t)^-ema_power, min_ema_multiplier)
        average = (1 - beta_t) * average + beta_t * theta_t
        alpha_t = (lag + multiplier * t)^-bias_power, or 0 for bias_power = 0
        weights = average + alpha_t * (theta_t - theta_0)

    When training ends, a model with these weights is in `output_dir/bema`. `device` holds them. A run that resumes from
    a checkpoint begins a new average.
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
    ):
        if update_freq < 1:
            raise ValueError(f"update_freq={update_freq}: give a number of steps >= 1")
        if lag + multiplier * (update_after + 1) <= 0:
            raise ValueError(f"lag={lag}, multiplier={multiplier}: powers of their sum are taken; give one above 0")
        self.update_freq, self.update_after, self.device = update_freq, update_after, device
        self.ema_power, self.bias_power = ema_power, bias_power
        self.lag, self.multiplier, self.min_ema_multiplier = lag, multiplier, min_ema_multiplier
        self.start: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def _trained(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained weights; what this process holds of them where FSDP2 has sharded the model."""
        if is_fsdp2(model):
            reshard(model)  # what a pass has left whole
        named = below_accelerate(model).named_parameters()
        return {name: held_part(parameter) for name, parameter in named if parameter.requires_grad}

    def _begin(self, model: nn.Module) -> None:
        kept = {name: p.detach().to(self.device, torch.float32, copy=True) for name, p in self._trained(model).items()}
        self.start, self.average = kept, {name: value.clone() for name, value in kept.items()}
        self.weights = {name: value.clone() for name, value in kept.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if is_sharded(kwargs["model"]) and not is_fsdp2(kwargs["model"]):
            raise ValueError("BEMACallback: ZeRO-3 holds no weights that it could average; take FSDP2 or DDP")
        self._begin(kwargs["model"])

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        if step <= self.update_after:
            if step == self.update_after:
                self._begin(kwargs["model"])
            return
        if (step - self.update_after) % self.update_freq:
            return
        age = self.lag + self.multiplier * step
        beta = max(age**-self.ema_power, self.min_ema_multiplier)
        alpha = age**-self.bias_power if self.bias_power else 0.0
        for name, parameter in self._trained(kwargs["model"]).items():
            now, average = parameter.to(self.device, torch.float32), self.average[name]
            average.lerp_(now, beta)
            self.weights[name] = average + alpha * (now - self.start[name])

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the averaged weights; afterwards it has its own again."""
        trained = self._trained(model)
        own = {name: parameter.detach().clone() for name, parameter in trained.items()}
        try:
            for name, parameter in trained.items():
                parameter.data.copy_(self.weights[name])
            yield model
        finally:
            for name, parameter in trained.items():
                parameter.data.copy_(own[name])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder, sharded = Path(str(args.output_dir)) / "bema", is_fsdp2(kwargs["model"])
        if not (state.is_world_process_zero or sharded):
            return
        with self.averaged(kwargs["model"]) as model:
            network = below_value_head(model)
            weights = {name: whole(value).cpu() for name, value in network.state_dict().items()} if sharded else None
            if state.is_world_process_zero:
                network.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
        if not state.is_world_process_zero:
            return
        if kwargs.get("processing_class") is not None:
            kwargs["processing_class"].save_pretrained(folder)
