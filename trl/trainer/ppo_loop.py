"""`PPOTrainer.train`: the step driven from a data set of prompts and whatever scores a response."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor

from trl.rewards.named import reward_panel
from trl.rewards.panel import RewardPanel
from trl.rollout.prompts import PromptStream
from trl.trainer.ppo_environment import play
from trl.trainer.ppo_setup import stop_tokens

TEXT_COLUMNS = ("prompt", "query")
"""where the text of a prompt is looked for, if there are no `input_ids`"""
SHOWN = {"score": "ppo/mean_scores", "kl": "objective/kl", "entropy": "ppo/policy/entropy"}
"""what the progress bar shows"""


def prompt_ids(row: Mapping[str, Any], tokenizer: Any) -> Tensor:
    """The tokens of a row's prompt: its `input_ids`, else its `prompt` or `query` (a text or a conversation). [P]"""
    if "input_ids" in row:
        return torch.as_tensor(row["input_ids"], dtype=torch.long).flatten()
    for name in TEXT_COLUMNS:
        if name in row and isinstance(row[name], str):
            return torch.tensor(tokenizer(row[name])["input_ids"], dtype=torch.long)
        if name in row:
            if not isinstance(row[name], list | tuple):
                raise ValueError(f"a row of the data set has {name}={row[name]!r}: give a text or a conversation")
            if not tokenizer.chat_template:
                raise ValueError(
                    f"{name} is a conversation, and the tokenizer has no chat_template: set it, or give texts"
                )
            ids = tokenizer.apply_chat_template(row[name], add_generation_prompt=True, return_dict=False)
            return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"a row of the data set has columns {list(row)}: give it `input_ids`, `prompt` or `query`")


def prompt_of(row: Mapping[str, Any], query: Tensor, tokenizer: Any) -> Any:
    """The prompt as reward functions read it: the row's text or conversation, else its decoded tokens."""
    given = next((row[name] for name in TEXT_COLUMNS if name in row), None)
    return tokenizer.decode(query, skip_special_tokens=True) if given is None else given


def scores_of(
    panel: RewardPanel,
    rows: Sequence[Mapping[str, Any]],
    batch: Mapping[str, Any],
    further: Mapping[str, Sequence[Any]] | None = None,
) -> list[Tensor]:
    """The sum of what the functions of the panel say of each response; ValueError where none says anything.

    They are called with `prompts`, `completions`, `completion_ids` and the data set's columns, each by keyword.
    Completions of conversations are messages. further: keywords that an environment adds or replaces.
    """
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(batch["query"], batch["response"], strict=True)
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompts", "completions")}
    asked = {
        **columns,
        "prompts": batch["query"],
        "completions": completions,
        "completion_ids": [response.tolist() for response in batch["responses"]],
        **(further or {}),
    }
    scores_FB = torch.tensor(panel(len(rows), asked).scores, dtype=torch.float32)
    unscored = scores_FB.isnan().all(0).nonzero().flatten().tolist()
    if unscored:
        raise ValueError(
            f"completion {unscored[0]} got a score from none of {', '.join(panel.names)}: PPO needs one for each"
        )
    return list(scores_FB.nan_to_num().sum(0))


def sampling_kwargs(config: Any, tokenizer: Any, stop_ids: Iterable[int]) -> dict[str, Any]:
    """Keywords of `generate` in `train()`."""
    ends = [*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *stop_ids]
    plain = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": config.max_new_tokens}
    return {**plain, **({"eos_token_id": ends} if ends else {}), **config.generation_kwargs}


def rollout(
    trainer: Any, rows: Sequence[Mapping[str, Any]], panel: RewardPanel, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Sample a response to each row's prompt and score it: `queries`, `responses`, their texts, `scores`."""
    tokenizer = trainer.tokenizer
    queries = [prompt_ids(row, tokenizer) for row in rows]
    responses = trainer.generate(queries, batch_size=len(queries), return_prompt=False, **kwargs)
    batch: dict[str, Any] = {"queries": queries, "responses": responses}
    batch["query"] = [prompt_of(row, query, tokenizer) for row, query in zip(rows, queries, strict=True)]
    batch["response"] = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
    batch["scores"] = scores_of(panel, rows, batch)
    return batch


def episodes(
    trainer: Any, rows: Sequence[Mapping[str, Any]], panel: RewardPanel | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """`rollout` by the trainer's environment; also `masks`, which are 1 where the policy chose the token."""
    tokenizer, device = trainer.tokenizer, trainer.current_device
    ids = [prompt_ids(row, tokenizer) for row in rows]
    prompts = [prompt_of(row, query, tokenizer) for row, query in zip(rows, ids, strict=True)]
    own = [
        {**row, "prompt": prompt, "prompt_ids": query.tolist()}
        for row, prompt, query in zip(rows, prompts, ids, strict=True)
    ]
    played = play(trainer, own, kwargs)
    batch: dict[str, Any] = {"query": prompts, "response": played.texts}
    columns = {"queries": played.prompts, "responses": played.completions, "masks": played.masks}
    for name, lists in columns.items():
        batch[name] = [torch.tensor(row, dtype=torch.long, device=device) for row in lists]
    if panel is None:
        batch["scores"] = list(torch.tensor(played.rewards, dtype=torch.float32))
    else:
        batch["scores"] = scores_of(panel, rows, batch, played.metadata)
    return batch


def batches(trainer: Any) -> Iterator[list[dict[str, Any]]]:
    """See `PPOTrainer.batches`. A step takes the next rows of the stream, of which each process has its part."""
    if trainer.dataset is None:
        raise ValueError("dataset=None: give the trainer a data set of prompts")
    accelerator, config = trainer.accelerator, trainer.config
    stream = PromptStream(trainer.dataset, config.seed)
    while trainer.data_position < config.total_ppo_epochs:
        part = trainer.data_position * accelerator.num_processes + accelerator.process_index
        trainer.data_position += 1
        yield stream.take(part * config.batch_size, config.batch_size)


def panel_of(trainer: Any, functions: Any, tokenizers: Any) -> RewardPanel | None:
    """The reward functions of a trainer; a reward model without a tokenizer of its own reads with the policy's.

    None: its environment gives the rewards.
    """
    if functions is None and trainer.environment is not None:
        return None
    if functions is None:
        raise ValueError("train() needs something that scores responses: pass `reward_funcs`")
    listed = functions if isinstance(functions, list | tuple) else [functions]
    given = tokenizers if isinstance(tokenizers, list | tuple) else [tokenizers] * len(listed)
    own = [
        trainer.tokenizer
        if each is None and not getattr(getattr(source, "config", None), "_name_or_path", "")
        else each
        for source, each in zip(listed, given, strict=False)
    ]
    return reward_panel(list(listed), own + list(given[len(own) :]), None, trainer.accelerator.device)


def run(
    trainer: Any,
    panel: RewardPanel | None,
    callback: Callable[[int, dict[str, Any], dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """See `PPOTrainer.train`."""
    config = trainer.config
    kwargs = sampling_kwargs(config, trainer.tokenizer, stop_tokens(config, trainer.tokenizer))
    sampled: Any = rollout if trainer.environment is None else episodes
    stats: dict[str, Any] = {}
    progress = tqdm(
        total=config.total_ppo_epochs, initial=trainer.data_position, desc="PPO", disable=not sys.stderr.isatty()
    )
    for rows in batches(trainer):
        batch = sampled(trainer, rows, panel, kwargs)
        stats = trainer.step(batch["queries"], batch["responses"], batch["scores"], batch.get("masks"))
        trainer.log_stats(stats, batch, batch["scores"])
        progress.update()
        progress.set_postfix({name: f"{float(stats[key]):.3g}" for name, key in SHOWN.items()})
        step = trainer.data_position
        if callback is not None:
            callback(step, stats, batch)
        if config.save_steps is not None and (step % config.save_steps == 0 or step == config.total_ppo_epochs):
            trainer.save_checkpoint(step)
    progress.close()
    return stats
