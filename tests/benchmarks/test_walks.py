"""The random walks task: its published numbers."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def walks():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import walks
    finally:
        sys.path.remove(str(BENCHMARKS))
    return walks


def test_published_numbers(walks):
    graph, recorded = walks.known_graph()
    data = json.loads((BENCHMARKS / "data" / "random_walks_1002.json").read_text())
    assert {start: graph.shortest[start] for start in graph.starts} == data["shortest"]
    assert graph.uniform_policy() == pytest.approx((0.78517, 0.98340), abs=5e-6)
    assert len(recorded) == 1000


def test_optimality(walks):
    graph, _ = walks.known_graph()
    assert graph.optimality("ba") == 1.0
    assert graph.optimality("cua") == 1.0
    assert graph.optimality("cotba") == pytest.approx((10 - 5) / (10 - 3))
    assert graph.optimality("baxyz") == 1.0  # nothing counts behind the goal
    assert graph.optimality("ca") == 0  # no such edge
    assert graph.optimality("c?a") == 0
    assert graph.optimality("co") == 0
    assert graph.optimality("mhmhmhmhmhba") == 0  # too late


def test_made_graphs(walks):
    graph, texts = walks.make_graph(1052, walks=50)
    assert (len(graph.starts), graph.edges["a"]) == (20, "a")
    assert all(2 <= len(text) <= 10 and (text[-1] == "a" or len(text) == 10) for text in texts)
    assert walks.make_graph(1052, walks=50) == (graph, texts)


def test_rewards_read_prompt_and_tokens(walks):
    graph, _ = walks.known_graph()
    ids = list(graph.edges).index
    reward = walks.rewards_for(graph)
    assert reward(prompts=["b", "c"], completion_ids=[[ids("a")], [ids("u"), 99]]) == [1.0, 0.0]
