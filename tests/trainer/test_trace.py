"""A file for each step, for `trl diff` and `trl replay`."""

import pytest
import torch
from conformity import build

from trl.trainer import trace


@pytest.mark.parametrize("name", ["sft", "dpo-sigmoid", "grpo"])
def test_a_traced_run_is_the_run(name, tmp_path):
    weights = []
    for traced in (False, True):
        trainer = build(name, tmp_path / str(traced), trace_steps=traced, max_steps=2)
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
    assert torch.equal(*weights)
    assert trace.steps(tmp_path / "False") == []
    assert trace.steps(tmp_path / "True") == [1, 2]
    one, two = (trace.read(trace.file_of(tmp_path / "True", step)) for step in (1, 2))
    assert one["weights_after"] == two["weights_before"] != one["weights_before"]
    assert two["weights_after"] == trace.checksum(p for p in trainer.model.parameters() if p.requires_grad)
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert [one["grad_norm"], two["grad_norm"]] == pytest.approx([row["grad_norm"] for row in logged], rel=1e-6)
    assert len(one["rows"]) == len(one["learned"]) > 0


def test_a_checksum_sees_every_bit():
    one = [torch.arange(6.0).view(2, 3), None, torch.ones(4, dtype=torch.bfloat16)]
    assert trace.checksum(one) == trace.checksum([x if x is None else x.clone() for x in one])
    other = [one[0].clone(), None, one[2]]
    other[0][1, 1] = torch.nextafter(other[0][1, 1], torch.tensor(9.0))
    assert trace.checksum(other) != trace.checksum(one)
    swapped = [one[0].flip(0), None, one[2]]
    assert trace.checksum(swapped) != trace.checksum(one)


def test_what_is_no_trace_is_left_alone(tmp_path):
    file = trace.file_of(tmp_path, 3)
    assert trace.read(file) is None
    file.parent.mkdir()
    file.write_text('{"rows": ')
    assert trace.read(file) is None
    assert trace.steps(tmp_path) == [3]
