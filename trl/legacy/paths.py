"""Old import paths: a module that has moved can still be imported by its old name.

At each old path stands a window: a module without code, which reads its names from the modules that have them today.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trl.legacy import absent

MOVED: dict[str, tuple[str, ...]] = {
    "chat_template_utils": ("models.chat_setup",),
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
    "data.mapping": ("data.row_job", "data.tokenize"),
    "data.pairs": ("legacy.dpo", "data.batches"),
    "data.truncation": ("data.encode",),
    "data_utils": ("data.formats", "data.packed_dataset"),
    "environment.answer_renderer": ("environment.chat_environment",),
    "environment.own_environment": ("environment.episodes",),
    "environment.plain_generate": ("generation.plain_generate",),
    "environment.rollout": ("environment.episodes",),
    "environment.stopping": ("generation.stopping",),
    "environment.tool_text": ("environment.tool_calls",),
    "environment.turn_loop": ("environment.episodes",),
    "experimental": (),
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
    "trainer.kto_config": ("trainer.kto_trainer",),
    "trainer.model_config": ("scripts.model_config",),
    "trainer.online_dpo_config": ("trainer.online_dpo_trainer",),
    "trainer.orpo_config": ("trainer.dpo_trainer",),
    "trainer.orpo_trainer": ("trainer.dpo_trainer",),
    "trainer.ppo_checkpoint": ("trainer.checkpoints",),
    "trainer.ppo_config": ("trainer.ppo_trainer",),
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

    def __init__(self, name: str, homes: tuple[str, ...]):
        super().__init__(name, f"A window on {', '.join(homes)}.")
        self.__dict__["_homes"] = homes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # code that inspects all modules must not load them
            raise AttributeError(name)
        if below := sys.modules.get(f"{self.__name__}.{name}"):
            return below
        absent.refuse(name)
        for home in self._homes:
            found = _example(home, self.__name__) if home in IN_EXAMPLES.values() else importlib.import_module(home)
            if hasattr(found, RENAMED.get(name, name)):
                return getattr(found, RENAMED.get(name, name))
        reads = f"it reads {', '.join(self._homes)}" if self._homes else "it is a window on trainers of `trl`"
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; {reads}")


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
    for old in ("chat_template_utils", "commands", "data_utils", "experimental"):  # attributes of `trl`, as any module
        window = sys.modules["trl"].__dict__[old] = sys.modules[f"trl.{old}"]
        window.__dict__["__path__"] = []  # `import` asks for a module below it
    absent.refuse_absent_modules()
