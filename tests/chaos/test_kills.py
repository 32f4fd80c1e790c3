"""Every trainer, killed or asked to end at random moments, in steps and in saves: resumed, its end is the same."""

import random
import signal

import pytest
import torch
from chaos_runs import RUNS, iterative_sft
from launch import Forked, starter
from safetensors.torch import load_file

from benchmarks.kill_resume import campaign, end_one, left_alone, same_end

pytestmark = pytest.mark.slow
often = pytest.mark.parametrize(("times", "more"), [(2, 1), pytest.param(10, 2, marks=pytest.mark.long)])


@often
@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed(name, times, more, tmp_path, count):
    rng = random.Random(f"{name} {times}")
    done = campaign(starter(name, (more + 1) * times + 3), tmp_path, times, rng, steps_more=more)
    count(kills=len(done), in_saves=sum(kill.in_save for kill in done), equal=True)


@pytest.mark.parametrize(
    ("name", "times"),
    [
        *((name, 1) for name in ("sft-lora", "grpo-synced-reference", "ppo-critic", "ddpo")),
        *(pytest.param(name, 3, marks=pytest.mark.long) for name in RUNS),
    ],
)
def test_asked_to_end_and_resumed(name, times, tmp_path, count):
    """SIGTERM, also amid a save: 143, and nothing that was done is lost."""
    rng = random.Random(f"{name} {times}")
    start = starter(name, 3 * times + 1, enable_jit_checkpoint=True)
    done = campaign(start, tmp_path, times, rng, signal.SIGTERM, steps_more=1)
    assert not any(kill.in_save for kill in done)
    count(signals=len(done), equal=True)


@often
def test_models_of_iterative_sft(times, more, tmp_path, count):
    """It saves no state, only models: wherever it is killed, each one is whole and that of its step."""

    def start(folder):
        return Forked(iterative_sft, str(folder), 12)

    left_alone(start, tmp_path / "whole")
    rng, seen = random.Random(times), 0
    for number in range(times):
        folder = tmp_path / str(number)
        end_one(start, folder, rng.randint(1, 10), rng.uniform(0, 0.02))
        for saved in folder.glob("checkpoint-*/model.safetensors"):
            one, other = (load_file(path) for path in (saved, tmp_path / "whole" / saved.relative_to(folder)))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
            seen += 1
    assert seen
    count(kills=times, models=seen, equal=True)


def test_what_is_lost_is_found(tmp_path):
    """A run that keeps its weights alone, without its optimizer, does not end the same: this suite would say so."""
    start = starter("kto", 5, save_only_model=True)
    left_alone(start, tmp_path / "whole")
    assert end_one(start, tmp_path / "killed", 3, 0.0) == 3
    left_alone(start, tmp_path / "killed")
    assert not same_end(tmp_path / "whole", tmp_path / "killed")
