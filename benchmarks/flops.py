"""Floating-point operations that the mathematics of a step needs, from the lengths of its rows alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 384, 1024, 6, 6, 32_000
"""of the Llama that all rows train, embedding and head tied"""
KEYS_AND_VALUES, THE_REST = 2 * WIDTH**2, 2 * WIDTH**2 + 3 * WIDTH * INNER
"""weights of a layer that each position of its input meets, and those that only positions meet that are read"""


@dataclass(frozen=True)
class Tree:
    """Tokens of a prompt and of each of its completions, all of which are scored."""

    prompt: int
    completions: Sequence[int]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.completions)

    @property
    def read(self) -> int:
        """Positions whose logits are wanted: the prompt's last, and of each completion all but the last."""
        return 1 + sum(length - 1 for length in self.completions)

    @property
    def seen(self) -> int:
        """Keys that the queries of all positions see."""
        own = [self.prompt, *self.completions]
        return sum(n * (n + 1) // 2 for n in own) + self.prompt * sum(self.completions)

    @property
    def seen_when_read(self) -> int:
        """Keys that the queries of those positions see that are read."""
        return self.prompt + sum((n - 1) * self.prompt + n * (n - 1) // 2 for n in self.completions)


def forward_flops(trees: Sequence[Tree], vocabulary: int = VOCABULARY) -> int:
    """Of one forward pass, a prompt once for all its completions; the last layer and the head where they are read.

    A product of M x K and K x N numbers has 2 M K N operations; attention has two of them for each key that is seen.
    """
    tokens, read, seen, seen_when_read = (
        sum(getattr(tree, name) for tree in trees) for name in ("tokens", "read", "seen", "seen_when_read")
    )
    weights = (LAYERS * KEYS_AND_VALUES + (LAYERS - 1) * THE_REST) * tokens + THE_REST * read
    attention = 2 * WIDTH * ((LAYERS - 1) * seen + seen_when_read)
    return 2 * (weights + attention + WIDTH * vocabulary * read)


def step_gflop(trees: Sequence[Tree], *, reference: bool, vocabulary: int = VOCABULARY) -> float:
    """Of a training step: a forward pass, a backward pass of twice as much, and the reference's forward pass."""
    return (4 if reference else 3) * forward_flops(trees, vocabulary) / 1e9


def _ended(ids: Sequence[int]) -> int:
    """Tokens of a completion and of the end token behind it."""
    return len(ids) + 1


def steps(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """GFLOP of a step of SFT and of DPO on these rows; by the names of their rows in the table."""
    supervised = [Tree(len(row["prompt"]), [_ended(row["completion"])]) for row in rows["supervised"]]
    pairs = [Tree(len(row["prompt"]), [_ended(row["chosen"]), _ended(row["rejected"])]) for row in rows["pairs"]]
    return {"sft": step_gflop(supervised, reference=False), "dpo": step_gflop(pairs, reference=True)}
