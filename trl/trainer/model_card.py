"""The README beside a model: what was trained, on what, with which settings, to which losses."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl.data.any_text import visible
from trl.trainer.run_record import Resolved, versions, write_whole
from trl.trainer.step_line import short

MARK = "<!-- Written by trl. A README without this line stays as it is. -->"
OTHERS = ("# Model Card for Model ID", "This model card has been generated automatically")
"""what drafts of PEFT and of transformers say, which a card of ours replaces"""
WAYS = {
    "SFTTrainer": "supervised fine-tuning", "IterativeSFTTrainer": "supervised fine-tuning, step by step",
    "RewardTrainer": "learning a reward from preferences", "PRMTrainer": "learning to judge single steps",
    "DPOTrainer": "direct preference optimisation", "ORPOTrainer": "odds-ratio preference optimisation",
    "CPOTrainer": "contrastive preference optimisation", "SimPOTrainer": "simple preference optimisation",
    "KTOTrainer": "learning from answers that are good or not (KTO)",
    "GRPOTrainer": "group-relative policy optimisation",
    "RLOOTrainer": "reinforcement learning, leave one out", "RAFTTrainer": "imitating the best of own answers",
    "OnlineDPOTrainer": "online direct preference optimisation", "DistillationTrainer": "distillation on own answers",
    "PPOTrainer": "proximal policy optimisation",
    "GKDTrainer": "generalised knowledge distillation",
}  # fmt: skip
"""trainer -> what it does, in words"""
TASKS = {"RewardTrainer": "text-classification", "PRMTrainer": "token-classification"}
ALWAYS = (
    "loss_type", "beta", "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_generations",
    "max_completion_length", "temperature", "seed",
)  # fmt: skip
"""settings that a card names where the config has them, also at their defaults"""
LOCAL = re.compile(
    r"output_dir|run_name|logging_\w+|report_to|save_\w+|eval_\w+|overwrite_output_dir|resume_from_checkpoint|use_cpu|"
    r"push_to_hub|hub_\w+|dataloader_\w+|disable_tqdm|enable_jit_checkpoint|model_init_kwargs|dataset_num_proc"
)
"""settings that say nothing about the model"""

PPO_CARD = """---
license: apache-2.0
library_name: transformers
tags:
- trl
- ppo
- transformers
- reinforcement-learning
---

# {model_name}

A language model that was fine-tuned with proximal policy optimisation against a score of its responses, with `trl`.
It can be used for text generation.

## Usage

The model itself, with transformers:

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{model_id}")
outputs = generator("Hello, my llama is cute")
```

With its value head, to train on:

```python
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead

tokenizer = AutoTokenizer.from_pretrained("{model_id}")
model = AutoModelForCausalLMWithValueHead.from_pretrained("{model_id}")

inputs = tokenizer("Hello, my llama is cute", return_tensors="pt")
logits, _, values = model(**inputs)
```
"""


def write_model_card(path: str, model_name: str | None, template: str) -> None:
    """`README.md` in the folder, under the name of the Hub account at hand; without one, a warning instead."""
    from huggingface_hub import whoami

    try:
        user = whoami()["name"]
    except Exception:  # offline, not logged in, token refused: each has its own
        warnings.warn("Cannot retrieve user information assuming you are running in offline mode.")
        return
    os.makedirs(path, exist_ok=True)
    name = model_name or "TRL Model"
    with open(os.path.join(path, "README.md"), "w", encoding="utf-8") as file:
        file.write(template.format(model_name=name, model_id=f"{user}/{os.path.basename(os.path.normpath(path))}"))


@dataclass
class CardFacts:
    """What a card says."""

    trainer: str
    name: str
    base: str
    settings: Iterable[Resolved]
    licence: str | None = None
    tags: Sequence[str] = ()
    peft: bool = False
    steps: int = 0
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """of each data set what is known of it"""
    datasets: Sequence[str] = ()
    """names of the data sets, on the Hub or files"""
    logs: Sequence[Mapping[str, Any]] = ()
    """the last ones, of training and of evaluation"""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """further metadata"""


def card_text(facts: CardFacts) -> str:
    """The README: metadata, then what was done."""
    import yaml

    licence = facts.licence or licence_of(facts.base)
    metadata: dict[str, Any] = {
        "library_name": "peft" if facts.peft else "transformers", "license": licence or "unknown",
        "base_model": facts.base if on_hub(facts.base) else "",
        "datasets": [name for name in facts.datasets if on_hub(name)],
        "model_name": facts.name, "tags": list(facts.tags),
        "pipeline_tag": TASKS.get(facts.trainer, "text-generation"), **facts.extra,
    }  # fmt: skip
    head = yaml.safe_dump({k: v for k, v in metadata.items() if v}, sort_keys=False, allow_unicode=True)
    base = f" from {_code(_public(facts.base))}" if facts.base else ""
    packages = [one for one in versions().items() if one[0] != "platform"]
    way = WAYS.get(facts.trainer, "training")
    lines = [
        f"---\n{head}---", MARK, f"# {_text(facts.name)}",
        f"Trained{base} by {way} ({_code(facts.trainer)} of trl), {facts.steps:,} steps.", "## Use", _use(facts),
        *_section("Data", "what", _data(facts)), *_section("Results", "metric", _results(facts)),
        *_section("Settings", "setting", _settings(facts)), *_section("Versions", "package", packages),
        "## Licence",
        f"{_text(licence)}: see `license` above." if licence else
        "Not known here: that of the base model and of the data decide. Write it into `license` above.",
    ]  # fmt: skip
    return "\n\n".join(lines) + "\n"


def _use(facts: CardFacts) -> str:
    task = TASKS.get(facts.trainer, "text-generation")
    where = ", an adapter: needs peft" if facts.peft else ""
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'model = pipeline("{task}", model=".")  # this folder{where}\nprint(model("Hello"))\n```'
    )


def _section(title: str, first: str, rows: Iterable[tuple[str, Any]]) -> list[str]:
    """A heading and a table; nothing where there are no rows."""
    lines = [f"| {_text(name)} | {_text(value)} |" for name, value in rows]
    return [f"## {title}", "\n".join([f"| {first} | value |", "|---|---|", *lines])] if lines else []


def _public(name: str) -> str:
    """The name of a model or data set, of one that lies here without its place."""
    return name if on_hub(name) else Path(name).name


def _data(facts: CardFacts) -> Iterator[tuple[str, Any]]:
    if facts.datasets:
        yield "source", ", ".join(map(_public, facts.datasets))
    for name, known in facts.data.items():
        parts = [f"{known['rows']:,} rows"] if known.get("rows") is not None else []
        parts += [f"{known['tokens']:,} tokens, {known['learned_tokens']:,} learned"] if "tokens" in known else []
        parts += [Path(str(path)).name for path in known.get("files", ())]
        parts += [f"fingerprint {known['fingerprint']}"] if "fingerprint" in known else []
        yield name, "; ".join(parts)


def _results(facts: CardFacts) -> Iterator[tuple[str, Any]]:
    left_out = re.compile(r"step|epoch|total_flos|.*(runtime|per_second)")
    for logs in facts.logs:
        for name, value in logs.items():
            if isinstance(value, int | float) and not left_out.fullmatch(name):
                yield name, short(value)


def _settings(facts: CardFacts) -> Iterator[tuple[str, Any]]:
    for each in facts.settings:
        if (each.differs or each.name in ALWAYS) and not LOCAL.fullmatch(each.name):
            yield each.name, ", ".join(map(str, each.now)) if isinstance(each.now, list) else each.now


def _text(value: Any) -> str:
    """A value in one line of Markdown, in which it is no markup."""
    whole = " ".join(visible(str(value)).split())
    return re.sub(r"([\\`*\[\]<>|#~])", r"\\\1", whole)


def _code(value: str) -> str:
    return f"`{' '.join(visible(value).split()).replace('`', chr(39))}`"


def licence_of(base: str) -> str | None:
    """What the README of a model's folder, or of one that was fetched from the Hub before, names as its licence."""
    import yaml
    from huggingface_hub import try_to_load_from_cache

    try:
        found = Path(base) / "README.md" if Path(base).is_dir() else try_to_load_from_cache(base, "README.md")
        parts = Path(str(found)).read_text(encoding="utf-8").split("---", 2) if isinstance(found, str | Path) else []
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, yaml.YAMLError):  # no name of the Hub either, say
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) and licence != "unknown" else None


def listed(names: str | Sequence[str] | None) -> list[str]:
    """One name or several as a list."""
    return [names] if isinstance(names, str) else list(names or ())


def on_hub(name: str) -> bool:
    """Whether a name may be one of the Hub, and is none of a file or folder here."""
    return re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) is not None and not Path(name).exists()


def write_card(folder: str | os.PathLike[str], text: str) -> bool:
    """Write a folder's README; False where somebody's own is there, which stays."""
    path = Path(folder) / "README.md"
    if path.exists():
        before = path.read_text(encoding="utf-8", errors="replace")
        if MARK not in before and not any(words in before for words in OTHERS):
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return True
