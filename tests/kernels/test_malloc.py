"""Memory kept between steps: set up within training, and never where somebody else has set it up."""

import pytest
import torch

from trl.kernels import step_memory as heap


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(heap, "_mallopt", lambda: lambda *pair: made.append(pair))
    return made


def test_freed_memory_stays_within_and_goes_afterwards(calls):
    def interrupted():
        raise KeyError(calls == [(heap.MMAP_THRESHOLD, 2**25), (heap.TRIM_THRESHOLD, 2**30)])

    with pytest.raises(KeyError, match="True"), heap.kept_memory(torch.device("cpu")):
        interrupted()
    assert calls[2:] == [(heap.TRIM_THRESHOLD, 2**26)]


def test_other_devices_are_left_alone(calls):
    with heap.kept_memory(torch.device("meta")):
        pass
    assert calls == []


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_who_sets_up_the_allocator_keeps_it(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert heap._mallopt.__wrapped__() is None
