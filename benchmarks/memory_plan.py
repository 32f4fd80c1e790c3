"""What jobs are predicted to need, beside what they needed: memory of a process, on a CPU, SmolLM2-135M-Instruct.

`python -m benchmarks.memory_plan MODEL` prints the table of docs/scale.md. Each job is a process of its own with one
thread, two optimizer steps in float32 on rows of known lengths. The prediction is made before the first step
(`predicted` in `run.json`); what was needed is the most that the process held (`VmHWM`).
"""

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import printed_by

JOBS = ("SFT", "SFT, adapter", "SFT, layers computed again", "DPO with a reference", "Reward", "KTO", "GRPO")


def ids(count: int, draw: random.Random) -> list[int]:
    return [draw.randrange(100, 40000) for _ in range(count)]


def trainer_of(job: str, model: str, folder: str) -> Any:
    """The trainer of a job, with rows of 256 tokens, or of 64 and 96."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    import trl

    draw = random.Random(0)
    settings: dict[str, Any] = {"output_dir": folder, "max_steps": 2, "report_to": "none", "save_strategy": "no",
                                "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1}  # fmt: skip
    shared: dict[str, Any] = {"processing_class": AutoTokenizer.from_pretrained(model), "callbacks": [
        trl.RunFolderCallback()]}  # fmt: skip
    if job.startswith("SFT"):
        rows = Dataset.from_dict({"input_ids": [ids(256, draw) for _ in range(8)]})
        config = trl.SFTConfig(per_device_train_batch_size=3, gradient_checkpointing="again" in job, **settings)
        adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if "adapter" in job else None
        return trl.SFTTrainer(model, args=config, train_dataset=rows, peft_config=adapter, **shared)
    prompts, answers = [ids(64, draw) for _ in range(8)], [ids(96, draw) for _ in range(16)]
    pairs = Dataset.from_dict({"prompt_ids": prompts, "chosen_ids": answers[:8], "rejected_ids": answers[8:]})
    if job.startswith("DPO"):
        config = trl.DPOConfig(per_device_train_batch_size=3, **settings)
        return trl.DPOTrainer(model, args=config, train_dataset=pairs, **shared)
    if job == "Reward":
        config = trl.RewardConfig(per_device_train_batch_size=3, **settings)
        return trl.RewardTrainer(model, args=config, train_dataset=pairs, **shared)
    texts = shared["processing_class"].batch_decode(prompts)
    if job == "KTO":
        said = shared["processing_class"].batch_decode(answers[:8])
        rows = Dataset.from_dict({"prompt": texts, "completion": said, "label": [True, False] * 4})
        return trl.KTOTrainer(
            model, args=trl.KTOConfig(per_device_train_batch_size=4, **settings), train_dataset=rows, **shared
        )
    config = trl.GRPOConfig(per_device_train_batch_size=16, num_generations=8, max_completion_length=48, **settings)
    return trl.GRPOTrainer(
        model, args=config, train_dataset=Dataset.from_dict({"prompt": texts}),
        reward_funcs=lambda completions, **columns: [float(len(text)) for text in completions], **shared,
    )  # fmt: skip


def measure(job: str, model: str, folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    trainer_of(job, model, folder).train()


def main() -> None:
    model, *chosen = sys.argv[1:]
    print("| | predicted, MB | needed, MB | off by | largest parts, predicted |\n| --- | --- | --- | --- | --- |")
    for job in chosen or JOBS:
        with tempfile.TemporaryDirectory() as folder:
            code = f"from benchmarks.memory_plan import measure; measure({job!r}, {model!r}, {folder!r})"
            printed_by(code)
            record = json.loads((Path(folder) / "run.json").read_text())
        predicted, needed = record["predicted"], record["peak_memory"]["bytes"]
        parts = sorted(predicted["parts"].items(), key=lambda part: -part[1])[:3]
        shown = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts)
        print(
            f"| {job} | {predicted['bytes'] / 1e6:,.0f} | {needed / 1e6:,.0f} | "
            f"{predicted['bytes'] / needed - 1:+.0%} | {shown} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
