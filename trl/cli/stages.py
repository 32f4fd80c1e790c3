"""The three stages of the quickstart, each written as a user of the library would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from trl import (
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.cli.intervals import Interval, share_interval
from trl.cli.language_model import adapters
from trl.cli.progress import Progress, StageCallback
from trl.cli.recipe import Recipe
from trl.cli.reviews import Reviews, openings, rating_pairs
from trl.rewards.reward_model import RewardModel
from trl.rewards.sentiment import sentiment, variety, varied_sentiment

CLEAR_RATINGS = 0.5
"""least difference of the ratings in a held-out pair: below, people do not agree on the order either"""
HELDOUT_LINES = 96
"""that the imitation is measured on"""
SCRATCH = "trainer"
"""folder below the output that trainers are given; nothing is saved there"""


@dataclass
class Imitation:
    """What the first stage did."""

    losses: list[float]
    heldout_before: float
    """nats a token on lines of other films"""
    heldout_after: float


def imitate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reviews: Reviews,
    recipe: Recipe,
    seed: int,
    output: Path,
    progress: Progress,
) -> tuple[PreTrainedModel, Imitation]:
    """Fine-tune on critics' lines; the adapter is merged into the weights."""
    train, heldout = ({"text": [r.text for r in part]} for part in (reviews.imitate, reviews.heldout[:HELDOUT_LINES]))
    with progress.stage("Imitate", recipe.imitation_steps) as stage:
        watch = StageCallback(stage, {"loss": "loss", "eval_loss": "held-out"})
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(output / SCRATCH),
                max_steps=recipe.imitation_steps,
                per_device_train_batch_size=recipe.imitation_lines,
                per_device_eval_batch_size=2 * recipe.imitation_lines,
                learning_rate=recipe.imitation_rate,
                max_length=recipe.line_tokens,
                **_common(seed),
            ),
            train_dataset=Dataset.from_dict(train),
            eval_dataset=Dataset.from_dict(heldout),
            tokenizer=tokenizer,
            peft_config=adapters(model, recipe.lora_share),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    trained: Any = trainer.model
    return (trained.merge_and_unload() if recipe.lora_share else trained), Imitation(watch.losses, before, after)


@dataclass
class Preference:
    """What the second stage did."""

    losses: list[float]
    pairs: int
    accuracy: Interval
    """of the reward model on held-out pairs"""
    judge_accuracy: Interval
    """of the judge on the same pairs"""


def learn_reward(
    base: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    reviews: Reviews,
    recipe: Recipe,
    seed: int,
    output: Path,
    progress: Progress,
) -> tuple[RewardModel, Preference]:
    """Train a reward model on pairs of lines that people rated."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    freeze_lower(model, recipe.trained_layers)
    pairs = rating_pairs(reviews.rated, recipe.rating_gap, seed, recipe.reward_pairs)
    with progress.stage("Reward", math.ceil(len(pairs) / recipe.reward_batch)) as stage:
        watch = StageCallback(stage, {"loss": "loss", "accuracy": "accuracy"})
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                output_dir=str(output / SCRATCH),
                num_train_epochs=1,
                per_device_train_batch_size=recipe.reward_batch,
                learning_rate=recipe.reward_rate,
                max_length=2 * recipe.line_tokens,
                **_common(seed),
            ),
            train_dataset=Dataset.from_list(pairs),
            tokenizer=tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        reward = RewardModel(model, tokenizer, max_length=2 * recipe.line_tokens)
        heldout = rating_pairs(reviews.heldout, CLEAR_RATINGS, seed, recipe.accuracy_pairs)
        accuracy = pair_accuracy(reward.raw, heldout)
        judge_accuracy = pair_accuracy(lambda texts: [sentiment(text) for text in texts], heldout)
        stage.advance(0, held_out_accuracy=accuracy.mean)
    return reward, Preference(watch.losses, len(pairs), accuracy, judge_accuracy)


def pair_accuracy(score: Any, pairs: Sequence[dict[str, str]]) -> Interval:
    """Share of pairs whose chosen text scores higher; half of the ties."""
    chosen, rejected = (score([pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    wins = sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True))
    return share_interval(round(wins), len(pairs))


def freeze_lower(model: PreTrainedModel, layers: int) -> None:
    """Only the topmost layers, what lies above them and the score head stay trainable."""
    backbone = model.base_model
    stack = next(module for module in backbone.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 1)
    embeddings = model.get_input_embeddings()
    for module in (embeddings, *list(stack)[: max(0, len(stack) - layers)]):
        module.requires_grad_(False)


@dataclass
class Reading:
    """What one model wrote for the held-out prompts, and what it is worth."""

    texts: list[str]
    reward: list[float]
    judge: list[float]
    variety: list[float]
    kl: list[float]
    """log p - log p_ref of each continuation, in nats"""


@dataclass
class Reinforcement:
    """What the third stage did."""

    prompts: list[str]
    before: Reading
    after: Reading
    history: dict[str, list[float]] = field(default_factory=dict)
    """a list for each curve, a number a step"""
    ending: str = ""


def reinforce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardModel,
    reviews: Reviews,
    recipe: Recipe,
    seed: int,
    progress: Progress,
) -> tuple[PPOTrainer, Reinforcement]:
    """PPO against the reward model, with the imitating model as reference; measured on prompts of held-out films."""
    with progress.stage("Before", 1) as stage:
        trainer = PPOTrainer(
            PPOConfig(
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
            ),
            model=AutoModelForCausalLMWithValueHead.from_pretrained(
                model, peft_config=adapters(model, recipe.lora_share), v_head_initializer_range=0.0
            ),
            tokenizer=tokenizer,
            dataset=Dataset.from_dict({"query": openings(reviews.imitate, recipe.prompt_words, seed)}),
            data_collator=lambda rows: [row["query"] for row in rows],
        )
        writer = Writer(trainer, tokenizer, recipe.new_tokens)
        prompts = openings(reviews.heldout, recipe.prompt_words, seed, recipe.measured_prompts)
        reward.calibrate([line.text for line in writer.write(prompts, seed)])
        outcome = Reinforcement(prompts, before := read(writer, prompts, reward, seed), before)
        stage.advance()
    usual = sum(before.variety) / len(before.variety)
    with progress.stage("Reinforce", recipe.ppo_steps) as stage:
        for step, openings_of_step in zip(range(recipe.ppo_steps), _forever(trainer.dataloader), strict=False):
            lines = writer.write(openings_of_step)
            scores = finite(reward.score([line.text for line in lines]))
            stats = trainer.step(
                [line.query for line in lines], [line.response for line in lines], [torch.tensor(s) for s in scores]
            )
            figures = {
                "reward": _mean(scores),
                "KL": float(stats["objective/kl"]),
                "judge": _mean([varied_sentiment(line.text) for line in lines]),
                "variety": _mean([variety(line.text) for line in lines]),
            }
            for name, value in figures.items():
                outcome.history.setdefault(name, []).append(value)
            stage.advance(**figures)
            if reason := hacked(figures, usual, recipe):
                outcome.ending = f"stopped after step {step + 1} of {recipe.ppo_steps}: {reason}"
                stage.shorten()
                break
        else:
            outcome.ending = f"all {recipe.ppo_steps} steps, within the limits of KL and variety"
    with progress.stage("After", 1) as stage:
        outcome.after = read(writer, prompts, reward, seed)
        stage.advance()
    return trainer, outcome


def hacked(figures: dict[str, float], usual_variety: float, recipe: Recipe) -> str:
    """Why the reward is no longer to be trusted at these figures of a step; empty while it is."""
    if figures["KL"] > recipe.highest_kl:
        return f"KL {figures['KL']:.1f} is above {recipe.highest_kl:.1f} nats a continuation"
    if figures["variety"] < usual_variety - recipe.lost_variety:
        return f"the distinct-word ratio fell from {usual_variety:.2f} to {figures['variety']:.2f}"
    return ""


def finite(scores: Sequence[float]) -> list[float]:
    """The scores, if all are numbers; a policy must not learn from anything else."""
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
    """Continues prompts with the policy as it is."""

    def __init__(self, trainer: PPOTrainer, tokenizer: PreTrainedTokenizerBase, new_tokens: int):
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.new_tokens = new_tokens

    def write(self, prompts: Sequence[str], seed: int | None = None) -> list[Line]:
        """A line for each prompt; with a seed, the same ones as long as the policy is the same."""
        queries = [torch.tensor(ids) for ids in self.tokenizer(list(prompts))["input_ids"]]
        if seed is not None:
            torch.manual_seed(seed)
        responses = self.trainer.generate(
            queries, batch_size=len(queries), return_prompt=False, max_new_tokens=self.new_tokens,
            do_sample=True, top_k=0, top_p=1.0,
        )  # fmt: skip
        whole = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
        texts = [" ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in whole]
        return [Line(*parts) for parts in zip(queries, responses, texts, strict=True)]


def read(writer: Writer, prompts: Sequence[str], reward: RewardModel, seed: int) -> Reading:
    """Continue the prompts and measure the continuations."""
    lines = writer.write(prompts, seed)
    texts = [line.text for line in lines]
    return Reading(
        texts=texts,
        reward=finite(reward.score(texts)),
        judge=[varied_sentiment(text) for text in texts],
        variety=[variety(text) for text in texts],
        kl=sampled_kl(writer.trainer, lines),
    )


@torch.no_grad()
def sampled_kl(trainer: PPOTrainer, lines: Sequence[Line]) -> list[float]:
    """log p - log p_ref of each continuation, summed over its tokens."""
    queries, responses = [line.query for line in lines], [line.response for line in lines]
    inputs = trainer.prepare_model_inputs(queries, responses)
    policy, _, _, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    with trainer.reference.model() as reference:
        frozen, _, _, _ = trainer.batched_forward_pass(reference, queries, responses, inputs)
    return [float(kl) for kl in ((policy - frozen) * mask).sum(1)]


def _forever(loader: Any) -> Any:
    while True:
        yield from loader


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _common(seed: int) -> dict[str, Any]:
    """Settings of both `Trainer` stages: a short warm-up, a log each step, no files, no trackers."""
    return {
        "lr_scheduler_type": "linear", "warmup_steps": 5, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "seed": seed, "data_seed": seed, "max_grad_norm": 1.0,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
