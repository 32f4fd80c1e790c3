"""Memory that two ranks need at most while they train a model of 135 M weights: DDP beside FSDP2, on the CPU (gloo).

`python -m benchmarks.sharded_memory` prints a table. The model has the shape of SmolLM2-135M and random weights in
float32; AdamW; a row of 64 tokens on each rank, so that weights, gradients and optimizer are nearly all there is.
Live bytes (glibc) from the end of the first step on, above those before the model was built.
"""

import ctypes
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "trainer")]
CASES = ("SFT", "DPO with a reference", "GRPO, gathered", "GRPO, layer by layer")
SHAPE = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


NUMBERS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Mallinfo(ctypes.Structure):
    """What glibc says of its memory."""

    _fields_: ClassVar[list[Any]] = [(name, ctypes.c_size_t) for name in NUMBERS.split()]


def live() -> float:
    """MB that this process has asked for and not freed: what is resident holds freed memory too."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = Mallinfo
    found = libc.mallinfo2()
    return (found.uordblks + found.hblkhd) / 1e6


class Watch(TrainerCallback):
    """Looks every few milliseconds, from the end of the first step on, at what is live."""

    def __init__(self) -> None:
        self.most, self.ends = 0.0, False

    def look(self) -> None:
        while not self.ends:
            self.most = max(self.most, live())
            time.sleep(0.004)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            threading.Thread(target=self.look, daemon=True).start()


def trainer_of(case: str, folder: str, watch: Watch, **settings: Any) -> Any:
    """The trainer of a case."""
    from tokenizers_for_tests import word_tokenizer

    import trl

    torch.manual_seed(0)
    model, words = AutoModelForCausalLM.from_config(SHAPE), "a b c d e f g h " * 8
    settings |= {"output_dir": folder, "per_device_train_batch_size": 1, "max_steps": 3, "report_to": "none",
                 "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}  # fmt: skip
    shared: dict[str, Any] = {"model": model, "processing_class": word_tokenizer(), "callbacks": [watch]}
    if case == "SFT":
        rows = Dataset.from_dict({"text": [words] * 8})
        return trl.SFTTrainer(args=trl.SFTConfig(**settings), train_dataset=rows, **shared)
    if case.startswith("DPO"):
        rows = Dataset.from_dict({"prompt": ["a b "] * 8, "chosen": [words[:64]] * 8, "rejected": [words[2:66]] * 8})
        return trl.DPOTrainer(args=trl.DPOConfig(**settings), train_dataset=rows, **shared)
    settings |= {"num_generations": 2, "max_completion_length": 16, "save_rollouts": False}
    settings |= {"gather": "layers"} if "layer" in case else {}
    rows = Dataset.from_dict({"prompt": [words[:64]] * 8})
    rewards = {"reward_funcs": lambda completions, **columns: [float(len(text)) for text in completions]}
    return trl.GRPOTrainer(args=trl.GRPOConfig(**settings), train_dataset=rows, **rewards, **shared)


def measure(rank: int, world: int, path: str, engine: str, case: str) -> None:
    """Train, and write MB and CPU seconds of this rank to `path`."""
    from sharded_runs import engine_settings, shard_on_the_cpu

    torch.set_num_threads(1)
    if engine == "fsdp2":
        shard_on_the_cpu()
    before, watch = live(), Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(case, folder, watch, **engine_settings(engine))
        started, wall = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()
        trainer.train()
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - started, time.perf_counter() - wall
    watch.ends = True
    torch.save((watch.most - before, *seconds), f"{path}-{rank}")


def main() -> None:
    from process_group import on_ranks

    print("| | DDP, MB a rank | FSDP2, MB a rank | CPU seconds of a rank, three steps: DDP, FSDP2 |")
    print("| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for case in sys.argv[1:] or CASES:
            found = []
            for engine in ("ddp", "fsdp2"):
                on_ranks(measure, 2, f"{folder}/{engine}", engine, case)
                found.append([torch.load(f"{folder}/{engine}-{rank}") for rank in range(2)])
            sizes = [f"{max(rank[0] for rank in ranks):.0f}" for ranks in found]
            seconds = [f"{max(rank[1] for rank in ranks):.1f}" for ranks in found]
            print(f"| {case} | {sizes[0]} | {sizes[1]} | {', '.join(seconds)} |", flush=True)


if __name__ == "__main__":
    main()
