"""Small PPO runs that tests start in processes of their own."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent.parent


def trainer_for(optimizer: Any = None, seed: int = 0, critic: bool = False, **numbers: Any) -> Any:
    """A trainer of a tiny model, the same in every process. critic: with a value model of its own."""
    import transformers as t
    from datasets import Dataset

    sys.path.insert(0, str(TESTS))
    from tokenizers_for_tests import word_tokenizer

    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = t.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLMWithValueHead.from_pretrained(t.AutoModelForCausalLM.from_config(config))
    config.num_labels = 1
    value_model = t.AutoModelForSequenceClassification.from_config(config) if critic else None
    trained = [*model.parameters(), *([] if value_model is None else value_model.parameters())]
    return PPOTrainer(
        PPOConfig(**numbers), model, tokenizer=word_tokenizer(), data_collator=list, value_model=value_model,
        optimizer=None if optimizer is None else optimizer(trained),
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


def updates(rank: int, world: int, out: str, variant: str) -> None:
    """Two steps on four samples that `world` processes share, the second one twice; what came of them in `out`.

    variant: "plain"; "unused": DDP looks for parameters without gradients; "critic": a value model of its own.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    rows, handlers = 4 // world, [DistributedDataParallelKwargs(find_unused_parameters=True)]
    trainer = trainer_for(
        lambda parameters: torch.optim.SGD(parameters, lr=0.5), batch_size=rows, mini_batch_size=1,
        gradient_accumulation_steps=rows, ppo_epochs=2, whiten_rewards=True, use_score_scaling=True,
        use_score_norm=True, max_grad_norm=0.5, target=0.1, horizon=20, critic=variant == "critic", seed=rank,
        accelerator_kwargs={"kwargs_handlers": handlers} if variant == "unused" else {},
    )  # fmt: skip
    models = [trainer.accelerator.unwrap_model(model) for model in trainer.actor.models]
    named = [(name, p) for model in models for name, p in model.named_parameters() if p.requires_grad]
    start = {name: p.detach().clone() for name, p in named}
    gradients: dict[str, torch.Tensor] = {}
    inner = trainer.optimizer.step

    def step() -> None:
        gradients.update({name: p.grad.clone() for name, p in named if not gradients.get(name, p.new_zeros(())).any()})
        inner()

    trainer.optimizer.step = step
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
        assert turn or abs(stats["objective/kl"]) < 1e-5  # the reference is the policy as it was, on every process
        ends.append([p.detach().clone() for _, p in named])
    assert all(torch.equal(again, once) for once, again in zip(*ends[1:], strict=True))
    kept = ("ppo/loss/total", "objective/kl", "ppo/policy/entropy", "ppo/mean_scores")
    results = {"kl_coef": trainer.kl_ctl.value, **{name: stats[name] for name in kept}}
    moved = {name: p.detach() - start[name] for name, p in named}
    weights = {name: p.detach() for name, p in named}
    torch.save({"weights": weights, "moved": moved, "gradients": gradients, "stats": results}, f"{out}-{rank}")
