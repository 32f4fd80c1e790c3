"""Log-probabilities among the words that a sampler's filters left, against a softmax over these words alone."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.models.forward import rows_padded
from trl.models.scoring import score

TREES = [
    TokenTree([5, 6, 9, 4], [Branch([9, 8, 7]), Branch([11])]),
    TokenTree([5], [Branch([7, 6])]),
]
LEFT = [[9, 3, 40], [8], [7, 59, 1, 2], [11, 12], [], [6, 0]]
"""for each scored token; of the fifth all words were left"""


def with_choices(packed):
    choices = torch.full((len(LEFT), 4), -1, dtype=torch.int32)
    for row, words in zip(choices, LEFT, strict=True):
        row[: len(words)] = torch.tensor(words, dtype=torch.int32)
    return replace(packed, choices_SK=choices)


def by_hand(model, temperature):
    """log p of each scored token among the words that were left, and the entropies: one row at a time."""
    found, entropies, left = [], [], iter(LEFT)
    for tree in TREES:
        for branch in tree.branches:
            logits = model(torch.tensor([[*tree.prompt, *branch.ids]])).logits[0].float() / temperature
            for slot, word in enumerate(branch.ids):
                words = next(left) or list(range(logits.shape[-1]))
                logprobs = logits[len(tree.prompt) + slot - 1][words].log_softmax(-1)
                found.append(logprobs[words.index(word)])
                entropies.append(-(logprobs.exp() * logprobs).sum())
    return torch.stack(found), torch.stack(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("padded", [False, True])
def test_numbers_and_gradients_are_those_among_the_words_alone(temperature, padded):
    model, packed = tiny_model("llama"), with_choices(pack(TREES))
    weights = [model.lm_head.weight, model.model.layers[0].self_attn.q_proj.weight]
    with rows_padded(padded):
        scores = score(model, packed, temperature=temperature, entropy_gradient=True)
    rows, slots = packed.row_S, packed.slot_S
    ours = scores.logprobs_BT[rows, slots], scores.entropy_BT[rows, slots]
    theirs = by_hand(model, temperature)
    scale = torch.linspace(0.5, 2.0, len(LEFT))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)
        slopes = [torch.autograd.grad((each * scale).sum(), weights, retain_graph=True) for each in (got, wanted)]
        for mine, hand in zip(*slopes, strict=True):
            torch.testing.assert_close(mine, hand, atol=2e-5, rtol=1e-4)
    assert ours[0][1] == 0.0  # the only word that was left


def test_whole_rows_are_as_without_choices():
    model, packed = tiny_model("gpt2"), pack(TREES)
    nothing = replace(packed, choices_SK=torch.full((len(LEFT), 1), -1, dtype=torch.int32))
    with torch.no_grad():
        whole, plain = (score(model, each, entropy=True) for each in (nothing, packed))
    torch.testing.assert_close(whole.logprobs_BT, plain.logprobs_BT, atol=2e-6, rtol=0)
    torch.testing.assert_close(whole.entropy_BT, plain.entropy_BT, atol=2e-6, rtol=0)
