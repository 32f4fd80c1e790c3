"""What is installed, and how the package's namespaces load their names only when asked."""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]], refuse: Callable[[str], None] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`(__getattr__, __dir__, __all__)` of a namespace whose names live in the modules that are the keys of `names`.

    PEP 562: the module behind a name is imported when the name is first read, so `import trl` loads no torch.
    `refuse`: raises for names that have an error of their own.
    """
    home = {name: module for module, listed in names.items() for name in listed}

    def load(name: str) -> Any:
        if name not in home:
            if refuse is not None:
                refuse(name)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name]), name)
        importlib.import_module(package).__dict__[name] = value
        return value

    return load, lambda: sorted(home), sorted(home)


def is_installed(module: str) -> bool:
    """Whether `import module` would find a real module, without importing it.

    `sys.modules[module] = None` hides it. A mere folder of that name (`wandb/` next to a script) is not a module.
    """
    if module in sys.modules:
        return sys.modules[module] is not None
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def pip_install(*packages: str) -> str:
    """The command that installs packages, for an error text.

    It never is `pip install "trl[...]"`: pip would fetch another project's package of that name.
    """
    return "pip install " + " ".join(f'"{each}"' if set(each) & set("[]<>=") else each for each in packages)


def is_gpu_available() -> bool:
    """Whether torch has an accelerator for which kernels of the field are written (not Apple's)."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is not None and device.type != "mps"


def is_peft_available() -> bool:
    return is_installed("peft")


def is_diffusers_available() -> bool:
    return is_installed("diffusers")


def is_bitsandbytes_available() -> bool:
    return is_installed("bitsandbytes")


def is_torchvision_available() -> bool:
    return is_installed("torchvision")


def is_rich_available() -> bool:
    return is_installed("rich")


def is_wandb_available() -> bool:
    return is_installed("wandb")


def is_deepspeed_available() -> bool:
    return is_installed("deepspeed")


def is_liger_kernel_available() -> bool:
    return is_installed("liger_kernel")


VLLM = "vllm>=0.32,<0.33"
"""what to install for sampling by vLLM"""


def is_vllm_available() -> bool:
    return is_installed("vllm")


def _at_least(package: str, version: str) -> bool:
    from packaging.version import Version

    return Version(importlib.metadata.version(package)) >= Version(version)


def is_accelerate_greater_20_0() -> bool:
    """Whether accelerate is 0.20.0 or newer."""
    return _at_least("accelerate", "0.20.0")


def is_torch_greater_2_0() -> bool:
    """Whether torch is 2.0 or newer."""
    return _at_least("torch", "2.0")


def is_transformers_greater_than(version: str) -> bool:
    """Whether transformers is strictly newer than `version`."""
    from packaging.version import Version

    return Version(importlib.metadata.version("transformers")) > Version(version)


def is_xpu_available() -> bool:
    """Whether an Intel XPU can be used, as accelerate sees it."""
    from accelerate.utils import is_xpu_available as accelerate_sees_xpu

    return bool(accelerate_sees_xpu())


def is_npu_available() -> bool:
    """Whether an Ascend NPU can be used."""
    if not is_installed("torch_npu"):
        return False
    import torch

    importlib.import_module("torch_npu")
    return hasattr(torch, "npu") and bool(torch.npu.is_available())
