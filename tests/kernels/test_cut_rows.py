"""How a packed row is cut for several ranks: who sees whom stays as it was, and each token has one place."""

import pytest
import torch
from dense_masks import dense_mask

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels import context_parallel
from trl.kernels.block_mask import BLOCK, block_tables, flex_tree_attention, on_device
from trl.kernels.tree_attention import TreeLayout
from trl.models.attention import segment_attention

TREES = {
    "texts": [TokenTree([], [Branch(range(5, 12))]), TokenTree([], [Branch(range(20, 43))])],
    "shared prompts": [
        TokenTree(range(40), [Branch(range(3)), Branch(range(5, 12)), Branch(range(9))]),
        TokenTree(range(2), [Branch(range(4)), Branch([1])]),
    ],
    "one token": [TokenTree([], [Branch([7])])],
}


@pytest.fixture
def parts(monkeypatch):
    """`own_part` of each rank, without processes."""

    def of(packed, ranks, unit=None):
        monkeypatch.setattr(context_parallel.dist, "get_world_size", lambda group: ranks)
        found = []
        for rank in range(ranks):
            monkeypatch.setattr(context_parallel.dist, "get_rank", lambda group, rank=rank: rank)
            found.append(context_parallel.own_part(packed, "group", unit))
        return found

    return of


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", TREES)
def test_each_token_stands_on_one_rank_and_sees_what_it_saw(name, ranks, parts):
    packed = pack(TREES[name])
    count, each = len(packed.ids_N), parts(packed, ranks)
    assert len({len(part.ids_N) for part in each}) == 1
    held = torch.cat([part.piece.positions("cpu") for part in each])
    assert sorted(held.tolist()) == list(range(each[0].piece.total))
    for window in (None, 4):
        seen = dense_mask(packed.segments, window)
        cut = dense_mask(each[0].segments, window)
        torch.testing.assert_close(cut[:count, :count], seen)
        assert not cut[:count, count:].any()
    for part in each:
        real = part.piece.positions("cpu") < count
        torch.testing.assert_close(part.ids_N[real], packed.ids_N[part.piece.positions("cpu")[real]])
        torch.testing.assert_close(part.position_N[real], packed.position_N[part.piece.positions("cpu")[real]])
        assert [part.row_indices(row) for row in range(part.rows)] == [
            packed.row_indices(row) for row in range(packed.rows)
        ]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", TREES)
def test_each_scored_token_is_scored_once_from_its_own_place(name, ranks, parts):
    packed = pack(TREES[name])
    found = {}
    for part in parts(packed, ranks):
        places = part.piece.positions("cpu")[part.scored_S]
        for row, slot, target, place in zip(part.row_S, part.slot_S, part.target_S, places, strict=True):
            assert (int(row), int(slot)) not in found
            found[int(row), int(slot)] = (int(target), int(place))
    whole = zip(packed.row_S, packed.slot_S, packed.target_S, packed.scored_S, strict=True)
    assert found == {(int(row), int(slot)): (int(target), int(place)) for row, slot, target, place in whole}


def test_all_ranks_see_about_as_many_keys(parts):
    packed = pack([TokenTree([], [Branch(range(800))])])
    seen = dense_mask(packed.segments).sum(-1)
    work = [int(seen[part.piece.positions("cpu")].sum()) for part in parts(packed, 4)]
    assert max(work) - min(work) <= 0.01 * max(work)


def test_rows_are_gathered_in_the_order_of_the_packed_row_and_summed_back(parts, monkeypatch):
    packed = pack([TokenTree([], [Branch(range(24))])])
    each = parts(packed, 2)
    numbers = torch.arange(24.0)[:, None] * torch.tensor([1.0, 10.0])
    held = [numbers[part.piece.positions("cpu")] for part in each]

    def gather(out, own, group):
        out.copy_(torch.cat(held))

    def scatter(out, whole, group):  # both ranks bring the same
        out.copy_(2 * whole.view(2, -1, 2)[rank])

    monkeypatch.setattr(context_parallel.dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(context_parallel.dist, "reduce_scatter_tensor", scatter)
    for rank, part in enumerate(each):
        torch.testing.assert_close(part.piece.in_order(held[rank]), numbers)
        torch.testing.assert_close(part.piece.summed_own(numbers), 2 * held[rank])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 70])
def test_a_gpu_computes_the_own_blocks_of_queries(window, parts):
    """The same function without its compiler, against attention segment by segment."""
    packed = pack([TokenTree(range(330), [Branch(range(200)), Branch(range(90))]), TokenTree([], [Branch(range(150))])])
    torch.manual_seed(0)
    for part in parts(packed, 2, 128):
        piece, tree = part.piece, TreeLayout(part.segments, {}, part.piece)
        sizes = ((4, len(part.ids_N)), (2, piece.total), (2, piece.total))
        query, key, value = (torch.randn(1, n, heads, 16).transpose(1, 2) for heads, n in sizes)
        tables = block_tables(part.segments, window, (piece.positions("cpu")[::BLOCK] // BLOCK).tolist())
        found = flex_tree_attention(
            query, key, value, on_device(tables, torch.device("cpu")), window=window, compiled=False,
            places_Q=piece.positions("cpu").int(),
        )  # fmt: skip
        expected = segment_attention(tree, query, key, value, window=window, scale=None)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
