"""One process or two (gloo): the same update. A kill at any moment: the same end."""

import random

import pytest
import torch
from ppo_runs import resumable_run, updates
from process_group import killed_run, on_ranks


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "unused", "critic"])
def test_two_processes_make_the_same_update(variant, tmp_path):
    updates(0, 1, str(tmp_path / "one"), variant)
    on_ranks(updates, 2, str(tmp_path / "two"), variant)
    one = torch.load(tmp_path / "one-0")
    assert "v_head.summary.weight" in one["gradients"] or variant == "critic"
    for rank in range(2):
        two = torch.load(tmp_path / f"two-{rank}")
        for kind in ("gradients", "moved"):
            assert one[kind].keys() == two[kind].keys()
            for name, expected in one[kind].items():
                scale = expected.norm().item()
                assert scale > 0, name
                assert (two[kind][name] - expected).norm().item() <= 1e-5 * scale + 1e-7, (kind, name)
        for name, value in one["stats"].items():
            assert two["stats"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, capsys):
    resumable_run(str(tmp_path / "whole"))
    folder = tmp_path / "killed"
    killed_run("ppo_runs", folder, after_step=3, delay=random.uniform(0, 0.01))
    killed_run("ppo_runs", folder, after_step=7, delay=random.uniform(0, 0.1))
    capsys.readouterr()
    resumable_run(str(folder))
    first = int(capsys.readouterr().out.split()[0])
    assert 6 < first <= 9  # it went on, and did not start again
    ends = [torch.load(run / "end.pt") for run in (tmp_path / "whole", folder)]
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
