"""`trl sft`, `trl dpo`, ...: a trainer on a file of rows, settings from the line or from YAML."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from trl.cli.main import Training

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
OWN_KEYS = ("model", "data", "eval_data", "rewards", "lora_rank")
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def rows_of(source: str, what: str) -> Any:
    """The data set in a file, in a folder of `save_to_disk`, or under a name on the Hub (its split `train`)."""
    import datasets

    path = Path(source)
    if path.suffix in FORMATS:
        if not path.exists():
            raise ValueError(f"--{what} {source}: there is no such file")
        return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    if path.is_dir():
        loaded = datasets.load_from_disk(str(path))
        return loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
    if path.exists():
        raise ValueError(f"--{what} {source}: give a file of {', '.join(FORMATS)}, or a folder of `save_to_disk`")
    return datasets.load_dataset(source, split="train")


def reward_function(name: str) -> Any:
    """`file.py:function` as the function; other names (of `REWARDS`, of a folder) are the trainer's to resolve."""
    place, _, function = name.partition(":")
    if not function or Path(place).suffix != ".py":
        return name
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None or not Path(place).exists():
        raise ValueError(f"--reward {name}: there is no file {place}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"--reward {name}: {place} has no function {function!r}")
    return getattr(module, function)


def fields_on(words: Sequence[str], config_class: type) -> dict[str, Any]:
    """`--field value`, `--field a b c` (a list) and `--flag` of a command line; `--field=value` too."""
    types = {entry.name: str(entry.type) for entry in fields(config_class)}
    given: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = [value] if equals else []
        elif not name:
            raise ValueError(f"{word!r}: expected --field before it")
        else:
            given[name].append(word)
    return {name: _value(values, types.get(name, "")) for name, values in given.items()}


def _value(words: list[str], annotation: str) -> Any:
    values = [word if annotation in ("str", "str | None") else _plain(word) for word in words]
    return True if not values else values[0] if len(values) == 1 else values


def _plain(word: Any) -> Any:
    """A word read as JSON (a number such as 1e-5, true, false, null, a list, an object); else the word itself."""
    if not isinstance(word, str):
        return word
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(word, word))
    except json.JSONDecodeError:
        return word


def settings_of(config_class: type, given: dict[str, Any], words: Sequence[str]) -> Any:
    """The config from the YAML file and the command line, which wins; an unknown field is a ValueError."""
    types = {entry.name: str(entry.type) for entry in fields(config_class) if entry.init}
    from_yaml = {k: v if types.get(k) in ("str", "str | None") else _plain(v) for k, v in given.items()}
    values = {**from_yaml, **fields_on(words, config_class)}
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ValueError(
            f"{unknown[0]}: {config_class.__name__} has no such field (`--fields` lists those that it has)"
        )
    return config_class(**values)


def field_docs(config_class: type) -> dict[str, str]:
    """The docstring under each field of our own config classes."""
    docs: dict[str, str] = {}
    for parent in reversed(config_class.__mro__):
        if not parent.__module__.startswith("trl."):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body  # type: ignore[attr-defined]
        for entry, text in pairwise(body):
            if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                docs[entry.target.id] = str(text.value.value)  # type: ignore[union-attr]
    return docs


def show_fields(config_class: type) -> None:
    """Print the config's own fields with defaults and meaning."""
    from rich.console import Console
    from rich.table import Table

    docs = field_docs(config_class)
    table = Table("field", "default", "meaning", title=config_class.__name__)
    for entry in fields(config_class):
        if entry.name in docs:
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            table.add_row(f"--{entry.name}", repr(default), docs[entry.name])
    Console().print(table)
    Console().print("and every field of transformers.TrainingArguments, by the same spelling", style="dim")


def lora(rank: int, task: str) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('--lora-rank needs peft: `pip install "trl[peft]"`') from error
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)


def train(job: Training, config: Path | None, line: dict[str, Any], words: Sequence[str]) -> str:
    """Run the job and return the folder of the trained model."""
    import yaml

    import trl

    given: dict[str, Any] = {}
    if config is not None:
        if not config.is_file():
            raise ValueError(f"--config {config}: there is no such file")
        given = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    own = {key: given.pop(key, None) if line.get(key) is None else line[key] for key in OWN_KEYS}
    for key in ("model", "data"):
        if not own[key]:
            raise ValueError(f"--{key}: say which (on the line, or `{key}:` in --config)")
    settings = settings_of(getattr(trl, job.config), given, words)
    arguments: dict[str, Any] = {}
    if job.rewards:
        names = own["rewards"] or []
        if not names:
            raise ValueError("--reward: say what to reward, once or more")
        arguments["reward_funcs"] = [reward_function(name) for name in names]
    elif own["rewards"]:
        raise ValueError("--reward: this command learns from its data, not from rewards")
    if own["lora_rank"]:
        arguments["peft_config"] = lora(int(own["lora_rank"]), job.task)
    trainer = getattr(trl, job.trainer)(
        model=own["model"],
        args=settings,
        train_dataset=rows_of(own["data"], "data"),
        eval_dataset=rows_of(own["eval_data"], "eval-data") if own["eval_data"] else None,
        **arguments,
    )
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model(settings.output_dir)
    return str(settings.output_dir)


def command_of(job: Training) -> Callable[..., None]:
    """The function that runs the command; its parameters are the options, its docstring the help."""

    def command(
        context: typer.Context,
        model: Annotated[str | None, typer.Option(help="Folder or Hub name to start from.")] = None,
        data: Annotated[
            str | None, typer.Option(help="Rows: .jsonl, .csv, .parquet, .txt, a folder, a Hub name.")
        ] = None,
        eval_data: Annotated[str | None, typer.Option(help="Rows to evaluate on.")] = None,
        rewards: Annotated[
            list[str] | None, typer.Option("--reward", help="Name, file.py:function or model folder; repeatable.")
        ] = None,
        lora_rank: Annotated[int | None, typer.Option(min=1, help="Train a LoRA adapter of this rank.")] = None,
        config: Annotated[Path | None, typer.Option(help="YAML with these and any field; the line wins.")] = None,
        list_fields: Annotated[bool, typer.Option("--fields", help="List the fields and leave.")] = False,
    ) -> None:
        if list_fields:
            import trl

            show_fields(getattr(trl, job.config))
            return
        line = {"model": model, "data": data, "eval_data": eval_data, "rewards": rewards, "lora_rank": lora_rank}
        print(f"saved to {train(job, config, line, context.args)}")

    command.__doc__ = f"Train with {job.trainer}. Any field of {job.config} goes on the line: --learning_rate 1e-5."
    return command
