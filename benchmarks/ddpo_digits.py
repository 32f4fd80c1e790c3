"""DDPO on a small diffusion model of real digits: curves, images before and after, and where it stops being good.

OMP_NUM_THREADS=1 python benchmarks/ddpo_digits.py run --task digit --seed 0 --out runs/ddpo     # each task and seed
OMP_NUM_THREADS=1 python benchmarks/ddpo_digits.py report --runs runs/ddpo --out docs/results
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import plots
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits.digits_base import digits, digits_pipeline
from digits.modeling_digits import DDPODigitsPipeline

from trl import DDPOConfig, DDPOTrainer
from trl.rewards.images import ClassifierProbability, brightness

torch.set_num_threads(1)

TASKS = {
    "digit": {"title": "probability of the asked digit", "wrong_labels": 0.7, "epochs": 60},
    "brightness": {"title": "brightness", "wrong_labels": 0.0, "epochs": 45},
}
SHEET = [str(index % 10) for index in range(40)]
"""the prompts of the pictures: four rows of 0 to 9, always from the same noise"""


@dataclass
class Gauges:
    """What the reward does not see: measured with a second classifier and against all real digits."""

    real: NDArray[Any]
    labels: NDArray[Any]
    judge: SVC = field(init=False)

    def __post_init__(self) -> None:
        # The reward's classifier has seen the even digits, the judge the odd ones.
        self.judge = SVC(gamma=2.0).fit(self.real[1::2], self.labels[1::2])

    def measure(self, images: NDArray[Any], asked: NDArray[Any]) -> dict[str, float]:
        """Images [B, 64]. `diversity`: deviation within a class, as part of that of real digits."""
        drawn, real = (
            np.mean([values[names == digit].std(0, ddof=1).mean() for digit in range(10) if (names == digit).sum() > 1])
            for values, names in ((images, asked), (self.real, self.labels))
        )
        nearest = torch.cdist(torch.tensor(images), torch.tensor(self.real)).min(1).values.mean()
        return {
            "judge": float((self.judge.predict(images) == asked).mean()),
            "distance": float(nearest),
            "diversity": float(drawn / real),
        }


def run(task: str, seed: int, epochs: int, out: Path) -> None:
    """Train once; after every epoch write `task-seed.json`, and the picture sheets as `task-seed.npy`."""
    images, labels = digits()
    real, names = images.flatten(1).numpy(), labels.numpy()
    gauges = Gauges(real, names)
    pipeline = digits_pipeline(wrong_labels=TASKS[task]["wrong_labels"])
    if task == "digit":
        reward: Any = ClassifierProbability(smooth_classifier(real[::2], names[::2]), lambda prompt, _: int(prompt))
    else:
        reward = brightness
    curve: list[dict[str, float]] = []
    sheets: list[NDArray[Any]] = []
    begun = time.process_time()

    def watch(samples: list[list[Any]], step: int, tracker: Any) -> None:
        drawn = torch.cat([batch[0] for batch in samples]).flatten(1).numpy()
        rewards = torch.cat([batch[3] for batch in samples])
        asked = np.array([int(prompt) for batch in samples for prompt in batch[1]])
        spent = time.process_time() - begun
        curve.append({"reward": rewards.mean().item(), **gauges.measure(drawn, asked), "cpu": spent})
        sheets.append(sheet(pipeline))
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{task}-{seed}.json").write_text(json.dumps(curve))
        np.save(out / f"{task}-{seed}.npy", np.stack(sheets))
        print(len(curve) - 1, {key: round(value, 3) for key, value in curve[-1].items()}, flush=True)

    config = settings(seed, epochs)
    trainer = DDPOTrainer(config, reward, lambda: (str(random.randrange(10)), {}), pipeline, watch)
    pipeline.set_progress_bar_config(disable=True)
    trainer.train()


def smooth_classifier(images: NDArray[Any], labels: NDArray[Any]) -> MLPClassifier:
    """Trained on noisy copies too: one that is not is fooled within ten epochs, without a better digit."""
    draw = np.random.default_rng(0)
    noisy = [images, *(images + 0.15 * draw.standard_normal(images.shape) for _ in range(4))]
    classifier = MLPClassifier((64,), random_state=0, max_iter=60, alpha=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(np.concatenate(noisy).clip(0, 1), np.tile(labels, 5))


def settings(seed: int, epochs: int) -> DDPOConfig:
    return DDPOConfig(
        seed=seed,
        num_epochs=epochs,
        save_freq=10**6,
        mixed_precision="no",
        logdir=tempfile.mkdtemp(),
        sample_num_steps=10,
        sample_guidance_scale=2.0,
        sample_batch_size=128,
        sample_num_batches_per_epoch=1,
        train_batch_size=16,
        train_learning_rate=2e-4,
        train_clip_range=1e-2,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=64,
        per_prompt_stat_tracking_min_count=8,
    )


def sheet(pipeline: DDPODigitsPipeline) -> NDArray[Any]:
    """The same 40 images, as the model draws them now. [32, 80] bytes"""
    noise = torch.Generator().manual_seed(0)
    drawn = pipeline(SHEET, num_inference_steps=10, guidance_scale=2.0, generator=noise, output_type="pt").images
    rows = drawn.view(4, 10, 8, 8).permute(0, 2, 1, 3).reshape(32, 80)
    return (rows * 255).round().byte().numpy()


# --- report -------------------------------------------------------------------------------------------------------


def report(runs: Path, out: Path) -> None:
    """Curves as SVG, sheets as PNG, and the table on the standard output."""
    out.mkdir(parents=True, exist_ok=True)
    loaded = {task: sorted(runs.glob(f"{task}-*.json")) for task in TASKS}
    curves = {task: [json.loads(path.read_text()) for path in paths] for task, paths in loaded.items()}
    draw_curves(curves, out / "ddpo_curves.svg")
    for task, paths in loaded.items():
        stop = best_epoch(curves[task])
        draw_sheets(np.load(paths[0].with_suffix(".npy")), stop, out / f"ddpo_{task}.png")
        print(f"\n| {TASKS[task]['title']} | epoch | reward | judge | distance | diversity | CPU s |")
        print("|---|---|---|---|---|---|---|")
        shared, longest = (least(len(curve) for curve in curves[task]) - 1 for least in (min, max))
        for epoch in sorted({0, stop, shared, longest}):
            print(table_row(curves[task], epoch))


def best_epoch(curves: list[list[dict[str, float]]]) -> int:
    """Where to stop: the last epoch at which the judge, as a mean over five, is within .1 of the best it ever was."""
    shared = min(len(curve) for curve in curves)
    judged = np.mean([[point["judge"] for point in curve[:shared]] for curve in curves], axis=0)
    smooth = np.array([judged[max(0, at - 2) : at + 3].mean() for at in range(len(judged))])
    return int(np.nonzero(smooth >= smooth.max() - 0.1)[0][-1])


def table_row(curves: list[list[dict[str, float]]], epoch: int) -> str:
    """Mean over the seeds that went so far, and the range of the reward."""
    points = [curve[epoch] for curve in curves if epoch < len(curve)]
    rewards = [point["reward"] for point in points]
    means = {key: np.mean([point[key] for point in points]) for key in points[0]}
    return (
        f"| {len(points)} seeds | {epoch} | {means['reward']:.3f} ({min(rewards):.3f} to {max(rewards):.3f}) "
        f"| {means['judge']:.2f} | {means['distance']:.2f} | {means['diversity']:.2f} | {means['cpu']:.0f} |"
    )


def draw_curves(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    panels = []
    for task, seeds in curves.items():
        stop = [plots.Mark(best_epoch(seeds) + 1, "stop here", upright=True)]
        names = {number: f"seed {number}" for number in range(len(seeds))}
        rewards = {names[number]: [point["reward"] for point in curve] for number, curve in enumerate(seeds)}
        others = {
            f"{key}{number}": [point[key] for point in curve]
            for key in ("judge", "diversity")
            for number, curve in enumerate(seeds)
        }
        colours = {name: plots.AFTER if name.startswith("judge") else plots.COST for name in others}
        blue = dict.fromkeys(rewards, plots.TRAINED)
        panels.append(plots.lines(f"Reward: {TASKS[task]['title']}", rewards, blue, (0, 1), stop, 1, "epoch"))
        panels.append(plots.lines("Not in the reward", others, colours, (0, 1.1), stop, 1, "epoch"))
    colours = {"reward": plots.TRAINED, "second classifier agrees": plots.AFTER, "diversity / real digits": plots.COST}
    plots.write(path, panels, 2, colours, "a line for each seed")


def draw_sheets(sheets: NDArray[Any], stop: int, path: Path) -> None:
    """Before, where to stop, and at the end, above each other; asked for: 0 to 9 in every row."""
    images = []
    for epoch in sorted({0, stop, len(sheets) - 1}):
        cells = np.pad(sheets[epoch].reshape(4, 8, 10, 8), ((0, 0), (1, 1), (0, 0), (1, 1)), constant_values=110)
        images.append(np.pad(cells.reshape(40, 100), ((0, 6), (0, 0)), constant_values=255))
    image = Image.fromarray(np.concatenate(images))
    image.resize((image.width * 5, image.height * 5), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--task", choices=list(TASKS), required=True)
    running.add_argument("--seed", type=int, required=True)
    running.add_argument("--epochs", type=int)
    running.add_argument("--out", type=Path, required=True)
    reporting = commands.add_parser("report")
    reporting.add_argument("--runs", type=Path, required=True)
    reporting.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "run":
        run(given.task, given.seed, given.epochs or TASKS[given.task]["epochs"], given.out)
    else:
        report(given.runs, given.out)


if __name__ == "__main__":
    main()
