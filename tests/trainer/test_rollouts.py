"""Rollouts as data: order, resuming, micro-batches, files."""

import doctest
import math
import random
from dataclasses import fields, replace

import pytest
import torch
from datasets import load_dataset

from trl.data import packing
from trl.data.packing import pack
from trl.data.records import Rollout
from trl.rollout import prompts
from trl.rollout.collector import replace_groups, tell_alike
from trl.rollout.experience import Experience, RolloutLoader, RolloutShape
from trl.rollout.prompts import PromptStream
from trl.rollout.report import record, table_of, write_parquet
from trl.rollout.rewards import Rewards, RolloutRewards

NAN = math.nan


def samples(rows=4):
    """Rows of 1, 2, 3, ... tokens below one prompt."""
    return Rollout(
        prompts=[[1, 2]] * rows,
        completions=[[3 + i] * (1 + i) for i in range(rows)],
        masks=[[1] * (1 + i) for i in range(rows)],
        logprobs=[[-1.0] * (1 + i) for i in range(rows)],
    )


def experience(rows=4):
    return Experience.of(samples(rows), advantages=torch.arange(rows) % 2)


def test_prompts_are_a_function_of_the_position():
    stream = PromptStream(list(range(5)), seed=3)
    whole = stream.take(0, 15)
    assert [sorted(whole[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert whole[:5] != whole[5:10]
    assert stream.take(7, 4) == whole[7:11]
    assert PromptStream(list(range(5)), seed=3, shuffle=False).take(3, 4) == [3, 4, 0, 1]


def test_ranks_share_the_prompts_of_a_step():
    assert doctest.testmod(prompts).attempted == 4
    assert doctest.testmod(prompts).failed == 0


def test_prompts_need_places():
    with pytest.raises(ValueError, match="a list_iterator has none"):
        PromptStream(iter([1]), 0)
    with pytest.raises(ValueError, match="no rows"):
        PromptStream([], 0)


def test_each_rollout_is_handed_out_as_often_as_asked_and_resumes_anywhere(tmp_path):
    def make(state):
        state.position += 2
        made = samples()
        made.prompts = [[state.rollouts]] * 4
        return Experience.of(made, advantages=torch.ones(4))

    def loader(iterations=2):
        shape = RolloutShape(2, 2, iterations, steps_per_generation=2)
        collate = lambda x: (int(x.prompts[0]), [ids.tolist() for ids in x.completions])  # noqa: E731
        return RolloutLoader(make, collate, shape, length=9)

    def read(source, count):
        stream = iter(source)
        return [next(stream) for _ in range(count)]

    whole = read(loader(), 10)
    first, second = [[3], [4, 4]], [[5, 5, 5], [6] * 4]
    assert whole == [(n, half) for n in (0, 1, 2) for half in (first, second, first, second)][:10]
    for cut in range(10):
        half, other = loader(), loader()
        read(half, cut)
        torch.save(half.plain_state(), tmp_path / "state.pt")
        other.restore(torch.load(tmp_path / "state.pt", weights_only=True))
        assert read(other, 10 - cut) == whole[cut:]
    read(half := loader(), 1)
    with pytest.raises(ValueError, match=r"num_iterations=3: the checkpoint stands .* with 2"):
        loader(3).restore(half.plain_state())
    with pytest.raises(ValueError, match="in an older format"):
        loader().restore({**half.plain_state(), "experience": {"prompts": [[1]], "masks": [[1]]}})


def test_select_and_cut_narrow_to_their_rows():
    columns = ("old_logprobs_BT", "reference_BT", "values_BT", "returns_BT")
    rows = replace(experience(), **{name: torch.arange(16.0).view(4, 4) + i for i, name in enumerate(columns)})
    assert rows.advantages_BT.tolist() == [[0] * 4, [1, 1, 0, 0], [0] * 4, [1] * 4]
    short = rows.select([1, 0])
    assert [ids.tolist() for ids in short.completions] == [[4, 4], [3]]
    assert (short.mask_BT.tolist(), short.returns_BT.tolist()) == ([[1, 1], [1, 0]], [[7, 8], [3, 4]])
    assert sorted(length for piece in rows.cut(7) for length in piece.lengths) == [1, 2, 3, 4]
    assert [piece.lengths for piece in rows.cut(7, whole_groups=True)] == [[1, 2, 3, 4]]


def test_a_batch_packs_its_rows_below_their_prompts():
    rows = Experience.of(
        Rollout([[5, 6], [5, 6], [4]], [[7], [8, 9], [3]], [[0.0], [0.0, 0.0], [0.0]], [[1], [0, 1], [1]]),
        advantages=torch.ones(3),
    )
    batch = rows.batch()
    assert batch.packed.ids_N.tolist() == [5, 6, 7, 8, 9, 4, 3]
    assert batch.packed.mask_BT.tolist() == batch.mask_BT.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert batch.counted == 3
    assert rows.packed(masked=False).mask_BT.tolist() == [[1, 0], [1, 1], [1, 0]]
    with pytest.raises(ValueError, match="it needs old_logprobs_BT and advantages_BT"):
        replace(rows, advantages_BT=None).batch()


def drawn_rows(seed):
    """Up to 7 rows of three prompts, in any order; with a prompt that is empty, and completions that are."""
    draw = random.Random(seed)
    tokens = lambda least, most: [draw.randint(0, 9) for _ in range(draw.randint(least, most))]  # noqa: E731
    pool = [tokens(0, 1), tokens(1, 4), tokens(1, 4)]
    prompts = [draw.choice(pool) for _ in range(draw.randint(1, 7))]
    completions = [tokens(0 if prompt else 1, 4) for prompt in prompts]
    masks = [[draw.randint(0, 1) for _ in ids] for ids in completions]
    return Experience.of(Rollout(prompts, completions, [], masks)), draw


def columns_of(packed):
    values = {field.name: getattr(packed, field.name) for field in fields(packed)}
    return {k: (v.dtype, v.tolist()) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


@pytest.mark.parametrize("seed", range(40))
def test_rows_packed_once_make_the_same_batches(seed):
    rows, draw = drawn_rows(seed)
    once = rows.packed_once()
    index = [draw.randrange(len(rows)) for _ in range(draw.randint(1, 7))]
    of = lambda each: [each, each.select(index), *each.select(index).cut(8), *each.cut(6, whole_groups=True)]  # noqa: E731
    for masked in (True, False):
        batches = [[columns_of(part.packed(masked=masked)) for part in of(each)] for each in (rows, once)]
        assert batches[0] == batches[1]
    assert once.select([]).packed().rows == 0


def test_a_rollout_is_packed_once_for_all_its_iterations(monkeypatch):
    calls, shape = [], RolloutShape(2, 2, num_iterations=3, steps_per_generation=2)
    make = lambda state: Experience.of(samples(), advantages=torch.ones(4))  # noqa: E731
    monkeypatch.setattr(packing, "pack", lambda trees: calls.append(len(trees)) or pack(trees))
    loader = RolloutLoader(make, Experience.batch, shape, length=9)
    batches = [batch for _, batch in zip(range(6), loader, strict=False)]
    assert calls == [4]
    assert [batch.packed.ids_N.tolist() for batch in batches] == [[1, 2, 3, 4, 4], [1, 2, 5, 5, 5, 6, 6, 6, 6]] * 3
    assert "packed_rows" not in loader.plain_state()["experience"]
    next(iter(loader))
    assert calls == [4, 4]


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


@pytest.mark.parametrize(("ours", "theirs"), [(True, False), (False, True), (True, True)])
def test_words_that_an_engine_says_of_some_rows_only_are_left_out(ours, theirs, caplog):
    """Of the round before or of the one that replaces its groups: a row never takes another's place in the column."""
    old, new = rollout(4), rollout(4)
    for made, told in ((old, ours), (new, theirs)):
        made.kept = [[[made.completions[i][0], 9]] for i in range(4)] if told else []
        made.experts = [[[[1]]]] * 4 if told else []
    new.completions = [[10 + i] for i in range(4)]
    scores, further = rewards([1.0], [1.0], [0.0], [1.0]), rewards([0.0], [3.0], [0.0], [0.0])
    with caplog.at_level("WARNING", "trl"):
        replace_groups(["a", "b"], old, scores, (["x", "y"], new, further), 2)
    assert old.completions == [[10], [11], [2], [3]]
    assert len(old.kept) == len(old.experts) == (4 if ours and theirs else 0)
    assert len(caplog.messages) == (0 if ours and theirs else 2)
    if not (ours and theirs):
        assert caplog.messages[0] == (
            "an engine did not say of all rows which words the filters left: it is used for none of them"
        )


def test_ranks_agree_on_what_an_engine_said():
    """As if there were a second rank whose engine said nothing; one without rows does not count."""
    for others, kept in (([False], 0), ([], 4)):
        made = rollout(4)
        made.kept = [[[1, 2]]] * 4
        tell_alike([made, rollout(0)], lambda mine, others=others: [*mine, *others])
        assert len(made.kept) == kept


@pytest.mark.parametrize("name", ["kept", "experts", "reference_BT"])
def test_parts_of_a_rollout_have_the_same_columns(name):
    known = {"kept": [[[1]]], "experts": [torch.zeros(1, 1, 1)], "reference_BT": torch.zeros(1, 1)}[name]
    one = Experience.of(rollout(1))
    for parts in ([replace(one, **{name: known}), one], [one, replace(one, **{name: known})]):
        with pytest.raises(ValueError, match=rf"^experience: {name} is known of 1 of 2 parts of a rollout"):
            Experience.below(parts)
    assert len(Experience.below([replace(one, **{name: known}), Experience.of(rollout(0))])) == 1


def test_overlong_is_one_more_reward():
    judge = RolloutRewards(None, [1.0], overlong=(4, 2))
    made = rollout(3)
    made.completions = [[1], [1] * 3, [1] * 4]
    made.rewards = [1.0, NAN, 0.5]
    given = judge(made, [], {})
    assert given.names == ["reward", "overlong"]
    assert given.scores_BF.nan_to_num(9).tolist() == [[1.0, 0.0], [9.0, 9.0], [0.5, -1.0]]
    assert given.total_B().nan_to_num(9).tolist() == [1.0, 9.0, -0.5]


def test_a_rollout_without_rewards_is_refused():
    with pytest.raises(ValueError, match="rollout_func gave 0 rewards for 2"):
        RolloutRewards(None, [1.0])(rollout(2), [], {})
    with pytest.raises(ValueError, match=r"reward_weights=\[1.0, 2.0\]"):
        RolloutRewards(None, [1.0, 2.0])


def test_metrics_by_hand():
    seen = {}

    def add(name, total, count):
        seen[name] = total / count if count else None

    made = rollout(4)
    made.completions = [[1], [1, 2], [1, 2, 3], [1, 2]]
    made.metadata["truncated"][0] = True
    record(
        add, lambda name, found: seen.update({name: found.value.item()}), made, rewards([1.0], [3.0], [NAN], [5.0]), 2
    )
    assert seen["completions/mean_length"] == 2
    assert seen["completions/clipped_ratio"] == 0.25
    assert seen["rewards/f0/mean"] == seen["reward"] == 3
    assert seen["unscored_ratio"] == 0.25
    assert seen["reward_std"] == pytest.approx(2**0.5)  # the second group has one scored completion
    assert seen["frac_reward_zero_std"] == 0.5


def test_datasets_reads_the_files_of_a_run_together(tmp_path):
    chat = [{"role": "user", "content": "ä"}]
    for number, (prompt, reward) in enumerate([("plain", NAN), (chat, 2.0)]):
        made = rollout(2)
        table = table_of(number, made, [prompt] * 2, rewards([reward], [reward]), {"advantage": [0.5, -0.5]})
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
