"""What a PPO step reports, under the seed's keys."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl.core import WANDB_PADDING, masked_mean

METRICS = {
    "loss": "loss/total",
    "policy": "loss/policy",
    "value_loss": "loss/value",
    "entropy": "policy/entropy",
    "approx_kl": "policy/approxkl",
    "policy_kl": "policy/policykl",
    "clip_fraction": "policy/clipfrac",
    "advantage": "policy/advantages_mean",
    "value": "val/vpred",
    "value_error": "val/error",
    "value_clip_fraction": "val/clipfrac",
}
"""metric of the objective -> key of the statistics, `ppo/` left out"""


def moments(values_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, population variance) of what counts."""
    mean = masked_mean(values_BT, mask_BT)
    return mean, masked_mean((values_BT - mean) ** 2, mask_BT)


def seed_keys(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimizer step's mean metrics under the seed's keys."""
    return {METRICS[name]: value for name, value in metrics.items() if name in METRICS}


def batch_keys(
    values_BT: Tensor, returns_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, ratios: Tensor
) -> dict[str, Tensor]:
    """What does not change from epoch to epoch, and the distribution of the ratios."""
    counted = mask_BT > 0
    values, returns = moments(values_BT, mask_BT), moments(returns_BT, mask_BT)
    return {
        "policy/advantages": advantages_BT[counted],
        "policy/ratio": ratios,
        "returns/mean": returns[0],
        "returns/var": returns[1],
        "val/mean": values[0],
        "val/var": values[1],
    }


def _std(values: Tensor) -> Tensor:
    """Unbiased; 0 for a single value, which has none."""
    return values.std() if values.numel() > 1 else torch.zeros_like(values).sum()


def _lengths(name: str, tokens: Sequence[Tensor], device: Any) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in tokens], dtype=torch.float, device=device)
    return {
        f"tokens/{name}_len_mean": lengths.mean(),
        f"tokens/{name}_len_std": _std(lengths),
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
) -> dict[str, Any]:
    """All statistics of a step but the times. `logprobs` ... `non_score_reward` are [B, T], `scores` [B]."""
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
        "ppo/mean_non_score_reward": masked_mean(non_score_reward, masks),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": _std(scores),
        **_lengths("queries", queries, scores.device),
        **_lengths("responses", responses, scores.device),
        **{f"ppo/{key}": value for key, value in train_stats.items()},
    }
    if "val/error" in train_stats and "returns/var" in train_stats:
        stats["ppo/val/var_explained"] = 1 - train_stats["val/error"] / train_stats["returns/var"]
    return stats


def gathered(accelerator: Any, stats: Mapping[str, Any]) -> dict[str, Any]:
    """Over all processes: numbers averaged, distributions laid together (padded with -1)."""
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


ON_POLICY = {torch.float32: (1e-5, 1e-8), torch.float64: (1e-5, 1e-8)}
"""how far the mean ratio may be from 1, and approxkl from 0, before anything was learnt"""
ON_POLICY_HALF = (2e-2, 1e-2)
"""the same in half precision and TF32"""


def check_on_policy(means: Mapping[str, Tensor], accelerator: Any, model: nn.Module) -> None:
    """RuntimeError unless the policy that is about to be updated is the one whose log-probabilities were taken.

    A mean ratio of 0 is that of no tokens: all responses of the optimizer step are empty or masked out.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} & {torch.float16, torch.bfloat16}
    tf32 = torch.get_float32_matmul_precision() != "highest"
    coarse = dtypes or tf32 or accelerator.mixed_precision not in ("no", None) or _is_quantized(model)
    ratio, approx_kl = means["ratio"].item(), means["approx_kl"].item()
    of_ratio, of_kl = ON_POLICY_HALF if coarse else ON_POLICY[torch.float32]
    if ratio and not (abs(ratio - 1) <= of_ratio and approx_kl <= of_kl):
        raise RuntimeError(
            f"before the first update of a step the policy must still be itself, but its mean ratio is {ratio:.7f}, "
            f"not 1, and approxkl {approx_kl:.3g}, not 0: is something random or stateful in the model's forward pass "
            "(dropout that ignores eval mode, noise on embeddings, a router), or are its weights changed elsewhere?"
        )


def _is_quantized(model: nn.Module) -> bool:
    return any(getattr(module, "is_quantized", False) for module in model.modules())


def log_stats(
    trainer: Any, stats: Mapping[str, Any], batch: Mapping[str, Any], rewards: Any, columns: Sequence[str]
) -> None:
    """See `PPOTrainer.log_stats`."""
    accelerator = trainer.accelerator
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
    elif trainer.config.log_with == "wandb":
        logs |= _game_log(batch, rewards_B, columns, accelerator)
    # the tracker of tensorboard has no count of its own
    step = {"step": trainer.logged_steps} if trainer.config.log_with == "tensorboard" else {}
    accelerator.log(logs, **step)
    trainer.logged_steps += 1


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
