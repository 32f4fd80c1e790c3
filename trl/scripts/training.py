"""A training job from a command line: settings from its words and from YAML, rows, rewards, trainer."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback

import trl
from trl.import_utils import is_installed, pip_install
from trl.scripts import launch
from trl.scripts.data_config import (
    DatasetMixtureConfig,
    GRPOScriptArguments,
    ScriptArguments,
    get_dataset,
    named_dataset,
    split_of,
)
from trl.scripts.data_files import told
from trl.scripts.exit_codes import exit_code, one_line, pointing
from trl.scripts.hints import default_of, read_value, settings_hints, takes_no_word, takes_several
from trl.scripts.jobs import JOBS, Training
from trl.scripts.launch import LaunchArguments
from trl.scripts.model_config import ModelConfig, get_peft_config, loading_keywords
from trl.scripts.parser import TrlParser, read_yaml, set_environment, suggestion, take_config
from trl.scripts.quiet import quiet, say

if TYPE_CHECKING:
    from trl.trainer.run_record import RunFolderCallback

ALIASES = {
    "model": "model_name_or_path",
    "torch_dtype": "dtype",
    "data": "dataset_name",
    "reward": "reward_funcs",
    "rewards": "reward_funcs",
    "judge": "judge_funcs",
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of the run
}
"""other names of settings, on the line and in YAML"""
ORDERS = ("reward_funcs", "reward_model_name_or_path", "reward_model_path", "judge")
"""settings of which one must say which completion is good"""
TRACKERS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{name: (name,) for name in ("comet_ml", "mlflow", "swanlab", "trackio", "wandb")},
}
"""tracker -> modules of which one writes to it"""
SEED = "seed-"
"""what the folder of each of several seeds begins with"""
LENGTHS = ("max_length", "max_prompt_length", "max_completion_length", "response_length")
"""settings that bound the length of rows"""


@dataclass(frozen=True)
class Line:
    """A job's command line, for the record of its run."""

    words: Sequence[str]
    reads: Callable[[str, Any], bool]
    """whether `--config` can read a value of a setting"""


@dataclass
class JobArguments:
    """What only the `trl` command takes."""

    eval_data: str | None = field(default=None)
    """rows to evaluate on, where they are not a split of the data set; named like `dataset_name`"""
    lora_rank: int | None = field(default=None)
    """train a LoRA adapter of this rank on all linear modules: `use_peft`, `lora_r`, `lora_alpha` twice the rank"""
    seeds: int = field(default=1)
    """train so many times, with `seed` and those after it, into folders seed-N of output_dir, and report the spread"""
    dry_run: bool = field(default=False)
    """train nothing: two steps on the longest rows say what memory, time and disk the run would take (`trl plan`)"""


def dataclasses_of(job: Training) -> tuple[type, ...]:
    """The dataclasses whose fields are the job's settings."""
    script = GRPOScriptArguments if job.rewards else ScriptArguments
    return ModelConfig, script, DatasetMixtureConfig, getattr(trl, job.config), JobArguments, LaunchArguments


class JobParser(TrlParser):
    """Reads the words of a line and a YAML file into dicts of settings, and checks each value by its type."""

    def __init__(self, job: Training):
        classes = dataclasses_of(job)
        self.job = job
        self.hints = {name: hint for one in classes for name, hint in settings_hints(one).items()}
        super().__init__(classes, add_help=False, allow_abbrev=False)
        for action in self._actions:
            hint = self.hints[action.dest]
            action.default, action.type, action.choices = argparse.SUPPRESS, None, None  # `read_value` does that
            if action.nargs != 0:
                several, alone = takes_several(hint), takes_no_word(hint)
                action.nargs = "*" if several and alone else "+" if several else "?" if alone else None
                action.const = True

    def error(self, message: str) -> Any:
        raise ValueError(message.removeprefix("argument "))

    def settings_of_words(self, words: Sequence[str]) -> dict[str, Any]:
        """The settings that stand on the line."""
        namespace, rest = self.parse_known_args([self._canonical_word(word) for word in words])
        if rest:
            first = next((word for word in rest if word.startswith("--")), rest[0])
            if not first.startswith("--"):
                raise ValueError(f"{first!r}: expected --setting before it")
            raise ValueError(self._unknown(first[2:].partition("=")[0]))
        given: dict[str, Any] = {}
        for name, value in vars(namespace).items():
            one = value[0] if isinstance(value, list) and len(value) == 1 else value
            given[name] = read_value(f"--{name}", self.hints[name], True if value == [] else one)
        return given

    def settings_of_file(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a YAML file, under the same names."""
        given: dict[str, Any] = {}
        for key, value in settings.items():
            name = self._canonical(key)
            if name not in self.hints:
                raise ValueError(self._unknown(key))
            if name in given:
                raise ValueError(f"{key}: the file gives {name} twice, under two of its names")
            given[name] = read_value(key, self.hints[name], value)
        return given

    def reads(self, name: str, value: Any) -> bool:
        """Whether a YAML file can give a setting this value."""
        try:
            read_value(name, self.hints[name], value)
        except (KeyError, ValueError):
            return False
        return True

    def _canonical(self, name: str) -> str:
        return name if name in self.hints else ALIASES.get(name, name)

    def _canonical_word(self, word: str) -> str:
        if not word.startswith("--"):
            return word
        name, equals, value = word[2:].partition("=")
        return f"--{self._canonical(name.replace('-', '_'))}{equals}{value}"

    def _unknown(self, name: str) -> str:
        if ALIASES.get(name, name) == "reward_funcs":
            return "--reward: this command learns from its data, not from rewards"
        near = suggestion(name, [*self.hints, *ALIASES])
        return f"{name}: {self.job.config} has no such field{near} (`--fields` lists the fields)"


def merged(job: Training, of_file: dict[str, Any], of_words: dict[str, Any]) -> dict[str, Any]:
    """One dict of settings: the line wins, and `lora_rank` becomes what it stands for."""
    short = False
    for source in (of_file, of_words):
        rank = source.pop("lora_rank", None)
        if rank is not None:
            short = True
            if source.get("lora_r", rank) != rank:
                raise ValueError(f"lora_rank={rank}, lora_r={source['lora_r']}: two names of one setting; give one")
            if rank < 1:
                raise ValueError(f"lora_rank={rank}: give a rank >= 1")
            source |= {"lora_r": rank, "use_peft": source.get("use_peft", True)}
    for name, other in (("dataset_name", "datasets"), ("datasets", "dataset_name")):
        if name in of_words and other not in of_words:
            of_file.pop(other, None)  # the line says which data
    settings = {**of_file, **of_words}
    if short:
        settings.setdefault("lora_alpha", 2 * settings["lora_r"])
        settings.setdefault("lora_target_modules", ["all-linear"])
    settings.setdefault("lora_task_type", job.task)
    return settings


def read_settings(job: Training, words: Sequence[str]) -> tuple[JobParser, dict[str, Any]]:
    """The settings on a line and in its YAML file, and their parser; ValueError without a model or data."""
    path, line = take_config(words)
    file = {} if path is None else read_yaml(path)
    set_environment(file.pop("env", {}))
    parser = JobParser(job)
    settings = merged(job, parser.settings_of_file(file), parser.settings_of_words(line))
    for key, alias in (("model_name_or_path", "model"), ("dataset_name", "data")):
        if not settings.get(key) and not (key == "dataset_name" and settings.get("datasets")):
            raise ValueError(f"--{alias}: say which (`--{key}` or `--{alias}` on the line, or in --config)")
    return parser, settings


def command(name: str, job: Training, words: Sequence[str]) -> int:
    """Run `trl NAME words`; returns the exit code."""
    from trl.scripts.describe import show_fields, show_help

    if {"--help", "-h"} & set(words):
        show_help(name, job)
        return 0
    if "--fields" in words:
        show_fields(job)
        return 0
    parser, settings = read_settings(job, words)
    dry = bool(settings.get("dry_run"))
    if settings.get("seeds", 1) != 1 and not dry:
        return several_seeds(name, job, words, settings)
    if "check_rewards" in parser.hints:
        settings.setdefault("check_rewards", "no" if dry else "yes")
    settings.setdefault("enable_jit_checkpoint", True)  # at SIGTERM: finish the step, save it, exit with 143
    if job.rewards and not any(settings.get(name) for name in ORDERS):
        raise ValueError("--reward: say what to reward (`--reward_funcs` or `--reward`, one or more)")
    several = LaunchArguments(**{key: settings[key] for key in settings_hints(LaunchArguments) if key in settings})
    if several.wanted():
        return launch.start(several, "trl", [name, *words])
    for note in [*without_effect(settings), *adapters_rate(job, settings)]:
        say(note)
    with quiet(), pointing(name, lengths_of(parser)):
        folder = train(job, Line(["trl", name, *words], parser.reads), *parser.parse_dict(settings))
    if dry:
        return 0
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"saved to {folder}")
        with suppress_all("what comes next is not said"):
            for what, line in what_next(Path(folder)):
                print(f"{what}: {line}")
    return 0


def several_seeds(name: str, job: Training, words: Sequence[str], settings: Mapping[str, Any]) -> int:
    """Train once for each seed, into a folder each, and say how far the figures spread; returns the exit code."""
    usual = {entry.name: default_of(entry) for entry in fields(getattr(trl, job.config))}
    count, first = settings["seeds"], settings.get("seed", usual["seed"])
    if count < 1:
        raise ValueError(f"seeds={count}: give 1 or more")
    if settings.get("push_to_hub"):
        raise ValueError(f"push_to_hub=True, seeds={count}: one model is pushed; push the folder that you choose")
    if not isinstance(resumed(settings.get("resume_from_checkpoint")), bool | None):
        raise ValueError(f"resume_from_checkpoint, seeds={count}: give True, and each goes on with its own newest one")
    folder = Path(str(settings.get("output_dir") or usual["output_dir"] or "trainer_output"))
    code = 0
    try:
        for seed in range(first, first + count):
            one = ["--seeds", "1", "--seed", str(seed), "--output_dir", str(folder / f"{SEED}{seed}")]
            code = command(name, job, [*words, *one])
            if code:
                return code
            gc.collect()
    finally:
        if int(os.environ.get("RANK", 0)) == 0:
            with suppress_all("the spread is not reported"):
                report_spread(folder)
    return code


def report_spread(folder: Path) -> None:
    """Write and print how far the seeds of a folder spread."""
    from trl.reports.spread import read_spread, spread_lines, write_spread

    found = read_spread(folder)
    for line in spread_lines(found):
        print(line)
    print(f"wrote {write_spread(found, folder)}")


def what_next(folder: Path) -> list[tuple[str, str]]:
    """What the model of a run can be used for: a sentence and a command each."""
    from trl.reports.findings import uses
    from trl.reports.run_folder import read_run

    return uses(read_run(folder))


def lengths_of(parser: JobParser) -> str:
    """The settings of a command that bound how long its rows are, for an error."""
    return " or ".join(f"--{name}" for name in LENGTHS if name in parser.hints)


def adapters_rate(job: Training, settings: dict[str, Any]) -> list[str]:
    """Set the learning rate of an adapter where none is given, and say so."""
    if not settings.get("use_peft") or settings.get("learning_rate") is not None:
        return []
    settings["learning_rate"] = job.lora_rate
    return [f"learning_rate={job.lora_rate:g}, as an adapter takes a higher one than whole weights (--learning_rate)"]


def without_effect(settings: Mapping[str, Any]) -> list[str]:
    """A line for each group of settings that were given and have no effect."""
    notes, usual = [], {entry.name: default_of(entry) for entry in fields(ModelConfig)}
    settings = {name: value for name, value in settings.items() if name not in usual or value != usual[name]}
    for starts, needed in ((("lora_", "use_rslora", "use_dora"), "use_peft"), (("bnb_", "use_bnb"), "load_in_4bit")):
        names = [name for name in settings if name.startswith(starts) and name != "lora_task_type"]
        if names and not settings.get(needed):
            notes.append(f"{', '.join(names)}: no effect without --{needed}")
    if settings.get("eval_data") and settings.get("eval_strategy", "no") == "no":
        notes.append("eval_data: no effect without --eval_strategy")
    return notes


def train(
    job: Training,
    line: Line,
    model: ModelConfig,
    script: ScriptArguments,
    mixture: DatasetMixtureConfig,
    config: Any,
    own: JobArguments,
    several: LaunchArguments,
) -> str:
    """Train and save the model; returns its folder."""
    from trl.core import set_seed
    from trl.trainer.callbacks import RichProgressCallback
    from trl.trainer.run_folder import check_writable
    from trl.trainer.run_record import RunFolderCallback

    if int(os.environ.get("RANK", 0)) == 0:
        check_writable(str(config.output_dir))
    if own.dry_run:
        from trl.scripts.plan import rehearse

        set_seed(config.seed)
        return rehearse(config, lambda config: trainer_of(job, model, script, mixture, config, own))
    check_trackers(config.report_to)
    record = RunFolderCallback(
        (model, script, mixture, config, own, several), line.words, line.reads, data_names(script, mixture, own)
    )
    places = [script.dataset_name, own.eval_data, *(one.path for one in mixture.datasets)]
    with reported(record, Path(str(config.output_dir))):
        with told("data", [place for place in places if place], sure=False):  # streamed rows are read while it trains
            set_seed(config.seed)  # an adapter or a head that is made has random weights
            trainer = trainer_of(job, model, script, mixture, config, own)
            for printer in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(printer)
            trainer.add_callback(RichProgressCallback())
            trainer.add_callback(record)
            trainer.train(resume_from_checkpoint=resumed(config.resume_from_checkpoint))
        trainer.save_model(config.output_dir)
        with suppress_all("README.md is not written"):
            trainer.create_model_card(dataset_name=[place for place in places if place])
        if config.push_to_hub:
            trainer.push_to_hub(dataset_name=script.dataset_name)
    return str(config.output_dir)


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker that is not installed, before a model is loaded."""
    for name in names:
        modules = TRACKERS.get(name, ())
        if modules and not any(map(is_installed, modules)):
            raise ValueError(f"report_to={name!r}: it is not installed; {pip_install(name.replace('_', '-'))}")


def resumed(word: str | None) -> str | bool | None:
    """A checkpoint's folder; True and False, which the field of transformers reads as texts, as they are meant."""
    return {"true": True, "false": False}.get(str(word).lower(), word)


@contextmanager
def reported(record: RunFolderCallback, folder: Path) -> Iterator[None]:
    """Record an error of what follows the training too; write the report of a run that has begun, however it ends."""
    try:
        yield
    except BaseException as error:
        if record.record and isinstance(error, KeyboardInterrupt | SystemExit):
            with suppress_all("checkpoints are not read"):
                say(way_on(folder))
        if record.record.get("status") == "finished":
            record.end_run(error)
        raise
    finally:
        if record.record:
            with suppress_all("report.html is not written"):
                from trl.reports.run_report import write_report

                write_report(folder)


def way_on(folder: Path) -> str:
    """How a run that was stopped goes on."""
    from trl.reports.run_folder import read_run

    saved = read_run(folder).checkpoints
    if not saved:
        return "no checkpoint was saved (--save_steps): the same line begins anew"
    return f"the same line with --resume_from_checkpoint True goes on from step {saved[-1]}"


@contextmanager
def suppress_all(what: str) -> Iterator[None]:
    """An error in the block is one line: what was trained is worth more than what is said of it."""
    try:
        yield
    except Exception as error:
        say(f"{what}: {one_line(error)}")


def trainer_of(
    job: Training,
    model: ModelConfig,
    script: ScriptArguments,
    mixture: DatasetMixtureConfig,
    config: Any,
    own: JobArguments,
) -> Any:
    """The job's trainer, with its model and its data."""
    from trl.models.prepare import load_tokenizer

    train_dataset, eval_dataset = datasets_of(script, mixture, own.eval_data, config.eval_strategy != "no")
    arguments: dict[str, Any] = {}
    if isinstance(script, GRPOScriptArguments):
        models = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
        arguments["reward_funcs"] = [*models, *map(reward_function, script.reward_funcs or [])] or None
        if script.judge_funcs and not job.judges:
            raise ValueError(f"--judge: {job.trainer} asks no held-out judge; give it to trl compare after training")
        if script.judge_funcs:
            arguments["judge_funcs"] = [reward_function(name) for name in script.judge_funcs]
    keywords = loading_keywords(model, config.trust_remote_code)
    where = {name: keywords[name] for name in ("revision", "trust_remote_code") if name in keywords}
    if where:
        arguments["processing_class"] = load_tokenizer(str(model.model_name_or_path), **where)
    config.model_init_kwargs = {**keywords, **(config.model_init_kwargs or {})}
    trainer = getattr(trl, job.trainer)(
        model=model.model_name_or_path,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model),
        **arguments,
    )
    if script.ignore_bias_buffers:
        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, each in buffers if str(each.dtype) == "torch.bool"
        ]
    return trainer


def data_names(script: ScriptArguments, mixture: DatasetMixtureConfig, own: JobArguments) -> dict[str, dict[str, Any]]:
    """By what names the rows were asked for, and how big files of these names are."""
    names = [one.path for one in mixture.datasets] or [str(script.dataset_name)]
    return {"train": _named(names), "eval": _named([own.eval_data] if own.eval_data else names)}


def _named(names: Sequence[str]) -> dict[str, Any]:
    sizes = {name: Path(name).stat().st_size for name in names if Path(name).is_file()}
    return {"name": ", ".join(names), **({"files": sizes} if sizes else {})}


def datasets_of(
    script: ScriptArguments, mixture: DatasetMixtureConfig, eval_data: str | None, evaluates: bool
) -> tuple[Any, Any]:
    """The rows to train and to evaluate on."""
    if mixture.datasets and script.dataset_name:
        raise ValueError(f"dataset_name={script.dataset_name!r}, datasets: two answers to one question; give one")
    streaming = script.dataset_streaming
    if mixture.datasets:
        splits = get_dataset(mixture)
    else:
        splits = named_dataset(str(script.dataset_name), "data", name=script.dataset_config, streaming=streaming)
    rows = split_of(splits, script.dataset_train_split, "dataset_train_split")
    if eval_data is not None:
        others = named_dataset(eval_data, "eval-data", streaming=streaming)
        split = script.dataset_test_split if script.dataset_test_split in others else "train"
        return rows, split_of(others, split, "dataset_test_split")
    return rows, split_of(splits, script.dataset_test_split, "dataset_test_split") if evaluates else None


def reward_function(name: str) -> Any:
    """A reward by name: of ours, with or without its ending `_reward`, or a function of a module or a file.

    The folder or Hub name of a reward model is left to the trainer, which has its tokenizer and its device.
    """
    from trl.rewards import REWARDS, get_soft_overlong_punishment, reward_named

    place, _, function = name.partition(":")
    if function and Path(place).suffix == ".py":
        return function_of_file(name, place, function)
    if name == "get_soft_overlong_punishment":
        return get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    if name.removesuffix("_reward") in REWARDS:
        return reward_named(name.removesuffix("_reward"))
    if "/" in name or Path(name).exists():
        return name
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where a user's modules are
    return reward_named(name if function or "." not in name else ":".join(name.rsplit(".", 1)))


def function_of_file(name: str, place: str, function: str, option: str = "reward") -> Callable[..., Any]:
    """What a file of the user's calls so; its code runs. option: the setting that named it."""
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None or not Path(place).exists():
        raise ValueError(f"--{option} {name}: there is no file {place}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"--{option} {name}: {place} has no function {function!r}")
    return getattr(module, function)


def run_script(name: str) -> None:
    """`python -m trl.scripts.NAME ...`: as `trl NAME ...`."""
    words = [word for word in sys.argv[1:] if word != "--debug"]
    sys.exit(exit_code(lambda: command(name, JOBS[name], words), debug="--debug" in sys.argv))
