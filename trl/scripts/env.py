"""`trl env`: versions and devices, for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform

PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "huggingface_hub", "numpy",
    "bitsandbytes", "deepspeed", "diffusers", "liger-kernel", "vllm", "wandb",
)  # fmt: skip


def command() -> None:
    """Print the versions and devices that a bug report should name."""
    for name, value in report().items():
        print(f"- {name}: {value}")


def report() -> dict[str, str]:
    """What the environment consists of."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    import trl

    lines = {"Platform": platform.platform(), "Python version": platform.python_version()}
    lines["TRL version"] = trl.__version__
    for package in PACKAGES:
        try:
            lines[f"{package} version"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[f"{package} version"] = "not installed"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if accelerator is not None else 0
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines["Accelerator"] = f"{count} x {accelerator}: {', '.join(names)}" if accelerator is not None else "none"
    lines["CPU cores"] = str(os.cpu_count())
    lines["Default config of accelerate"] = default_config_file if os.path.isfile(default_config_file) else "none"
    return lines


if __name__ == "__main__":
    command()
