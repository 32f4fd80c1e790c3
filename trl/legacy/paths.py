"""Old import paths: a module that has moved is still found under the name that it had before.

Each such path opens a window: a module without code of its own, whose names are read from where they live now.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
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
    "trainer.heap": ("kernels.malloc",),
    "trainer.ppo_padded": ("legacy.ppo_padded",),
    "trainer.prompt_stream": ("rollout.prompts",),
    "trainer.rollout_report": ("rollout.report",),
    "trainer.rollout_rewards": ("rollout.rewards",),
    "trainer.rollouts": ("rollout.loader",),
}
"""path below `trl` before -> where its names live now, looked through in this order"""

RENAMED: dict[str, str] = {}
"""a name in one of these modules before -> today"""

IN_EXAMPLES = {"models.digits_base": "digits_base", "models.modeling_digits": "modeling_digits"}
"""modules that a source checkout has in `examples/digits/` and an installed package lacks"""


class _Windows(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        below = fullname.removeprefix("trl.")
        if below == fullname or (below not in MOVED and below not in IN_EXAMPLES):
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        below = module.__name__.removeprefix("trl.")
        homes = [f"trl.{home}" for home in MOVED.get(below, ())]
        if below in IN_EXAMPLES:
            homes = [_example(IN_EXAMPLES[below], module.__name__)]
        module.__doc__ = f"A window on {', '.join(homes)}."

        def __getattr__(name: str) -> Any:
            for home in homes:
                found = importlib.import_module(home)
                if hasattr(found, RENAMED.get(name, name)):
                    return getattr(found, RENAMED.get(name, name))
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}; it reads {', '.join(homes)}")

        module.__dict__["__getattr__"] = __getattr__
        module.__dict__["__dir__"] = lambda: sorted(
            {name for home in homes for name in dir(importlib.import_module(home))}
        )


def _example(name: str, asked: str) -> str:
    folder = Path(__file__).parents[2] / "examples" / "digits"
    if not folder.is_dir():
        raise ImportError(f"{asked} is an example now: take examples/digits/{name}.py from the source")
    if "digits" not in sys.modules:
        spec = importlib.util.spec_from_file_location("digits", folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["digits"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return f"digits.{name}"


def install() -> None:
    """Let `import` open the windows. They come after every other finder: a module that exists is never hidden."""
    if not any(isinstance(finder, _Windows) for finder in sys.meta_path):
        sys.meta_path.append(_Windows())
