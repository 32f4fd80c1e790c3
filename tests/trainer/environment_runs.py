"""Small GRPO runs on an environment that tests start in processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from outcomes import outcome

TESTS = Path(__file__).parent.parent


def trainer_for(folder: str, environment: Any = None, **settings: Any) -> Any:
    """A trainer of a tiny model whose episodes have several turns, rewarded turn by turn."""
    import transformers as t
    from datasets import Dataset, disable_progress_bars

    sys.path.insert(0, str(TESTS))
    from environments_for_tests import letters
    from tokenizers_for_tests import word_tokenizer

    from trl import GRPOConfig, GRPOTrainer

    disable_progress_bars()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    base = {
        "output_dir": folder, "max_completion_length": 20, "num_generations": 2, "num_iterations": 2, "beta": 0.1,
        "turn_level_credit": True, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "scale_rewards": "batch", "max_steps": 4, "learning_rate": 0.5, "optim": "sgd",
        "max_grad_norm": 0.5, "save_rollouts": False,
    }  # fmt: skip
    rows = [{"prompt": text, "wanted": text[0]} for text in ("a b", "c", "d e f", "g h", "i j k")]
    given = settings.pop("train_dataset", Dataset.from_list(rows))
    return GRPOTrainer(
        t.AutoModelForCausalLM.from_config(config), args=GRPOConfig(**{**base, **settings}),
        train_dataset=given, processing_class=word_tokenizer(),
        environment=letters() if environment is None else environment,
    )  # fmt: skip


def updates(rank: int, world: int, out: str, rollout_steps: int) -> None:
    """Four steps on episodes that `world` processes share, so many on each rollout; what came of them in `out`."""
    accumulated = 4 // world
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulated}
    trainer = trainer_for(out + "-files", **shape, steps_per_generation=accumulated * rollout_steps)
    result = outcome(trainer)
    if rank == 0:
        torch.save(result, out)


def own_prompts(rank: int, world: int, out: str) -> None:
    """Four steps without a data set on episodes that `world` processes share; what came of them in `out`."""
    sys.path.insert(0, str(TESTS))
    import random

    from environments_for_tests import Letters, Talkative

    class Asks(Letters):
        """Says its prompt."""

        reusable = False

        def reset(self) -> str:
            return " ".join(random.choices("abcdefghijk", k=3))

        def get_reward(self) -> float:
            return self.reward

    turns: dict[str, Any] = {"max_turns": 3, "generation_kwargs": {"max_new_tokens": 2}, "tool_timeout": None}
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4 // world, "train_dataset": None}
    trainer = trainer_for(out + "-files", Talkative(environment_factory=Asks, **turns), **shape)
    result = outcome(trainer)
    if rank == 0:
        torch.save(result, out)
