"""What to look at in a run, by the table of metrics, and what to do next, in commands that exist."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from statistics import fmean, pvariance

from trl.reports.run_folder import RunRead, Series, reward_check
from trl.trainer.metrics import named
from trl.trainer.step_line import short

ENOUGH = 8
"""logs that a trend is told of"""
NEXT = {
    "SFT": ("dpo", "grpo"),
    "Reward": ("grpo",),
    "DPO": ("grpo",), "ORPO": ("grpo",), "CPO": ("grpo",), "SimPO": ("grpo",), "KTO": ("grpo",),
}  # fmt: skip
"""trainer -> commands that often follow it"""
NOT_INSPECTED = ("ppo",)
"""commands whose rows `trl inspect` does not show"""
HELD_OUT = "held-out.jsonl"
"""rows that a run has not seen"""
DATA = {"dpo": "pairs.jsonl", "grpo": "prompts.jsonl"}


def quarters(values: list[float]) -> tuple[list[float], list[float]]:
    """The first and the last quarter."""
    size = max(1, len(values) // 4)
    return values[:size], values[-size:]


def trend(series: Series) -> tuple[int, float, float]:
    """Whether a metric rose (1), fell (-1) or neither beyond its noise; means of its first and last quarter."""
    first, last = quarters(series.known)
    before, after = fmean(first), fmean(last)
    if len(series.known) < ENOUGH:
        return 0, before, after
    noise = math.sqrt(pvariance(first) / len(first) + pvariance(last) / len(last))
    moved = abs(after - before) > max(2 * noise, 1e-9 * max(abs(before), abs(after)))
    return (0 if not moved else 1 if after > before else -1), before, after


def findings(run: RunRead) -> list[str]:
    """A line for each thing that somebody should look at."""
    found = list(_of_numbers(run))
    for name, series in run.series.items():
        metric = named(run.trainer, name)
        if metric is None or not series.known:
            continue
        direction, before, after = trend(series)
        if not metric.is_healthy(after):
            advice = metric.advice or f"healthy: {metric.healthy}".replace("`", "")
            found.append(f"{name} is {short(after)} in the last quarter: {advice}")
        elif metric.direction and direction == -metric.direction:
            went = "rose" if direction > 0 else "fell"
            healthy = metric.healthy.replace("`", "")
            found.append(f"{name} {went} from {short(before)} to {short(after)}; healthy: {healthy}")
    found += _of_losses(run)
    found += _of_judges(run)
    found += [f"before training: {line}" for line in reward_check(run.folder).get("weaknesses", [])]
    for facts in run.record.get("data", {}).values():
        found += [f"data: {line}" for line in facts.get("met", [])[1:]]
    return found


def _of_numbers(run: RunRead) -> Iterator[str]:
    yield from run.skipped
    for name, series in run.series.items():
        lost = len(series.values) - len(series.known)
        if lost:
            yield f"{name} was not a finite number in {lost} of {len(series.values)} logs"


def _of_losses(run: RunRead) -> list[str]:
    """What the losses say where they should fall: on data that were given."""
    loss, judged, found = run.series.get("loss"), run.series.get("eval_loss"), []
    offline = "reward" not in run.series
    if loss is not None and loss.known and offline:
        direction, before, after = trend(loss)
        if direction > 0:
            found.append(f"loss rose from {short(before)} to {short(after)}: a lower learning_rate may help")
    if judged is not None and len(judged.known) > 2:
        least = min(judged.known)
        at = int(judged.steps[judged.values.index(least)])
        if judged.known[-1] > least * 1.02 + 1e-6 * (least <= 0):
            found.append(
                f"eval_loss was least at step {at} ({short(least)}) and is {short(judged.known[-1])} now: the model "
                "learns its rows by heart; train for less, or on more rows"
            )
    return found


def _of_judges(run: RunRead) -> Iterator[str]:
    """Where a held-out judge and the reward part: one falls while the other rises."""
    reward = run.series.get("reward")
    for name, series in run.series.items():
        if not name.startswith("judge/") or reward is None or len(series.known) < ENOUGH:
            continue
        steps, values = series.steps[: len(series.values)], series.values
        known = [(int(step), value) for step, value in zip(steps, values, strict=True) if value is not None]
        width = max(2, len(known) // 8)
        smooth = [fmean(value for _, value in known[at : at + width]) for at in range(len(known) - width + 1)]
        best = max(range(len(smooth)), key=smooth.__getitem__)
        later = [value for _, value in known[best + width :]]
        if len(later) < width:
            continue
        top, now = [value for _, value in known[best : best + width]], later[-max(width, len(later) // 2) :]
        noise = math.sqrt(pvariance(top) / len(top) + pvariance(now) / len(now))
        since = [value for step, value in _points(reward) if step >= known[best][0]]
        rose = len(since) > 3 and fmean(since[-width:]) > fmean(since[:width])
        if fmean(top) - fmean(now) > 2 * noise + 1e-9 and rose:
            step = known[best + width // 2][0]
            yield (
                f"{name} was best near step {step} ({short(fmean(top))}) and is {short(fmean(now))} now, while the "
                "reward went on rising: from there the reward is gamed; read rollouts/, take an earlier checkpoint"
            )


def _points(series: Series) -> list[tuple[int, float]]:
    pairs = zip(series.steps, series.values, strict=True)
    return [(int(step), value) for step, value in pairs if value is not None]


def next_steps(run: RunRead) -> list[tuple[str, str]]:
    """What can be done now: a sentence, and a command for it or nothing."""
    job, folder = job_of(run), str(run.folder)
    settings = f"--config {shlex.quote(str(run.config))}"
    status = run.status[0]
    steps: list[tuple[str, str]] = []
    if status in ("failed", "stopped", "ended") and run.checkpoints:
        where = f"Go on from step {run.checkpoints[-1]}"
        line = f"trl {job} {settings} --resume_from_checkpoint True" if job else ""
        steps.append((where if line else f"{where}: trainer.train(resume_from_checkpoint=True)", line))
    if job and run.settings:
        again = shlex.quote(f"{folder.rstrip('/')}-2")
        steps.append(("Run it again with something changed", f"trl {job} {settings} --output_dir {again}"))
    if job and run.settings and job not in NOT_INSPECTED:
        steps.append(("See the rows as they were learned", f"trl inspect {job} {settings} --rows 5"))
    if status == "finished":
        steps += uses(run)
        for follows in NEXT.get(run.trainer, ()):
            model = f"--model {shlex.quote(folder)} --data {DATA[follows]}"
            if run.trainer == "Reward":
                line = f"trl grpo --model MODEL --data {DATA[follows]} --reward {shlex.quote(folder)}"
                steps.append(("Reinforce a model by this reward model", line))
            elif follows == "grpo":
                steps.append(("Reinforce it with a reward", f"trl grpo {model} --reward accuracy_reward"))
            else:
                steps.append(("Teach it preferences", f"trl {follows} {model}"))
    return steps


def uses(run: RunRead) -> list[tuple[str, str]]:
    """What the model of a run can be used for now: a sentence and a command each."""
    folder, base = shlex.quote(str(run.folder)), str(run.record.get("model") or "")
    if not job_of(run) or run.trainer == "PRM":
        return []
    if run.trainer == "Reward":
        return [("Measure it on pairs that it has not seen", f"trl eval {folder} --data {HELD_OUT}")]
    steps = [("Talk to it", f"trl chat {folder}")]
    if base:
        steps.append(("See whether it is better", f"trl compare {shlex.quote(base)} {folder} --data {HELD_OUT}"))
    if (run.folder / "adapter_config.json").is_file():
        merged = shlex.quote(f"{str(run.folder).rstrip('/')}-merged")
        steps.append(("Merge the adapter into a plain folder", f"trl merge {folder} --output {merged}"))
    return steps


def job_of(run: RunRead) -> str:
    """The command that made the run; empty where a script did."""
    words = str(run.record.get("command", "")).split()
    return words[1] if len(words) > 1 and words[0] == "trl" else ""
