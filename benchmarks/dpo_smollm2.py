"""DPO of SmolLM2-135M-Instruct with LoRA on real preferences: a line that critics liked over one they did not, for the
same film, and chat answers over worse ones. Prints held-out margins before and after, as JSON.

    python benchmarks/dpo_smollm2.py films
    python benchmarks/dpo_smollm2.py chat
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections import defaultdict

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import DPOConfig, DPOTrainer
from trl.data.formats import maybe_convert_to_chatml
from trl.quickstart.assets import DEMO_DATA, QUOTES, SMOLLM2, fetch
from trl.quickstart.reviews import _rows, clean


def film_pairs(seed: int) -> list[dict[str, str]]:
    """Fresh over rotten within a film, each quote once; films in order: a split by rows is nearly one by films."""
    films: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(fetch(QUOTES, print) / "rotten_tomatoes_corpus_full.csv.bz2"):
        films[row["movie_name"]][row["category"]].append(clean(row["text"]))
    picker, pairs = random.Random(seed), []
    for film in sorted(films):
        fresh, rotten = (sorted(films[film][kind]) for kind in ("fresh", "rotten"))
        picker.shuffle(fresh)
        picker.shuffle(rotten)
        prompt = f"What do the critics say about the film {film}?\n"
        pairs.append([{"prompt": prompt, "chosen": c, "rejected": r} for c, r in zip(fresh, rotten, strict=False)][:4])
    picker.shuffle(pairs)
    return [pair for of_film in pairs for pair in of_film]


def chat_pairs(seed: int) -> list[dict[str, object]]:
    """The ShareGPT-style pairs of LLaMA-Factory as conversations with an implicit prompt."""
    rows = json.loads((fetch(DEMO_DATA, print) / "dpo_en_demo.json").read_text(encoding="utf-8"))
    made = []
    for row in rows:
        prompt = maybe_convert_to_chatml({"messages": row["conversations"]})["messages"]
        sides = {
            name: maybe_convert_to_chatml({"messages": [row[name]]})["messages"] for name in ("chosen", "rejected")
        }
        made.append({"prompt": prompt, **sides})
    random.Random(seed).shuffle(made)
    return made


TASKS = {
    "films": {"rows": film_pairs, "max_length": 96, "batch": 8, "learning_rate": 3e-4, "held_out": 64},
    "chat": {"rows": chat_pairs, "max_length": 192, "batch": 4, "learning_rate": 2e-4, "held_out": 40},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[args.task]
    folder = fetch(SMOLLM2, print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = task["rows"](0)
    held_out, train = rows[: task["held_out"]], rows[task["held_out"] :]
    random.Random(args.seed).shuffle(train)
    torch.manual_seed(args.seed)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(), max_steps=args.steps, per_device_train_batch_size=task["batch"],
            per_device_eval_batch_size=16, precompute_ref_log_probs=True, learning_rate=task["learning_rate"],
            warmup_steps=2, beta=args.beta, max_length=task["max_length"], truncation_mode="keep_start",
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=args.seed,
            max_tokens_per_microbatch=4096,
        ),
        train_dataset=Dataset.from_list(train[: args.steps * task["batch"]]),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    started, cpu = time.time(), time.process_time()
    before = trainer.evaluate()
    measured = time.process_time()
    trainer.train()
    trained = time.process_time()
    after = trainer.evaluate()
    kept = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    print(
        json.dumps(
            {
                **vars(args),
                "before": {name: round(before[f"eval_{name}"], 4) for name in kept},
                "after": {name: round(after[f"eval_{name}"], 4) for name in kept},
                "train_loss": [round(row["loss"], 3) for row in trainer.state.log_history if "loss" in row],
                "cpu_seconds": {"evaluation": round(measured - cpu), "training": round(trained - measured)},
                "wall_seconds": round(time.time() - started),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
