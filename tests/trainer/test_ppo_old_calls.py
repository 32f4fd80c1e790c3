"""PPOTrainer as old scripts call it: graphs, shapes, masks, ends that never come, what `generate` may return."""

import pytest
import torch
from ppo_cases import SAMPLING, batch, maker

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")


@pytest.fixture
def make(tiny_tokenizer):
    return maker(tiny_tokenizer)


def test_scores_with_graphs_and_rows_of_shape_1_l_are_the_same_batch(make):
    """L14"""
    queries, responses, scores = batch()
    weight = torch.nn.Parameter(torch.ones(()))
    plain = make(mini_batch_size=1).step(queries, responses, scores)
    other = make(mini_batch_size=1)
    stats = other.step([q[None] for q in queries], [r[None] for r in responses], [weight * score for score in scores])
    assert stats["ppo/loss/total"] == plain["ppo/loss/total"]
    assert weight.grad is None


@pytest.mark.parametrize("score", [1e30, -1e20, 3e38])
def test_scores_whose_square_is_no_float32_are_refused(make, score):
    """R5"""
    queries, responses, scores = batch()
    with pytest.raises(ValueError, match=r"scores\[1\]=.*: its square is no number in float32"):
        make().step(queries, responses, [scores[0], torch.tensor(score), *scores[2:]])


def test_an_attention_mask_hides_padding(make):
    """L14"""
    trainer, queries = make(), batch()[0][:2]
    greedy = {"max_new_tokens": 4, "return_prompt": False, "do_sample": False}
    plain = trainer.generate(queries, **greedy)
    padded = [torch.cat([torch.zeros(2, dtype=torch.long), query]) for query in queries]
    masks = [(torch.arange(len(query)) >= 2).long() for query in padded]
    for asked in ({}, {"attention_mask": [torch.ones_like(query) for query in queries]}):
        assert all(map(torch.equal, trainer.generate(queries, **asked, **greedy), plain))
    assert all(map(torch.equal, trainer.generate(padded, attention_mask=masks, **greedy), plain))
    one = trainer.generate(padded[0], attention_mask=masks[0][None], **greedy)
    assert torch.equal(one[0], plain[0])
    with pytest.raises(ValueError, match=r"attention_mask: \[9\] places for queries of"):
        trainer.generate(queries[0], attention_mask=torch.ones(1, 9), **greedy)


@pytest.mark.parametrize("least", [0, 2, 5])
def test_an_end_token_that_never_comes(make, least):
    """L14"""
    made = make().generate(batch()[0], return_prompt=False, eos_token_id=100_000, min_new_tokens=least, **SAMPLING)
    assert [len(response) for response in made] == [5] * len(made)


@pytest.mark.parametrize("name", ["return_dict_in_generate", "output_scores", "output_hidden_states"])
def test_what_asks_for_more_than_tokens_is_refused_by_name(make, name):
    """L14"""
    with pytest.raises(ValueError, match=f"{name}: `generate` of the trainer returns the responses' tokens"):
        make().generate(batch()[0], **{name: True}, **SAMPLING)
    assert make().generate(batch()[0], **{name: False}, **SAMPLING)
