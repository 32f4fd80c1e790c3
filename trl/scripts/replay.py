"""`trl replay RUN --step N`: computes a step of a run again, and shows token by token what it did."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from trl.data.any_text import many
from trl.reports.findings import job_of
from trl.reports.run_folder import RunRead, read_run
from trl.scripts.jobs import JOBS
from trl.scripts.quiet import quiet
from trl.trainer import trace
from trl.trainer.checkpoints import PREFIX

if TYPE_CHECKING:
    from trl.trainer.objective import ObjectiveTrainer

OVERRIDES: dict[str, Any] = {
    "report_to": "none", "save_strategy": "no", "push_to_hub": False, "load_best_model_at_end": False,
    "trace_steps": True, "overwrite_output_dir": False, "check_rewards": "no", "save_rollouts": False,
    "log_completions": False,
}  # fmt: skip
"""settings of a replay: what is written and said, which changes no number"""


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `trl`.")],
    step: Annotated[int, typer.Option(min=1, help="Optimizer step.")],
    rows: Annotated[int, typer.Option(min=0, help="Rows to show token by token.")] = 2,
) -> int:
    """Compute a step of a run again, and show token by token what it did to the model."""
    read = read_run(run)
    job = job_of(read)
    if job not in JOBS:
        raise ValueError(f"{run}: a replay needs a run of the `trl` command; `run.json` there names none")
    last = read.last_step
    if step > last:
        raise ValueError(f"--step {step}: the last step of the run is {last}")
    start = max((at for at in read.checkpoints if at < step), default=0)
    print(f"from {f'the checkpoint of step {start}' if start else 'the beginning'} to step {step}", flush=True)
    with tempfile.TemporaryDirectory(prefix="trl-replay-") as folder, quiet():
        seen = replayed(read, job, step, start, Path(folder))
        found = trace.read(trace.file_of(Path(folder), step))
    if found is None:
        raise ValueError(f"--step {step}: the run ends before it")
    for line in [*told(found, samples=JOBS[job].rewards), *compared(read, step, found), *seen.lines(rows)]:
        print(line)
    return 0


def replayed(read: RunRead, job: str, step: int, start: int, folder: Path) -> Explained:
    """Train as the run did, up to the step, in a folder of its own."""
    from trl.core import set_seed
    from trl.scripts.training import read_settings, trainer_of

    words = ["--config", str(read.config), "--output_dir", str(folder)]
    parser, settings = read_settings(JOBS[job], words)
    settings |= {name: value for name, value in OVERRIDES.items() if name in parser.hints}
    settings.pop("resume_from_checkpoint", None)
    model, script, mixture, config, own, _ = parser.parse_dict(settings)
    set_seed(config.seed)
    trainer = trainer_of(JOBS[job], model, script, mixture, config, own)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    seen = Explained(trainer, step)
    trainer.add_callback(seen)
    trainer.train(resume_from_checkpoint=str(read.folder / f"{PREFIX}{start}") if start else None)
    return seen


class Explained(TrainerCallback):
    """Ends a run after a step, and keeps what the model said of the step's tokens before and after it."""

    def __init__(self, trainer: ObjectiveTrainer, step: int):
        self.step, self._trainer = step, trainer
        self.words = trainer.tokenizer
        self.packs: list[Any] = []
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.packs = [packed for packed in self._trainer.step_packs() if packed.rows]
            self.before = self._said()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            self.after = self._said()
            control.should_training_stop = True
            control.should_save = control.should_evaluate = False

    def _said(self) -> list[torch.Tensor]:
        from trl.models.forward import eval_no_grad
        from trl.models.scoring import score

        model = self._trainer.model
        if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
            return []
        with eval_no_grad(model):
            return [score(model, packed).logprobs_BT.cpu() for packed in self.packs]

    def lines(self, rows: int) -> Iterator[str]:
        """The learned tokens of the first rows: how likely they were, and are after the step."""
        number = 0
        for packed, before_BT, after_BT in zip(self.packs, self.before, self.after, strict=False):
            for row in range(packed.rows):
                if number == rows:
                    return
                yield f"row {number}: token, log-probability before and after the step"
                for s in (packed.row_S == row).nonzero().flatten().tolist():
                    slot = int(packed.slot_S[s])
                    was, is_now = float(before_BT[row, slot]), float(after_BT[row, slot])
                    text = repr(self.words.decode([int(packed.target_S[s])]))
                    yield f"  {text:20} {was:9.4f} {is_now:9.4f}  {is_now - was:+.4f}"
                number += 1


def told(found: Mapping[str, Any], samples: bool = False) -> Iterator[str]:
    """The step in a few lines. samples: whether the run learned from its own samples."""
    batches = many(len(found["losses"]), "micro-batch", "micro-batches")
    yield f"loss {sum(found['losses']):.9g} of {batches}, {many(len(found['rows']), 'row')}"
    norm = found.get("grad_norm")
    if not any(found["losses"]) and not norm:
        moved = found["weights_before"] != found["weights_after"]
        why = "the optimizer moved the weights by what it remembers of earlier steps, or by decay" if moved else ""
        yield f"nothing was learned in this step: its loss and gradient are 0{f'; {why}' if why else ''}"
        if samples:
            yield "  as where the rewards of each group are all alike, so that no answer is better than another"
    yield f"gradient {found['gradient']}{'' if norm is None else f', norm {norm:.9g}'}"
    yield f"weights {found['weights_before']} -> {found['weights_after']}"


def compared(read: RunRead, step: int, found: Mapping[str, Any]) -> Iterator[str]:
    """Whether that is what the run computed: by its trace, else by its log."""
    own = trace.read(trace.file_of(read.folder, step))
    if own is not None:
        apart = [name for name in own if own[name] != found.get(name)]
        yield "the same as in the run, bit for bit" if not apart else f"NOT as in the run: {', '.join(apart)}"
        return
    series = read.series.get("grad_norm")
    logged = dict(zip(series.steps, series.values, strict=False)) if series is not None else {}
    if step in logged and found.get("grad_norm") is not None:
        same = logged[step] == found["grad_norm"]
        yield f"the run logged grad_norm {logged[step]}: {'the same' if same else 'NOT the same'}"
    else:
        yield "the run has no trace of this step to compare with (trace_steps=True writes one)"
