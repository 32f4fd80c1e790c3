"""What a job's settings are: for `--help`, for `--fields`, and as the JSON schema of its YAML file."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Annotated, Any

import typer

from trl.scripts.hints import default_of, in_words, schema_of, settings_hints
from trl.scripts.jobs import JOBS, Training

COMMON = (
    "output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim",
    "gradient_checkpointing", "bf16", "fp16", "logging_steps", "report_to", "run_name", "eval_strategy", "eval_steps",
    "per_device_eval_batch_size", "save_strategy", "save_steps", "seed", "resume_from_checkpoint", "push_to_hub",
)  # fmt: skip
"""fields of a config that most runs set"""
SHORT = {"model_name_or_path": "--model", "dataset_name": "--data", "reward_funcs": "--reward"}


@dataclass(frozen=True)
class Setting:
    """A setting of a job."""

    name: str
    hint: Any
    default: Any
    meaning: str
    owner: type
    """the dataclass that the job reads it into"""


def settings_of(dataclass_type: Any) -> Iterator[Setting]:
    """The settings that a dataclass stands for."""
    from trl.trainer.configuration import PostTrainingConfig

    # a config that is no subclass may have its fields
    hints, docs = settings_hints(dataclass_type), field_docs(PostTrainingConfig) | field_docs(dataclass_type)
    for entry in fields(dataclass_type):
        if entry.init:
            meaning = docs.get(entry.name) or " ".join(str(entry.metadata.get("help", "")).split())
            yield Setting(entry.name, hints[entry.name], default_of(entry), meaning, dataclass_type)


def field_docs(config_class: type) -> dict[str, str]:
    """The docstring under each field of our own classes."""
    docs: dict[str, str] = {}
    for parent in reversed(config_class.__mro__):
        if not parent.__module__.startswith("trl."):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body  # type: ignore[attr-defined]
        for entry, text in pairwise(body):
            if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                docs[entry.target.id] = str(text.value.value)  # type: ignore[union-attr]
    return docs


def show_help(name: str, job: Training) -> None:
    """Print usage, an example, and the settings by group, the common ones first."""
    import trl
    from trl.scripts.training import dataclasses_of

    model, script, mixture, config, own, several = (list(settings_of(one)) for one in dataclasses_of(job))
    names = field_docs(getattr(trl, job.config))
    chosen, lora = [*model[:4], *script, *mixture, *own], model[4:]
    common = [each for key in COMMON for each in config if each.name == key]
    special = [each for each in config if each.name in names and each not in common]
    rest = [each.name for each in config if each not in common and each not in special]
    more = "--reward_funcs accuracy_reward " if job.rewards else job.more
    example = f"trl {name} --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name rows.jsonl"
    print(f"usage: trl {name} --model_name_or_path MODEL --dataset_name DATA [--setting value ...]\n")
    print(f"{job.help} Every setting goes on the line or into a YAML file; the line wins.\n")
    print(f"example:\n  {example} \\\n      {more}--use_peft --lora_r 32 --learning_rate 1e-4 --output_dir out")
    print(f"  trl {name} --config settings.yaml --max_steps 10\n  a row of rows.jsonl: {job.row}\n")
    _print_table("Model and data", chosen)
    _print_table("Common settings of training", common)
    _print_table(f"Further settings of {job.config}", special)
    _print_table("LoRA and quantisation", lora)
    _print_table("Several processes", several)
    print(
        "Further options: --config FILE (YAML; `env:` there sets environment variables), --debug (the traceback of an"
    )
    print("error), --fields (every field of the config with its meaning). These are fields too, as in transformers:")
    print(textwrap.fill(", ".join(rest), 118))


def show_fields(job: Training) -> None:
    """Print every field of the job's config with its default and meaning, our own first."""
    import trl

    config = getattr(trl, job.config)
    listed, own = list(settings_of(config)), field_docs(config)
    _print_table(job.config, [each for each in listed if each.name in own])
    _print_table("transformers.TrainingArguments", [each for each in listed if each.name not in own])


def _print_table(title: str, settings: Iterable[Setting]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("setting", no_wrap=True)
    table.add_column("takes", max_width=24)
    table.add_column("default", max_width=20, overflow="fold")
    table.add_column("meaning", min_width=40)
    for each in settings:
        words = f"--{each.name}" + (f", {SHORT[each.name]}" if each.name in SHORT else "")
        default = "" if each.default is None else str(getattr(each.default, "value", each.default))
        table.add_row(*map(Text, (words, in_words(each.hint), default, each.meaning)))
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(table)
    print()


def command(job: Annotated[str, typer.Argument(help="Training command: sft, dpo, grpo, ...")]) -> None:
    """Print the JSON schema of a training command's YAML file, for editors that complete and check it."""
    if job not in JOBS:
        raise ValueError(f"{job}: no training command of that name; choose one of {', '.join(JOBS)}")
    print(json.dumps(schema(job), indent=2))


def schema(name: str) -> dict[str, Any]:
    """The JSON schema of the YAML file of `trl NAME`."""
    from trl.scripts.training import ALIASES, dataclasses_of

    properties: dict[str, Any] = {
        "env": {"type": "object", "description": "environment variables to set before training"}
    }
    for one in dataclasses_of(JOBS[name]):
        for each in settings_of(one):
            default = getattr(each.default, "value", each.default)
            simple = isinstance(default, bool | int | float | str) or default is None
            properties[each.name] = {
                **schema_of(each.hint), "description": each.meaning, **({"default": default} if simple else {})
            }  # fmt: skip
    for alias, target in ALIASES.items():
        if target in properties:
            properties.setdefault(alias, {**properties[target], "description": f"another name of {target}"})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"trl {name} --config",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
