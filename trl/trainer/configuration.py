"""The base classes of the configs, checks of their fields, and configs made from older call styles."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Real
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from trl.data.encode import TRUNCATION_MODES
from trl.trainer.ranks import join_again
from trl.trainer.run_folder import check_writable
from trl.trainer.settings import (
    accepted,
    check_inherited,
    compile_by_layers,
    default_of,
    fit_to_machine,
    log_without_effect,
    rename,
    switch_liger_off,
    translate,
    unknown_field,
)

ROWS = "rows in an optimizer step"
ACTIONS = ("stop", "skip")
"""values of `on_non_finite`"""

Config = TypeVar("Config", bound="PostTrainingConfig")


class KeepsAsked:
    """A dataclass that keeps what was asked for: `__post_init__` changes some fields, and derives others."""

    def __new__(cls, *values: Any, **named: Any) -> Any:
        made = super().__new__(cls)
        entries: Any = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type]
        unknown = [name for name in named if name not in entries]
        if unknown and not _takes(cls.__init__, unknown[0]):
            raise TypeError(unknown_field(cls.__name__, unknown[0], entries))
        given = {**dict(zip(entries, values, strict=False)), **named}
        made.__dict__["_asked"] = {
            name: value for name, value in given.items() if name not in entries or value != default_of(entries[name])
        }
        return made

    @property
    def asked(self) -> dict[str, Any]:
        """The fields that were given another value than their default, with that value."""
        return dict(self.__dict__.get("_asked", {}))


def _takes(function: Any, name: str) -> bool:
    """Whether a function, such as a subclass's own `__init__`, takes a keyword."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


@dataclass
class PostTrainingConfig(KeepsAsked, TrainingArguments):
    """`TrainingArguments` with the defaults of post-training: a precision that fits the device, frequent logs."""

    bf16: bool | None = field(default=None)
    """mixed precision in bfloat16; None: where the GPU does it well and `fp16` is off"""
    logging_steps: float = field(default=10)
    """optimizer steps between two logs; below 1: a fraction of the whole run"""
    remove_unused_columns: bool = field(default=True)
    """has no effect, set or not: the trainers drop the columns that they do not need, and only those"""
    trust_remote_code: bool = field(default=False)
    """run code that a model's folder or Hub repository brings along, where the model is given by name"""
    model_init_kwargs: dict[str, Any] | str | None = field(default=None)
    """keywords of `from_pretrained`, where the model is given by name"""
    dataset_num_proc: int | None = field(default=None)
    """processes that tokenise the data"""
    on_non_finite: str = field(default="stop")
    """where a loss or a gradient is nan or infinite, before the optimizer step: stop (an error names the rows), or skip
    (the step is left out; the loss that is logged for it is nan)"""
    max_non_finite_skips: int = field(default=10)
    """steps of a run that `on_non_finite="skip"` leaves out at most; one more is an error"""
    memory_plan: bool = field(default=True)
    """where a run would not fit into the memory that is there, choose what the settings left open (token budget of a
    pass, `gradient_checkpointing`, offload of activations, `sampling_max_rows`) so that it does, and say so"""
    activation_offloading: bool = field(default=False)
    """keep what the backward pass reads in main memory instead of on the GPU: less memory, slower steps, same numbers.
    With `gradient_checkpointing` there is less to move"""
    trace_steps: bool = field(default=False)
    """write `output_dir/trace/step-N.json` for each optimizer step: its rows, losses, and checksums of gradient and
    weights, for `trl diff` and `trl replay`; it reads the device several times a step"""
    overwrite_output_dir: bool = field(default=False)
    """remove another run's checkpoints and rollouts from `output_dir` when training begins; False: refuse such a
    folder"""
    evaluation_strategy: str | None = accepted("evaluation_strategy")
    warmup_ratio: float | None = accepted("warmup_ratio")
    no_cuda: bool = accepted("no_cuda", False)
    use_liger: bool = accepted("use_liger", False)
    logging_dir: str | None = accepted("logging_dir")
    router_aux_loss_coef: float | None = field(default=None)
    """mixtures of experts: weight of the loss that keeps their experts equally busy; None: the model's own weight where
    its config has `output_router_logits=True`, else 0. Each micro-batch is balanced by itself, a dense model never"""
    use_liger_kernel: bool = accepted("use_liger_kernel", False)
    use_liger_loss: bool = accepted("use_liger_loss", False)
    pad_to_multiple_of: int | str | None = accepted("pad_to_multiple_of")
    group_by_length: bool = accepted("group_by_length", False)
    save_safetensors: bool = accepted("save_safetensors", True)
    use_mps_device: bool = accepted("use_mps_device", False)
    include_inputs_for_metrics: bool = accepted("include_inputs_for_metrics", False)
    jit_mode_eval: bool = accepted("jit_mode_eval", False)
    use_ipex: bool = accepted("use_ipex", False)
    compile_layers: str | None = field(default=None)
    """torch compiles each layer of the model: a backend, such as inductor, or backend:mode. The first steps then take
    some tens of seconds more, and later ones less on a GPU (docs/gpu.md)"""
    torch_compile: bool = accepted("torch_compile", False)
    torch_compile_backend: str | None = accepted("torch_compile_backend")
    torch_compile_mode: str | None = accepted("torch_compile_mode")
    torchdynamo: str | None = accepted("torchdynamo")
    label_names: list[str] | None = accepted("label_names")  # noqa: RUF009
    fp16_backend: str = accepted("fp16_backend", "auto")
    fp16_opt_level: str = accepted("fp16_opt_level", "O1")
    tpu_num_cores: int | None = accepted("tpu_num_cores")
    mp_parameters: str = accepted("mp_parameters", "")
    ray_scope: str | None = accepted("ray_scope", "last")
    past_index: int = field(default=-1)
    """an error unless it is -1: no state is carried from row to row"""
    half_precision_backend: str = accepted("half_precision_backend", "auto")
    include_tokens_per_second: bool = accepted("include_tokens_per_second", False)

    _may_checkpoint = False
    """whether nothing was said about `gradient_checkpointing`"""

    @property
    def pads_rows(self) -> bool:
        """Whether every forward pass pads its rows."""
        return False

    @property
    def leaves_checkpointing(self) -> bool:
        """Whether the memory plan may compute activations again: the settings say nothing about it."""
        return self.memory_plan and self._may_checkpoint and not self.gradient_checkpointing

    def __post_init__(self) -> None:
        self.translate()
        read_numbers(self)
        if int(os.environ.get("RANK", "0")) == 0:
            log_without_effect(self)
        self.settle()
        fit_to_machine(self)
        self.remove_unused_columns = False  # `Trainer` knows only what the model takes
        for name in self.json_fields():  # JSON from a command line
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, _json(name, value))
        for older, newer in (  # both spellings of transformers, without its warning about the older one
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            if hasattr(self, newer) and getattr(self, newer) is None:
                setattr(self, newer, getattr(self, older))
        self._may_checkpoint = self.gradient_checkpointing is None  # the default since transformers 5.23
        join_again("gloo" if self.use_cpu else self.ddp_backend, self.ddp_timeout)
        super().__post_init__()
        self.validate()
        switch_liger_off(self)

    def translate(self) -> None:
        """Give today's fields the values of fields that other releases had. Subclasses extend it."""
        translate(self)

    def settle(self) -> None:
        """Leave what has no effect here and would be in the way. Subclasses extend it."""
        compile_by_layers(self)

    @classmethod
    def exceptions(cls) -> dict[str, str]:
        """Fields of `TrainingArguments` that these trainers read otherwise than others do, and how."""
        return {}

    def unused(self) -> dict[str, str]:
        """Fields that have no effect beside the others' values, and why. Subclasses extend it."""
        return {}

    @property
    def smooths_labels(self) -> bool:
        """Whether the loss can learn smoothed labels (`label_smoothing_factor`)."""
        return True

    def loading_keywords(self, quantization_config: Any = None) -> dict[str, Any]:
        """Keywords of `from_pretrained` for a model that is given by name."""
        keywords = dict(self.model_init_kwargs) if isinstance(self.model_init_kwargs, dict) else {}
        if self.trust_remote_code:
            keywords.setdefault("trust_remote_code", True)
        if quantization_config is not None:
            keywords["quantization_config"] = quantization_config
        return keywords

    def json_fields(self) -> tuple[str, ...]:
        """Names of the fields that may be given as JSON text."""
        return ("model_init_kwargs",)

    def token_settings(self) -> dict[str, str | None]:
        """The config's `eos_token`, `pad_token` and `chat_template_path`: those of them that it has."""
        return {}

    def validate(self) -> None:
        """Raise a ValueError that names the field, its value and the way out. Subclasses extend it."""
        check_inherited(self)
        if self.dataset_num_proc is not None:
            require(self, "dataset_num_proc", self.dataset_num_proc >= 1, "give a number of processes >= 1, or None")
        choose(self, "on_non_finite", ACTIONS)
        require(self, "max_non_finite_skips", self.max_non_finite_skips >= 1, "give a number of steps >= 1")
        refuse_unused(self, ("max_non_finite_skips",), self.on_non_finite == "skip", "on_non_finite='skip'")

    @property
    def token_budget(self) -> int | None:
        """The number of tokens that a forward pass of training may have at most; None: no limit was asked for."""
        return None

    def cuts_unasked(self) -> bool:
        """Whether a batch may be cut into several forward passes where no budget is given."""
        return False

    @property
    def moves_reference(self) -> bool:
        """Whether the reference model follows the policy."""
        return False

    @property
    def shares_rows(self) -> bool:
        """Whether several ranks can compute a row together: context parallelism."""
        return False

    @property
    def ranks_of_a_row(self) -> int:
        """How many ranks compute each row together, as far as the config says."""
        return getattr(self.parallelism_config, "cp_size", None) or 1

    def place_in_data(self) -> dict[str, Any]:
        """What the place in the data depends on: it must be as it was when a run resumes from a checkpoint."""
        if self.auto_find_batch_size:
            return {}
        own = self.per_device_train_batch_size * self.gradient_accumulation_steps
        ordered = self.train_sampling_strategy in (
            "group_by_length",
            "batch_rebalance",
        )  # in stretches of that many rows
        return {ROWS: own * self.world_size, **({f"{ROWS} on each process": own} if ordered else {})}


class Setting:
    """An attribute of a trainer that is a field of its config: scripts and callbacks read it there and set it.

    A new value has its effect from the next optimizer step on, or is refused as the config would refuse it. `field`:
    its name in the config, where that is another one. `fixed`: why a later change could have no effect. `unset`: the
    field that counts where this one is None.
    """

    def __init__(self, field: str | None = None, *, fixed: str | None = None, unset: str | None = None):
        self.field, self.fixed, self.unset = field, fixed, unset

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.field = name, self.field or name

    def __get__(self, holder: Any, owner: type) -> Any:
        if holder is None:
            return self
        if "args" not in vars(holder):
            return vars(holder)[self.name]
        value = getattr(holder.args, str(self.field))
        return getattr(holder.args, self.unset) if value is None and self.unset else value

    def __set__(self, holder: Any, value: Any) -> None:
        if "args" not in vars(holder):  # before the constructor, whose config then counts
            vars(holder)[self.name] = value
            return
        field = str(self.field)
        before = getattr(holder.args, field)
        if value == before:
            return
        if self.fixed is not None:
            raise ValueError(f"{self.name}={value!r}: {self.fixed}, so it would have no effect; set it in the config")
        setattr(holder.args, field, value)
        try:
            holder.args.validate()
            holder.changed(self.name)
        except ValueError:
            setattr(holder.args, field, before)
            raise


_INHERITED = frozenset(entry.name for entry in fields(TrainingArguments))
_NUMBERS: dict[Any, type[int] | type[float]] = {int: int, float: float}


@cache
def _hints(config_class: Any) -> dict[str, Any]:
    """The types of the fields; `HfArgumentParser` writes others into the fields themselves."""
    try:
        return get_type_hints(config_class)
    except (NameError, TypeError):  # a user's subclass may name what is not there any more
        return {}


def _kind_of(hint: Any) -> tuple[type[int] | type[float] | None, bool]:
    """The kind of number that a field of this type holds, if any, and whether None is a value of it."""
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [each for each in choices if each is not type(None)]
    kind = kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) else None
    return _NUMBERS.get(kind), type(None) in choices


def read_numbers(config: Any) -> None:
    """Read numbers that are written as text, as in a YAML file; ValueError for a field of one number that has none."""
    kind_of_config: Any = type(config)
    hints = _hints(kind_of_config)
    for entry in fields(config):
        kind, may_be_none = _kind_of(hints.get(entry.name))
        value = getattr(config, entry.name)
        untouched = value is None and (may_be_none or default_of(entry) is None)
        if kind is None or untouched or entry.name in _INHERITED or value == default_of(entry):
            continue
        try:
            setattr(config, entry.name, _number(value, kind))
        except (TypeError, ValueError, OverflowError):
            what = "a whole number" if kind is int else "a number"
            or_none = ", or None" if may_be_none else ""
            raise ValueError(f"{entry.name}={value!r}: give {what}{or_none}") from None


def _number(value: Any, kind: type) -> Any:
    number: Any = float(value) if isinstance(value, str) else value
    known = isinstance(number, Real)
    if not known:
        raise TypeError
    if kind is float or isinstance(number, int):
        return number
    if number != int(number):
        raise ValueError
    return int(number)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: not JSON ({error}); give a dict, or the type of the field") from error


def require(config: Any, name: str, holds: bool, way_out: str) -> None:
    """Raise a ValueError `name=value: way out` unless the condition holds."""
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r}: {way_out}")


def refuse_unused(config: Any, names: Sequence[str], used: bool, needs: str) -> None:
    """Raise a ValueError if one of the fields was set and they are not used."""
    defaults = {entry.name: default_of(entry) for entry in fields(config)}
    for name in names:
        require(config, name, used or getattr(config, name) == defaults[name], f"it has no effect without {needs}")


def choose(config: Any, name: str, choices: Any) -> None:
    """ValueError unless the field has one of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")


def as_config(args: TrainingArguments | None, config_class: type[Config]) -> Config:
    """`args` as the trainer's own config; plain TrainingArguments keep their values and gain the config's fields.

    ValueError where its `output_dir` cannot be written: a trainer asks before it loads a model.
    """
    config = _as_config(args, config_class)
    if config.process_index == 0:
        check_writable(str(config.output_dir))
    return config


def _as_config(args: TrainingArguments | None, config_class: type[Config]) -> Config:
    if args is None:
        return config_class()
    if isinstance(args, config_class):
        return args
    if not isinstance(args, TrainingArguments):
        raise ValueError(f"args must be a {config_class.__name__} or TrainingArguments, got {type(args).__name__}")
    config = object.__new__(config_class)
    config.__dict__.update({entry.name: default_of(entry) for entry in fields(config_class)})
    config.__dict__.update(args.__dict__)  # already through its own __post_init__: devices are set up once
    config.remove_unused_columns = False
    if args.process_index == 0:
        log_without_effect(config)
    config.settle()
    config.validate()
    return config


def older_style(args: Any, config_class: type, given: Mapping[str, Any]) -> bool:
    """Whether a trainer was called as in older releases: with plain TrainingArguments, or with settings as keywords."""
    settings = any(value is not None for value in given.values())
    return not isinstance(args, config_class) and (args is not None or settings)


def with_keywords(config: Config, given: Mapping[str, Any]) -> Config:
    """The config with the fields that a trainer was given as keywords (the older call style); None means not given.

    A keyword that contradicts a value set in the config is a ValueError: one of them would be ignored. The caller's
    own object stays as it is.
    """
    defaults = {entry.name: default_of(entry) for entry in fields(config)}
    changed = {}
    for name, value in given.items():
        current = getattr(config, name)
        if value is None or value == current:
            continue
        if current != defaults[name]:
            raise ValueError(
                f"You cannot specify both `{name}` and `args.{name}`: {value!r} against {current!r}. Set one of them."
            )
        changed[name] = value
    if changed:
        config = copy.copy(config)
        config.__dict__.update(changed)
    config.validate()
    return config


@dataclass
class OfflineConfig(PostTrainingConfig):
    """The settings that the trainers on a data set share."""

    padding_free: bool = field(default=True)
    """no padding, shared prompts computed once; False forces padded rows (same results, slower)"""
    context_parallel_size: int = field(default=1)
    """ranks that compute each packed row together, for rows whose activations do not fit one device; the number of
    processes must be a multiple of it"""
    max_tokens_per_microbatch: int | None = field(default=None)
    """cut each batch into forward passes of at most so many tokens, equally full; the gradient stays the same. None: no
    cuts, except for a single process on the CPU, which takes 1,536 at a time (a large number undoes that)"""

    def validate(self) -> None:
        super().validate()
        budget = self.max_tokens_per_microbatch
        require(self, "max_tokens_per_microbatch", budget is None or budget > 0, "give a number of tokens, or None")
        own, asked = self.context_parallel_size, super().ranks_of_a_row
        require(self, "context_parallel_size", own >= 1, "give a number of ranks >= 1")
        same = asked in (1, own) or own == 1
        require(self, "context_parallel_size", same, f"parallelism_config says cp_size={asked}; give one of them")

    @property
    def token_budget(self) -> int | None:
        return self.max_tokens_per_microbatch

    @property
    def shares_rows(self) -> bool:
        return True

    @property
    def ranks_of_a_row(self) -> int:
        return max(self.context_parallel_size, super().ranks_of_a_row)

    def cuts_unasked(self) -> bool:
        return not self.pads_rows

    @property
    def pads_rows(self) -> bool:
        """Whether every forward pass pads its rows; with NEFTune too, whose noise depends on the width of a row."""
        return not self.padding_free or self.neftune_noise_alpha is not None


@dataclass
class PreferenceConfig(OfflineConfig):
    """The settings that the preference trainers share, on pairs or on single completions."""

    learning_rate: float = field(default=1e-6)
    """initial learning rate"""
    beta: float = field(default=0.1)
    """scale of the log-ratios: the smaller, the further the policy may move"""
    max_length: int | None = field(default=1024)
    """longest prompt + completion in tokens; None: never cut"""
    max_prompt_length: int | None = field(default=None)
    """longest prompt in tokens"""
    max_completion_length: int | None = field(default=None)
    """longest completion in tokens"""
    truncation_mode: str = field(default="keep_start")
    """which end of a long prompt stays: keep_start or keep_end"""
    learn_tool_results: bool = field(default=False)
    """score what tools and users say inside a completion too (conversational rows)"""
    disable_dropout: bool = field(default=True)
    """train without dropout"""
    pad_token: str | None = field(default=None)
    """padding token, where it is not the tokenizer's own"""
    label_pad_token_id: int = accepted("label_pad_token_id", -100)
    padding_value: int | None = accepted("padding_value")
    is_encoder_decoder: bool | None = accepted("is_encoder_decoder")
    use_logits_to_keep: bool = accepted("use_logits_to_keep", False)
    max_target_length: int | None = accepted("max_target_length")

    @property
    def smooths_labels(self) -> bool:
        return False

    def translate(self) -> None:
        super().translate()
        rename(self, "max_target_length", "max_completion_length")
        self.max_target_length = None

    def token_settings(self) -> dict[str, str | None]:
        return {"pad_token": self.pad_token}

    def validate(self) -> None:
        super().validate()
        choose(self, "truncation_mode", TRUNCATION_MODES)
        require(self, "beta", self.beta >= 0, "give a scale >= 0")
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "give a length > 0, or None")


def processing_class_of(processing_class: Any, tokenizer: Any) -> Any:
    """The tokenizer under either of its two names; both at once is a ValueError."""
    if processing_class is not None and tokenizer is not None and processing_class is not tokenizer:
        raise ValueError("`processing_class` and `tokenizer` are two names of one argument: give one of them")
    return tokenizer if processing_class is None else processing_class
