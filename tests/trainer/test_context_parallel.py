"""Two ranks (gloo, CPU) that share rows train as one process does, on whole and on sharded weights."""

import re

import pytest
import torch
from accelerate import ParallelismConfig
from context_runs import CASES, ENGINES, build, run_all
from process_group import on_ranks

import trl


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process found, and what each of two ranks found."""
    folder = tmp_path_factory.mktemp("context")
    run_all(0, 1, str(folder / "one"))
    on_ranks(run_all, 2, str(folder / "two"))
    return [torch.load(folder / name) for name in ("one-0", "two-0", "two-1")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sharded"), ENGINES, ids=lambda x: x if isinstance(x, str) else "FSDP2" if x else "DDP"
)
def test_ranks_that_share_rows_learn_the_same(name, sharded, results):
    one, *ranks = results[0][name], *(each[name, sharded] for each in results[1:])
    assert one["ranks"] == 1
    for two in ranks:
        assert (two["ranks"], two["sharded"], two["packed"]) == (2, sharded, True)
        assert len(two["logged"]) == len(one["logged"])
        for ours, expected in zip(two["logged"], one["logged"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert two["flops"] == pytest.approx(one["flops"], rel=0.05)
        assert two["weights"].keys() == one["weights"].keys()
        for key, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=1e-5, msg=key)


MESSAGES = {
    "padded rows": r"context_parallel_size=2: padded rows \(padding_free=False, .* are not cut; leave one of them out",
    "two numbers": "context_parallel_size=2: parallelism_config says cp_size=3; give one of them",
    "three ranks of two": "context_parallel_size=3: the number of processes, 2, is no multiple of it; start more",
    "a recurrence": "Lfm2ForCausalLM pads its rows, and ranks share packed rows only: leave context_parallel_size out",
    "ALiBi": "BloomForCausalLM pads its rows, and ranks share packed rows only",
    "an encoder": "BertForSequenceClassification has an encoder, whose rows cannot be cut; leave it out",
    "rows at random": "context_parallel_size=2: the ranks that share rows read different ones for step 1: a data set",
    "whole rows": r"FSDPLlamaForCausalLM is called on whole rows, .* by `trl.models.scoring.score",
    "GRPO under the launcher": "cp_size=2: GRPOTrainer makes its rows while it trains, which ranks cannot share",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESSAGES)
def test_what_cannot_be_shared_is_refused(name, results):
    for two in results[1:]:
        assert re.search(MESSAGES[name], two["refused"][name]), two["refused"][name]


def test_one_process_cannot_share(tmp_path):
    with pytest.raises(ValueError, match="context_parallel_size=2: the number of processes, 1, is no multiple of it"):
        build(CASES["KTO"], str(tmp_path), context_parallel_size=2)


def test_the_size_is_a_number_of_ranks(tmp_path):
    with pytest.raises(ValueError, match="context_parallel_size=0: give a number of ranks >= 1"):
        trl.SFTConfig(str(tmp_path), context_parallel_size=0)


@pytest.mark.parametrize(
    "name", ["GRPOConfig", "RLOOConfig", "OnlineDPOConfig", "DistillationConfig", "IterativeSFTConfig"]
)
def test_configs_of_trainers_that_make_their_rows_refuse_it(name, tmp_path):
    with pytest.raises(ValueError, match=f"cp_size=2: {name} makes its rows while it trains, which ranks cannot share"):
        getattr(trl, name)(output_dir=str(tmp_path), parallelism_config=ParallelismConfig(cp_size=2))


def test_sequence_parallelism_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sp_size=2: heads and layers are not cut here; shard weights by FSDP2"):
        trl.SFTConfig(str(tmp_path), parallelism_config=ParallelismConfig(sp_size=2))
