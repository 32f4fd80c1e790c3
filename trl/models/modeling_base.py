"""The base class of models that put a value head beside a language model, and frozen copies of a model."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import WEIGHTS_NAME

from trl.import_utils import is_npu_available, is_xpu_available
from trl.models.peft_support import (
    KBIT_ARGUMENTS,
    PEFT_ARCHITECTURES,
    add_adapter,
    is_peft_config,
    is_peft_model,
    require_peft,
    reward_head_weights,
)
from trl.models.prepare import load_model, modern_init_kwargs
from trl.models.weight_files import HUB_ARGUMENTS, WEIGHT_FILES, belongs, holds_other_modules, read_modules, writing
from trl.models.zero import copy_in_parts

LAYER_PATTERNS = [
    "transformer.h.{layer}",
    "model.decoder.layers.{layer}",
    "gpt_neox.layers.{layer}",
    "model.layers.{layer}",
]


class PreTrainedModelWrapper(nn.Module):
    """A transformers or PEFT model with another module beside it. Abstract.

    A subclass names the auto class that loads the inner model (`transformers_parent_class`), its own keywords
    (`supported_args`) and the modules that a checkpoint holds (`supported_modules`). It defines `state_dict`,
    `post_init` and `push_to_hub`.
    """

    transformers_parent_class: ClassVar[Any] = None
    supported_args: ClassVar[tuple[str, ...] | None] = None
    supported_modules: ClassVar[tuple[str, ...]] = ("v_head",)
    supported_rm_modules: ClassVar[tuple[str, ...]] = ("score",)
    supported_pretrained_model_architectures: ClassVar[tuple[type[nn.Module], ...]] = (
        PreTrainedModel,
        *PEFT_ARCHITECTURES,
    )

    def __init__(
        self,
        pretrained_model: Any = None,
        score_module: nn.Module | None = None,
        supports_rm_adapter: bool = False,
        rm_adapter_name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        if unknown := sorted(set(kwargs) - set(self.supported_args or ())):
            raise TypeError(f"{type(self).__name__} does not know the arguments {', '.join(unknown)}")
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.prepare_inputs_for_generation = getattr(pretrained_model, "prepare_inputs_for_generation", None)
        self.is_loaded_in_8bit = getattr(pretrained_model, "is_loaded_in_8bit", False)
        self.is_loaded_in_4bit = getattr(pretrained_model, "is_loaded_in_4bit", False)
        self.is_sequential_parallel = False
        for name in (
            f"{what}_checkpointing_{do}" for what in ("gradient", "activation") for do in ("enable", "disable")
        ):
            if hasattr(pretrained_model, name):
                setattr(self, name, getattr(pretrained_model, name))
        self.is_peft_model = is_peft_model(pretrained_model)
        self.current_device = self._get_current_device()
        self.supports_rm_adapter = supports_rm_adapter
        self.rm_adapter_name = rm_adapter_name
        self.policy_adapter_name = "default"
        if score_module is not None:
            self.score = score_module

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | nn.Module, *model_args: Any, **kwargs: Any
    ) -> PreTrainedModelWrapper:
        """A wrapped model from a folder, a Hub name or a model.

        Our keywords: `peft_config` (put a new adapter on), `is_trainable` (go on training the adapter that the folder
        holds), `reward_adapter` and `reward_adapter_name` (an adapter with a score head, see `compute_reward_score`),
        the class's `supported_args`, and those of PEFT's `prepare_model_for_kbit_training`. All others go to
        `from_pretrained` of the inner model. A head's weights that the folder holds are loaded. Without a `dtype` the
        weights are float32, and those below an adapter as they were saved.
        """
        adapters = {name: kwargs.pop(name, None) for name in ("peft_config", "reward_adapter")}
        reward_adapter_name = kwargs.pop("reward_adapter_name", "reward_adapter")
        is_trainable = kwargs.pop("is_trainable", False)
        _check_adapters(**adapters)
        own_kwargs, pretrained_kwargs, kbit_kwargs = cls._split_kwargs(kwargs)
        where = {name: pretrained_kwargs[name] for name in HUB_ARGUMENTS if name in pretrained_kwargs}
        source = pretrained_model_name_or_path
        if isinstance(source, str | os.PathLike):
            source = os.fspath(source)
            pretrained_kwargs = cls._with_device_map(pretrained_kwargs)
            loader = cls.transformers_parent_class
            whole = adapters["peft_config"] is None
            inner = load_model(source, loader, pretrained_kwargs, *model_args, is_trainable=is_trainable, whole=whole)
            has_adapter = is_peft_model(inner)
        elif isinstance(source, cls.supported_pretrained_model_architectures) or is_peft_model(source):
            inner = cls._given(source, model_args, pretrained_kwargs)
        else:
            raise ValueError(
                f"pretrained_model_name_or_path should be a string or a PreTrainedModel, but is {type(source)}"
            )
        inner = _with_adapter(inner, adapters["peft_config"], kbit_kwargs)
        own_kwargs |= cls._reward_modeling(inner, adapters["reward_adapter"], reward_adapter_name, where.get("token"))
        model = cls(inner, **own_kwargs)
        if isinstance(source, str):
            state = read_modules(source, cls.supported_modules, adapter=has_adapter, **where)
            if not state:
                logging.warning(
                    f"A {type(inner)} model is loaded from '{source}', and no v_head weight is found. "
                    "This IS expected if you are not resuming PPO training."
                )
        else:
            state = {key: value for key, value in inner.state_dict().items() if belongs(key, cls.supported_modules)}
        model.post_init(state_dict=state)
        return model

    @classmethod
    def _given(cls, model: nn.Module, model_args: tuple[Any, ...], pretrained_kwargs: dict[str, Any]) -> nn.Module:
        unused = [name for name in pretrained_kwargs if name != "token"] + ["*model_args"] * bool(model_args)
        if unused:
            raise ValueError(
                f"{', '.join(unused)} say how to load a model, and a loaded {type(model).__name__} was passed: "
                "give them to its own `from_pretrained`"
            )
        return model

    @classmethod
    def _with_device_map(cls, pretrained_kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = modern_init_kwargs(pretrained_kwargs)
        quantization = kwargs.get("quantization_config")
        bits = any(getattr(quantization, f"load_in_{bits}bit", False) for bits in (8, 4))
        if bits and kwargs.get("device_map") is None:
            kwargs["device_map"] = {"": cls._get_current_device()}
            logging.warning(
                "The `device_map` argument is not provided: the whole model goes to the current device. "
                "To spread it over several devices, pass a `device_map`."
            )
        return kwargs

    @classmethod
    def _reward_modeling(
        cls, model: nn.Module, reward_adapter: str | None, name: str, token: str | bool | None
    ) -> dict[str, Any]:
        """Keywords of `__init__` for a model that is its own reward model through another adapter."""
        if reward_adapter is None:
            return {}
        if not is_peft_model(model):
            raise ValueError("reward_adapter can only be used with a PeftModel. ")
        score = cls.add_and_load_reward_modeling_adapter(model, reward_adapter, name, token=token)
        return {"score_module": score, "supports_rm_adapter": True, "rm_adapter_name": name}

    @classmethod
    def _get_current_device(cls) -> int | str:
        """This process's device: an index on CUDA, "xpu:i", "npu:i" or "cpu"."""
        if torch.cuda.is_available():
            return PartialState().local_process_index
        if is_xpu_available():
            return f"xpu:{PartialState().local_process_index}"
        if is_npu_available():
            return f"npu:{PartialState().local_process_index}"
        return "cpu"

    @classmethod
    def _split_kwargs(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """(the class's own, those of the inner model's `from_pretrained`, those of PEFT's k-bit preparation)."""
        own = {name: value for name, value in kwargs.items() if name in (cls.supported_args or ())}
        kbit = {name: value for name, value in kwargs.items() if name in KBIT_ARGUMENTS and name not in own}
        others = {name: value for name, value in kwargs.items() if name not in own and name not in kbit}
        return own, others, kbit

    @classmethod
    def add_and_load_reward_modeling_adapter(
        cls,
        pretrained_model: Any,
        adapter_model_id: str,
        adapter_name: str = "reward_model_adapter",
        token: str | bool | None = None,
    ) -> nn.Linear:
        """Load the adapter of a reward model beside the policy's; the frozen score head that was saved with it."""
        where = {} if token is None else {"token": token}
        pretrained_model.load_adapter(adapter_model_id, adapter_name, is_trainable=False, **where)
        pretrained_model.train()
        weights = reward_head_weights(adapter_model_id, cls.supported_rm_modules, token)
        labels, hidden = weights["weight"].shape
        score = nn.Linear(hidden, labels, bias="bias" in weights)
        score.load_state_dict(weights)
        return score.to(cls._get_current_device(), pretrained_model.dtype).requires_grad_(False)

    def compute_reward_score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        ppo_adapter_name: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Scores of every position under the reward adapter, [B, T, labels]; without gradients.

        Afterwards `ppo_adapter_name` (None: the policy's) is active again and the model is in eval mode.
        """
        if not self.supports_rm_adapter:
            raise ValueError("This model does not support reward modeling adapter.")
        policy = self.policy_adapter_name if ppo_adapter_name is None else ppo_adapter_name
        trainable = [parameter for parameter in self.pretrained_model.parameters() if parameter.requires_grad]
        self.pretrained_model.set_adapter(self.rm_adapter_name, inference_mode=True)
        self.pretrained_model.eval()
        try:
            with torch.no_grad():
                output = self.pretrained_model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    output_hidden_states=True,
                    return_dict=True,
                    **kwargs,
                )
                hidden = getattr(output, "decoder_hidden_states", None) or output.hidden_states
                return self.score(hidden[-1].to(self.score.weight.dtype))
        finally:
            self.pretrained_model.set_adapter(policy, inference_mode=True)
            for parameter in trainable:
                parameter.requires_grad_(True)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write a folder that both transformers' auto classes and this class load; nothing is left half-written.

        A plain model: its own files, `v_head.*` among the weights. PEFT: the adapter's files, and `v_head.*` alone in
        `pytorch_model.bin`. `kwargs` go to the inner model's `save_pretrained`; a `state_dict` replaces our own.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("`push_to_hub` is not part of saving here: call `push_to_hub(repo_id)` afterwards")
        state = kwargs.pop("state_dict", None)
        state = self.state_dict() if state is None else state
        if not kwargs.get("is_main_process", True):  # this process writes nothing, but the others may need its shards
            self.pretrained_model.save_pretrained(str(save_directory), state_dict=state, **kwargs)
        elif self.is_peft_model:
            self._save_adapter(Path(save_directory), state, **kwargs)
        else:
            with writing(save_directory, () if kwargs.get("variant") else WEIGHT_FILES) as folder:
                self.pretrained_model.save_pretrained(folder, state_dict=state, **kwargs)

    def _save_adapter(self, directory: Path, state: Mapping[str, Tensor], **kwargs: Any) -> None:
        if holds_other_modules(directory / WEIGHTS_NAME, self.supported_modules):
            raise ValueError(
                f"{str(directory)!r} holds a whole model, whose {WEIGHTS_NAME} the value head would overwrite: "
                "save the adapter to a folder of its own"
            )
        with writing(directory, ("adapter_model.safetensors", "adapter_model.bin")) as folder:
            if (directory / "README.md").exists():  # PEFT brings the user's card up to date
                shutil.copy(directory / "README.md", folder)
            theirs = {key: value for key, value in state.items() if not belongs(key, self.supported_modules)}
            self.pretrained_model.save_pretrained(str(folder), state_dict=theirs or None, **kwargs)
            ours = {key: value for key, value in state.items() if belongs(key, self.supported_modules)}
            with open(folder / WEIGHTS_NAME, "wb") as file:
                torch.save(ours, file)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        raise NotImplementedError

    def post_init(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


def _check_adapters(peft_config: Any, reward_adapter: Any) -> None:
    if reward_adapter is not None and not isinstance(reward_adapter, str):
        raise ValueError(
            "The `reward_adapter` argument should be a string representing the name of local path or the Hub id to "
            "the Reward Modeling adapter."
        )
    if peft_config is not None:
        require_peft("`peft_config`")
        if not is_peft_config(peft_config):
            raise ValueError("The `peft_config` argument should be an instance of `peft.PeftConfig` class.")


def _with_adapter(model: Any, peft_config: Any, kbit_kwargs: dict[str, Any]) -> nn.Module:
    """`model` with a new adapter if one is asked for; ValueError for adapters that PPO cannot train."""
    if is_peft_model(model):
        if peft_config is not None:
            logging.warning("`peft_config` is ignored: the model has an adapter of its own, and that one is used.")
    elif peft_config is not None:
        model = add_adapter(model, peft_config, **kbit_kwargs)
        kbit_kwargs = {}
    if any(kbit_kwargs.values()):
        raise ValueError(
            f"{', '.join(kbit_kwargs)} prepare a quantised model for a new adapter: pass `peft_config` too"
        )
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError("PromptLearningConfig is not supported for PPO training.")
    return model


def create_reference_model(
    model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None
) -> nn.Module:
    """A frozen copy of `model` in eval mode.

    With `num_shared_layers`, everything before that layer is shared: both models hold the same tensors, which are
    frozen in `model` too. `pattern` names a layer's parameters ("transformer.h.{layer}"); None: the first of
    `LAYER_PATTERNS` that fits; ValueError if none does. Weights that DeepSpeed ZeRO-3 holds in parts are copied in
    parts, by all ranks together.
    """
    if pattern is not None and num_shared_layers is None:
        raise ValueError(f"`pattern`={pattern!r} says where shared layers are: pass `num_shared_layers` with it")
    shared = [] if num_shared_layers is None else _before_layer(model, num_shared_layers, pattern)
    for parameter in shared:
        parameter.requires_grad_(False)  # both models read it, and the reference must not move
    copied = copy_in_parts(model, {id(parameter): parameter for parameter in shared})
    return copied.eval().requires_grad_(False)


def _before_layer(model: nn.Module, layer: int, pattern: str | None) -> list[nn.Parameter]:
    """The parameters before layer number `layer`; none, with a warning, where a given pattern fits nothing."""
    names = [name for name, _ in model.named_parameters()]
    candidates = LAYER_PATTERNS if pattern is None else [pattern]
    for part in (candidate.format(layer=layer) for candidate in candidates):
        first = next((place for place, name in enumerate(names) if part in name), None)
        if first is not None:
            return [model.get_parameter(name) for name in names[:first]]
    if pattern is None:
        raise ValueError("Layer pattern could not be matched.")
    logging.warning("Pattern passed or found, but no layers matched in the model. Check for a typo.")
    return []
