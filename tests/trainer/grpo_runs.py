"""Small GRPO runs that tests start in processes of their own."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from outcomes import outcome

TESTS = Path(__file__).parent.parent


def trainer_for(folder: str, **settings: Any) -> Any:
    """A trainer of a tiny model; each process draws weights of its own, of which the first one's count."""
    import transformers as t
    from datasets import Dataset, disable_progress_bars

    sys.path.insert(0, str(TESTS))
    from tokenizers_for_tests import word_tokenizer

    from trl import GRPOConfig, GRPOTrainer

    disable_progress_bars()
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ.get("RANK", 0)))
    config = t.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    base = {
        "output_dir": folder, "max_completion_length": 6, "num_generations": 2, "num_iterations": 2, "beta": 0.1,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
        "scale_rewards": "batch", "top_entropy_quantile": 0.7,
    }  # fmt: skip

    def letters(completions: list[str], **columns: Any) -> list[float]:
        return [float(sum(letter in "abcdefghij" for letter in text.split())) for text in completions]

    def varied(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        return [0.0 if "d" in prompt else len(set(text.split())) / 6 for prompt, text in pairs]

    return GRPOTrainer(
        t.AutoModelForCausalLM.from_config(config), [letters, varied], GRPOConfig(**{**base, **settings}),
        Dataset.from_list([{"prompt": text} for text in ("a b", "c", "d e f", "g h", "i j k")]),
        processing_class=word_tokenizer(),
    )  # fmt: skip


def resumable_run(folder: str, steps: int = 12) -> None:
    """`steps` steps, four on each rollout, a checkpoint behind each; prints each step; the end in `end.pt`."""
    from transformers import PrinterCallback, TrainerCallback

    warnings.simplefilter("ignore")

    class Announcer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            print(state.global_step, flush=True)

    trainer = trainer_for(
        folder, per_device_train_batch_size=4, steps_per_generation=2, max_steps=steps, learning_rate=1e-3,
        save_strategy="steps", save_steps=1, save_total_limit=3, sync_ref_model=True, ref_model_sync_steps=3,
        logging_strategy="no",
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Announcer())
    trainer.train(resume_from_checkpoint=True)
    torch.save([p.detach() for p in trainer.model.parameters()], os.path.join(folder, "end.pt"))


def updates(rank: int, world: int, out: str, **settings: Any) -> None:
    """Four steps on rollouts that `world` processes share; what came of them in `out`."""
    result = outcome(
        trainer_for(
            out + "-files", per_device_train_batch_size=4, gradient_accumulation_steps=4 // world, max_steps=4,
            learning_rate=0.5, optim="sgd", max_grad_norm=0.5, **settings,
        )
    )  # fmt: skip
    if rank == 0:
        torch.save(result, out)


def refilled(rank: int, world: int, out: str) -> None:
    """`updates` with dynamic sampling."""
    updates(rank, world, out, dynamic_sampling=True, dynamic_sampling_max_rounds=4)


RELATIVES = ("grpo-gspo", "grpo-cispo", "rloo", "online-dpo", "raft", "distillation", "gkd")


def relatives(rank: int, world: int, out: str) -> None:
    """What the other on-policy trainers log on rollouts that `world` processes share, in `out`."""
    sys.path.insert(0, str(TESTS))
    logs = {name: _logs(name, world, Path(f"{out}-{rank}-files")) for name in RELATIVES}
    if rank == 0:
        torch.save(logs, out)


def _logs(name: str, world: int, folder: Path) -> dict[str, list[float]]:
    from conformity import build, history

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trainer = build(name, folder, per_device_train_batch_size=8 // world, max_steps=4, use_cpu=True)
    trainer.train()
    assert trainer.args.world_size == world
    keys = ("loss", "grad_norm", "reward", "completions/mean_length", "policy_loss", "val/contain_eos_token",
            "objective/kl", "objective/entropy", "objective/rlhf_reward", "objective/scores_margin")  # fmt: skip
    return {key: history(trainer, key) for key in keys}
