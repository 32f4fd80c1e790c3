"""The third stage of the quickstart: PPO against the reward model, measured before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.quickstart.language_model import adapters
from trl.quickstart.progress import Progress
from trl.quickstart.recipe import Recipe
from trl.quickstart.results import Reading, Reinforcement
from trl.quickstart.reviews import Reviews, openings
from trl.rewards.reward_model import RewardModel
from trl.rewards.sentiment import varied_sentiment, variety


def reinforce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardModel,
    reviews: Reviews,
    recipe: Recipe,
    seed: int,
    progress: Progress,
) -> tuple[PPOTrainer, Reinforcement]:
    """Train by PPO with the imitating model as reference; measure before and after on prompts of held-out films."""
    prompts = openings(reviews.heldout, recipe.prompt_words, seed, recipe.measured_prompts)
    with progress.stage("Before", 1) as stage:
        trainer = make_trainer(model, tokenizer, openings(reviews.imitate, recipe.prompt_words, seed), recipe, seed)
        writer = Writer(trainer, tokenizer, recipe)
        lines = writer.write(prompts, seed)
        reward.calibrate([line.text for line in lines])
        before = read(trainer, lines, reward)
        stage.advance()
    with progress.stage("Reinforce", recipe.ppo_steps) as stage:
        history: dict[str, list[float]] = {}
        ending = f"all {recipe.ppo_steps} steps, within the limits of KL and variety"
        for step, queries in zip(range(recipe.ppo_steps), _forever(trainer.dataloader), strict=False):
            figures = ppo_step(trainer, writer, reward, queries)
            for name, value in figures.items():
                history.setdefault(name, []).append(value)
            stage.advance(figures=figures)
            if reason := hacked(figures, _mean(before.variety), recipe):
                ending = f"stopped after step {step + 1} of {recipe.ppo_steps}: {reason}"
                stage.shorten()
                break
    with progress.stage("After", 1) as stage:
        after = read(trainer, writer.write(prompts, seed), reward)
        stage.advance()
    return trainer, Reinforcement(prompts, before, after, history, ending)


def make_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, queries: Sequence[str], recipe: Recipe, seed: int
) -> PPOTrainer:
    """A PPO trainer for new adapters (or all weights), with a value head that starts at 0."""
    config = PPOConfig(
        seed=seed,
        learning_rate=recipe.ppo_rate,
        batch_size=recipe.ppo_lines,
        mini_batch_size=recipe.ppo_minibatch,
        ppo_epochs=recipe.ppo_epochs,
        init_kl_coef=recipe.kl_coefficient,
        adap_kl_ctrl=False,
        max_grad_norm=1.0,
        steps=recipe.ppo_steps * recipe.ppo_lines,
        anneal_learning_rate=True,
        temperature=recipe.temperature,
    )
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(
        model, peft_config=adapters(model, recipe.lora_share), v_head_initializer_range=0.0
    )
    return PPOTrainer(
        config,
        model=policy,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"query": list(queries)}),
        data_collator=lambda rows: [row["query"] for row in rows],
    )


def ppo_step(trainer: PPOTrainer, writer: Writer, reward: RewardModel, queries: Sequence[str]) -> dict[str, float]:
    """One PPO step: write, score, learn. Returns the figures for the curves."""
    lines = writer.write(queries)
    scores = finite(reward.score([line.text for line in lines]))
    stats = trainer.step(
        [line.query for line in lines], [line.response for line in lines], [torch.tensor(score) for score in scores]
    )
    return {
        "reward": _mean(scores),
        "judge": _mean([varied_sentiment(line.text) for line in lines]),
        "KL": float(stats["objective/kl"]),
        "variety": _mean([variety(line.text) for line in lines]),
    }


def hacked(figures: dict[str, float], usual_variety: float, recipe: Recipe) -> str:
    """Why these figures of a step show that the reward is no longer reliable; empty if they do not."""
    if figures["KL"] > recipe.highest_kl:
        return f"KL {figures['KL']:.1f} is above {recipe.highest_kl:.1f} nats a continuation"
    if figures["variety"] < usual_variety - recipe.lost_variety:
        return f"the distinct-word ratio fell from {usual_variety:.2f} to {figures['variety']:.2f}"
    return ""


def finite(scores: Sequence[float]) -> list[float]:
    """The scores; ValueError unless all are finite, since a policy must not learn from others."""
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"the reward of text {index} is {score}: train the reward model with a lower rate")
    return list(scores)


@dataclass(frozen=True)
class Line:
    """A prompt, its continuation, and both as text."""

    query: torch.Tensor
    response: torch.Tensor
    text: str


class Writer:
    """Continues prompts with the current policy."""

    def __init__(self, trainer: PPOTrainer, tokenizer: PreTrainedTokenizerBase, recipe: Recipe):
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.recipe = recipe

    def write(self, prompts: Sequence[str], seed: int | None = None) -> list[Line]:
        """A line for each prompt; the same policy and seed give the same lines."""
        queries = [torch.tensor(ids) for ids in self.tokenizer(list(prompts))["input_ids"]]
        if seed is not None:
            torch.manual_seed(seed)
        responses = self.trainer.generate(
            queries, batch_size=len(queries), return_prompt=False, do_sample=True, top_k=0, top_p=1.0,
            max_new_tokens=self.recipe.new_tokens, min_new_tokens=self.recipe.least_tokens,
        )  # fmt: skip
        whole = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
        texts = [" ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in whole]
        return [Line(*parts) for parts in zip(queries, responses, texts, strict=True)]


def read(trainer: PPOTrainer, lines: Sequence[Line], reward: RewardModel) -> Reading:
    """The scores of lines, and their KL from the reference."""
    texts = [line.text for line in lines]
    return Reading(
        texts=texts,
        reward=finite(reward.score(texts)),
        judge=[varied_sentiment(text) for text in texts],
        variety=[variety(text) for text in texts],
        kl=sampled_kl(trainer, lines),
    )


@torch.no_grad()
def sampled_kl(trainer: PPOTrainer, lines: Sequence[Line]) -> list[float]:
    """log p - log p_ref of each continuation, summed over its tokens."""
    queries, responses = [line.query for line in lines], [line.response for line in lines]
    inputs = trainer.prepare_model_inputs(queries, responses)
    policy, _, _, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    with trainer.reference.model() as reference:
        assert reference is not None
        frozen, _, _, _ = trainer.batched_forward_pass(reference, queries, responses, inputs)
    return [float(kl) for kl in ((policy - frozen) * mask).sum(1)]


def _forever(loader: Any) -> Iterator[list[str]]:
    while True:
        yield from loader


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
