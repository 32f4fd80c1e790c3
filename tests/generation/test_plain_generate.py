import pytest
import torch
import transformers as t
from tokenizers_for_tests import word_tokenizer

from trl.generation.generate_kwargs import asked_end_tokens
from trl.generation.plain_generate import generate_padded, padded_pair, plain_generate
from trl.generation.stopping import end_tokens, until_end

QUERIES = [torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([11, 12])]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1, "forced_eos_token_id": None}


def bart():
    torch.manual_seed(0)
    size = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    more = {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.5}
    return t.BartForConditionalGeneration(t.BartConfig(vocab_size=100, **size, **more, **ends)).eval()


def test_an_encoder_reads_a_query_in_a_batch_as_it_reads_it_alone():
    model, tokenizer = bart(), word_tokenizer()
    together = generate_padded(model, tokenizer, QUERIES, GREEDY)
    alone = [generate_padded(model, tokenizer, [query], GREEDY)[0] for query in QUERIES]
    assert [ids.tolist() for ids in together] == [ids.tolist() for ids in alone]
    assert [int(ids[0]) for ids in together] == [2, 2]  # the start token
    without_start = plain_generate(model, tokenizer, QUERIES, GREEDY, (), batch_size=1)
    assert [ids.tolist() for ids in without_start] == [ids[1:].tolist() for ids in together]


@pytest.mark.parametrize("generate", [generate_padded, plain_generate])
def test_only_one_response_for_each_query(generate):
    further = [()] if generate is plain_generate else []
    with pytest.raises(ValueError, match="num_return_sequences"):
        generate(bart(), word_tokenizer(), QUERIES, {"num_return_sequences": 2}, *further)


@pytest.mark.parametrize(
    ("side", "multiple", "ids", "mask"),
    [
        ("left", None, [[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]]),
        ("right", None, [[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
        ("left", 4, [[9, 1, 2, 3], [9, 9, 9, 4]], [[0, 1, 1, 1], [0, 0, 0, 1]]),
        ("right", 4, [[1, 2, 3, 9], [4, 9, 9, 9]], [[1, 1, 1, 0], [1, 0, 0, 0]]),
    ],
)
def test_padding(side, multiple, ids, mask):
    pair = padded_pair([torch.tensor([1, 2, 3]), torch.tensor([4])], 9, side, multiple)
    assert [each.tolist() for each in pair] == [ids, mask]


@pytest.mark.parametrize(
    ("ends", "cut"), [((7,), [5, 6, 7]), ((9, 6), [5, 6]), ((), [5, 6, 7, 7]), ((5,), [5]), ((8,), [5, 6, 7, 7])]
)
def test_until_the_first_end_token(ends, cut):
    assert until_end(torch.tensor([5, 6, 7, 7]), ends).tolist() == cut


@pytest.mark.parametrize(
    ("keywords", "asked"),
    [
        ({}, None),
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": None}, ()),
        ({"eos_token_id": -1}, ()),
        ({"generation_config": t.GenerationConfig(eos_token_id=7)}, (7,)),
        ({"generation_config": t.GenerationConfig(eos_token_id=7), "eos_token_id": 8}, (8,)),
        ({"generation_config": t.GenerationConfig()}, None),
    ],
)
def test_end_tokens_that_keywords_name(keywords, asked):
    assert asked_end_tokens(keywords) == asked


def test_end_tokens_of_the_model_and_the_tokenizer():
    model, tokenizer = bart(), word_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(9)
    assert end_tokens(model, tokenizer) == (2, 9)
    assert end_tokens(model, tokenizer, (3,)) == (3,)
    assert end_tokens(model, tokenizer, ()) == ()
