"""Training on episodes: micro-batches, repetition and processes change nothing."""

import pytest
import torch
from environment_runs import own_prompts, trainer_for, updates
from outcomes import check_same, outcome
from process_group import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.mark.parametrize("credit", [True, False])
def test_the_size_of_micro_batches_does_not_change_the_update(credit, tmp_path):
    results = []
    for size in (8, 4, 2):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        results.append(outcome(trainer_for(str(tmp_path), turn_level_credit=credit, **shape)))
    for result in results[1:]:
        check_same(results[0], result)


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one, other, third = (outcome(trainer_for(str(tmp_path), seed=seed, **shape)) for seed in (5, 5, 6))
    check_same(one, other, exactly=True)
    assert not torch.equal(one["weights"], third["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("rollout_steps", [1, 2])
def test_two_processes_make_the_same_update_from_episodes(rollout_steps, tmp_path):
    on_ranks(updates, 2, str(tmp_path / "two"), rollout_steps)
    on_ranks(updates, 1, str(tmp_path / "one"), rollout_steps)
    check_same(torch.load(tmp_path / "one"), torch.load(tmp_path / "two"))


@pytest.mark.slow
def test_two_processes_ask_an_environment_for_the_same_prompts(tmp_path):
    """E2: without a data set."""
    on_ranks(own_prompts, 2, str(tmp_path / "two"))
    on_ranks(own_prompts, 1, str(tmp_path / "one"))
    check_same(torch.load(tmp_path / "one"), torch.load(tmp_path / "two"))
