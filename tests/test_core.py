import gc
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trl import core, import_utils

VALUES = torch.tensor([[1.0, 2, 4, 8], [3, -1, 0.5, 2]])
MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])


def test_flatten_dict():
    assert core.flatten_dict({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert core.flatten_dict({"a": {"b": 1}}, sep=".") == {"a.b": 1}


@pytest.mark.parametrize("nested", [{"k/x": 1}, {"a": {"k/x": 1}}])
def test_flatten_dict_refuses_a_key_with_the_separator(nested):
    with pytest.raises(ValueError, match="separator '/' not allowed to be in key 'k/x'"):
        core.flatten_dict(nested)


def test_convert_to_scalar_takes_only_single_numbers():
    stats = {"a": torch.tensor(1.5), "b": np.array([2]), "c": torch.ones(2), "d": torch.ones(1, 1), "e": "text"}
    converted = core.convert_to_scalar(stats)
    assert (converted["a"], converted["b"], converted["e"]) == (1.5, 2, "text")
    assert converted["c"] is stats["c"]
    assert converted["d"] is stats["d"]


def test_stack_dicts_pads_with_minus_one():
    stacked = core.stack_dicts([{"a": torch.tensor([[1], [2]])}, {"a": torch.tensor([3]), "b": torch.tensor(0)}])
    assert list(stacked) == ["a"]
    assert stacked["a"].tolist() == [[1, 2], [3, core.WANDB_PADDING]]


def test_add_suffix():
    assert core.add_suffix({"a": 1}, "_x") == {"a_x": 1}


def test_average_torch_dicts():
    averaged = core.average_torch_dicts([{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}])
    assert averaged["a"].tolist() == [2, 4]


def test_stats_to_np():
    stats = {
        "bf16": torch.ones(2, dtype=torch.bfloat16, requires_grad=True), "scalar": torch.tensor(2.0), "int": 3,
        "np": np.float32(4), "flag": np.True_, "array": np.arange(2), "text": "kept",
    }  # fmt: skip
    converted = core.stats_to_np(stats)
    assert converted["bf16"].dtype == np.float32
    assert isinstance(converted["scalar"], np.ndarray)
    assert [type(converted[k]) for k in ("int", "np", "flag")] == [float] * 3
    assert converted["array"] is stats["array"]
    assert converted["text"] == "kept"


def test_pad_to_size():
    rows = torch.tensor([[1, 2], [3, 4]])
    assert core.pad_to_size(rows, 2) is rows
    assert core.pad_to_size(rows, 3).tolist() == [[1, 2, 50256], [3, 4, 50256]]
    assert core.pad_to_size(rows, 3, dim=0, padding=0).tolist() == [[1, 2], [3, 4], [0, 0]]
    assert core.pad_to_size(rows, 3, dim=-1, padding=0).shape == (2, 3)
    with pytest.raises(ValueError, match="size=1: dimension 1 already holds 2"):
        core.pad_to_size(rows, 1)


def test_logprobs_from_logits():
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(9), 0.0]]])
    labels = torch.tensor([[1, 1]])
    torch.testing.assert_close(core.logprobs_from_logits(logits, labels), torch.tensor([[0.75, 0.1]]).log())
    every = torch.tensor([[[0.25, 0.75], [0.9, 0.1]]]).log()
    torch.testing.assert_close(core.logprobs_from_logits(logits, None, gather=False), every)
    with pytest.raises(ValueError, match="labels=None"):
        core.logprobs_from_logits(logits, None)


def test_whiten_is_unbiased_and_keeps_the_mean_on_request():
    values = torch.tensor([1.0, 2.0, 3.0])  # mean 2, unbiased variance 1
    torch.testing.assert_close(core.whiten(values), torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(core.whiten(values, shift_mean=False), torch.tensor([1.0, 2.0, 3.0]))


def test_masked_statistics_match_the_release():
    torch.testing.assert_close(core.masked_mean(VALUES, MASK), torch.tensor(1.75))
    torch.testing.assert_close(core.masked_mean(VALUES, MASK, axis=1), torch.tensor([3, 1.125]))
    torch.testing.assert_close(core.masked_var(VALUES, MASK), torch.tensor(3.175))
    torch.testing.assert_close(core.masked_var(VALUES, MASK, unbiased=False), torch.tensor(2.645833))
    row = torch.tensor([-0.42091, 0.140303, 1.26273, 3.507585])
    torch.testing.assert_close(core.masked_whiten(VALUES, MASK)[0], row, atol=1e-5, rtol=0)
    kept = core.masked_whiten(VALUES, MASK, shift_mean=False)[0]
    torch.testing.assert_close(kept, row + 1.75, atol=1e-5, rtol=0)


def test_masked_var_of_nothing_and_of_one():
    with pytest.raises(ValueError, match="The sum of the mask is zero"):
        core.masked_var(VALUES, torch.zeros_like(MASK))
    assert not core.masked_var(torch.tensor([1.0, 2.0]), torch.tensor([1, 0])).isfinite()


def test_masked_whiten_does_not_depend_on_padding():
    values, mask = torch.tensor([[1.0, 3.0, 5.0]]), torch.ones(1, 3)
    padded = core.masked_whiten(torch.tensor([[1.0, 3.0, 5.0, 99.0, -7.0]]), torch.tensor([[1, 1, 1, 0, 0]]))
    torch.testing.assert_close(core.masked_whiten(values, mask), padded[:, :3])


def test_clip_by_value_takes_tensors_and_numbers():
    x = torch.tensor([-2.0, 0.5, 3.0])
    assert core.clip_by_value(x, -1, 1).tolist() == [-1, 0.5, 1]
    low, high = torch.tensor([-3.0, 0.6, 0.0]), torch.tensor([0.0, 0.7, 2.0])
    torch.testing.assert_close(core.clip_by_value(x, low, high), torch.tensor([-2.0, 0.6, 2.0]))


def test_entropy_from_logits():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3), -200.0, -200.0]])
    expected = torch.tensor([math.log(4), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))])
    torch.testing.assert_close(core.entropy_from_logits(logits), expected)


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0].isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.45}, [1]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.0}, [1]),
        ({"top_p": 0.0, "min_tokens_to_keep": 3}, [0, 1, 2]),
        ({"top_k": 3, "top_p": 0.9}, [0, 1, 2]),
    ],
)
def test_top_k_top_p_filtering(asked, expected):
    logits = torch.tensor([[0.3, 0.5, 0.15, 0.05]]).log()
    assert kept(core.top_k_top_p_filtering(logits, **asked)) == expected


def test_filter_value():
    filtered = core.top_k_top_p_filtering(torch.tensor([[1.0, 2.0]]), top_k=1, filter_value=-9)
    assert filtered.tolist() == [[-9, 2]]


def test_respond_to_batch_samples_behind_the_queries():
    def successor(ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.nn.functional.one_hot((ids + 1) % 5, 5) * 100.0,)

    responses = core.respond_to_batch(successor, torch.tensor([[0, 1], [0, 4]]), txt_len=4, top_p=0.9)
    assert responses.tolist() == [[2, 3, 4, 0], [0, 1, 2, 3]]


def test_length_sampler_excludes_its_maximum():
    sampler = core.LengthSampler(2, 5)
    assert sampler.values == [2, 3, 4]
    assert {int(sampler()) for _ in range(100)} == {2, 3, 4}
    with pytest.raises(ValueError, match="max_value=2"):
        core.LengthSampler(2, 2)


def test_set_seed_repeats_every_generator():
    def draws():
        core.set_seed(3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draws() == draws()


@pytest.mark.parametrize(("xpu", "npu", "used"), [(True, False, "xpu"), (False, True, "npu"), (False, False, "cuda")])
def test_set_seed_and_cache_use_the_accelerator_there_is(monkeypatch, xpu, npu, used):
    calls = []
    for name in ("xpu", "npu", "cuda"):
        module = SimpleNamespace(
            manual_seed_all=lambda seed, name=name: calls.append((name, seed)),
            empty_cache=lambda name=name: calls.append((name, "emptied")),
            _is_in_bad_fork=lambda: True,
        )
        monkeypatch.setattr(torch, name, module, raising=False)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    monkeypatch.setattr(import_utils, "is_xpu_available", lambda: xpu)
    monkeypatch.setattr(import_utils, "is_npu_available", lambda: npu)
    core.set_seed(7)
    monkeypatch.setattr(core.PPODecorators, "optimize_device_cache", True)
    with core.PPODecorators.empty_device_cache():
        assert calls == [(used, 7)]
    assert calls == [(used, 7), (used, "emptied")]


def test_cache_is_left_alone_by_default(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: pytest.fail("not asked for"))

    @core.PPODecorators.empty_device_cache()
    def step(x):
        return x + 1

    assert [step(1), step(2)] == [2, 3]


def test_randn_tensor_is_torch_randn_of_its_generator():
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(core.randn_tensor((2, 3), torch.Generator().manual_seed(1)), expected)
    assert torch.equal(core.randn_tensor((2, 3), [torch.Generator().manual_seed(1)]), expected)
    assert core.randn_tensor((2, 3), dtype=torch.float64).dtype == torch.float64


def test_randn_tensor_gives_each_row_its_generator():
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    rows = [torch.randn(1, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert torch.equal(core.randn_tensor((2, 3), generators), torch.cat(rows))
    with pytest.raises(ValueError, match="2 generators for a batch of 4"):
        core.randn_tensor((4, 3), generators)


def test_randn_tensor_between_devices():
    with pytest.warns(UserWarning, match="drawn on 'cpu' and then moved to meta"):
        assert core.randn_tensor((2,), torch.Generator(), device="meta").device.type == "meta"
    elsewhere = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ValueError, match="Cannot generate a cpu tensor from a generator of type cuda"):
        core.randn_tensor((2,), elsewhere)
