"""What is installed, and how the package's namespaces load their names only when asked."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`(__getattr__, __dir__, __all__)` of a namespace whose names live in the modules that are the keys of `names`.

    PEP 562: the module behind a name is imported when the name is first read, so `import trl` loads no torch.
    """
    home = {name: module for module, listed in names.items() for name in listed}

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name]), name)
        importlib.import_module(package).__dict__[name] = value
        return value

    return load, lambda: sorted(home), sorted(home)


def is_diffusers_available() -> bool:
    return importlib.util.find_spec("diffusers") is not None
