"""The mask of a packed row for FlexAttention, from its segments' bounds."""

import logging
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from dense_masks import dense_mask
from torch._dynamo.testing import CompileCounter

from trl.data.packing import pack
from trl.data.records import Branch, Segment, TokenTree
from trl.kernels import block_mask
from trl.kernels.block_mask import (
    BLOCK,
    block_tables,
    flash_takes,
    flex_tree_attention,
    kind_of,
    on_device,
    padded_tokens,
    row_bounds,
    tour_of,
)
from trl.kernels.tree_attention import TreeLayout
from trl.models import attention
from trl.models.attention import segment_attention

CPU = torch.device("cpu")


def grown(seed, trees, sizes=(1, 5, 40, 127, 128, 129, 256, 300)):
    """Random trees of up to three levels."""
    draw, segments = random.Random(seed), []

    def add(parent, level):
        start = segments[-1].end if segments else 0
        segments.append(Segment(start, start + draw.choice(sizes), parent))
        own = len(segments) - 1
        for _ in range(draw.choice([0, 1, 2, 3]) if level < 2 else 0):
            add(own, level + 1)

    for _ in range(trees):
        add(-1, 0)
    return segments


def test_the_tour_by_hand():
    """A prompt of 4 with branches of 2 and 3, the second with a later turn; then a row alone."""
    segments = [Segment(0, 4, -1), Segment(4, 6, 0), Segment(6, 9, 0), Segment(9, 10, 2), Segment(10, 12, -1)]
    tour = tour_of(segments)
    assert tour.enter.tolist() == [0, 1, 2, 3, 4]
    assert tour.leave.tolist() == [4, 2, 4, 4, 5]
    assert tour.depth.tolist() == [0, 4, 4, 7, 0]


def test_a_later_turn_may_stand_behind_another_branch():
    """Parents before children is all that is asked; the tour is not the order of the segments."""
    segments = [Segment(0, 4, -1), Segment(4, 6, 0), Segment(6, 9, 0), Segment(9, 10, 1)]
    tour = tour_of(segments)
    inside = [[int(tour.enter[k] <= tour.enter[q] < tour.leave[k]) for k in range(4)] for q in range(4)]
    assert inside == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]


def test_few_lengths_and_little_tail():
    lengths = {padded_tokens(n) for n in range(4096, 65537)}
    assert len(lengths) == 32 * 4 + 1
    assert all(n <= padded_tokens(n) <= n * (1 + 1 / 32) and padded_tokens(n) % BLOCK == 0 for n in range(4096, 65537))
    assert padded_tokens(1) == padded_tokens(256) == 256
    assert padded_tokens(257) == 384


@pytest.mark.parametrize("window", [None, 3, 128, 200])
def test_the_tables_are_the_rule(window):
    for seed in range(6):
        segments = grown(seed, 1 + seed % 3)
        tables, total = block_tables(segments, window), segments[-1].end
        tail = [Segment(total, tables.tokens, -1)] if tables.tokens > total else []
        expected = dense_mask([*segments, *tail], window)
        enter, leave, depth = (torch.from_numpy(numbers) for numbers in tables[:3])
        query, key = torch.arange(tables.tokens)[:, None], torch.arange(tables.tokens)
        seen = (key <= query) & (enter <= enter[:, None]) & (enter[:, None] < leave)
        assert torch.equal(seen if window is None else seen & (depth[:, None] - depth < window), expected)

        blocks = tables.tokens // BLOCK
        pairs = expected.view(blocks, BLOCK, blocks, BLOCK).sum((1, 3))
        some, full = (pairs > 0) & (pairs < BLOCK**2), pairs == BLOCK**2
        for at, chosen in enumerate((some, full, some.T, full.T)):
            counts, listed = tables[4 + 2 * at : 6 + 2 * at]
            rows = [row[:n].tolist() for n, row in zip(counts, listed, strict=True)]
            assert rows == [row.nonzero().flatten().tolist() for row in chosen]


def inputs_of(segments, dtype=torch.float32, width=16):
    torch.manual_seed(0)
    total = segments[-1].end
    return [torch.randn(1, heads, total, width, dtype=dtype) for heads in (4, 2, 2)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "how",
    [{}, {"window": 50}, {"softcap": 5.0, "scale": 0.4}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "window": 150}],
    ids=["plain", "window", "soft-cap", "sinks"],
)
def test_the_forward_is_that_of_segments(how):
    segments = grown(4, 2)
    query, key, value = inputs_of(segments)
    tables = on_device(block_tables(segments, how.get("window")), CPU)
    assert tables.tokens > segments[-1].end  # a tail
    with torch.no_grad():
        ours = flex_tree_attention(query, key, value, tables, compiled=False, **how)
        plain = segment_attention(TreeLayout(segments), query, key, value, **{"scale": None, **how})
    torch.testing.assert_close(ours, plain, rtol=0, atol=5e-6)


def test_one_compilation_serves_every_length(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    block_mask._compiled.cache_clear()
    lengths = set()
    for seed in range(20):
        segments = grown(seed, 1 + seed % 8, sizes=(1, 40, 128))
        query, key, value = (x[:, :2] for x in inputs_of(segments))
        window = 40 + seed
        lengths.add(padded_tokens(segments[-1].end))
        with torch.no_grad():
            ours = flex_tree_attention(query, key, value, on_device(block_tables(segments, window), CPU), window=window)
            plain = segment_attention(TreeLayout(segments), query, key, value, window=window, scale=None)
        torch.testing.assert_close(ours, plain, rtol=0, atol=5e-6)
    assert len(lengths) > 8  # after so many compilations torch leaves off
    assert counter.frame_count == 1
    block_mask._compiled.cache_clear()


def test_another_kind_has_a_function_of_its_own():
    query, key, value = inputs_of(grown(0, 1))
    plain = kind_of(query, key, value, window=None, scale=None, softcap=None, sinks=None)
    others = [replace_fields(plain, windowed=True), replace_fields(plain, softcap=30.0)]
    codes = {block_mask._compiled(kind)._torchdynamo_orig_callable.__code__ for kind in (plain, *others)}
    assert len(codes) == 3
    assert kind_of(query, key, value, window=None, scale=0.25, softcap=None, sinks=None) == plain  # 16 ** -0.5


def replace_fields(kind, **fields):
    return kind._replace(**fields)


def test_memory_of_the_mask_is_linear():
    """46 GiB were made for 64k tokens when each pair of tokens had a number."""
    for tokens in (4096, 16384, 65536):
        segments = []
        for start in range(0, tokens, 4096):
            parent = len(segments)
            segments.append(Segment(start, start + 1024, -1))
            segments += [Segment(start + at, start + at + 512, parent) for at in range(1024, 4096, 512)]
        assert sum(table.nbytes for table in block_tables(segments)) <= 32 * tokens


def test_which_tensors_learn_is_not_compiled_for(monkeypatch):
    """As where an adapter lies on some of the projections only; and nothing learns under a frozen layer."""
    calls = []

    def kernel(kind, query, key, value, tables):
        calls.append((kind, [x.requires_grad for x in (query, key, value)], torch.is_grad_enabled()))
        return query * 2, None

    monkeypatch.setattr(block_mask, "_compiled", lambda kind: kernel)
    segments = [Segment(0, 10, -1)]
    tables = on_device(block_tables(segments), CPU)
    query, key, value = inputs_of(segments)
    query.requires_grad_()
    for tensors in ((query, key, value), (query, key, value.requires_grad_())):
        flex_tree_attention(*tensors, tables).sum().backward()
    frozen = flex_tree_attention(query.detach(), key, value.detach(), tables)
    assert not frozen.requires_grad
    assert [learns for _, learns, _ in calls] == [[True] * 3, [True] * 3, [False] * 3]
    assert [enabled for _, _, enabled in calls] == [True, True, False]
    assert calls[0][0] == calls[1][0] != calls[2][0]


def test_the_batch_keeps_its_tables_for_every_pass():
    packed = pack([TokenTree([1] * 5, [Branch([2] * 3), Branch([3] * 4)])])
    again = replace(packed.to("cpu"), width=9)
    first = TreeLayout(packed.segments, packed.kept).shared("tables", lambda: object())
    assert TreeLayout(again.segments, again.kept).shared("tables", lambda: object()) is first


def test_rows_alone():
    layout = TreeLayout([Segment(0, 3, -1), Segment(3, 10, -1), Segment(10, 11, -1)])
    assert layout.is_flat
    assert not TreeLayout([Segment(0, 3, -1), Segment(3, 10, 0)]).is_flat
    bounds = row_bounds(layout.segments, CPU)
    assert bounds.starts.tolist() == [0, 3, 10, 11]
    assert bounds.longest == 7


def test_flash_rows_gets_what_its_release_takes(monkeypatch):
    """Windows reach back `window - 1` tokens there; older releases say `is_causal` and know no windows."""
    calls = []

    def recent(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        calls.append((tuple(q.shape), max_q, scale, window_size, enable_gqa))
        return q

    def older(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        calls.append(is_causal)
        return q

    query, key, value = inputs_of([Segment(0, 10, -1)], torch.bfloat16)
    bounds = row_bounds([Segment(0, 10, -1)], CPU)
    kind = kind_of(query, key, value, window=None, scale=None, softcap=None, sinks=None)
    for function, names in ((recent, {"scale", "window_size", "enable_gqa"}), (older, {"is_causal"})):
        monkeypatch.setattr(block_mask, "_flash", lambda f=function, n=names: (f, frozenset(n)))
        assert flash_takes(kind)
        assert flash_takes(kind._replace(windowed=True)) == (function is recent)
        out = block_mask.flash_rows(query, key, value, bounds, window=None, scale=None)
        torch.testing.assert_close(out, query)
    monkeypatch.setattr(block_mask, "_flash", lambda: (recent, frozenset({"scale", "window_size", "enable_gqa"})))
    block_mask.flash_rows(query, key, value, bounds, window=4, scale=0.5)
    assert calls == [((10, 4, 16), 10, None, (-1, 0), True), True, ((10, 4, 16), 10, 0.5, (3, 0), True)]
    for field, changed in (("softcap", 30.0), ("sinks", True), ("dtype", torch.float32), ("widths", (16, 8))):
        assert not flash_takes(kind._replace(**{field: changed}))


def wrong_kernel(*args, **how):
    return segment_attention(*args, **how) * 1.5


def broken_kernel(*args, **how):
    raise RuntimeError("out of resource: shared memory\nRequired: 300000")


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (segment_attention, None),
        (wrong_kernel, "(off by 0.5 of the largest number): it is computed segment by segment (same results, slower)"),
        (broken_kernel, "(RuntimeError out of resource: shared memory): it is computed segment by segment"),
    ],
)
def test_a_kernel_is_tried_before_it_is_used(kernel, says, monkeypatch, caplog):
    monkeypatch.setitem(attention.KERNELS, attention.FLEX, kernel)
    query, key, value = (x.requires_grad_() for x in inputs_of([Segment(0, 10, -1)]))
    kind = kind_of(query, key, value, window=5, scale=None, softcap=3.0, sinks=torch.zeros(4))
    assert kind.learns
    attention._agrees.cache_clear()
    with caplog.at_level(logging.WARNING):
        answers = [attention._agrees(attention.FLEX, kind, CPU) for _ in range(2)]
    assert answers == [says is None] * 2
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == (says is not None)
    assert all(f"FlexAttention does not compute attention of 4 heads with 16 numbers in float32 here {says}" in text
               for text in texts)  # fmt: skip
    attention._agrees.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_in_half_precision_may_round_as_the_plain_one_does(dtype, monkeypatch):
    """The float32 result is what both are held against: a kernel that sums in float32 is no worse, 5 % is wrong."""

    def exact(tree, *qkv, **how):
        return segment_attention(tree, *(x.float() for x in qkv), **how).to(dtype)

    query, key, value = (x.requires_grad_() for x in inputs_of([Segment(0, 10, -1)], dtype, 128))
    for more in ({}, {"softcap": 20.0}, {"window": 5}):
        kind = kind_of(query, key, value, **{"window": None, "scale": None, "softcap": None, "sinks": None, **more})
        for kernel, good in ((segment_attention, True), (exact, True), (lambda *a, **h: exact(*a, **h) * 1.05, False)):
            monkeypatch.setitem(attention.KERNELS, attention.FLEX, kernel)
            attention._agrees.cache_clear()
            assert attention._agrees(attention.FLEX, kind, CPU) is good
        shares = [attention.share_off(plain, wide) for _, plain, wide in attention.tried(exact, kind, CPU, shared=True)]
        assert max(shares) < 0.02  # the numbers that it is tried on tell right from wrong
    attention._agrees.cache_clear()


def test_dropout_is_said_once(caplog):
    query, key, value = inputs_of([Segment(0, 10, -1)])
    attention._say_dropout.cache_clear()
    for _ in range(2):
        attention.device_attention(
            TreeLayout([Segment(0, 10, -1)]), query, key, value, window=None, scale=None, dropout=0.1, softcap=None,
            sinks=None,
        )  # fmt: skip
    (record,) = caplog.records
    assert record.getMessage().startswith("attention_dropout=0.1: no kernel drops attention weights of packed rows")
