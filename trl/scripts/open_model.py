"""What a run has left, opened to be used: its output folder, a checkpoint, an adapter, or a model by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trl.import_utils import is_peft_available, pip_install
from trl.scripts.quiet import say

ADAPTER, WHOLE, PIPELINE = "adapter_config.json", "config.json", "model_index.json"
"""files that say what lies in a folder"""
TASKS = {"SEQ_CLS": "reward model", "TOKEN_CLS": "process reward model"}
ENDINGS = {"ForSequenceClassification": "reward model", "ForTokenClassification": "process reward model"}
LANGUAGE_MODEL = "language model"

Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"] | None,
    typer.Option(help="Precision of the weights; auto: as saved (default: float32 on a CPU, as saved on a GPU)."),
]


@dataclass(frozen=True)
class Found:
    """Where a model lies, and what it is; nothing is loaded yet."""

    name: str
    """as the user gave it"""
    place: str
    """folder, or name on the Hub"""
    kind: str
    """language model, reward model or process reward model"""
    adapter: Any | None = None
    """the adapter's config, where it is one"""

    @property
    def base(self) -> str:
        """The model below the adapter, or the model itself."""
        return self.place if self.adapter is None else str(self.adapter.base_model_name_or_path)


@dataclass
class Opened:
    """A model and its tokenizer, which knows the processor of a model that reads pictures."""

    found: Found
    model: Any
    tokenizer: Any
    stops: tuple[str, ...] = ()
    """texts that end an answer, where roles are spelled out as words"""

    def spell_roles(self) -> None:
        """Put conversations to a model without a chat template as `User: ...` and `Assistant: ...`, and say so."""
        from trl.models.chat_setup import SIMPLE_CHAT_TEMPLATE

        if self.tokenizer.chat_template:
            return
        say(f"{self.found.name} has no chat template: turns are put to it as `User: ...` and `Assistant: ...`")
        self.tokenizer.chat_template, self.stops = SIMPLE_CHAT_TEMPLATE, ("\n\nUser:",)


def find_model(name: str) -> Found:
    """What lies at a folder or a name on the Hub. ValueError where it is no model."""
    from trl.models.peft_support import find_adapter

    place = _folder_of(name)
    if Path(place).is_dir():
        if (Path(place) / PIPELINE).is_file():
            raise ValueError(f"{name}: it draws images; diffusers.DiffusionPipeline.from_pretrained opens it")
        if (Path(place) / ADAPTER).is_file() and not is_peft_available():
            raise ValueError(f"{name}: it holds an adapter, which needs the package peft; run `{pip_install('peft')}`")
    adapter = find_adapter(place)
    if adapter is not None and not adapter.base_model_name_or_path:
        raise ValueError(f"{name}: the adapter does not say which model it belongs to (`base_model_name_or_path`)")
    return Found(name, place, _kind_of(place, adapter), adapter)


def _folder_of(name: str) -> str:
    """The folder to read: of a run that was killed its newest whole checkpoint."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"{name}: it is a file; give the folder that it lies in")
    if not path.is_dir():
        if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name.strip():
            raise ValueError(f"{name or 'MODEL'}: there is no such folder; give a run's output folder or a Hub name")
        return name
    if any((path / one).is_file() for one in (ADAPTER, WHOLE, PIPELINE)):
        return str(path)
    from trl.reports.run_folder import check_one_run
    from trl.trainer.checkpoints import checkpoints, is_finished

    saved = [one for one in checkpoints(path) if is_finished(one)]
    if not saved:
        check_one_run(path)
        raise ValueError(
            f"{name}: no model lies there, neither {WHOLE} nor {ADAPTER}; give the output folder of a run that has "
            "saved one, or a Hub name"
        )
    say(f"{name}: the run has not saved its last model, {saved[-1].name} is taken")
    return str(saved[-1])


def _kind_of(place: str, adapter: Any) -> str:
    if adapter is not None:
        return TASKS.get(str(getattr(adapter.task_type, "value", adapter.task_type)), LANGUAGE_MODEL)
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(place)
    except (OSError, ValueError):  # the loading itself says what is wrong
        return LANGUAGE_MODEL
    made = (config.get("architectures") or [""])[0]
    return next((kind for ending, kind in ENDINGS.items() if made.endswith(ending)), LANGUAGE_MODEL)


def auto_class_of(found: Found) -> Any:
    """The class of transformers that loads the model, or the base of the adapter."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    if found.kind != LANGUAGE_MODEL:
        scores = found.kind == "reward model"
        return AutoModelForSequenceClassification if scores else AutoModelForTokenClassification
    try:
        encodes = getattr(AutoConfig.from_pretrained(found.base), "is_encoder_decoder", False)
    except (OSError, ValueError):
        encodes = False
    return AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM


def labels_of(found: Found) -> dict[str, int]:
    """How many labels a classifier has, which its adapter's head says."""
    if found.adapter is None or found.kind == LANGUAGE_MODEL:
        return {}
    from trl.models.peft_support import reward_head_weights

    head = reward_head_weights(found.place, ("score", "classifier", "classification_head"))
    return {"num_labels": int(head["weight"].shape[0])}


def open_model(name: str, dtype: str | None = None, wants: str | None = LANGUAGE_MODEL) -> Opened:
    """Load a model to use it, with its tokenizer. wants: what it has to be; None: anything."""
    found = find_model(name)
    if wants is not None and found.kind != wants:
        way = "`trl eval` measures it on pairs, and `--reward` of `trl grpo` or `trl eval` rewards with it"
        raise ValueError(f"{name}: it is a {found.kind}, which writes nothing; {way}")
    return open_found(found, dtype)


def open_found(found: Found, dtype: str | None) -> Opened:
    """Load what was found, on the accelerator where there is one."""
    import torch

    from trl.models.forward import introduce
    from trl.models.peft_support import is_quantized
    from trl.models.prepare import load_model

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    keywords: dict[str, Any] = labels_of(found)
    if dtype is not None:
        keywords["dtype"] = dtype
    like = torch.float32 if device is not None and device.type == "cpu" else None  # which computes halves slowly
    with head_of_adapter(found):
        model = load_model(found.place, auto_class_of(found), keywords, frozen=True, like=like)
    if not is_quantized(model):  # these lie where they were loaded
        model = model.to(device)
    tokenizer = tokenizer_of(found)
    introduce(model, tokenizer)
    return Opened(found, model.eval().requires_grad_(False), tokenizer)


@contextmanager
def head_of_adapter(found: Found) -> Iterator[None]:
    """Within it transformers does not say that the base lacks a head, which the adapter of a classifier brings."""
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    if found.adapter is not None and found.kind != LANGUAGE_MODEL:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def tokenizer_of(found: Found) -> Any:
    """The tokenizer beside the model, of its run, or of the base."""
    from trl.models.prepare import load_tokenizer

    place = Path(found.place)
    places = [place, place.parent] if place.name.startswith("checkpoint-") else [place]
    own = next((str(one) for one in places if (one / "tokenizer_config.json").is_file()), None)
    if own is None and (found.adapter is None or not place.is_dir()):
        own = found.place if found.adapter is None else None
    return load_tokenizer(own or found.base)
