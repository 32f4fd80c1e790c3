"""The random walks task: a policy reads a start node of a directed graph and writes a short walk to the goal.

The task and its first graph are those of trlX (examples/randomwalks, seed 1002).
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Graph:
    """Directed edges between letters; the goal leads to itself alone."""

    edges: dict[str, str]
    goal: str = "a"
    max_length: int = 10

    @cached_property
    def starts(self) -> list[str]:
        return [node for node in self.edges if node != self.goal]

    @cached_property
    def shortest(self) -> dict[str, int]:
        """Nodes on the shortest path from each node to the goal, both ends counted."""
        length, frontier = {self.goal: 1}, [self.goal]
        while frontier:
            reached = [n for n in self.edges if n not in length and any(m in frontier for m in self.edges[n])]
            length |= dict.fromkeys(reached, length[frontier[0]] + 1)
            frontier = reached
        return length

    def optimality(self, walk: str) -> float:
        """1 for a shortest path to the goal, 0 for one that is too long, wrong or never there."""
        start, length = walk[:1], self.max_length
        if self.goal in walk[: self.max_length]:
            path = walk[: walk.index(self.goal) + 1]
            if all(b in self.edges.get(a, "") for a, b in pairwise(path)):
                length = len(path)
        return (self.max_length - length) / (self.max_length - self.shortest[start])

    def uniform_policy(self) -> tuple[float, float]:
        """(optimality, how often the goal is reached) of walking an edge at random, averaged over the start nodes."""
        total = reached = 0.0
        for start in self.starts:
            where = {start: 1.0}
            for length in range(2, self.max_length + 1):
                after: dict[str, float] = {}
                for node, mass in where.items():
                    for target in self.edges[node]:
                        after[target] = after.get(target, 0.0) + mass / len(self.edges[node])
                done = after.pop(self.goal, 0.0)
                total += done * (self.max_length - length) / (self.max_length - self.shortest[start])
                reached += done
                where = after
        return total / len(self.starts), reached / len(self.starts)

    def walk(self, rng: random.Random) -> str:
        """A random walk from a random start, up to the goal or `max_length` nodes."""
        walk = rng.choice(self.starts)
        while walk[-1] != self.goal and len(walk) < self.max_length:
            walk += rng.choice(self.edges[walk[-1]])
        return walk


def known_graph() -> tuple[Graph, list[str]]:
    """The graph and the 1,000 walks of the data file."""
    data = json.loads((DATA / "random_walks_1002.json").read_text())
    return Graph(data["edges"], data["goal"], data["max_length"]), data["walks"]


def make_graph(seed: int, nodes: int = 21, density: float = 0.1, walks: int = 1000) -> tuple[Graph, list[str]]:
    """Another graph of the same kind: each edge with probability `density`, no dead ends, the goal in reach of all."""
    rng = random.Random(seed)
    letters = string.ascii_lowercase[:nodes]
    while True:
        edges = {a: "".join(b for b in letters if b != a and rng.random() < density) for a in letters}
        edges["a"] = "a"
        graph = Graph(edges)
        if all(edges.values()) and len(graph.shortest) == nodes and max(graph.shortest.values()) < graph.max_length:
            return graph, [graph.walk(rng) for _ in range(walks)]


def tokenizer_of(graph: Graph) -> PreTrainedTokenizerFast:
    """A token a letter; the goal is the end token: nothing that follows it counts."""
    vocabulary = {node: index for index, node in enumerate([*graph.edges, "<pad>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=graph.goal, pad_token="<pad>", unk_token="<pad>", model_max_length=16
    )


def rewards_for(graph: Graph):
    """A reward function of a trainer: the optimality of prompt and completion together."""

    def optimality(prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: object) -> list[float]:
        nodes = list(graph.edges)
        texts = ["".join(nodes[i] if i < len(nodes) else "?" for i in ids) for ids in completion_ids]
        return [graph.optimality(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]

    return optimality
