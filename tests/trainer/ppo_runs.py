"""Small PPO runs that tests start in processes of their own."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from process_group import join_group, leave_group

TESTS = Path(__file__).parent.parent


def trainer_for(optimizer: Any = None, **numbers: Any) -> Any:
    """A trainer of a tiny model, the same in every process."""
    import transformers as t
    from datasets import Dataset

    sys.path.insert(0, str(TESTS))
    from tokenizers_for_tests import word_tokenizer

    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLMWithValueHead.from_pretrained(t.AutoModelForCausalLM.from_config(config))
    return PPOTrainer(
        PPOConfig(**numbers), model, tokenizer=word_tokenizer(), data_collator=list,
        optimizer=None if optimizer is None else optimizer(model.parameters()),
        dataset=Dataset.from_list([{"prompt": text} for text in ("a b", "c", "d e f", "g h", "i j k")]),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    )  # fmt: skip


def resumable_run(folder: str, steps: int = 12) -> None:
    """`steps` steps, a checkpoint behind each, from the newest one on; prints each step; the end in `end.pt`."""
    warnings.simplefilter("ignore")
    trainer = trainer_for(
        batch_size=4, mini_batch_size=2, ppo_epochs=2, steps=4 * steps, learning_rate=1e-3, max_new_tokens=4,
        output_dir=folder, save_steps=1, use_score_scaling=True, anneal_learning_rate=True,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True, callback=lambda step, *_: print(step, flush=True))
    torch.save([p.detach() for p in trainer.model.parameters()], os.path.join(folder, "end.pt"))


def updates(rank: int, world: int, port: int, out: str) -> None:
    """Two steps on four samples that `world` processes share, the second one twice; what came of them in `out`."""
    if world > 1:
        join_group(rank, world, port)
    _updates(rank, world, out)  # the trainer is gone when it returns
    if world > 1:
        leave_group()


def _updates(rank: int, world: int, out: str) -> None:
    rows = 4 // world
    trainer = trainer_for(
        lambda parameters: torch.optim.SGD(parameters, lr=0.5), batch_size=rows, mini_batch_size=1,
        gradient_accumulation_steps=rows, ppo_epochs=2, whiten_rewards=True, use_score_scaling=True,
        use_score_norm=True, max_grad_norm=0.5, target=0.1, horizon=20,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    queries = [torch.randint(4, 100, (3 + i,), generator=g) for i in range(4)]
    responses = [torch.randint(4, 100, (2 + 2 * i,), generator=g) for i in range(4)]  # a mean of means would show
    scores = [torch.tensor(float(i)) for i in (3, 0, 1, -2)]
    part = slice(rank * rows, (rank + 1) * rows)
    ends = []
    for turn in range(3):
        if turn == 1:
            trainer.save_state(f"{out}-state")
        if turn == 2:
            trainer.load_state(f"{out}-state")
        stats = trainer.step(queries[part], responses[part], scores[part])
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(again, once) for once, again in zip(*ends[1:], strict=True))
    if rank == 0:
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        kept = ("ppo/loss/total", "objective/kl", "ppo/policy/entropy", "ppo/mean_scores")
        torch.save({"weights": weights, "kl_coef": trainer.kl_ctl.value, **{k: stats[k] for k in kept}}, out)
