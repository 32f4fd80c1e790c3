import pytest
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from trl.generation.generate_kwargs import sampling_params
from trl.generation.sampler import SamplingParams


@pytest.fixture
def model():
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, eos_token_id=2, bos_token_id=1, pad_token_id=0, **size))


SEED = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("asked", "params"),
    [
        ({}, SamplingParams(20, temperature=0, stop_token_ids=(2,))),
        ({"do_sample": True}, SamplingParams(20, top_k=50, stop_token_ids=(2,))),
        ({**SEED, "max_new_tokens": 32}, SamplingParams(32, stop_token_ids=(2,))),
        ({**SEED, "eos_token_id": -1}, SamplingParams(20, stop_token_ids=())),
        ({**SEED, "eos_token_id": None}, SamplingParams(20, stop_token_ids=())),
        ({**SEED, "eos_token_id": [2, 5]}, SamplingParams(20, stop_token_ids=(2, 5))),
        ({**SEED, "temperature": 0.7, "top_p": 0.9}, SamplingParams(20, 0.7, top_p=0.9, stop_token_ids=(2,))),
        ({"do_sample": False, "top_p": 0.9}, SamplingParams(20, temperature=0, stop_token_ids=(2,))),
        ({"num_beams": 1, "use_cache": True}, SamplingParams(20, temperature=0, stop_token_ids=(2,))),
        (
            {"generation_config": GenerationConfig(do_sample=True, top_k=3, eos_token_id=7), "max_new_tokens": 4},
            SamplingParams(4, top_k=3, stop_token_ids=(7,)),
        ),
    ],
)  # fmt: skip
def test_means_the_same(model, asked, params):
    assert sampling_params(model, asked) == params


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 2}, {"max_length": 30}, {"min_length": 3}, {"logits_processor": [object()]}, {"typical_p": 0.9},
        {"bad_words_ids": [[3]]}, {"penalty_alpha": 0.5}, {"do_sample": True, "temperature": 0.0},
    ],
)  # fmt: skip
def test_what_only_generate_can_do(model, asked):
    assert sampling_params(model, asked) is None


def test_the_models_own_settings_apply(model):
    model.generation_config.update(do_sample=True, temperature=0.5, max_new_tokens=7)
    assert sampling_params(model, {"top_k": 0}) == SamplingParams(7, temperature=0.5, stop_token_ids=(2,))
    model.generation_config.max_length = 30
    assert sampling_params(model, {}) is None


def test_stop_strings_and_seed_are_passed_on(model):
    params = sampling_params(model, {}, stop_strings=["<call>"], seed=(1, 2))
    assert params is not None
    assert (params.stop_strings, params.seed) == (("<call>",), (1, 2))
