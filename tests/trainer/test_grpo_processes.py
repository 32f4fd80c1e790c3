"""One process or two (gloo): the same update. A kill at any moment: the same end."""

import random

import pytest
import torch
from grpo_runs import RELATIVES, refilled, relatives, resumable_run, updates
from outcomes import check_same
from process_group import killed_run, on_ranks


@pytest.mark.slow
def test_two_processes_make_the_same_update(tmp_path):
    on_ranks(updates, 2, str(tmp_path / "two"))
    on_ranks(updates, 1, str(tmp_path / "one"))
    check_same(torch.load(tmp_path / "one"), torch.load(tmp_path / "two"))


@pytest.mark.slow
def test_two_processes_refill_a_rollout_with_the_same_groups(tmp_path):
    for world in (1, 2):
        on_ranks(refilled, world, str(tmp_path / str(world)))
    one, two = torch.load(tmp_path / "1"), torch.load(tmp_path / "2")
    assert one["position"] > 16  # more prompts than the 16 groups of the rollouts: some had to be replaced
    check_same(one, two)


@pytest.mark.slow
def test_two_processes_make_the_same_update_in_every_on_policy_trainer(tmp_path):
    on_ranks(relatives, 2, str(tmp_path / "two"))
    on_ranks(relatives, 1, str(tmp_path / "one"))
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    for name in RELATIVES:
        assert max(one[name]["grad_norm"]) > 0
        for key, values in one[name].items():
            assert two[name][key] == pytest.approx(values, rel=2e-5, abs=1e-6), (name, key)


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, capsys):
    resumable_run(str(tmp_path / "whole"))
    folder = tmp_path / "killed"
    for after_step, delay in ((2, random.uniform(0, 0.02)), (5, random.uniform(0, 0.02)), (9, random.uniform(0, 0.1))):
        killed_run("grpo_runs", folder, after_step, delay)
    capsys.readouterr()
    resumable_run(str(folder))
    first = int(capsys.readouterr().out.split()[0])
    assert 8 < first <= 11  # it went on, and did not start again
    ends = [torch.load(run / "end.pt") for run in (tmp_path / "whole", folder)]
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
