"""What the jobs share. They run in any environment, so they import nothing of this project by name but `trl`.

A job is a process `python JOB.py FOLDER OUT SETTINGS`: the materials, the file for its report, and a JSON of settings.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
FOLDER, OUT, SETTINGS = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
STEPS = SETTINGS.pop("steps", 2)


def text(ids: list[int]) -> str:
    return "".join(f" w{i}" for i in ids)


def rows(name: str) -> list[dict[str, Any]]:
    """The data set as text, a word for each token."""
    found = json.loads((FOLDER / "rows.json").read_text())[name]
    return [{k: text(v) if isinstance(v, list) else v for k, v in row.items()} for row in found]


def ids(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / "rows.json").read_text())[name]


def tokenizer(vocabulary: int = 32_000) -> Any:
    """Words are `w17` and the like; no token is added in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=2048
    )


def model(name: str = "policy") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER / name)


def real_rows(name: str) -> list[dict[str, str]]:
    """Rows of real text, for the real model."""
    return json.loads((FOLDER / "real.json").read_text())[name]


def real_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / "real")


def adapted() -> Any:
    """The real model in float32, with LoRA of rank 16 on all its linear layers but the head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(FOLDER / "real", dtype=torch.float32)
    torch.manual_seed(0)
    return get_peft_model(policy, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def arguments(**more: Any) -> dict[str, Any]:
    """Training arguments that every trainer takes: one CPU thread, float32, one epoch over one batch a step."""
    return {
        "output_dir": str(OUT.parent / "trainer"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "num_train_epochs": STEPS,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        **more,
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """CPU and wall seconds from `start` to `stop`, and the memory that the process held before and at most."""

    def start(self) -> None:
        self.before, self.ends = peak_mb(), []
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def stop(self, steps: int) -> dict[str, float]:
        """At the end of each step, with their number so far."""
        self.ends.append(time.process_time())
        cpu, wall = self.ends[-1] - self.cpu, time.perf_counter() - self.wall
        later = {"later_cpu": (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)} if len(self.ends) > 1 else {}
        return {
            "steps": steps,
            "step_cpu": cpu / steps,
            "step_wall": wall / steps,
            "memory_before_mb": self.before,
            "memory_mb": peak_mb(),
            **later,
        }


def report(gate: dict[str, Any], measured: dict[str, float]) -> None:
    OUT.write_text(json.dumps({"gate": gate, **measured}))


def train(
    trainer: Any,
    keys: dict[str, str],
    *,
    only_first: tuple[str, ...] = (),
    only_last: tuple[str, ...] = (),
    units: tuple[str, float] | None = None,
) -> None:
    """Train, and report the time from the first step's data to the last step's end, and what the logs say.

    keys: name in the gate -> name in the logs; of `only_first` the first step's value alone, of `only_last` the
    last one's. units: a name in the logs and a factor, whose product is how much was done in a step.
    """
    from transformers import TrainerCallback

    clock, seen = Clock(), {}

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            seen.update(clock.stop(state.global_step))

    trainer.add_callback(Watch())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        print(entry)
    gate = {name: [float(entry[key]) for entry in logs] for name, key in keys.items()}
    gate.update({name: gate[name][:1] for name in only_first} | {name: gate[name][-1:] for name in only_last})
    if units is not None:
        seen["units"] = units[1] * sum(float(entry[units[0]]) for entry in logs) / len(logs)
    report(gate, seen)
