"""The rewards of a rollout: reward functions are called, their answers added up or credited to turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from trl.data.records import Rollout
from trl.losses.policy import soft_overlong_punishment
from trl.models.scoring import rewards as rewards_of
from trl.models.sharded import gathered
from trl.models.unwrap import below_peft
from trl.rewards.named import reward_panel
from trl.rewards.panel import Logs, RewardPanel, Verdict, checked
from trl.rewards.texts import EpisodeText
from trl.rollout.experience import Experience
from trl.rollout.measure import PACKED_TOKENS, pieces


@dataclass
class Rewards:
    """What each of F reward functions said of each completion, NaN where it had no opinion."""

    names: list[str]
    scores_BF: Tensor
    weights_F: Tensor
    timed_out: list[bool | None]
    """whether each function came too late; None where it has no time-out"""
    logs: Logs = field(default_factory=lambda: Logs(0))

    @classmethod
    def none(cls, rows: int) -> Rewards:
        """Of completions that nobody judges, in an algorithm without rewards."""
        return cls([], torch.zeros(rows, 0), torch.zeros(0), [])

    def total_B(self) -> Tensor:
        """The weighted sum; NaN for a completion that no function scored."""
        return weighted_total(self.scores_BF, self.weights_F)

    def informative_groups(self, group: int) -> Tensor:
        """Whether a group holds two scored completions of different reward. [groups]"""
        total = self.total_B().unflatten(0, (-1, group))
        highest, lowest = total.nan_to_num(nan=-torch.inf).amax(1), total.nan_to_num(nan=torch.inf).amin(1)
        return highest - lowest > 1e-6


def weighted_total(scores_BF: Tensor, weights_F: Tensor) -> Tensor:
    """The weighted sum of the scores that are known; NaN where none is. [B]"""
    unscored_B = scores_BF.isnan().all(-1)
    return (scores_BF.nan_to_num() @ weights_F).masked_fill(unscored_B, torch.nan)


def lateness(panel: RewardPanel, verdict: Verdict) -> list[bool | None]:
    """Whether each function came too late; None for one that may take its time."""
    pairs = zip(verdict.timed_out, panel.timeouts, strict=True)
    return [None if seconds is None else late for late, seconds in pairs]


class RolloutRewards:
    """Scores rollouts with reward functions, and with the soft overlong punishment where it is asked for.

    panel: None where the rollouts carry their own rewards. weights: one for each function; None: 1 each.
    overlong: `(longest completion, tokens before it that are punished)`. kinds: of an environment whose rewards are
    logged apart, the name of each factory's rewards.
    """

    def __init__(
        self,
        panel: RewardPanel | None,
        weights: Sequence[float] | None = None,
        overlong: tuple[int, int] | None = None,
        kinds: Mapping[Any, str] | None = None,
    ):
        self.panel, self.overlong = panel, overlong
        self.kinds = kinds if panel is None else None
        names = list(self.kinds.values()) if self.kinds else ["reward"] if panel is None else panel.names
        weights = weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise ValueError(
                f"reward_weights={list(weights)}: give one weight for each of the {len(names)} reward functions"
            )
        self.names = [*names, *(["overlong"] if overlong else [])]
        self.weights_F = torch.tensor([*weights, *([1.0] if overlong else [])], dtype=torch.float32)

    def of(self, functions: Sequence[int]) -> RolloutRewards:
        """The rewards by these functions of the panel alone."""
        assert self.panel is not None
        panel = RewardPanel(
            [self.panel.functions[i] for i in functions], [self.panel.timeouts[i] for i in functions],
            names=[self.panel.names[i] for i in functions],
        )  # fmt: skip
        return RolloutRewards(panel, [float(self.weights_F[i]) for i in functions])

    def of_nothing(self) -> Rewards:
        """The rewards of no completion."""
        return Rewards(self.names, torch.zeros(0, len(self.names)), self.weights_F, [None] * len(self.names))

    def __call__(self, rollout: Rollout, prompts: Sequence[Any], columns: Mapping[str, Any]) -> Rewards:
        """prompts: texts or conversations, one for each completion. columns: further keywords of the functions."""
        late: list[bool | None]
        if self.panel is None:
            if len(rollout.rewards) != len(rollout):
                raise ValueError(
                    f"rollout_func gave {len(rollout.rewards)} rewards for {len(rollout)} completions: fill "
                    "`Rollout.rewards`, or give `reward_funcs`"
                )
            histories = rollout.metadata.get("histories")
            source = "rollout_func" if histories is None else "the environment"
            known = [None if reward is not None and reward != reward else reward for reward in rollout.rewards]
            logs, given = Logs(len(rollout)), checked(source, known, len(rollout))  # nan: no opinion
            scores = [given] if self.kinds is None else self._apart(given, histories or [])
            late = [None] * len(scores)
        else:
            asked = asked_of(rollout, prompts, columns)
            verdict = self.panel(len(rollout), asked, {name: asked.pop(name) for name in LIVE if name in asked})
            scores, late, logs = verdict.scores, lateness(self.panel, verdict), verdict.logs
        return self.with_overlong(rollout, torch.tensor(scores, dtype=torch.float32).T, late, logs)

    def _apart(self, scores: Sequence[float], histories: Sequence[Any]) -> list[list[float]]:
        """The scores in a column for each kind of environment."""
        assert self.kinds is not None
        own = [history.episode.own.factory for history in histories]
        return [
            [score if factory == kind else math.nan for score, factory in zip(scores, own, strict=True)]
            for kind in self.kinds
        ]

    def with_overlong(self, rollout: Rollout, scores_BF: Tensor, late: list[bool | None], logs: Logs) -> Rewards:
        """The rewards, with the soft overlong punishment where it is asked for."""
        if self.overlong is not None:
            lengths_B = torch.tensor([float(len(ids)) for ids in rollout.completions])
            punishment_B = soft_overlong_punishment(lengths_B, *self.overlong)
            punishment_B = punishment_B.masked_fill(scores_BF.isnan().all(-1), torch.nan)
            scores_BF, late = torch.cat([scores_BF, punishment_B[:, None]], 1), [*late, None]
        return Rewards(self.names, scores_BF, self.weights_F, late, logs)


class OwnRewards(RolloutRewards):
    """The rewards of a panel by way of a user's function, which may ask the panel or score by itself.

    function: `(rows of the data set, prompts, completions, completion_ids) -> [B, F]`, all of them one a completion.
    """

    function: Callable[..., Any]

    def __call__(self, rollout: Rollout, prompts: Sequence[Any], columns: Mapping[str, Any]) -> Rewards:
        assert self.panel is not None
        asked = asked_of(rollout, prompts, columns)
        own = [asked.pop(name) for name in ("prompts", "completions", "completion_ids")]
        self._live = {name: asked.pop(name) for name in LIVE if name in asked}
        listed = {name: values for name, values in asked.items() if isinstance(values, list)}
        self._shared = {name: value for name, value in asked.items() if name not in listed}
        rows = [
            {"prompt": prompt, **{name: values[row] for name, values in listed.items()}}
            for row, prompt in enumerate(own[0])
        ]
        self._late: list[bool | None] = [None] * len(self.panel.names)
        self._logs = Logs(len(rollout))
        scores_BF = torch.as_tensor(self.function(rows, *own)).detach().float().cpu()
        wanted = (len(rollout), len(self.panel.names))
        if scores_BF.shape != wanted:
            raise ValueError(
                f"_calculate_rewards gave scores of shape {tuple(scores_BF.shape)}; give {wanted}: a row for each "
                "completion of this process, a column for each reward function"
            )
        return self.with_overlong(rollout, scores_BF, self._late, self._logs)

    def of_panel(
        self, rows: Sequence[Mapping[str, Any]], prompts: Any, completions: Any, completion_ids: Any
    ) -> Tensor:
        """What the reward functions say; NaN: no opinion. [B, F]"""
        assert self.panel is not None
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        own = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        verdict = self.panel(len(prompts), {**columns, **self._shared, **own}, self._live)
        self._late, self._logs = lateness(self.panel, verdict), verdict.logs
        return torch.tensor(verdict.scores, dtype=torch.float32).T


class TokenRewards(RolloutRewards):
    """Scores rollouts with a reward model that reads the policy's tokens: prompt and completion, at the last of them.

    tokens: that a pass takes, if that is more than one completion.
    """

    def __init__(self, model: nn.Module, device: Any, tokens: int = PACKED_TOKENS):
        super().__init__(None)
        self.model, self.device, self.tokens = model.to(device).eval().requires_grad_(False), device, tokens

    @torch.no_grad()
    def __call__(self, rollout: Rollout, prompts: Sequence[Any], columns: Mapping[str, Any]) -> Rewards:
        self._check(rollout)
        rows = Experience.of(rollout)
        runs = pieces(rows, 1, self.tokens)
        with gathered(self.model):  # in parts where ZeRO-3 was on when the model was loaded
            parts = [rewards_of(self.model, rows.select(r).packed(masked=False).to(self.device)).cpu() for r in runs]
        scores = checked("reward_model", torch.cat(parts), len(rollout))
        return Rewards(self.names, torch.tensor(scores)[:, None], self.weights_F, [None])

    def _check(self, rollout: Rollout) -> None:
        """ValueError for a token that the model does not have: it belongs to another tokenizer than the policy's."""
        held = below_peft(self.model).get_input_embeddings().num_embeddings
        largest = max(max(ids, default=0) for ids in (*rollout.prompts, *rollout.completions))
        if largest >= held:
            raise ValueError(
                f"reward_model: it has {held} tokens, and the policy wrote token {largest}; give its tokenizer as "
                "`reward_processing_classes`, and it reads the texts"
            )


LIVE = ("histories", "environments", "trainer_state")
"""keywords of reward functions whose objects are not copied"""


def asked_of(rollout: Rollout, prompts: Sequence[Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a reward function: a conversation is completed by a message, a text by a text."""
    extra = {name: values for name, values in rollout.metadata.items() if name not in ("truncated", "completions")}
    texts: Sequence[str] = rollout.texts
    own: dict[str, Any] = {"environments": None}
    if "histories" in extra:
        turns = [history.turns for history in extra["histories"]]
        texts = [EpisodeText.of(text, own_turns) for text, own_turns in zip(texts, turns, strict=True)]
        own |= {"turn_texts": turns, "environments": [history.own_environment for history in extra["histories"]]}
    said = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return {
        **own,
        **columns,
        **extra,
        "prompts": list(prompts),
        "completions": rollout.metadata.get("completions", said),
        "completion_ids": rollout.completions,
    }


def panel_of(functions: Any, tokenizers: Any, default: Any, device: Any, like: Any = None) -> RewardPanel:
    """Reward functions as a panel; a reward model that names no tokenizer reads with `default`, the policy's.

    like: the dtype of reward models that are given by name.
    """
    listed = functions if isinstance(functions, list | tuple) else [functions]
    given = tokenizers if isinstance(tokenizers, list | tuple) else [tokenizers] * len(listed)
    own = [
        default if each is None and not getattr(getattr(source, "config", None), "_name_or_path", "") else each
        for source, each in zip(listed, given, strict=False)
    ]
    return reward_panel(list(listed), own + list(given[len(own) :]), None, device, like)


def without_end(rewards: Rewards, rollout: Rollout, penalty: float | None, ends: Sequence[int] = ()) -> Rewards:
    """The rewards with a further column: minus the penalty for completions that were cut at the length limit.

    ends: the tokens that end a completion. Where the rollout does not say which were cut, those without one are.
    """
    if penalty is None:
        return rewards
    unended = [not set(ids[-1:]) & set(ends) for ids in rollout.completions]
    cut_B = torch.tensor(rollout.metadata.get("truncated", unended), dtype=torch.float32)
    lost_B = (-penalty * cut_B).masked_fill(rewards.scores_BF.isnan().all(-1), torch.nan)
    return Rewards(
        [*rewards.names, "missing_eos"],
        torch.cat([rewards.scores_BF, lost_B[:, None]], 1),
        torch.cat([rewards.weights_F, torch.ones(1)]),
        [*rewards.timed_out, None],
        rewards.logs,
    )


def total_scores(rewards: Rewards) -> list[Tensor]:
    """The sum of the scores of each completion; ValueError for one that no function has scored."""
    unscored = rewards.scores_BF.isnan().all(1).nonzero().flatten().tolist()
    if unscored:
        raise ValueError(
            f"completion {unscored[0]} got a score from none of {', '.join(rewards.names)}: PPO needs one for each"
        )
    return list(rewards.scores_BF.nan_to_num().sum(1))


def credit_turns(
    rewards: Rewards, rollout: Rollout, advantages: Callable[[Rewards], Tensor], world_size: int
) -> list[list[float]]:
    """A number for each token: the advantage of its turn, by the rewards of this turn and the later ones.

    A turn is compared with the same turn of the episodes that `advantages` compares with, if they have it; it cannot
    have caused the rewards before it. A tool's tokens get the number of the turn that follows; they are masked.
    """
    turn_rewards, turn_ends = (rollout.metadata[name] if len(rollout) else [] for name in ("turn_rewards", "turn_ends"))
    longest = [max(map(len, turn_ends), default=0)]
    most = max(gather_object(longest) if world_size > 1 else longest)
    credited: list[list[float]] = [[] for _ in turn_ends]
    for turn in range(most):
        scores_BF = rewards.scores_BF.clone()
        first_B1 = (~scores_BF.isnan()).int().argmax(1, keepdim=True)  # each kind of environment has a column
        before_B = torch.tensor([sum(earned[:turn]) for earned in turn_rewards])
        scores_BF.scatter_add_(1, first_B1, -before_B[:, None].to(scores_BF))
        absent_B = torch.tensor([turn >= len(ends) for ends in turn_ends], dtype=torch.bool)
        advantages_B = advantages(replace(rewards, scores_BF=scores_BF.masked_fill(absent_B[:, None], torch.nan)))
        for row, ends, advantage in zip(credited, turn_ends, advantages_B.tolist(), strict=True):
            if turn < len(ends):
                row += [advantage] * (ends[turn] - len(row))
    widths = map(len, rollout.completions)
    return [row + [0.0] * (width - len(row)) for row, width in zip(credited, widths, strict=True)]
