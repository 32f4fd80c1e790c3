"""Rollouts as data: order, resuming, micro-batches, files."""

import math

import pytest
import torch
from datasets import load_dataset

from trl.data.records import Rollout
from trl.rollout.loader import Experience, RolloutLoader, RolloutState, policy_batch
from trl.rollout.prompts import PromptStream
from trl.rollout.report import record, table_of, write_parquet
from trl.rollout.rewards import Rewards, RolloutRewards, replace_groups

NAN = math.nan


def experience(rows=4):
    return Experience(
        prompts=[[1, 2]] * rows,
        completions=[[3 + i] * (1 + i) for i in range(rows)],
        masks=[[1] * (1 + i) for i in range(rows)],
        logprobs=[[-1.0] * (1 + i) for i in range(rows)],
        advantages=[[float(i % 2)] * (1 + i) for i in range(rows)],
    )


def test_prompts_are_a_function_of_the_position():
    stream = PromptStream(list(range(5)), seed=3)
    whole = stream.take(0, 15)
    assert [sorted(whole[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert whole[:5] != whole[5:10]
    assert stream.take(7, 4) == whole[7:11]
    assert PromptStream(list(range(5)), seed=3, shuffle=False).take(3, 4) == [3, 4, 0, 1]


def test_prompts_need_places():
    with pytest.raises(ValueError, match="map-style"):
        PromptStream(iter([1]), 0)
    with pytest.raises(ValueError, match="no rows"):
        PromptStream([], 0)


def test_each_rollout_is_handed_out_as_often_as_asked_and_resumes_anywhere():
    def make(state):
        state.position += 2
        made = experience()
        made.prompts = [[state.rollouts]] * 4
        return made

    def loader():
        return RolloutLoader(make, lambda x: (x.prompts[0][0], x.completions), microbatches=2, iterations=2, length=9)

    def read(source, count):
        stream = iter(source)
        return [next(stream) for _ in range(count)]

    whole = read(loader(), 10)
    first, second = [[3], [4, 4]], [[5, 5, 5], [6] * 4]
    assert whole == [(n, half) for n in (0, 1, 2) for half in (first, second, first, second)][:10]
    for cut in range(10):
        half, other = loader(), loader()
        read(half, cut)
        other.state = RolloutState(**vars(half.state))
        assert read(other, 10 - cut) == whole[cut:]


def test_idle_and_masked_rows_are_counted_but_not_packed():
    rows = experience()
    rows.masks[3] = [0] * 4
    batch = policy_batch(rows, "token", 8, skip_idle=True)
    assert batch.packed.rows == 1  # rows 0 and 2 have no advantage, row 3 no counted token
    assert batch.counted == 1 + 2 + 3
    assert policy_batch(rows, "sequence", 8, skip_idle=True).counted == 3
    assert policy_batch(rows, "constant", 8, skip_idle=True).counted == 4 * 8
    assert policy_batch(rows, "token", 8, skip_idle=False).packed.rows == 3


def test_a_batch_without_a_live_row():
    rows = experience()
    rows.advantages = [[0.0] * len(ids) for ids in rows.completions]
    assert policy_batch(rows, "token", 8, skip_idle=True).packed.rows == 0
    kept = policy_batch(rows, "token", 8, skip_idle=True, least=1)
    assert kept.packed.rows == 1
    assert kept.counted == 10


def rewards(*rows, weights=None):
    scores_BF = torch.tensor(rows)
    return Rewards(
        [f"f{i}" for i in range(scores_BF.shape[1])], scores_BF,
        torch.ones(scores_BF.shape[1]) if weights is None else torch.tensor(weights), [False] * scores_BF.shape[1],
    )  # fmt: skip


def test_what_is_not_scored_is_no_zero():
    given = rewards([1.0, NAN], [NAN, NAN], [0.0, 2.0], [NAN, 3.0], weights=[2.0, 0.5])
    assert given.total_B().nan_to_num(-9).tolist() == [2.0, -9.0, 1.0, 1.5]
    lonely = rewards([1.0], [NAN], [0.0], [1.0], [NAN], [NAN])
    assert lonely.informative_groups(2).tolist() == [False, True, False]


def rollout(count):
    return Rollout(
        prompts=[[1]] * count, completions=[[i] for i in range(count)], logprobs=[[0.0]] * count, masks=[[1]] * count,
        texts=[f"text {i}" for i in range(count)], metadata={"truncated": [False] * count},
    )  # fmt: skip


def test_dynamic_sampling_replaces_whole_groups():
    old, new = rollout(6), rollout(6)
    new.texts = [f"new {i}" for i in range(6)]
    scores, further = (
        rewards([1.0], [1.0], [0.0], [1.0], [0.0], [0.0]),
        rewards([2.0], [2.0], [0.0], [5.0], [7.0], [7.0]),
    )
    rows = ["a", "b", "c"]
    replace_groups(rows, old, scores, (["x", "y", "z"], new, further), 2)
    assert rows == ["y", "b", "c"]  # one useful group for the first of two useless ones
    assert old.texts == ["new 2", "new 3", "text 2", "text 3", "text 4", "text 5"]
    assert scores.scores_BF.flatten().tolist() == [0, 5, 0, 1, 0, 0]


def test_overlong_is_one_more_reward():
    judge = RolloutRewards(None, [1.0], overlong=(4, 2))
    samples = rollout(3)
    samples.completions = [[1], [1] * 3, [1] * 4]
    samples.rewards = [1.0, NAN, 0.5]
    given = judge(samples, {}, None)
    assert given.names == ["reward", "overlong"]
    assert given.scores_BF.nan_to_num(9).tolist() == [[1.0, 0.0], [9.0, 9.0], [0.5, -1.0]]
    assert given.total_B().nan_to_num(9).tolist() == [1.0, 9.0, -0.5]


def test_a_rollout_without_rewards_is_refused():
    with pytest.raises(ValueError, match="rollout_func gave 0 rewards for 2"):
        RolloutRewards(None, [1.0])(rollout(2), {}, None)
    with pytest.raises(ValueError, match=r"reward_weights=\[1.0, 2.0\]"):
        RolloutRewards(None, [1.0, 2.0])


def test_metrics_by_hand():
    seen = {}

    def add(name, total, count):
        seen[name] = total / count if count else None

    samples = rollout(4)
    samples.completions = [[1], [1, 2], [1, 2, 3], [1, 2]]
    record(add, samples, rewards([1.0], [3.0], [NAN], [5.0]), [True, False, False, False], 2)
    assert seen["completions/mean_length"] == 2
    assert seen["completions/clipped_ratio"] == 0.25
    assert seen["rewards/f0/mean"] == seen["reward"] == 3
    assert seen["unscored_ratio"] == 0.25
    assert seen["reward_std"] == pytest.approx(2**0.5)  # the second group has one scored completion
    assert seen["frac_reward_zero_std"] == 0.5


def test_datasets_reads_the_files_of_a_run_together(tmp_path):
    chat = [{"role": "user", "content": "ä"}]
    for number, (prompt, reward) in enumerate([("plain", NAN), (chat, 2.0)]):
        samples = rollout(2)
        table = table_of(number, samples, [prompt] * 2, rewards([reward], [reward]), {"advantage": [0.5, -0.5]})
        path = write_parquet(tmp_path / "rollouts", number, table)
        assert path.name == f"rollout-00000{number}.parquet"
    rows = load_dataset(
        "parquet", data_files=str(tmp_path / "rollouts" / "*.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert rows["reward_f0"] == [None, None, 2.0, 2.0]
    assert rows["completion"][:2] == ["text 0", "text 1"]
    assert rows["prompt"][2] == '[{"role": "user", "content": "ä"}]'
    assert rows["advantage"][3] == -0.5
    assert rows["completion_ids"][1] == [1]
