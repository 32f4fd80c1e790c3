"""Old import paths: a module that has moved is still found under the name that it had before.

Each such path opens a window: a module without code of its own, whose names are read from where they live now.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "cli.assets": ("quickstart.assets",),
    "cli.intervals": ("quickstart.intervals",),
    "cli.language_model": ("quickstart.language_model",),
    "cli.plots": ("quickstart.plots",),
    "cli.progress": ("quickstart.progress",),
    "cli.quickstart": ("quickstart.command",),
    "cli.recipe": ("quickstart.recipe",),
    "cli.reinforcement": ("quickstart.stage_reinforce",),
    "cli.report": ("quickstart.report",),
    "cli.results": ("quickstart.results",),
    "cli.reviews": ("quickstart.reviews",),
    "cli.stages": ("quickstart.stage_imitate_reward",),
    "cli.training": ("scripts.training", "scripts.describe", "scripts.jobs"),
    "commands": ("scripts.parser", "scripts.data_config"),
    "commands.cli_utils": ("scripts.parser", "scripts.data_config"),
    "data.collators": ("legacy.collators",),
    "data.constant_length": ("legacy.constant_length",),
    "data.pairs": ("legacy.joint_pairs", "data.batches"),
    "environment.plain_generate": ("generation.plain_generate",),
    "environment.stopping": ("generation.stop_criteria",),
    "models.gradient_place": ("kernels.grad_in_place",),
    "models.last_layer": ("kernels.last_layer",),
    "models.layout": ("kernels.tree_layout",),
    "models.linear_logprobs": ("kernels.head_tiles",),
    "models.norms": ("kernels.norms",),
    "models.onednn": ("kernels.onednn",),
    "models.rotary": ("kernels.rotary",),
    "models.stand_in": ("kernels.swapped_forward",),
    "models.tree_attention": ("kernels.tree_attention",),
    "trainer.dpo_padded": ("legacy.dpo_padded",),
    "trainer.environment_rollouts": ("rollout.episodes",),
    "trainer.experience": ("rollout.measure",),
    "scripts.utils": ("scripts.parser", "scripts.data_config", "scripts.model_config"),
    "trainer.heap": ("kernels.malloc",),
    "trainer.model_config": ("scripts.model_config",),
    "trainer.ppo_padded": ("legacy.ppo_padded",),
    "trainer.prompt_stream": ("rollout.prompts",),
    "trainer.rollout_report": ("rollout.report",),
    "trainer.rollout_rewards": ("rollout.rewards",),
    "trainer.rollouts": ("rollout.loader",),
}
"""path below `trl` before -> where its names live now, looked through in this order"""

RENAMED: dict[str, str] = {}
"""a name in one of these modules before -> today"""

IN_EXAMPLES = {"models.digits_base": "digits.digits_base", "models.modeling_digits": "digits.modeling_digits"}
"""modules that a source checkout has in `examples/digits/` and an installed package lacks"""


class Window(ModuleType):
    """A module of an older layout, which reads its names from today's modules when they are asked for."""

    def __init__(self, name: str, homes: tuple[str, ...]):
        super().__init__(name, f"A window on {', '.join(homes)}.")
        self.__dict__["_homes"] = homes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what inspects all modules loads none of them
            raise AttributeError(name)
        for home in self._homes:
            found = _example(home, self.__name__) if home in IN_EXAMPLES.values() else importlib.import_module(home)
            if hasattr(found, RENAMED.get(name, name)):
                return getattr(found, RENAMED.get(name, name))
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; it reads {', '.join(self._homes)}")


def _example(name: str, asked: str) -> ModuleType:
    folder = Path(__file__).parents[2] / "examples" / "digits"
    if not folder.is_dir():
        raise ImportError(f"{asked} is an example now: take examples/{name.replace('.', '/')}.py from the source")
    if "digits" not in sys.modules:
        spec = importlib.util.spec_from_file_location("digits", folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["digits"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(name)


def open_windows() -> None:
    """Put a window where each module was; `import` finds it there."""
    for old, homes in MOVED.items():
        sys.modules[f"trl.{old}"] = Window(f"trl.{old}", tuple(f"trl.{home}" for home in homes))
    for old, home in IN_EXAMPLES.items():
        sys.modules[f"trl.{old}"] = Window(f"trl.{old}", (home,))
