"""Old import paths: a module that has moved can still be imported by its old name.

At each old path stands a window: a module without code, which reads its names from the modules that have them today.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from trl.legacy import absent

MOVED: dict[str, tuple[str, ...]] = {
    "chat_template_utils": ("models.chat_setup",),
    "cli.assets": ("quickstart.assets",),
    "cli.intervals": ("reports.intervals",),
    "cli.language_model": ("quickstart.language_model",),
    "cli.plots": ("quickstart.plots", "reports.charts"),
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
    "data.mapping": ("data.row_job", "data.tokenize"),
    "data.pairs": ("legacy.dpo", "data.batches"),
    "data.truncation": ("data.encode",),
    "data_utils": ("data.formats", "data.packed_dataset"),
    "environment.answer_renderer": ("environment.chat_environment",),
    "environment.own_environment": ("environment.factories",),
    "environment.plain_generate": ("generation.plain_generate",),
    "environment.rollout": ("environment.episodes",),
    "environment.stopping": ("generation.stopping",),
    "environment.tool_text": ("environment.tool_calls",),
    "environment.turn_loop": ("environment.episodes",),
    "experimental.bco": ("trainer.kto_trainer",),
    "experimental.cpo": ("trainer.dpo_trainer",),
    "experimental.distillation": ("trainer.distillation_trainer",),
    "experimental.gkd": ("trainer.distillation_trainer",),
    "experimental.gspo_token": ("trainer.grpo_trainer",),
    "experimental.kto": ("trainer.kto_trainer",),
    "experimental.online_dpo": ("trainer.online_dpo_trainer",),
    "experimental.orpo": ("trainer.dpo_trainer",),
    "experimental.ppo": ("trainer.ppo_trainer", "models.modeling_value_head", "models.modeling_base"),
    "experimental.prm": ("trainer.prm_trainer",),
    "generation.choose": ("generation.local",),
    "generation.sampling_mode": ("models.unwrap",),
    "losses.reference_free": ("losses.preference",),
    "losses.reward": ("losses.supervised",),
    "models.checkpoints": ("models.weight_files",),
    "models.gradient_place": ("kernels.step_memory", "kernels.layers"),
    "models.head": ("models.scoring",),
    "models.last_layer": ("kernels.layers",),
    "models.layout": ("kernels.tree_attention",),
    "models.linear_logprobs": ("kernels.head_tiles",),
    "models.norms": ("kernels.layers",),
    "models.onednn": ("kernels.onednn",),
    "models.rotary": ("kernels.layers",),
    "models.stand_in": ("kernels.layers",),
    "models.tree_attention": ("kernels.tree_attention",),
    "models.utils": ("models.chat_setup", "models.modeling_base", "models.prepare", "models.unwrap"),
    "models.wrapped": ("models.forward", "models.prepare"),
    "rewards.pairwise": ("rewards.named",),
    "scripts.utils": ("scripts.parser", "scripts.data_config", "scripts.model_config"),
    "trainer.adaptive_entropy": ("trainer.grpo_trainer",),
    "trainer.base_config": ("trainer.configuration",),
    "trainer.base_trainer": ("trainer.objective",),
    "trainer.bco_config": ("trainer.kto_trainer",),
    "trainer.bco_trainer": ("trainer.kto_trainer",),
    "trainer.cpo_config": ("trainer.dpo_trainer",),
    "trainer.cpo_trainer": ("trainer.dpo_trainer",),
    "trainer.ddpo_files": ("trainer.ddpo_setup",),
    "trainer.distillation_config": ("trainer.distillation_trainer",),
    "trainer.dpo_config": ("trainer.dpo_trainer", "trainer.pair_trainer"),
    "trainer.dpo_padded": ("legacy.dpo",),
    "trainer.environment_rollouts": ("rollout.source", "rollout.rewards"),
    "trainer.eval_samples": ("trainer.pair_trainer",),
    "trainer.experience": ("rollout.measure",),
    "trainer.gkd_config": ("trainer.distillation_trainer",),
    "trainer.gkd_trainer": ("trainer.distillation_trainer",),
    "trainer.grpo_config": ("trainer.grpo_trainer", "trainer.rloo_trainer", "trainer.on_policy"),
    "trainer.heap": ("kernels.step_memory",),
    "trainer.iterative_sft_config": ("trainer.iterative_sft_trainer",),
    "trainer.kto_config": ("trainer.kto_trainer",),
    "trainer.model_config": ("scripts.model_config",),
    "trainer.online_dpo_config": ("trainer.online_dpo_trainer",),
    "trainer.orpo_config": ("trainer.dpo_trainer",),
    "trainer.orpo_trainer": ("trainer.dpo_trainer",),
    "trainer.ppo_checkpoint": ("trainer.checkpoints",),
    "trainer.ppo_config": ("trainer.ppo_trainer",),
    "trainer.ppov2_config": ("trainer.ppo_trainer",),
    "trainer.ppov2_trainer": ("trainer.ppo_trainer",),
    "trainer.ppo_environment": ("trainer.ppo_trainer",),
    "trainer.ppo_generation": ("generation.plain_generate", "generation.stopping"),
    "trainer.ppo_inputs": ("trainer.ppo_trainer", "legacy.ppo_padded"),
    "trainer.ppo_loop": ("trainer.ppo_trainer", "rollout.prompts", "rollout.rewards"),
    "trainer.ppo_objective": ("trainer.ppo_trainer",),
    "trainer.ppo_padded": ("legacy.ppo_padded",),
    "trainer.ppo_setup": ("trainer.ppo_trainer",),
    "trainer.preference_config": ("trainer.configuration", "trainer.references"),
    "trainer.prm_config": ("trainer.prm_trainer",),
    "trainer.prompt_stream": ("rollout.prompts",),
    "trainer.reward_config": ("trainer.reward_trainer",),
    "trainer.reward_shift": ("trainer.statistics",),
    "trainer.rloo_config": ("trainer.rloo_trainer", "trainer.on_policy"),
    "trainer.rollout_config": ("trainer.rollout_trainer",),
    "trainer.rollout_report": ("rollout.report",),
    "trainer.rollout_rewards": ("rollout.rewards", "rollout.collector"),
    "trainer.rollouts": ("rollout.experience",),
    "trainer.sft_config": ("trainer.sft_trainer",),
    "trainer.sft_data": ("trainer.sft_trainer",),
    "trainer.training_configs": ("trainer.reward_trainer",),
}
"""path below `trl` before, or in other releases -> where its names live now, looked through in this order"""

RENAMED: dict[str, str] = {
    "BaseTrainer": "ObjectiveTrainer",
    "_BaseConfig": "PostTrainingConfig",
    "_BaseTrainer": "ObjectiveTrainer",
    "base_model": "below_peft",
    "only_at": "computed_at",
    "stand_in": "swapped_forward",
    "up_to_end": "until_end",
}
"""old name in one of these modules -> today's name"""

IN_EXAMPLES = {"models.digits_base": "digits.digits_base", "models.modeling_digits": "digits.modeling_digits"}
"""modules that a source checkout has in `examples/digits/` and an installed package lacks"""


class Window(ModuleType):
    """A module of an older layout, which reads its names from today's modules when they are asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # code that inspects all modules must not load them
            raise AttributeError(name)
        if name == "__all__":
            return dir(self)
        absent.refuse(name)
        homes = _homes(self.__name__)
        for home in homes:
            found = _home(home, self.__name__)
            if hasattr(found, RENAMED.get(name, name)):
                return getattr(found, RENAMED.get(name, name))
        reads = f"it reads {', '.join(homes)}" if homes else "it is a folder of windows"
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; {reads}")

    def __dir__(self) -> list[str]:
        found = [_home(home, self.__name__) for home in _homes(self.__name__)]
        return sorted({name for home in found for name in vars(home) if not name.startswith("_")})


def _homes(window: str) -> tuple[str, ...]:
    """The modules that a window reads, by their full names."""
    below = window.removeprefix("trl.")
    return (IN_EXAMPLES[below],) if below in IN_EXAMPLES else tuple(f"trl.{home}" for home in MOVED.get(below, ()))


def _home(home: str, asked: str) -> ModuleType:
    if home not in IN_EXAMPLES.values():
        return importlib.import_module(home)
    folder = Path(__file__).parents[2] / "examples" / "digits"
    if not folder.is_dir():
        raise ImportError(f"{asked} is an example now: take examples/{home.replace('.', '/')}.py from the source")
    if "digits" not in sys.modules:
        spec = importlib.util.spec_from_file_location("digits", folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["digits"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(home)


class _Opener:
    """The loader of a window."""

    def create_module(self, spec: ModuleSpec) -> Window:
        return Window(spec.name, f"A window on {', '.join(_homes(spec.name))}.")

    def exec_module(self, module: ModuleType) -> None:
        """A window has no code."""

    def get_code(self, name: str) -> CodeType:
        """`python -m` of an older path runs today's module."""
        home = _homes(name)[0]
        return compile(f"import runpy\nrunpy.run_module({home!r}, run_name='__main__', alter_sys=True)", name, "exec")


class _Room(FileFinder):
    """Finds the modules of a folder of `trl`, and windows where modules of an older layout were.

    It is asked for names in that folder only, so no other import is slower.
    """

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = super().find_spec(fullname, target)
        below = fullname.removeprefix("trl.")
        if spec is not None and spec.loader is not None:
            return spec
        if fullname in absent.MODULES:
            raise absent.refusal(fullname, absent.MODULES[fullname])
        if below in _packages():
            found = ModuleSpec(fullname, _Opener(), is_package=True)  # type: ignore[arg-type]
            found.submodule_search_locations = [os.path.join(self.path, below.rpartition(".")[2])]
            return found
        return ModuleSpec(fullname, _Opener()) if _homes(fullname) else None  # type: ignore[arg-type]


def _packages() -> set[str]:
    """The packages that hold windows or lack a module, below `trl`."""
    lacking = (module.removeprefix("trl.") for module in absent.MODULES)
    return {key.rpartition(".")[0] for key in (*MOVED, *IN_EXAMPLES, *lacking)} - {""}


def open_windows(root: str) -> None:
    """Let `import` find the windows. root: the folder of `trl`, as it stands in `trl.__path__`."""
    kinds = (
        (ExtensionFileLoader, EXTENSION_SUFFIXES),
        (SourceFileLoader, SOURCE_SUFFIXES),
        (SourcelessFileLoader, BYTECODE_SUFFIXES),
    )
    for package in {"", *_packages()}:
        folder = os.path.join(root, *package.split(".")) if package else root
        sys.path_importer_cache[folder] = _Room(folder, *kinds)
