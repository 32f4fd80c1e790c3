"""Two ranks that hold half of the weights each (FSDP2, gloo, CPU) train as one process does."""

import pytest
import torch
from process_group import on_ranks
from sharded_runs import RUNS, train_all


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process found, and what each of two ranks found."""
    folder = tmp_path_factory.mktemp("sharded")
    on_ranks(train_all, 1, str(folder / "one"))
    on_ranks(train_all, 2, str(folder / "two"))
    return [torch.load(folder / name) for name in ("one-0", "two-0", "two-1")]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_sharded_weights_learn_the_same(run, results):
    one, *ranks = (each[run] for each in results)
    assert not one["sharded"]
    assert one["packed"]
    for two in ranks:
        assert two["sharded"]
        assert two["packed"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-7)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert two["weights"].keys() == one["weights"].keys()
        for key, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=1e-5, msg=key)
