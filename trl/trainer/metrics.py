"""The metrics that trainers log: what each is and what is healthy. The page `docs/metrics.md` is made of this table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
_TODAY = "today's form of its config"
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
    least: float | None = None
    most: float | None = None
    """bounds of what is healthy"""
    advice: str = ""
    """what a number outside of them means, and what to do"""

    def is_healthy(self, value: float) -> bool:
        """Whether a number is within the bounds; one without bounds is."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    @property
    def direction(self) -> int:
        """1 for a metric that should rise, -1 for one that should fall, 0 for one that may do either."""
        return 0 if ", or " in self.healthy else {"rises": 1, "falls": -1}.get(re.split(r"\W", self.healthy)[0], 0)

    def names(self, logged: str) -> bool:
        """Whether a name in the logs is this metric."""
        pattern = re.sub(r"<\w+>", "[^/]+", re.escape(self.name))
        return re.fullmatch(pattern, logged) is not None


_ENDS = "so the limit does not cut most of them"
_SAMPLING = tuple(
    Metric(
        f"sampling/{name}", f"{meaning}, before the first update on a rollout", healthy,
        RATIOS if name.endswith(("max", "min")) else (*RATIOS, "PPO"), "", False,
    )
    for name, meaning, healthy in (
        (
            "sampling_logp_difference/mean", "mean absolute difference between the log-probabilities that the sampler "
            "and the trainer compute of a token", "1e-6 in float32, below 0.03 in half precision",
        ),
        ("sampling_logp_difference/max", "the largest", "below 1"),
        (
            "importance_sampling_ratio/mean", "mean ratio of trainer to sampler: of tokens, or of completions where "
            "the loss reads theirs", "1",
        ),
        ("importance_sampling_ratio/min", "the least", "near 1"),
        ("importance_sampling_ratio/max", "the largest", "near 1"),
        ("kl", "estimate of the KL of a token from sampler to trainer", "near 0, of either sign"),
        ("approx_kl", "mean of half their squared log-ratio", "below 1e-3"),
        (
            "outside_clip_range", "share of these ratios outside the clip range: what would be clipped if the "
            "sampler's log-probabilities were the old ones", "0 in float32; more is harmless in half precision, whose "
            "old ones are the trainer's",
        ),
    )
)  # fmt: skip
_AHEAD = tuple(
    Metric(f"sampling/{name}", meaning, healthy, ROLLOUTS, "`max_staleness` > 0", False)
    for name, meaning, healthy in (
        (
            "staleness/mean", "optimizer steps between the weights that sampled a token and those that learn from it "
            "first", "`max_staleness` times the steps of a rollout, less at the start",
        ),
        ("staleness/max", "of the oldest token", "the same"),
        ("waited", "seconds in which the trainer waited for the completions of a rollout", "near 0"),
        (
            "idle", "share of the time in which nothing was sampled", "near 0; where `waited` is large too, look at "
            "what lies between: rewards, new weights",
        ),
    )
)  # fmt: skip
_APART = tuple(
    Metric(f"sampling/{name}", meaning, healthy, (*RATIOS, "PPO"), "an engine or older weights", False)
    for name, meaning, healthy in (
        ("weight", "mean weight of a token's surrogate: the ratio of trainer to sampler, bounded", "near 1"),
        ("corrected", "share of tokens whose weight was cut or set to 0", "below 0.1"),
    )
)
_OBJECTIVE = tuple(
    Metric(f"objective/{name}", meaning, healthy, trainers, when, evaluated=trainers == ("PPO",) and name == "scores")
    for trainers, when in ((RATIOS, "`beta` > 0"), (("OnlineDPO",), ""), (("PPO",), _TODAY))
    for name, meaning, healthy in (
        ("kl", "mean KL of a completion to the reference, by its tokens' log-ratios", "grows slowly"),
        ("entropy", "mean of minus a completion's log-probability", "falls slowly"),
        ("scores", "mean reward of a completion", "rises"),
        ("non_score_reward", "minus `beta` times that KL; PPO: the KL coefficient", "small beside `objective/scores`"),
        ("rlhf_reward", "`objective/scores` plus that", "rises"),
    )
)
_EARLIER = tuple(
    Metric(name, f"`{now}`, as releases 0.9-0.16 called it", "as that", ("RLOO",), "a field of these releases", False)
    for name, now in (
        ("policy/approxkl_avg", "approx_kl"), ("policy/clipfrac_avg", "clip_ratio/region_mean"),
        ("policy/entropy_avg", "entropy"), ("loss/policy_avg", "policy_loss"), ("val/ratio", "ratio"),
    )
)  # fmt: skip
_PPO = tuple(
    Metric(name, meaning, healthy, ("PPO",), _TODAY, False)
    for name, meaning, healthy in (
        ("policy/approxkl_avg", "mean of half the squared log-ratio to the policy before the step", "below 0.05"),
        ("policy/clipfrac_avg", "share of tokens whose gradient is clipped", "below 0.2"),
        ("policy/entropy_avg", "mean entropy of the policy's next token, in nats", "falls slowly"),
        ("loss/policy_avg", "the policy's loss", "of either sign"),
        ("loss/value_avg", "the critic's loss", "falls"),
        ("val/clipfrac_avg", "share of values that the critic's clip range holds back", "below 0.2"),
        ("val/ratio", "mean importance ratio", "near 1"),
        ("val/ratio_var", "its variance over tokens", "small"),
        ("val/num_eos_tokens", "responses that ended by themselves", "near the batch size"),
        ("lr", "learning rate", "as set"),
        ("episode", "responses so far, over all processes", "grows evenly"),
        ("eps", "responses a second", "steady"),
    )
)
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
        "rises; where it is far above that of evaluations, the model learns by heart",
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
    Metric("approx_kl", "mean of half the squared log-ratio to the sampling policy", "below 0.05", RATIOS, "", False,
        most=0.05, advice="each update moves the policy far from what sampled; lower learning_rate or num_iterations"),
    Metric("policy_kl", "mean of minus that log-ratio", "near 0", RATIOS, "", False),
    Metric("clip_ratio/region_mean", "share of tokens whose gradient is clipped", "below 0.2", RATIOS, "", False,
        most=0.2, advice="much of what was sampled is not learned; lower learning_rate or num_iterations"),
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
    Metric("completions/clipped_ratio", "share of completions that the limit cut", f"small, {_ENDS}", ROLLOUTS,
        most=0.3,
        advice="the limit cuts completions before they end; raise max_completion_length, or reward shorter ones"),
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
        REWARDED, "groups of 2 or more", most=0.5,
        advice="most groups teach nothing, as all their rewards are equal; use a finer reward, prompts neither "
        "too easy nor too hard, a higher temperature or more num_generations",
    ),
    Metric("unscored_ratio", "share of completions that no reward function had an opinion of", "0", REWARDED,
        "reward_timeout, or a function that has given None", most=0.0,
        advice="some completions have no reward and are not learned; see what the reward functions return for them"),
    Metric("rewards/<function>/mean", "mean of one reward function", "rises", REWARDED),
    Metric("rewards/<function>/std", "its standard deviation", "above 0", REWARDED, "2 opinions or more"),
    Metric(
        "judge/<function>/mean", "mean of a held-out judge, of which nothing is learned", "rises", ROLLOUTS,
        "judge_funcs", False,
    ),
    Metric("rewards/<function>/timed_out", "share of calls that came too late", "0", REWARDED, "reward_timeout"),
    Metric("policy_loss", "the loss without its KL term and entropy bonus", "of either sign", RATIOS, "", False),
    *_SAMPLING,
    *_AHEAD,
    *_APART,
    *_OBJECTIVE,
    Metric(
        "objective/scores_margin", "mean reward of the best of a group minus that of the worst", "above 0",
        ("OnlineDPO",), "", False,
    ),
    Metric(
        "val/contain_eos_token", "share of completions that hold an end token", "near 1", ("OnlineDPO",), "", False,
    ),
    Metric("beta", "scale of the log-ratios in this epoch", "as set", ("OnlineDPO",), "", False),
    *_EARLIER,
    *_PPO,
    Metric("kept_ratio", "share of completions that are learned", "steady", ("RAFT",), "", False),
    Metric(
        "teacher_known", "share of a served teacher's probability on the tokens that it gives", "near 1",
        ("Distillation",), "`teacher_model_server_url`, and not all or none of the tokens", False,
    ),
    Metric("step_time", "seconds of an optimizer step, sampling and rewards included", "steady", ROLLOUTS, "", False),
)  # fmt: skip


def named(trainer: str, logged: str) -> Metric | None:
    """The entry of a name in the logs of a trainer (`SFT`, `DPO`, ...), with or without `eval_`; None: none."""
    evaluated = logged.startswith("eval_")
    found = (m for m in METRICS if trainer in m.trainers and m.names(logged.removeprefix("eval_")))
    return next((metric for metric in found if metric.evaluated or not evaluated), None)


def with_advice(logged: str, value: Any) -> Metric | None:
    """The entry of a name in the logs whose advice a number asks for; None: it is healthy, or nothing is advised."""
    if not isinstance(value, int | float):
        return None
    found = next((metric for metric in METRICS if metric.advice and metric.names(logged)), None)
    return None if found is None or found.is_healthy(value) else found


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
