"""Two ranks train as one process does: whole weights (DDP), sharded ones (FSDP2), sharded ones below an adapter."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conformity import build
from process_group import on_ranks
from sharded_runs import ENGINES, RESUMED, differences, helpers, runs_of, train_all


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of the rows of an engine, on each of its ranks; each engine runs once, in a group of its own."""
    folder = tmp_path_factory.mktemp("sharded")

    @cache
    def of(engine, lora):
        world, names = 1 if engine == "one" else 2, runs_of("lora" if lora else "")
        path = str(folder / f"{engine}-{lora}")
        on_ranks(train_all, world, path, engine, names, lora)
        return [torch.load(f"{path}-{rank}") for rank in range(world)]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "name"), [(engine, name) for engine in ENGINES for name in runs_of(engine)], ids=lambda it: it
)
def test_two_ranks_train_as_one_process(engine, name, found):
    lora = engine.endswith("lora")
    one = found("one", lora)[0][name]
    assert one["weights"]
    for rank in found(engine, lora):
        two = rank[name]
        assert two["sharded"] == engine.startswith("fsdp2")
        assert two["packed"] == one["packed"]
        apart = differences(one, two)
        assert (apart.pop("resumed run") == 0) == (name in RESUMED)
        assert {column: size for column, size in apart.items() if not size <= 1e-5} == {}


@pytest.mark.slow
def test_callbacks_and_helpers_on_sharded_weights(tmp_path):
    on_ranks(helpers, 1, str(tmp_path / "one"))
    on_ranks(helpers, 2, str(tmp_path / "two"))
    one, *ranks = (torch.load(tmp_path / name) for name in ("one-0", "two-0", "two-1"))
    assert ranks[0]["loads"]
    assert one["bema"].keys() == ranks[0]["bema"].keys()
    for key, weight in one["bema"].items():
        torch.testing.assert_close(ranks[0]["bema"][key], weight, rtol=0, atol=1e-6, msg=key)
    for two in ranks:
        assert two["ids"].shape == one["ids"].shape == (1, 6)
        assert two["shown"] == 2


def test_gathering_layer_by_layer_is_for_sharded_weights(tmp_path, caplog):
    build("grpo", tmp_path, gather="layers")
    assert "gather='layers': no effect" in caplog.text


@pytest.mark.parametrize(
    ("sharding", "model", "message"),
    [
        ({"is_fsdp2": False}, {}, "fsdp_version=1: the sampler cannot gather its weights; take fsdp_version=2"),
        ({"is_fsdp2": True}, {"is_encoder_decoder": True}, "gather='layers': an encoder-decoder"),
    ],
)
def test_what_cannot_be_gathered_is_refused(sharding, model, message, tmp_path):
    trainer = build("grpo", tmp_path, gather="layers")
    trainer.is_fsdp_enabled, trainer.accelerator = True, SimpleNamespace(**sharding)
    for name, value in model.items():
        setattr(trainer.model.config, name, value)
    with pytest.raises(ValueError, match=message):
        trainer._check_sharding()
