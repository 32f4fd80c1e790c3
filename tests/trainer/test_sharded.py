"""Two ranks train as one process does: whole weights (DDP), sharded ones (FSDP2), sharded ones below an adapter."""

from functools import cache

import pytest
import torch
from process_group import on_ranks
from sharded_runs import ENGINES, differences, runs_of, train_all


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
        assert {column: size for column, size in apart.items() if not size <= 1e-5} == {}
