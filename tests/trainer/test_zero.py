"""Two ranks under DeepSpeed ZeRO (gloo, CPU) train as one process does."""

import sys

import pytest
import torch
from process_group import on_ranks
from zero_runs import ENGINES, deepspeed_folder, train_engines

from trl.import_utils import is_deepspeed_available

RUNS = [(engine, row) for engine, rows in ENGINES.items() for row in rows]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What one process found, and what each of two ranks found, by engine and row."""
    folder = tmp_path_factory.mktemp("zero")
    with pytest.MonkeyPatch.context() as patch:
        if (there := deepspeed_folder()).is_dir():  # for the ranks only: accelerate imports it wherever it finds it
            patch.syspath_prepend(there)
        if not is_deepspeed_available():
            pytest.skip(f"deepspeed is not in {there}, where `make test` puts it, nor could it be installed there")
        on_ranks(train_engines, 2, str(folder / "two"))
    on_ranks(train_engines, 1, str(folder / "one"))
    return [torch.load(folder / name) for name in ("one-0", "two-0", "two-1")]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "row"), RUNS, ids=[f"{engine}-{row}" for engine, row in RUNS])
def test_sharded_by_zero_learns_the_same(engine, row, ranks):
    one, *two = ranks
    want = one["lora" if engine.endswith("lora") else "one", row]
    for found in (each[engine, row] for each in two):
        assert found["packed"] == want["packed"]
        assert found["sharded"] == engine.startswith("zero3")
        assert found.get("resumed", 0.0) == 0
        for name in {"loss", "grad_norm", "objective/kl", "ppo/loss/value"} & want["numbers"].keys():
            assert found["numbers"][name] == pytest.approx(want["numbers"][name], rel=1e-5, abs=1e-6), name
        assert found["weights"].keys() == want["weights"].keys()
        for key, weight in want["weights"].items():
            torch.testing.assert_close(found["weights"][key], weight, rtol=0, atol=1e-5, msg=key)


@pytest.mark.slow
def test_a_run_goes_on_and_is_saved(ranks):
    for found in ranks[1:]:
        assert found["saved"] == {"saved": 0.0, "resumed": 0.0}


@pytest.mark.slow
def test_an_engine_gets_weights_in_parts_whole(ranks):
    given = ranks[1]["given"]
    assert (given["whole"], given["adapter"]) == (0.0, 0.0)
    assert given["merged"] < 1e-6
    assert given["moved"] > 1e-3


@pytest.mark.slow
def test_ppo_and_its_critic_are_saved(ranks):
    for saved in (saved for found in ranks[1:] for saved in found["PPO saved"]):
        assert min(saved["policy moved"], saved["critic moved"]) > 1e-4
        assert (saved["back"], saved["files"]) == (0.0, 0.0)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out_on_all_ranks(ranks):
    for skipped, losses in (found["skipped"] for found in ranks[1:]):
        assert skipped == 1
        assert [loss == loss for loss in losses] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_a_policy_that_is_loaded_in_parts_has_a_copy_in_parts(name, ranks):
    one, *two = (found[name] for found in ranks)
    for found in two:
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-6)
        assert found["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_deepspeed_stays_out_of_other_processes():
    """Where it is importable, accelerate imports it into each process that trains: 0.4 s, 20 MB and a warning."""
    assert str(deepspeed_folder()) not in sys.path
