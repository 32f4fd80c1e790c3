import pytest
import torch

from trl.losses.loss_sum import LossSum, aggregate, counted, extreme, masked_sum, row_share

LOSS = torch.tensor([[1.0, 2.0, 6.0], [4.0, 9.0, 9.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("how", "max_tokens", "total", "count"),
    [("token", 0, 13.0, 4), ("sequence", 0, 7.0, 2), ("constant", 5, 13.0, 10), ("sequence_sum", 0, 13.0, 2)],
)
def test_the_four_ways_to_add_up(how, max_tokens, total, count):
    got_total, got_count = aggregate(LOSS, MASK, how, max_tokens)
    assert got_total.item() == pytest.approx(total)
    assert got_count.item() == count == counted(MASK, how, max_tokens).item()


@pytest.mark.parametrize("how", ["token", "sequence", "constant", "sequence_sum"])
def test_micro_batches_add_up_to_the_batch(how):
    whole, whole_count = aggregate(LOSS, MASK, how, 5)
    parts = [aggregate(LOSS[i : i + 1], MASK[i : i + 1], how, 5) for i in range(2)]
    assert sum(total for total, _ in parts).item() == pytest.approx(whole.item())
    assert sum(count for _, count in parts) == whole_count


@pytest.mark.parametrize("how", ["token", "sequence", "constant", "sequence_sum"])
def test_padding_changes_nothing(how):
    padded = torch.nn.functional.pad(LOSS, (0, 2), value=123.0), torch.nn.functional.pad(MASK, (0, 2))
    assert torch.equal(torch.stack(aggregate(*padded, how, 5)), torch.stack(aggregate(LOSS, MASK, how, 5)))


def test_a_row_that_counts_nothing_is_no_sequence():
    total, count = aggregate(LOSS, torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), "sequence")
    assert (total.item(), count.item()) == (3.0, 1)


def test_the_mean_of_nothing_is_zero():
    assert LossSum(torch.tensor(0.0), torch.tensor(0)).mean.item() == 0.0
    assert LossSum(torch.tensor(6.0), 4).mean.item() == 1.5


def test_a_second_term_is_weighed_and_brings_its_metrics():
    both = LossSum(torch.tensor(1.0), 2, {"a": torch.tensor(1.0)}).plus(
        LossSum(torch.tensor(4.0), 2, {"b": torch.tensor(2.0)}), weight=0.5
    )
    assert both.mean.item() == 1.5
    assert set(both.metrics) == {"a", "b"}


def test_a_metric_per_token_is_detached():
    values = LOSS.clone().requires_grad_()
    total, count = masked_sum(values, MASK)
    assert (total.item(), count.item()) == (13.0, 4.0)
    assert not total.requires_grad


def test_constant_needs_the_limit_and_other_names_are_refused():
    with pytest.raises(ValueError, match="max_tokens=0"):
        counted(MASK, "constant")
    with pytest.raises(ValueError, match="aggregation='mean'"):
        counted(MASK, "mean")


def test_extremes_by_hand():
    assert extreme(torch.tensor([3.0, -1.0]), largest=True).value.item() == 3
    assert extreme(torch.tensor([3.0, -1.0]), largest=False).value.item() == -1
    assert extreme(torch.zeros(0), largest=True).value.item() == -torch.inf
    flags, mask = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert row_share(flags, mask, largest=True).value.item() == 1
    assert row_share(flags, mask, largest=False).value.item() == 0.5  # a row without tokens has no share
    assert row_share(flags[2:], mask[2:], largest=False).value.item() == torch.inf
