"""The statistics of a PPO step, under the keys of release 0.7.7."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trl.core import WANDB_PADDING, masked_mean
from trl.data.records import moved_ahead
from trl.losses.policy import Correction, sampling_metrics
from trl.rollout.experience import Experience, PolicyBatch
from trl.rollout.measure import means_of

METRICS = {
    "loss": "loss/total",
    "policy": "loss/policy",
    "value_loss": "loss/value",
    "entropy": "policy/entropy",
    "approx_kl": "policy/approxkl",
    "policy_kl": "policy/policykl",
    "clip_ratio/region_mean": "policy/clipfrac",
    "advantage": "policy/advantages_mean",
    "value": "val/vpred",
    "value_error": "val/error",
    "value_clip_fraction": "val/clipfrac",
}
"""metric of the objective -> key of the statistics, `ppo/` left out"""


OF_BATCH = ("policy/advantages", "policy/ratio", "returns/mean", "returns/var", "val/mean", "val/var")
SEED_KEYS = (*METRICS.values(), *OF_BATCH)
"""of an optimizer step, `ppo/` left out"""


Total = Callable[[Tensor], Tensor]
"""the sum over all processes of each number of a tensor"""


def alone(numbers: Tensor) -> Tensor:
    """The `Total` of a single process."""
    return numbers


def mean_of(values_BT: Tensor, mask_BT: Tensor, total: Total = alone) -> Tensor:
    """The mean of what counts."""
    if total is alone:
        return masked_mean(values_BT, mask_BT)
    summed, count = total(torch.stack([(values_BT * mask_BT).sum(), mask_BT.sum()]))
    return summed / count


def moments(values_BT: Tensor, mask_BT: Tensor, total: Total = alone) -> tuple[Tensor, Tensor]:
    """(mean, population variance) of what counts."""
    mean = mean_of(values_BT, mask_BT, total)
    return mean, mean_of((values_BT - mean) ** 2, mask_BT, total)


def seed_keys(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimizer step's mean metrics under the keys of release 0.7.7."""
    return {METRICS[name]: value for name, value in metrics.items() if name in METRICS}


def batch_keys(batch: Experience | PolicyBatch, ratios: Tensor, total: Total = alone) -> dict[str, Tensor]:
    """What does not change from epoch to epoch, and the distribution of the ratios."""
    assert batch.values_BT is not None
    assert batch.returns_BT is not None
    assert batch.advantages_BT is not None
    values, returns = (moments(each, batch.mask_BT, total) for each in (batch.values_BT, batch.returns_BT))
    return {
        "policy/advantages": batch.advantages_BT[batch.mask_BT > 0],
        "policy/ratio": ratios,
        "returns/mean": returns[0],
        "returns/var": returns[1],
        "val/mean": values[0],
        "val/var": values[1],
    }


def sampling_keys(
    measured: Experience,
    sampled_BT: Tensor,
    cliprange: float,
    total: Total = alone,
    correction: Correction | None = None,
) -> dict[str, Tensor]:
    """By how much the sampler's log-probabilities differ from those that were measured, as means over tokens; and the
    weights by which a correction makes up for that."""
    assert measured.old_logprobs_BT is not None
    trained_BT, mask_BT = measured.old_logprobs_BT, measured.mask_BT
    bounds = (1 - cliprange, 1 + cliprange)
    metrics = sampling_metrics(trained_BT, sampled_BT.to(trained_BT), mask_BT, "token", bounds)
    if correction is not None:
        metrics |= correction.weigh(trained_BT, sampled_BT.to(trained_BT), mask_BT)[1]
    if total is not alone:
        pairs = {name: value for name, value in metrics.items() if isinstance(value, tuple)}
        both = [torch.as_tensor(number, dtype=torch.float32) for pair in pairs.values() for number in pair]
        summed = total(torch.stack([number.to(trained_BT.device) for number in both])).view(-1, 2)
        metrics = {name: (value, count) for name, (value, count) in zip(pairs, summed, strict=True)}
    return means_of(metrics)


def _std(values: Tensor, total: Total = alone) -> Tensor:
    """Unbiased; 0 for a single value, which has none."""
    if total is not alone:
        ones = torch.ones_like(values)
        count = total(ones.sum())
        return (moments(values, ones, total)[1] * count / (count - 1).clamp(min=1)).sqrt()
    return values.std() if values.numel() > 1 else torch.zeros_like(values).sum()


def _lengths(name: str, tokens: Sequence[Tensor], device: Any, total: Total) -> dict[str, Tensor]:
    lengths = moved_ahead(torch.tensor([len(row) for row in tokens], dtype=torch.float), device)
    return {
        f"tokens/{name}_len_mean": lengths.mean(),
        f"tokens/{name}_len_std": _std(lengths, total),
        f"tokens/{name}_dist": lengths,
    }


def step_stats(
    kl_coef: float,
    *,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    masks: Tensor,
    scores: Tensor,
    non_score_reward: Tensor,
    train_stats: Mapping[str, Tensor],
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    total: Total = alone,
) -> dict[str, Any]:
    """All statistics of a step but the times. `logprobs` ... `non_score_reward` are [B, T], `scores` [B].

    Numbers that are no mean over rows, of which all processes have as many, are those of all processes.
    """
    kl_B = ((logprobs - ref_logprobs) * masks).sum(-1)
    mean_kl = kl_B.mean()
    if mean_kl.item() < -1.0:
        warnings.warn(
            f"KL divergence is starting to become negative: {mean_kl.item():.2f} - this might be a precursor for "
            "failed training. sometimes this happens because the generation kwargs are not correctly set. Please make "
            "sure that the generation kwargs are set correctly, or review your training hyperparameters."
        )
    stats: dict[str, Any] = {
        "objective/kl": mean_kl,
        "objective/kl_dist": kl_B,
        "objective/logprobs": logprobs,
        "objective/ref_logprobs": ref_logprobs,
        "objective/kl_coef": kl_coef,
        "objective/entropy": (-logprobs * masks).sum(-1).mean(),
        "ppo/mean_non_score_reward": mean_of(non_score_reward, masks, total),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": _std(scores, total),
        **_lengths("queries", queries, scores.device, total),
        **_lengths("responses", responses, scores.device, total),
        **{f"ppo/{key}": value for key, value in train_stats.items()},
    }
    if "val/error" in train_stats and "returns/var" in train_stats:
        stats["ppo/val/var_explained"] = 1 - train_stats["val/error"] / train_stats["returns/var"]
    return stats


def gathered(accelerator: Any, stats: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics of all processes: numbers averaged, distributions concatenated (padded with -1)."""
    names = sorted(name for name, value in stats.items() if isinstance(value, Tensor))
    together = dict(stats)
    scalars = [name for name in names if stats[name].ndim == 0]
    if scalars:
        stacked = torch.stack([stats[name].detach().float().to(accelerator.device) for name in scalars])
        together.update(zip(scalars, accelerator.reduce(stacked, "mean").unbind(), strict=True))
    for name in names:
        if stats[name].ndim:
            value = stats[name].detach().to(accelerator.device)
            for dim in range(value.ndim):
                value = accelerator.pad_across_processes(value, dim=dim, pad_index=WANDB_PADDING)
            together[name] = accelerator.gather(value)
    return together


class Clock:
    """Seconds of a step's parts."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """`name` was what happened since the lap before."""
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def stats(self) -> dict[str, float]:
        return {
            f"time/ppo/{name}": seconds for name, seconds in {**self.laps, "total": self.last - self.started}.items()
        }


def log_stats(
    accelerator: Accelerator,
    stats: Mapping[str, Any],
    batch: Mapping[str, Any],
    rewards: Any,
    columns: Sequence[str],
    tracker: str | None,
    number: int,
) -> None:
    """See `PPOTrainer.log_stats`. number: of this call."""
    rewards_B = torch.as_tensor([float(reward) for reward in rewards], device=accelerator.device)
    rewards_B = accelerator.gather(rewards_B).flatten()
    logs = {
        **stats,
        "env/reward_mean": rewards_B.mean().item(),
        "env/reward_std": _std(rewards_B).item(),
        "env/reward_dist": rewards_B.cpu().numpy(),
    }
    if "query" not in batch and "response" not in batch:
        warnings.warn(
            "The game logs will not be logged because the batch does not contain the keys 'query' and 'response'. "
        )
    elif tracker == "wandb":
        logs |= _game_log(batch, rewards_B, columns, accelerator)
    # the tracker of tensorboard does not count steps
    accelerator.log(logs, **({"step": number} if tracker == "tensorboard" else {}))


def _game_log(batch: Mapping[str, Any], rewards_B: Tensor, columns: Sequence[str], accelerator: Any) -> dict[str, Any]:
    """A wandb table of the batch's columns and rewards, over all processes."""
    import wandb
    from accelerate.utils import gather_object

    missing = [column for column in columns if column not in batch]
    if missing:
        raise ValueError(f"Columns to log {missing} are not present in the batch {list(batch)}.")
    texts = [gather_object(list(batch[column])) for column in columns]
    rows = [list(row) for row in zip(*texts, rewards_B.tolist(), strict=True)]
    return {"game_log": wandb.Table(columns=[*columns, "reward"], rows=rows)}
