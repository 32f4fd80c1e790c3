"""A group of completions may lie across ranks: two processes learn as one does (gloo)."""

import pytest
import torch
from conformity import build, history
from group_runs import CASES, runs
from process_group import on_ranks

from trl.rollout.experience import Experience


@pytest.mark.slow
def test_groups_across_ranks_are_those_of_one_process(tmp_path):
    """L8: whole groups on each rank, one group on two ranks, three groups on two ranks, groups across steps."""
    on_ranks(runs, 2, str(tmp_path / "two"))
    runs(0, 1, str(tmp_path / "one"))
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    ours, theirs = two.pop("evaluated"), one.pop("evaluated")
    assert one.keys() == CASES.keys()
    for name, expected in one.items():
        assert max(expected["logs"]["grad_norm"]) > 0
        torch.testing.assert_close(two[name]["weights"], expected["weights"], rtol=1e-5, atol=2e-6, msg=name)
        assert two[name]["logs"].keys() == expected["logs"].keys(), name
        for key, values in expected["logs"].items():
            assert two[name]["logs"][key] == pytest.approx(values, rel=2e-5, abs=1e-6), (name, key)
    for name, expected in theirs.items():  # rows that fill up the last batch count once
        assert ours[name].keys() == expected.keys(), name
        for key, value in expected.items():
            assert ours[name][key] == pytest.approx(value, rel=2e-5, abs=1e-6), (name, key)


def experience(rows):
    return Experience(
        prompts=[torch.tensor([1 + row // 2]) for row in range(rows)],
        completions=[torch.tensor([row] * (1 + row % 3)) for row in range(rows)],
        mask_BT=torch.tensor([[1.0] * (1 + row % 3) + [0.0] * (2 - row % 3) for row in range(rows)]),
    )


@pytest.mark.parametrize(("rows", "world", "steps", "of_step"), [(12, 2, 6, 1), (12, 3, 4, 2), (8, 4, 2, 1)])
def test_every_step_takes_the_rows_of_one_process(rows, world, steps, of_step):
    whole, size = experience(rows), rows // world // steps
    shares = [whole.dealt(rank, world, steps, of_step) for rank in range(world)]
    for step in range(steps // of_step):
        part = slice(step * of_step * size, (step + 1) * of_step * size)
        learned = [int(ids[0]) for share in shares for ids in share.completions[part]]
        assert learned == list(range(step * of_step * size * world, (step + 1) * of_step * size * world))
    assert sum(share.mask_BT.sum() for share in shares) == whole.mask_BT.sum()


@pytest.mark.parametrize(("pairs", "world", "steps"), [(1, 2, 1), (3, 2, 1), (3, 2, 2), (2, 1, 4)])
def test_pairs_stay_whole_and_what_fills_up_does_not_count(pairs, world, steps):
    whole = experience(2 * pairs)
    learned = []
    for rank in range(world):
        share = whole.dealt(rank, world, steps, steps, together=2)
        assert len(share) == 2 * steps * -(-pairs // (world * steps))
        counted = [int(ids[0]) for ids, mask_T in zip(share.completions, share.mask_BT, strict=True) if mask_T.any()]
        assert counted[1::2] == [first + 1 for first in counted[::2]]
        learned += [first // 2 for first in counted[::2]]
    assert learned == list(range(pairs))


def test_parts_without_rows_may_lack_columns():
    nothing = Experience([], [], torch.zeros(0, 0))
    filled = Experience([torch.tensor([1])], [torch.tensor([2, 3])], torch.ones(1, 2), advantages_BT=torch.ones(1, 2))
    both = Experience.below([nothing, filled, filled.select([0])])
    assert len(both) == 2
    assert both.advantages_BT.tolist() == [[1, 1], [1, 1]]
    assert len(Experience.below([nothing, nothing])) == 0


def test_a_pair_may_lie_across_micro_batches(tmp_path):
    """Online DPO: the best and the worst of four are a pair, of a step of two micro-batches of two rows."""
    seen = []
    for size in (4, 2):
        trainer = build(
            "online-dpo", tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            num_generations=4, generation_batch_size=None, dynamic_sampling=False, save_rollouts=False,
        )  # fmt: skip
        trainer.train()
        seen.append({name: history(trainer, name) for name in ("loss", "grad_norm", "rewards/margins")})
    assert max(seen[0]["grad_norm"]) > 0
    for name, values in seen[0].items():
        assert seen[1][name] == pytest.approx(values, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        ("grpo", {"num_generations": 3}, "a rollout, .* = 4; 2, 4 do"),
        ("rloo", {"num_generations": 5, "per_device_train_batch_size": 7}, "a rollout, .* = 7; 7 do"),
        ("online-dpo", {"num_generations": 4, "steps_per_generation": 2}, "an optimizer step .*, 2, .*; 2 do"),
    ],
)
def test_what_does_not_divide_is_named_with_what_does(name, settings, what, tmp_path):
    base = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "generation_batch_size": None}
    base |= {"gradient_accumulation_steps": 2} if name == "grpo" else {}
    with pytest.raises(ValueError, match=f"num_generations={settings['num_generations']}: must divide .*{what}"):
        build(name, tmp_path, **{**base, **settings})
