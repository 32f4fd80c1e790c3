"""`PPOTrainer.train`: the step driven from a data set of prompts and whatever scores a response."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor, nn

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.models.scoring import rewards
from trl.trainer.ppo_checkpoint import PREFIX, find_checkpoint, keep_newest, load_state, save_state
from trl.trainer.ppo_setup import stop_tokens

RewardFunction = Callable[..., Sequence[float]]
TEXT_COLUMNS = ("prompt", "query")
"""where the text of a prompt is looked for, if there are no `input_ids`"""
SHOWN = {"score": "ppo/mean_scores", "kl": "objective/kl", "entropy": "ppo/policy/entropy"}
"""what the progress bar shows"""


@dataclass(frozen=True)
class PromptStream:
    """Rows of a data set in an endless shuffled order that is a function of the position alone.

    Every epoch is a permutation of its own. A step takes `world * rows` rows, of which each process has its part: the
    order does not depend on the number of processes, and a run goes on from a position without replaying.
    """

    dataset: Any
    seed: int
    rows: int
    rank: int = 0
    world: int = 1

    def batch(self, step: int) -> list[dict[str, Any]]:
        """The rows of this process at a step, counted from 0."""
        first, size = (step * self.world + self.rank) * self.rows, len(self.dataset)
        places = [divmod(index, size) for index in range(first, first + self.rows)]
        orders = {
            epoch: torch.randperm(size, generator=torch.Generator().manual_seed(self.seed + epoch))
            for epoch in dict(places)
        }
        return [self.dataset[int(orders[epoch][place])] for epoch, place in places]


def prompt_ids(row: Mapping[str, Any], tokenizer: Any) -> Tensor:
    """The tokens of a row's prompt: its `input_ids`, else its `prompt` or `query` (a text or a conversation). [P]"""
    if "input_ids" in row:
        return torch.as_tensor(row["input_ids"], dtype=torch.long).flatten()
    for name in TEXT_COLUMNS:
        if name in row and isinstance(row[name], str):
            return torch.tensor(tokenizer(row[name])["input_ids"], dtype=torch.long)
        if name in row:
            ids = tokenizer.apply_chat_template(row[name], add_generation_prompt=True, return_dict=False)
            return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"a row of the data set has columns {list(row)}: give it `input_ids`, `prompt` or `query`")


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def text_of(row: Mapping[str, Any], query: Tensor, tokenizer: Any) -> str:
    for name in TEXT_COLUMNS:
        if isinstance(row.get(name), str):
            return row[name]
    return tokenizer.decode(query, skip_special_tokens=True)


class Judge:
    """Scores of responses: the sum of what reward functions and a reward model say.

    functions: called with `prompts`, `completions` (texts), `completion_ids` and the data set's columns, each by
    keyword; they return a number for each completion. model: a model with a score head of one label; where it has a
    tokenizer of its own, it reads prompt and completion as text.
    """

    def __init__(
        self,
        tokenizer: Any,
        functions: RewardFunction | Sequence[RewardFunction] | None,
        model: nn.Module | None,
        model_tokenizer: Any = None,
        rows: int = 8,
    ):
        self.functions = [functions] if callable(functions) else list(functions or ())
        if not self.functions and model is None:
            raise ValueError("train() needs something that scores responses: pass `reward_funcs` or `reward_model`")
        if model is None and model_tokenizer is not None:
            raise ValueError("reward_processing_class: it belongs to a `reward_model`, and there is none")
        self.tokenizer, self.model, self.rows = tokenizer, model, rows
        self.model_tokenizer = None if model_tokenizer is tokenizer else model_tokenizer

    @classmethod
    def of(cls, trainer: Any, functions: Any, model: Any, model_tokenizer: Any) -> Judge:
        if model is not None:
            model = trainer.accelerator.prepare_model(model.requires_grad_(False).eval(), evaluation_mode=True)
        return cls(trainer.tokenizer, functions, model, model_tokenizer, rows=max(8, trainer.config.mini_batch_size))

    def __call__(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> Tensor:
        """[B] on the CPU; ValueError for a score that is missing or not finite."""
        total = torch.zeros(len(rows))
        for function in self.functions:
            total += self._of_function(function, rows, batch)
        if self.model is not None:
            total += self._of_model(batch)
        return total

    def _of_function(self, function: RewardFunction, rows: Sequence[Mapping[str, Any]], batch: Any) -> Tensor:
        name = getattr(function, "__name__", type(function).__name__)
        taken = {"prompts", "completions", "completion_ids", "prompt", "completion"}
        columns = {key: values for key, values in columns_of(rows).items() if key not in taken}
        values = function(
            prompts=batch["query"],
            completions=batch["response"],
            completion_ids=[response.tolist() for response in batch["responses"]],
            **columns,
        )
        values = values.tolist() if isinstance(values, Tensor) else list(values)
        if len(values) != len(rows):
            raise ValueError(f"the reward function {name} gave {len(values)} scores for {len(rows)} completions")
        missing = next((place for place, value in enumerate(values) if value is None), None)
        if missing is not None:
            raise ValueError(
                f"the reward function {name} gave no score for completion {missing}: PPO needs one for each"
            )
        return torch.tensor([float(value) for value in values])

    @torch.no_grad()
    def _of_model(self, batch: Mapping[str, Any]) -> Tensor:
        device = next(self.model.parameters()).device  # type: ignore[union-attr]
        if self.model_tokenizer is None:
            pairs = zip(batch["queries"], batch["responses"], strict=True)
            trees = [TokenTree(query.tolist(), [Branch(response.tolist())]) for query, response in pairs]
        else:
            texts = [query + response for query, response in zip(batch["query"], batch["response"], strict=True)]
            trees = [TokenTree([], [Branch(self.model_tokenizer(text)["input_ids"])]) for text in texts]
        parts = [
            rewards(self.model, pack(trees[start : start + self.rows]).to(device))  # type: ignore[arg-type]
            for start in range(0, len(trees), self.rows)
        ]
        return torch.cat(parts).float().cpu()


def sampling_kwargs(config: Any, tokenizer: Any, stop_ids: Iterable[int]) -> dict[str, Any]:
    """Keywords of `generate` in `train()`."""
    ends = [*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *stop_ids]
    plain = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": config.max_new_tokens}
    return {**plain, **({"eos_token_id": ends} if ends else {}), **config.generation_kwargs}


def rollout(trainer: Any, rows: Sequence[Mapping[str, Any]], judge: Judge, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Sample a response to each row's prompt and score it: `queries`, `responses`, their texts, `scores`."""
    tokenizer = trainer.tokenizer
    queries = [prompt_ids(row, tokenizer) for row in rows]
    responses = trainer.generate(queries, batch_size=len(queries), return_prompt=False, **kwargs)
    batch: dict[str, Any] = {"queries": queries, "responses": responses}
    batch["query"] = [text_of(row, query, tokenizer) for row, query in zip(rows, queries, strict=True)]
    batch["response"] = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
    batch["scores"] = list(judge(rows, batch))
    return batch


def batches(trainer: Any) -> Iterator[list[dict[str, Any]]]:
    """See `PPOTrainer.batches`."""
    if trainer.dataset is None:
        raise ValueError("dataset=None: give the trainer a data set of prompts")
    if not len(trainer.dataset):
        raise ValueError("dataset: it has no rows")
    accelerator, config = trainer.accelerator, trainer.config
    stream = PromptStream(
        trainer.dataset, config.seed, config.batch_size, accelerator.process_index, accelerator.num_processes
    )
    while trainer.data_position < config.total_ppo_epochs:
        rows = stream.batch(trainer.data_position)
        trainer.data_position += 1
        yield rows


def run(
    trainer: Any,
    judge: Judge,
    resume: bool | str | os.PathLike[str] | None,
    callback: Callable[[int, dict[str, Any], dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """See `PPOTrainer.train`."""
    config = trainer.config
    checkpoint = find_checkpoint(resume, config.output_dir)
    if checkpoint is not None:
        load_state(trainer, checkpoint)
    kwargs = sampling_kwargs(config, trainer.tokenizer, stop_tokens(config, trainer.tokenizer))
    stats: dict[str, Any] = {}
    progress = tqdm(
        total=config.total_ppo_epochs, initial=trainer.data_position, desc="PPO", disable=not sys.stderr.isatty()
    )
    for rows in batches(trainer):
        batch = rollout(trainer, rows, judge, kwargs)
        stats = trainer.step(batch["queries"], batch["responses"], batch["scores"])
        trainer.log_stats(stats, batch, batch["scores"])
        progress.update()
        progress.set_postfix({name: f"{float(stats[key]):.3g}" for name, key in SHOWN.items()})
        step = trainer.data_position
        if callback is not None:
            callback(step, stats, batch)
        if config.save_steps is not None and (step % config.save_steps == 0 or step == config.total_ppo_epochs):
            save_state(trainer, os.path.join(config.output_dir, f"{PREFIX}{step}"))
            if trainer.accelerator.is_main_process:
                keep_newest(config.output_dir, config.save_total_limit)
    progress.close()
    return stats
