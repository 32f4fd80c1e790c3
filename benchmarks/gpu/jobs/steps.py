"""Two steps of SFT, DPO, GRPO and PPO on the same data: losses, and how the weights move.

Run on a CPU in float32, and on the card in float32, bfloat16 and fp16 (whose scaler may leave first steps out);
`compare_steps` holds the moves of the weights against each other.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, OUT, SETTINGS, attempt, folder, record
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

import trl

PRECISION = SETTINGS["precision"]
WORDS = 200


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def model() -> Any:
    """Made on the CPU: the same weights wherever it is trained."""
    config = Qwen2Config(
        vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=2,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, WORDS, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def text(count: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in ids(count, seed))


def arguments(**more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder(), "report_to": "none", "max_steps": 2, "learning_rate": 0.1, "optim": "sgd",
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 0,
        "bf16": PRECISION == "bf16", "fp16": PRECISION == "fp16",
        "use_cpu": DEVICE.type == "cpu", "per_device_train_batch_size": 4, "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0, **more,
    }  # fmt: skip


def sft() -> Any:
    rows = Dataset.from_list([{"text": text(40 + 10 * n, n)} for n in range(8)])
    return trl.SFTTrainer(model(), trl.SFTConfig(**arguments()), train_dataset=rows, processing_class=tokenizer())


def dpo() -> Any:
    rows = [{"prompt": text(50, n), "chosen": text(30 + n, 100 + n), "rejected": text(20, 200 + n)} for n in range(8)]
    return trl.DPOTrainer(
        model(), args=trl.DPOConfig(**arguments(beta=1.0)), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )  # fmt: skip


def grpo() -> Any:
    """With given completions, because what is sampled differs from device to device."""

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        answers = [ids(20 + n, 300 + n) for n in range(len(prompts))]
        return {"prompt_ids": [ids(40, len(str(prompt))) for prompt in prompts], "completion_ids": answers}

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        return [float(number % 4) for number in range(len(completions))]

    rows = Dataset.from_list([{"prompt": text(40, n)} for n in range(8)])
    config = trl.GRPOConfig(**arguments(num_generations=4, beta=0.1, max_completion_length=64, save_rollouts=False))
    return trl.GRPOTrainer(
        model(), reward, config, train_dataset=rows, processing_class=tokenizer(), rollout_func=rollout
    )


def weights(model: Any) -> torch.Tensor:
    return torch.cat([weight.detach().float().cpu().flatten() for weight in model.parameters()])


def offline(trainer: Any) -> tuple[list[float], torch.Tensor]:
    before = weights(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, weights(trainer.model) - before


def ppo() -> tuple[list[float], torch.Tensor]:
    policy = trl.AutoModelForCausalLMWithValueHead.from_pretrained(model())
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.v_head.summary.weight, std=0.1)
    accelerator = {"mixed_precision": "no" if PRECISION == "float32" else PRECISION, "cpu": DEVICE.type == "cpu"}
    config = trl.PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=2, seed=0, accelerator_kwargs=accelerator)
    sgd = torch.optim.SGD(policy.parameters(), lr=0.1)  # Adam makes steps of rounding errors
    trainer = trl.PPOTrainer(config, policy, None, tokenizer(), optimizer=sgd)
    queries, responses = ([torch.tensor(ids(30 + n, seed + n)) for n in range(4)] for seed in (400, 500))
    before = weights(trainer.model)
    stats = trainer.step(queries, responses, [torch.tensor(float(n)) for n in range(4)])
    return [float(stats["ppo/loss/total"])], weights(trainer.model) - before


METHODS = {
    "sft": lambda: offline(sft()), "dpo": lambda: offline(dpo()), "grpo": lambda: offline(grpo()), "ppo": ppo
}  # fmt: skip


def main() -> None:
    moved: dict[str, Any] = {}
    for name, run in METHODS.items():
        with attempt(name):
            losses, moved[name] = run()
            record(name, {"losses": losses})
    torch.save(moved, Path(os.fspath(OUT)).with_suffix(".pt"))


if __name__ == "__main__":
    main()
    sys.exit(0)
