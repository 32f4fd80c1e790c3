"""What `trl plan` says of six runs, beside what they took: memory and CPU seconds.

`python -m benchmarks.plans MODEL FOLDER [job ...]` prints a table. FOLDER holds chats.jsonl,
pairs.csv, votes.jsonl and sums.jsonl; each command is a process of its own with one thread. CPU seconds of a run are
those of `trainer.train`, its start included, which a plan does not count.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = {
    "sft": ("sft", "chats.jsonl", "--max_steps 8"),
    "sft, whole weights": ("sft", "chats.jsonl", "--max_steps 8 --use_peft false --learning_rate 1e-5"),
    "dpo": ("dpo", "pairs.csv", "--max_steps 10"),
    "kto": ("kto", "votes.jsonl", "--max_steps 12"),
    "reward": ("reward", "pairs.csv", "--max_steps 12"),
    "grpo": ("grpo", "sums.jsonl", "--max_steps 4"),
}


def main() -> None:
    model, rows, *chosen = sys.argv[1:]
    print("| run | memory planned, MB | taken, MB | off by | CPU s planned | taken | off by |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in chosen or RUNS:
        job, data, more = RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            words = [job, "--config", f"recipes/{job}-laptop.yaml", "--model", model, "--data", f"{rows}/{data}"]
            words += ["--output_dir", folder, "--save_strategy", "no", *more.split()]
            for line in (["plan", *words], words):
                command = [sys.executable, "-W", "ignore", "-m", "trl", *line]
                done = subprocess.run(
                    command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
                )
                if done.returncode:
                    raise SystemExit(done.stderr)
            record = json.loads((Path(folder) / "run.json").read_text())
        planned, taken = record["planned"], record["peak_memory"]["bytes"]
        cpu, seconds = planned["cpu_seconds"], record["seconds"]["cpu"]
        memory = planned["memory"]["measured"]
        sizes = f"{memory / 1e6:,.0f} | {taken / 1e6:,.0f} | {memory / taken - 1:+.0%}"
        print(f"| {name} | {sizes} | {cpu:.0f} | {seconds:.0f} | {cpu / seconds - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
