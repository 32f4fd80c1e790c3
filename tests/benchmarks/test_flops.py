"""Operations that a step needs: counted by hand, and by torch while our own passes run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import LAYERS, WIDTH, Tree, forward_flops, step_gflop, steps
from benchmarks.harness import Outcome, Pair, Run
from benchmarks.materials import config
from benchmarks.report import useful_lines
from benchmarks.scaling import useful_gflop
from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.kernels import head_tiles, layers
from trl.models.scoring import score


def test_a_tree_counted_by_hand():
    tree = Tree(2, [3])
    assert (tree.tokens, tree.read) == (5, 3)
    assert tree.seen == 1 + 2 + 3 + 4 + 5
    assert tree.seen_when_read == 2 + 3 + 4
    pair = Tree(2, [3, 1])
    assert (pair.tokens, pair.read) == (6, 3)  # a completion of one token is read at the prompt's last position alone
    assert pair.seen == tree.seen + 3
    assert pair.seen_when_read == tree.seen_when_read


def test_a_shared_prompt_is_computed_once():
    pair, apart = forward_flops([Tree(200, [60, 60])]), forward_flops([Tree(200, [60]), Tree(200, [60])])
    assert 0.5 < pair / apart < 0.8
    assert step_gflop([Tree(9, [9])], reference=True) == pytest.approx(
        step_gflop([Tree(9, [9])], reference=False) * 4 / 3
    )


def test_products_are_those_that_a_pass_computes(monkeypatch):
    from transformers import LlamaForCausalLM

    for file in (layers, head_tiles):
        monkeypatch.setattr(file, "leads", lambda: False)  # torch does not count what oneDNN multiplies

    vocabulary, shapes = 640, [(20, 5), (11, 9)]
    model = LlamaForCausalLM(config(vocabulary)).eval()
    packed = pack([TokenTree(list(range(3, 3 + a)), [Branch(list(range(3, 3 + b)))]) for a, b in shapes])
    with torch.no_grad():
        score(model, packed)  # the probe
        with FlopCounterMode(display=False) as counter:
            score(model, packed)
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    trees = [Tree(a, [b]) for a, b in shapes]
    attention = 4 * WIDTH * sum((LAYERS - 1) * tree.seen + tree.seen_when_read for tree in trees)
    assert counts["aten.mm"] == forward_flops(trees, vocabulary) - attention


def test_steps_end_with_the_end_token():
    rows = {
        "supervised": [{"prompt": [1] * 9, "completion": [1] * 4}],
        "pairs": [{"prompt": [1] * 9, "chosen": [1] * 4, "rejected": [1] * 2}],
    }
    assert steps(rows) == {
        "sft": step_gflop([Tree(9, [5])], reference=False), "dpo": step_gflop([Tree(9, [5, 3])], reference=True)
    }  # fmt: skip
    point = {"prompts": 1, "group": 2, "prompt": 9, "completion": 5, "vocabulary": 32_000}
    assert useful_gflop(point) == step_gflop([Tree(9, [5, 5])], reference=True)


def test_the_share_of_the_peak_is_shown_with_its_target():
    def taken(seconds: float) -> Outcome:
        run = Run(report={"step_cpu": seconds})
        return Outcome([Pair(run, run)])

    points = [{"peak_gflops": peak, "error": ""} for peak in (90, 100, 110)]
    lines = useful_lines({"sft": 300.0, "dpo": 300.0}, {"sft": taken(4.0), "dpo": taken(6.0)}, points)
    assert lines[2].endswith("| 300 | 4.0 | 75 | 100 | 75% | 60 % met |")
    assert lines[3].endswith("| 300 | 6.0 | 50 | 100 | 50% | 60 % **missed** |")
    assert useful_lines({"sft": 300.0}, {}, points)[2].endswith("| 300 | - | - | - | - | **void or not measured** |")
    assert useful_lines({"sft": 300.0}, {"sft": taken(4.0)}, [{"error": "killed"}]) == [
        "**Not measured**: no row above has a peak."
    ]
