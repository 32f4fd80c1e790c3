"""Which model a script trains, and how it is loaded: `ModelConfig` and what follows from it."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any, Literal

from trl.import_utils import is_peft_available, pip_install

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class ModelConfig:
    """The model of a script: its name, precision, attention, LoRA adapter and quantisation."""

    model_name_or_path: str | None = field(default=None)
    """folder or Hub name of the model to train"""
    model_revision: str = field(default="main")
    """branch, tag or commit on the Hub"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = field(
        default=None, metadata={"aliases": ["--torch_dtype", "--torch-dtype"]}
    )
    """precision of the weights; auto: as they were saved; None: float32 where they are trained, and as they were saved
    below an adapter"""
    attn_implementation: str | None = field(default=None)
    """attention: sdpa, eager, flash_attention_2, or a kernel of the Hub; None: the model's default"""
    use_peft: bool = field(default=False)
    """train a LoRA adapter in place of the weights"""
    lora_r: int = field(default=16)
    """rank of the adapter"""
    lora_alpha: int = field(default=32)
    """scale of the adapter"""
    lora_dropout: float = field(default=0.05)
    """dropout of the adapter"""
    lora_target_modules: list[str] | None = field(default=None)
    """modules that get an adapter, or all-linear; None: PEFT's choice for the model"""
    lora_target_parameters: list[str] | None = field(default=None)
    """parameters that get an adapter, for weights that are not modules (mixtures of experts)"""
    lora_modules_to_save: list[str] | None = field(default=None)
    """modules that are trained whole, beside the adapter"""
    lora_task_type: str = field(default="CAUSAL_LM")
    """what the adapter is told of the model: CAUSAL_LM, SEQ_CLS (reward models), TOKEN_CLS"""
    use_rslora: bool = field(default=False)
    """scale the adapter by alpha / sqrt(r) (rsLoRA) instead of alpha / r"""
    use_dora: bool = field(default=False)
    """split weights into magnitude and direction (DoRA)"""
    load_in_8bit: bool = field(default=False)
    """quantise the weights to 8 bits (bitsandbytes)"""
    load_in_4bit: bool = field(default=False)
    """quantise the weights to 4 bits (bitsandbytes)"""
    bnb_4bit_quant_type: str = field(default="nf4")
    """4 bits: nf4 or fp4"""
    use_bnb_nested_quant: bool = field(default=False)
    """4 bits: quantise the scales too"""
    bnb_4bit_quant_storage: str | None = field(default=None)
    """4 bits: type in which the weights are stored; FSDP wants that of the other weights"""
    trust_remote_code: InitVar[bool] = False
    torch_dtype: InitVar[str | None] = None

    def __post_init__(self, trust_remote_code: bool, torch_dtype: str | None) -> None:
        # Older scripts read and pass these two. They are not fields: a parser would meet each of them twice.
        self.dtype = torch_dtype or self.dtype  # type: ignore[assignment]
        self.__dict__ |= {"trust_remote_code": trust_remote_code, "torch_dtype": self.dtype}
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit=True, load_in_4bit=True: weights are quantised one way; choose one of them")
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            # PEFT reads a name that is not in a list as a pattern, and "all-linear" as all linear modules
            self.lora_target_modules = self.lora_target_modules[0]  # type: ignore[assignment]


def get_peft_config(model_args: ModelConfig) -> Any:
    """The `LoraConfig` that the settings ask for; None without `use_peft`."""
    if not model_args.use_peft:
        return None
    if not is_peft_available():
        raise ValueError(f"use_peft=True: needs the package peft; run `{pip_install('peft')}`")
    from peft import LoraConfig

    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        bias="none",
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        modules_to_save=model_args.lora_modules_to_save,
    )


def get_quantization_config(model_args: ModelConfig) -> Any:
    """The `BitsAndBytesConfig` that the settings ask for; None without `load_in_8bit` and `load_in_4bit`."""
    if not (model_args.load_in_8bit or model_args.load_in_4bit):
        return None
    from transformers import BitsAndBytesConfig

    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=None if model_args.dtype in (None, "auto") else model_args.dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )


def get_kbit_device_map() -> dict[str, int] | None:
    """Where quantised weights are loaded: the whole model on this process's device; None without an accelerator."""
    import torch
    from accelerate import PartialState

    return {"": PartialState().local_process_index} if torch.accelerator.is_available() else None


def loading_keywords(model_args: ModelConfig, trust_remote_code: bool = False) -> dict[str, Any]:
    """Keywords of `from_pretrained` that the settings stand for."""
    keywords: dict[str, Any] = {"dtype": model_args.dtype} if model_args.dtype is not None else {}
    if model_args.model_revision != "main":
        keywords["revision"] = model_args.model_revision
    if model_args.attn_implementation is not None:
        keywords["attn_implementation"] = model_args.attn_implementation
    if trust_remote_code:
        keywords["trust_remote_code"] = True
    quantisation = get_quantization_config(model_args)
    if quantisation is not None:
        # as a dict: trackers write the config down as JSON, which an object in it would break
        keywords |= {"quantization_config": quantisation.to_dict(), "device_map": get_kbit_device_map()}
    return keywords
