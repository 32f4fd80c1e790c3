"""Every module of the project's earlier layout can still be imported by its old name."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from trl.legacy.paths import MOVED

MODULES = (Path(__file__).parent / "old_modules.txt").read_text(encoding="utf-8").splitlines()
"""`module: its public names`, as they were before the rooms `kernels`, `legacy`, `quickstart` and `rollout` existed"""
GONE: dict[str, set[str]] = {
    "trl.cli.training": {"Job", "command_of", "fields_on", "lora", "rows_of"},  # `TrlParser` reads the words
    "trl.data.mapping": {"map_rows"},
    "trl.environment.turn_loop": {"take_turns"},
    "trl.generation.sampling_mode": {"sampling_mode"},
    "trl.trainer.ddpo_files": {"checkpoint_number", "latest_checkpoint"},
    "trl.trainer.eval_samples": {"log_samples", "random_prompts", "sampled_texts"},
    "trl.trainer.environment_rollouts": {"Played", "check_text_environment", "end_ids", "play"},
    "trl.trainer.experience": {"Measured", "PPOBatch", "Sample", "pack_samples", "ppo_batch"},
    "trl.trainer.ppo_checkpoint": {
        "find_checkpoint",
        "fingerprint",
        "load_state",
        "restore",
        "same_model",
        "save_state",
        "state_of",
    },
    "trl.trainer.ppo_environment": {"check_environment", "play"},
    "trl.trainer.ppo_generation": {"respond", "respond_at_lengths"},
    "trl.trainer.ppo_inputs": {"samples_of"},
    "trl.trainer.ppo_loop": {"batches", "episodes", "rollout", "run", "sampling_kwargs", "scores_of"},
    "trl.trainer.ppo_objective": {"terms"},
    "trl.trainer.ppo_setup": {"columns_of"},
    "trl.trainer.rollouts": {"policy_batch", "prompt_trees"},
}
"""names of moved modules that nothing called and that nobody was told of"""


@pytest.mark.parametrize("line", MODULES, ids=lambda line: line.partition(":")[0])
def test_module_and_its_names(line):
    module, _, names = line.partition(": ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that a module is about
        loaded = importlib.import_module(module)
    if module.removeprefix("trl.") in MOVED:
        assert {name for name in names.split() if not hasattr(loaded, name)} == GONE.get(module, set())


def test_a_name_that_a_window_lacks():
    window = importlib.import_module("trl.trainer.heap")
    with pytest.raises(AttributeError, match=r"it reads trl\.kernels\.step_memory"):
        window.keep_nothing  # noqa: B018


def test_a_window_is_a_module_of_its_package():
    code = """
import importlib, importlib.util, pydoc, sys
import trl.trainer.ppo_config
assert trl.trainer.ppo_config.PPOConfig is trl.PPOConfig
assert importlib.util.find_spec("trl.models.head") is not None
assert importlib.util.find_spec("trl.models.no_such_module") is None
assert "PPOConfig" in dir(trl.trainer.ppo_config)
assert importlib.reload(trl.trainer.ppo_config).PPOConfig is trl.PPOConfig
assert pydoc.locate("trl.trainer.ppo_config.PPOConfig") is trl.PPOConfig
from trl.trainer.dpo_config import *
assert DPOConfig is trl.DPOConfig
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_an_old_path_runs_as_a_program():
    command = [sys.executable, "-W", "ignore", "-m", "trl.cli.intervals"]
    subprocess.run(command, check=True)
