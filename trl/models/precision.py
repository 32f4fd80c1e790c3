"""The one owner of precision: what is stored, what is computed, and how far two computations may differ.

Stored: what is trained is float32 unless a dtype is asked for; an adapter's base stays as it was saved; what is frozen
beside a policy follows it. Computed: autocast where the settings ask for it. Tolerated: `TOLERANCES`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from trl.models.unwrap import below_peft, below_value_head, has_parts
from trl.models.zero import elements

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)


# -- stored -----------------------------------------------------------------------------------


def dtype_keywords(
    source: str, init_kwargs: Mapping[str, Any], where: Mapping[str, Any], *, trained: bool, like: torch.dtype | None
) -> dict[str, Any]:
    """`dtype` for `from_pretrained`; empty: as the weights were saved.

    trained: the weights themselves are. like: the dtype that frozen weights follow. A dtype in `init_kwargs` is what
    the user asked for; quantised weights, and those wider than float32, stay as they are.
    """
    if init_kwargs.get("dtype") is not None:
        return {"dtype": init_kwargs["dtype"]}
    wanted = torch.float32 if trained else like
    if wanted is None or init_kwargs.get("quantization_config") is not None:
        return {}
    try:
        saved, _ = PreTrainedConfig.get_config_dict(source, **where)
    except (OSError, ValueError):  # the loading itself says what is wrong
        saved = {}
    wide = str(saved.get("dtype") or saved.get("torch_dtype")).endswith("float64")
    return {} if wide or saved.get("quantization_config") else {"dtype": wanted}


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of most of the weights below an adapter: what a reference follows to give the same numbers."""
    numbers: dict[torch.dtype, int] = {}
    for name, weight in below_peft(model).named_parameters():
        if weight.is_floating_point() and "lora_" not in name:
            numbers[weight.dtype] = numbers.get(weight.dtype, 0) + elements(weight)
    return max(numbers, key=numbers.__getitem__) if numbers else None


def frozen_dtype(policy: nn.Module, mixed_precision: str | None = None) -> torch.dtype | None:
    """The dtype of a teacher or a reward model beside a policy: float32 with one that computes so; else as saved."""
    exact = mixed_precision in (None, "no") and dtype_of(policy) == torch.float32
    return torch.float32 if exact else None


def heads_of(network: nn.Module) -> dict[str, nn.Module]:
    """The modules with weights that stand beside the body of a transformers model: its heads."""
    body = getattr(network, "base_model_prefix", "")
    if not body or not hasattr(network, body):
        return {}
    beside = ((name, part) for name, part in network.named_children() if name != body)
    return {name: part for name, part in beside if next(part.parameters(), None) is not None}


def raise_trained(model: nn.Module) -> None:
    """Store in float32 what an adapter trains in half precision: heads, norms and biases of the base.

    The modules around them compute as before, so what goes in and comes out is cast. Heads answer in float32.
    """
    if has_parts(model):  # whose weights are empty here
        return
    heads = {part for head in heads_of(below_peft(model)).values() for part in head.modules()}
    for module, inside in list(_modules(model)):
        own = [weight for weight in module.parameters(recurse=False) if weight.dtype in HALF]
        if not any(weight.requires_grad for weight in own):
            continue
        surroundings = own[0].dtype
        for weight in own:
            weight.data = weight.data.float()
        if not inside:
            module.register_forward_pre_hook(_Widen())
            if module not in heads:
                module.register_forward_hook(_Narrow(surroundings))


def _modules(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """All modules, and whether each belongs to an adapter, which casts by itself; the layer below it does not."""
    tuner: set[nn.Module] = set()
    for module in model.modules():
        if hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):
            base_layer: Any = module.base_layer
            tuner |= set(module.modules()) - set(base_layer.modules())
    for module in model.modules():
        yield module, module in tuner


class _Widen:
    """Before a module: floats in half precision become float32."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, Tensor) and x.dtype in HALF else x for x in inputs)


class _Narrow:
    """After a module: back to the dtype of what is around it."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, Tensor) and output.is_floating_point() else output


def check_trainable(model: nn.Module) -> None:
    """ValueError for a model of which nothing is trained."""
    network = below_value_head(model)
    if any(weight.requires_grad for weight in network.parameters()):
        return
    name = type(network).__name__
    if hasattr(network, "peft_config"):
        raise ValueError(
            f"{name} has no trainable weight: its adapter was loaded for inference; load it with `is_trainable=True`: "
            "`PeftModel.from_pretrained(base, path, is_trainable=True)`"
        )
    raise ValueError(f"{name} has no trainable weight: call `requires_grad_(True)` on what is to be trained")


def warn_of_half(model: nn.Module, learning_rate: float) -> None:
    """Warn where weights are trained in half precision: what a step of this size can move, and what it cannot."""
    half = [weight for weight in below_value_head(model).parameters() if weight.requires_grad and weight.dtype in HALF]
    if not half or not learning_rate:
        return
    total = sum(elements(weight) for weight in half)
    moved = sum(elements(weight) * _share_moved(weight.detach(), learning_rate) for weight in half) / max(total, 1)
    name = _name(half[0].dtype)
    limit = 2.0 ** (1 + math.floor(math.log2(2 * learning_rate / torch.finfo(half[0].dtype).eps)))
    warnings.warn(
        f"{total:,} trained weights are stored in {name}: a step of learning_rate={learning_rate:g} moves {moved:.1%} "
        f"of them, those below {limit:.2g}, and rounding undoes it for all others; leave `dtype` out to train in "
        "float32, and set bf16=True to compute in bfloat16"
    )


def _share_moved(weight: Tensor, step: float) -> float:
    """The share of weights whose neighbours in their own precision are nearer than two steps."""
    sample = weight.flatten()[:: max(1, weight.numel() // 4096)].float()
    if not len(sample):
        return 0.0
    _, exponent = torch.frexp(sample.abs())
    spacing = torch.ldexp(torch.full_like(sample, torch.finfo(weight.dtype).eps), exponent - 1)
    return float((spacing / 2 <= step).float().mean())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- memory -----------------------------------------------------------------------------------

STATES = {"adafactor": None, "galore": None, "apollo": None, "schedule_free": None, "stable": None, "grokadamw": None,
          "lomo": 0.0, "sgd": 0.0, "rmsprop": 1.0, "adagrad": 1.0, "lion": 1.0, "adam": 2.0}  # fmt: skip
"""numbers that an optimizer keeps for each trained one, by a part of its name; the first that fits. None: unknown"""


def memory_line(model: nn.Module, others: Iterable[nn.Module], optimizer: Any) -> str:
    """What training keeps beside activations: weights, gradients, optimizer; trained and frozen apart.

    others: frozen models beside the trained one, which may share weights. optimizer: the object, or its name.
    """
    weights: dict[int, Tensor] = {id(weight): weight for weight in model.parameters()}
    frozen = {id(weight): weight for other in others for weight in other.parameters()} | weights
    trained = [weight for weight in weights.values() if weight.requires_grad]
    rest = [weight for weight in frozen.values() if id(weight) not in {id(each) for each in trained}]
    size = _bytes(trained)
    parts = [f"trained weights {size_text(size)} {_dtypes(trained)}", f"gradients {size_text(size)}"]
    states = optimizer_states(optimizer)
    if states is not None:
        wide = sum(elements(weight) for weight in trained) if "8bit" in str(optimizer) else size
        parts.append(f"optimizer {size_text(states * wide)}")
    if rest:
        parts.append(f"frozen weights {size_text(_bytes(rest))} {_dtypes(rest)}")
    return "memory: " + ", ".join(parts)


def say_memory(model: nn.Module, others: Iterable[nn.Module], optimizer: Any) -> None:
    """One line before training, always shown."""
    logger.warning(memory_line(model, others, optimizer))


def optimizer_states(optimizer: Any) -> float | None:
    """Numbers that an optimizer keeps for each trained one; None where nobody knows before."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # below accelerate's
    if isinstance(optimizer, torch.optim.SGD):
        return float(bool(optimizer.defaults.get("momentum")))
    chosen = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    name = str(getattr(optimizer, "value", chosen)).lower()  # an enum of transformers
    return next((states for part, states in STATES.items() if part in name), None)


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(elements(weight) * weight.element_size() for weight in weights)


def size_text(size: float) -> str:
    """Bytes as people write them."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB")) if size >= each[0] / 20), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"


def _dtypes(weights: Iterable[Tensor]) -> str:
    """The dtypes of the weights, that of most bytes first."""
    sizes: dict[str, int] = {}
    for weight in weights:
        sizes[_name(weight.dtype)] = sizes.get(_name(weight.dtype), 0) + _bytes([weight])
    return " and ".join(sorted(sizes, key=sizes.__getitem__, reverse=True)) or "none"


# -- computed, and tolerated ------------------------------------------------------------------


class Tolerance(NamedTuple):
    """By how much two ways to compute the same numbers may differ."""

    states: float
    """of the head's input, relative to the largest"""
    logits: float
    """in standard deviations of the logits"""
    rounded: float
    """root mean square of the difference of states, relative to that of the states"""
    ratio: float
    """of the mean log-ratio from 0, in the first update on what the policy has sampled"""
    kl: float
    """of approx_kl from 0, there"""


TOLERANCES = {
    "float64": Tolerance(1e-3, 1e-4, 1e-3, 1e-5, 1e-8),
    "float32": Tolerance(1e-3, 1e-4, 1e-3, 1e-5, 1e-8),
    "tf32": Tolerance(3e-2, 5e-2, 4e-3, 2e-2, 1e-2),
    "float16": Tolerance(3e-2, 5e-2, 4e-3, 2e-2, 1e-2),
    "bfloat16": Tolerance(2e-1, 5e-2, 3e-2, 2e-2, 1e-2),
}
"""by the precision of the products; from exact to coarse. `rounded`: in bfloat16 at most half of it for llama, qwen3,
gemma2, gemma3, gpt2 and opt of 2 to 8 layers, nearly all for a router of experts, more for ALiBi whose biases matter;
the others, with 3 bits more, have an eighth of it"""

EXACT = ("float64", "float32")
"""of these: two ways to compute the same numbers, such as sampling and training, differ by nothing that counts"""


def coarsest(precisions: Iterable[str]) -> str:
    """Of several precisions, the one that tolerates most."""
    return max(precisions, key=list(TOLERANCES).index)


def precision_of(model: nn.Module) -> str:
    """The precision in which the model computes now, a key of `TOLERANCES`: the coarsest of all that plays a part.

    These are its weights, autocast, and products of float32 numbers whose factors are rounded ("tf32"): as torch is
    set, and as the device really does it.
    """
    network = below_value_head(model)
    weights = [weight for weight in network.parameters() if weight.is_floating_point()]
    if not weights:
        return "float32"
    device = weights[0].device
    dtypes = {weight.dtype for weight in weights}
    if torch.is_autocast_enabled(device.type):
        dtypes = (dtypes - {torch.float32}) | {torch.get_autocast_dtype(device.type)}
    names = {_name(dtype) if _name(dtype) in TOLERANCES else "bfloat16" for dtype in dtypes}
    if torch.float32 in dtypes:
        names |= {switched_products(device.type), products(device)}
    if is_quantized(network):
        names.add("bfloat16")
    return coarsest(names)


def is_quantized(model: nn.Module) -> bool:
    """Whether weights are stored in fewer bits than any of torch's floats, by bitsandbytes and its like."""
    return any(getattr(module, "is_quantized", False) for module in model.modules())


def switched_products(kind: str) -> str:
    """How torch is set to multiply float32 matrices on this kind of device."""
    backends: Any = torch.backends
    own = backends.cuda.matmul if kind == "cuda" else backends.mkldnn.matmul
    wider = (backends.cudnn if kind == "cuda" else backends.mkldnn, backends)
    settings = [getattr(each, "fp32_precision", "none") for each in (own, *wider)]
    setting = next((each for each in settings if each != "none"), "ieee")
    return {"tf32": "tf32", "bf16": "bfloat16"}.get(setting, "float32")


@torch.no_grad()
def products(device: torch.device) -> str:
    """How this device multiplies float32 matrices: one product, held against the same in float64."""
    if device.type == "meta":
        return "float32"
    numbers, other = (torch.linspace(-1, end, 128 * 128).sin().view(128, 128) for end in (500.0, 900.0))
    exact = numbers.double() @ other.double().T
    with torch.autocast(device.type, enabled=False):
        found = nn.functional.linear(numbers.to(device), other.to(device)).cpu().double()
    error = float((found - exact).norm() / exact.norm())
    return "float32" if error < 5e-6 else "tf32" if error < 1.2e-3 else "bfloat16"
