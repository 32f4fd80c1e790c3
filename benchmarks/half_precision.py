"""How many completions an update clips before anything was learned, in bfloat16 on the CPU.

Run: `python benchmarks/half_precision.py`. Prints the table of `docs/results/half_precision.md`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, PrinterCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

TOKENS, ROWS, SEEDS = 100, 32, 4
GSPO = {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4}
"""the clip range of its paper"""


class RLOOAsSampled(RLOOTrainer):
    """Learns from the sampler's log-probabilities, whatever the precision."""

    def _sampler_is_coarse(self) -> bool:
        return False


class GRPOAsSampled(GRPOTrainer):
    """Learns from the sampler's log-probabilities, whatever the precision."""

    def _sampler_is_coarse(self) -> bool:
        return False


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each of 98 numbers, padding and an end token."""
    vocabulary = {"<pad>": 0, "<eos>": 1, **{str(number): 2 + number for number in range(98)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def model(seed: int) -> Any:
    """Two layers, with logits as far apart as a trained model's."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.2,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes))


def of_place(completions: list[str], **columns: Any) -> list[float]:
    """Each completion of a group has its own reward."""
    return [float(number % 4) for number in range(len(completions))]


def first_update(trainer: type, config: type, seed: int, **settings: Any) -> dict[str, float]:
    """What is logged of the first update on a rollout."""
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            output_dir=folder, use_cpu=True, seed=seed, per_device_train_batch_size=ROWS, num_generations=4,
            max_completion_length=TOKENS, generation_kwargs={"min_new_tokens": TOKENS}, beta=0.0, max_steps=1,
            logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", save_rollouts=False, **settings,
        )  # fmt: skip
        rows = Dataset.from_dict({"prompt": [f"{number} {number + 1}" for number in range(8)]})
        run = trainer(model(seed), of_place, args, train_dataset=rows, processing_class=tokenizer())
        run.remove_callback(PrinterCallback)
        run.train()
    found: dict[str, float] = run.state.log_history[0]
    return found


def line(name: str, trainers: tuple[type, type], config: type, **settings: Any) -> str:
    """A row of the table: of all seeds."""
    columns = []
    for trainer in trainers:
        columns.append([first_update(trainer, config, seed, **settings) for seed in range(SEEDS)])
    before, after = columns
    outside = [each["sampling/outside_clip_range"] for each in before]
    clipped = [[each["clip_ratio/region_mean"] for each in runs] for runs in columns]
    token = mean(each["sampling/sampling_logp_difference/mean"] for each in after)
    return (
        f"| {name} | {token:.1e} | {mean(outside):.0%} ({min(outside):.0%} to {max(outside):.0%}) "
        f"| {mean(clipped[0]):.0%} ({min(clipped[0]):.0%} to {max(clipped[0]):.0%}) | {max(clipped[1]):.0%} |"
    )


if __name__ == "__main__":
    disable_progress_bars()
    torch.set_num_threads(1)
    print("| | difference a token | outside the clip range | clipped before | clipped now |\n|---|---|---|---|---|")
    for precision in (True, False):
        what = "bfloat16" if precision else "float32"
        print(line(f"RLOO, {what}", (RLOOAsSampled, RLOOTrainer), RLOOConfig, bf16=precision))
        print(line(f"GSPO, {what}", (GRPOAsSampled, GRPOTrainer), GRPOConfig, bf16=precision, **GSPO))
