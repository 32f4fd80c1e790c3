"""What came of a run on rollouts, and how two runs are held against each other."""

from typing import Any

import pytest
import torch

LOGGED = (
    "loss", "grad_norm", "reward", "kl", "approx_kl", "ratio", "episodes/turns", "frac_reward_zero_std",
)  # fmt: skip


def outcome(trainer: Any) -> dict[str, Any]:
    """Train; the weights, what was logged of each step, and the place in the prompts."""
    trainer.train()
    logs = {name: [row[name] for row in trainer.state.log_history if name in row] for name in LOGGED}
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {"weights": weights, "logs": logs, "position": trainer.rollouts.state.position}


def check_same(one: dict[str, Any], other: dict[str, Any], exactly: bool = False) -> None:
    """Something was learned, and the same: to 1e-5 of the weights, or to the last bit."""
    assert max(one["logs"]["grad_norm"]) > 0
    if exactly:
        assert torch.equal(one["weights"], other["weights"])
    torch.testing.assert_close(other["weights"], one["weights"], rtol=1e-5, atol=1e-6)
    assert one["position"] == other["position"]
    assert one["logs"].keys() == other["logs"].keys()
    for name, values in one["logs"].items():
        assert other["logs"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
