"""The metrics that trainers log: what each is and what is healthy. The page `docs/metrics.md` is made of this table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

OF_TRANSFORMERS = frozenset(
    {
        "loss", "grad_norm", "learning_rate", "epoch", "runtime", "samples_per_second", "steps_per_second",
        "total_flos", "num_input_tokens_seen", "tokens_per_second",
    }
)  # fmt: skip
"""what `transformers.Trainer` logs by itself, much of it with `train_` or `eval_` before it"""
PAIRS = ("DPO", "ORPO", "CPO", "SimPO")
REWARDED = ("GRPO", "RLOO", "OnlineDPO", "RAFT")
ROLLOUTS = (*REWARDED, "Distillation")
RATIOS = ("GRPO", "RLOO")
EVERY = ("SFT", "Reward", "PRM", *PAIRS, "KTO", *ROLLOUTS)


@dataclass(frozen=True)
class Metric:
    """A name in the logs. What stands in `< >` may be any word, such as the name of a reward function."""

    name: str
    meaning: str
    healthy: str
    trainers: tuple[str, ...]
    when: str = ""
    """the setting that it needs; "": always there"""
    evaluated: bool = True
    """whether evaluation logs it too, with `eval_` before it"""

    def names(self, logged: str) -> bool:
        """Whether a name in the logs is this metric."""
        pattern = re.sub(r"<\w+>", "[^/]+", re.escape(self.name))
        return re.fullmatch(pattern, logged) is not None


_ENDS = "so the limit does not cut most of them"
METRICS: tuple[Metric, ...] = (
    Metric(
        "num_tokens",
        "tokens learned from so far, on all processes and before a resume too: rows with their prompts; of a rollout "
        "its prompts and sampled tokens, once",
        "grows evenly",
        EVERY,
    ),
    Metric(
        "entropy",
        "mean entropy of the model's next token, in nats, over learned tokens (pairs: of both completions)",
        "falls slowly; near 0 the model has settled on one answer",
        ("SFT", *PAIRS),
    ),
    Metric(
        "entropy",
        "mean entropy of the policy's next token at the sampling temperature, in nats, over learned tokens",
        "falls slowly; near 0 the samples of a group are all alike and nothing is learned",
        RATIOS,
        evaluated=False,
    ),
    Metric(
        "mean_token_accuracy",
        "share of learned tokens than which no token is likelier (pairs: of the chosen completion); a tie counts",
        "rises; far above its `eval_` twin the model learns by heart",
        ("SFT", *PAIRS),
    ),
    Metric("nll", "mean negative log-likelihood of a learned token", "falls", ("SFT",), "`loss_type='dft'`"),
    Metric("accuracy", "share of pairs whose chosen has the higher reward", "rises from 0.5", ("Reward",)),
    Metric("accuracy", "share of steps that are judged right", "rises", ("PRM",)),
    Metric("margin", "mean of the chosen's reward minus the rejected's", "rises from 0", ("Reward",)),
    Metric("min_reward", "lowest reward of a completion", "of the size of a few margins", ("Reward",)),
    Metric(
        "mean_reward", "mean reward of both completions", "near 0 with `center_rewards_coefficient`, else free",
        ("Reward",),
    ),
    Metric("max_reward", "highest reward of a completion", "of the size of a few margins", ("Reward",)),
    Metric("rewards/chosen", "mean reward of the chosen completions", "above `rewards/rejected`", ("Reward",)),
    Metric("rewards/rejected", "mean reward of the rejected completions", "below `rewards/chosen`", ("Reward",)),
    Metric(
        "rewards/chosen",
        "mean of beta times the log-ratio of chosen (KTO: desirable) completions to the reference; without a "
        "reference of beta times their log-probability",
        "rises, or falls less than `rewards/rejected`",
        (*PAIRS, "KTO"),
    ),
    Metric(
        "rewards/rejected", "the same of rejected (KTO: undesirable) completions", "falls", (*PAIRS, "KTO")
    ),
    Metric(
        "rewards/margins", "`rewards/chosen` minus `rewards/rejected`", "rises from 0", (*PAIRS, "KTO")
    ),
    Metric(
        "rewards/accuracies", "share of pairs whose chosen has the higher of these rewards", "rises from 0.5",
        PAIRS,
    ),
    Metric(
        "logps/chosen",
        "mean log-probability of a chosen (KTO: desirable) completion; per token where the loss compares it so",
        "falls little: a steep fall unlearns the good answers too",
        (*PAIRS, "KTO"),
    ),
    Metric(
        "logps/rejected", "the same of rejected (KTO: undesirable) completions", "falls", (*PAIRS, "KTO")
    ),
    Metric(
        "logits/chosen", "mean logit over the vocabulary and the tokens of chosen completions", "drifts slowly",
        (*PAIRS, "KTO"),
    ),
    Metric("logits/rejected", "the same of rejected completions", "drifts slowly", (*PAIRS, "KTO")),
    Metric(
        "rewards/<what>", "DPO's `chosen`, `rejected`, `margins`, `accuracies`, of the best and the worst of a group",
        "as DPO's", ("OnlineDPO",), "", False,
    ),
    Metric("logps/<side>", "log-probabilities of these two", "as DPO's", ("OnlineDPO",), "", False),
    Metric(
        "nll_loss", "the loss's own likelihood term: -log p of a chosen completion per token", "falls", ("ORPO", "CPO")
    ),
    Metric(
        "nll_loss", "the loss's own likelihood term: -log p of a chosen completion per token", "falls", ("DPO",),
        "`rpo_alpha`, or `sft` in `loss_type`",
    ),
    Metric("log_odds_chosen", "mean log odds of chosen over rejected completions", "rises from 0", ("ORPO",)),
    Metric("log_odds_ratio", "mean of log sigma of that", "rises towards 0", ("ORPO",)),
    Metric(
        "kl", "KTO's reference point: mean log-ratio of mismatched completions, at least 0", "small; it grows as the "
        "policy leaves the reference", ("KTO",), "`loss_type='kto'`",
    ),
    Metric(
        "kl", "mean KL of a token to the reference: k3 where the loss has that, else k1", "grows slowly", RATIOS,
        "`beta` > 0", evaluated=False,
    ),
    Metric("ratio", "mean importance ratio", "near 1; exactly 1 at the first update on a rollout", RATIOS, "", False),
    Metric("approx_kl", "mean of half the squared log-ratio to the sampling policy", "below 0.05", RATIOS, "", False),
    Metric("policy_kl", "mean of minus that log-ratio", "near 0", RATIOS, "", False),
    Metric("clip_ratio/region_mean", "share of tokens whose gradient is clipped", "below 0.2", RATIOS, "", False),
    Metric("clip_ratio/low_mean", "share clipped because the ratio is too low", "below 0.1", RATIOS, "", False),
    Metric("clip_ratio/low_min", "the same in the completion with the least", "0", RATIOS, "", False),
    Metric("clip_ratio/high_mean", "share clipped because the ratio is too high", "below 0.1", RATIOS, "", False),
    Metric(
        "clip_ratio/high_max", "the same in the completion with the most", "well below 1: few completions carry all "
        "of the change", RATIOS, "", False,
    ),
    Metric(
        "entropy_coef", "weight of the entropy bonus", "between its bounds, not at one", ("GRPO",),
        "`use_adaptive_entropy=True`", False,
    ),
    Metric("completions/mean_length", "mean length in tokens", "does not run to the limit", ROLLOUTS),
    Metric("completions/min_length", "shortest completion", "above 1", ROLLOUTS),
    Metric("completions/max_length", "longest completion", "at most the limit", ROLLOUTS),
    Metric("completions/clipped_ratio", "share of completions that the limit cut", f"small, {_ENDS}", ROLLOUTS),
    Metric(
        "completions/mean_terminated_length", "mean length of those that ended by themselves", "near `mean_length`",
        ROLLOUTS, "completions that end",
    ),
    Metric(
        "completions/min_terminated_length", "the shortest of them", "above 1", ROLLOUTS, "completions that end"
    ),
    Metric(
        "completions/max_terminated_length", "the longest of them", "below the limit", ROLLOUTS, "completions that end"
    ),
    Metric("episodes/turns", "mean turns of an episode", "what the task needs", ROLLOUTS, "an environment"),
    Metric("episodes/sampled_tokens", "mean tokens that the policy sampled in it", "-", ROLLOUTS, "an environment"),
    Metric(
        "tools/call_frequency", "share of completions in which a tool was called", "as often as the task needs one",
        ROLLOUTS, "`tools`, or another chat environment",
    ),
    Metric(
        "tools/failure_frequency",
        "share of these calls that failed: unreadable, to an unknown tool, too late, or the tool raised an error",
        "falls to near 0", ROLLOUTS, "calls",
    ),
    Metric("reward", "mean of the weighted sum of all rewards", "rises", REWARDED),
    Metric("reward_std", "mean standard deviation within a group", "above 0", REWARDED, "groups of 2 or more"),
    Metric(
        "frac_reward_zero_std", "share of groups whose rewards are all equal: they teach nothing", "below 0.5",
        REWARDED, "groups of 2 or more",
    ),
    Metric("unscored_ratio", "share of completions that no reward function had an opinion of", "0", REWARDED,
        "reward_timeout, or a function that has given None"),
    Metric("rewards/<function>/mean", "mean of one reward function", "rises", REWARDED),
    Metric("rewards/<function>/std", "its standard deviation", "above 0", REWARDED, "2 opinions or more"),
    Metric("rewards/<function>/timed_out", "share of calls that came too late", "0", REWARDED, "reward_timeout"),
    Metric("kept_ratio", "share of completions that are learned", "steady", ("RAFT",), "", False),
    Metric("step_time", "seconds of an optimizer step, sampling and rewards included", "steady", ROLLOUTS, "", False),
)  # fmt: skip


def named(trainer: str, logged: str) -> Metric | None:
    """The entry of a name in the logs of a trainer (`SFT`, `DPO`, ...), with or without `eval_`; None: none."""
    evaluated = logged.startswith("eval_")
    found = (m for m in METRICS if trainer in m.trainers and m.names(logged.removeprefix("eval_")))
    return next((metric for metric in found if metric.evaluated or not evaluated), None)


def table(metrics: Iterable[Metric] = METRICS) -> str:
    """The table as Markdown, a row an entry."""
    lines = ["| name | what it is | healthy | trainers |", "|---|---|---|---|"]
    for metric in metrics:
        who = "all" if metric.trainers == EVERY else ", ".join(metric.trainers)
        needs = f"; needs {metric.when}" if metric.when else ""
        where = "" if metric.evaluated else "; training only"
        lines.append(f"| `{metric.name}` | {metric.meaning} | {metric.healthy} | {who}{needs}{where} |")
    return "\n".join(lines)


def check_new_names(names: Iterable[str]) -> None:
    """ValueError for a name that a reward function logs a number under, and that means something else already."""
    for name in names:
        if name in OF_TRANSFORMERS or any(m.names(name) for m in METRICS if {*m.trainers} & {*ROLLOUTS}):
            raise ValueError(f"log_metric: {name!r} is a metric of the trainers already; give it another name")
