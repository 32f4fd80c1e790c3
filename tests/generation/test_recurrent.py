"""Recurrent models: `generate` computes a row as it would alone, whatever the model's state does with padding."""

import logging
import math

import pytest
import tiny_recurrent
import torch
from datasets import Dataset
from tokenizers_for_tests import word_tokenizer

import trl
from trl.generation import make_sampler
from trl.generation.plain_generate import generate_padded
from trl.generation.probe import generates
from trl.generation.sampler import SamplingParams

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 9, 8, 11], [12], [4, 4, 3]]
BEARS = {"rwkv": (False, False), "recurrent_gemma": (False, True)}
"""the others are (True, True): behind padding, with the cache"""


def alone(model, prompt, ids):
    """The log-probabilities of a completion by one pass over its row."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    return logits[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("name", tiny_recurrent.CONFIGS)
def test_sampled_log_probabilities_are_the_models_own(name, caplog):
    """L7: prompts of several lengths, several copies."""
    model = tiny_recurrent.model(name)
    with caplog.at_level(logging.WARNING, "trl.generation"):
        sampler = make_sampler(model)
        drawn = sampler.sample(PROMPTS, SamplingParams(max_new_tokens=6, seed=3, stop_token_ids=()), n=2)
    found = generates(model)
    assert (found.behind_padding, found.with_cache) == BEARS.get(name, (True, True))
    assert any("prompts of one length run together" in each.message for each in caplog.records) == (name in BEARS)
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        for completion in group:
            assert completion.logprobs == pytest.approx(alone(model, prompt, completion.ids), abs=2e-5)


@pytest.mark.parametrize("name", BEARS)
def test_a_model_that_was_never_trained_is_told_too(name):
    """Its padding token may have no meaning yet, and its biases are 0."""
    found = generates(tiny_recurrent.model(name, moved=0.0))
    assert (found.behind_padding, found.with_cache) == BEARS[name]


@pytest.mark.parametrize("name", [*BEARS, "jamba"])
def test_queries_of_several_lengths_are_answered_as_one_by_one(name):
    model, tokenizer = tiny_recurrent.model(name), word_tokenizer()
    queries = [torch.tensor(ids) for ids in PROMPTS]
    asked = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1, "eos_token_id": -1}
    together = generate_padded(model, tokenizer, queries, asked, pad_to_multiple_of=8)
    apart = [generate_padded(model, tokenizer, [query], asked)[0] for query in queries]
    assert [row.tolist() for row in together] == [row.tolist() for row in apart]
    beams = {**asked, "num_beams": 2, "num_return_sequences": 2, "use_cache": False}
    several = generate_padded(model, tokenizer, queries, beams, several=True)
    expected = [row for query in queries for row in generate_padded(model, tokenizer, [query], beams, several=True)]
    assert [row.tolist() for row in several] == [row.tolist() for row in expected]


PROMPT_ROWS = Dataset.from_dict({"prompt": ["a b", "c d e f g h i j k l", "x", "k l m n o"]})


@pytest.mark.parametrize("name", [*BEARS, "mamba"])
def test_the_first_ratio_is_one(name, tmp_path):
    config = trl.GRPOConfig(
        str(tmp_path), per_device_train_batch_size=8, num_generations=2, max_completion_length=5, max_steps=1,
        logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, beta=0.1,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        tiny_recurrent.model(name), lambda completion_ids, **columns: [float(len(ids) % 3) for ids in completion_ids],
        config, PROMPT_ROWS, processing_class=word_tokenizer(),
    )  # fmt: skip
    trainer.train()
    (logged,) = [row for row in trainer.state.log_history if "ratio" in row]
    assert logged["ratio"] == pytest.approx(1, abs=1e-5)
    assert logged["approx_kl"] < 1e-8


@pytest.mark.filterwarnings("ignore:No dataset is provided")
@pytest.mark.parametrize("name", [*BEARS, "bamba"])
def test_ppo_steps(name):
    tokenizer, model = (
        word_tokenizer(),
        trl.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_recurrent.model(name)),
    )
    config = trl.PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1, accelerator_kwargs={"cpu": True})
    trainer = trl.PPOTrainer(config, model, tokenizer=tokenizer)
    queries = [torch.tensor(tokenizer(text)["input_ids"]) for text in PROMPT_ROWS["prompt"]]
    answers = trainer.generate(queries, return_prompt=False, max_new_tokens=5, do_sample=True, eos_token_id=-1)
    stats = trainer.step(queries, answers, [torch.tensor(float(row)) for row in range(4)])
    assert math.isfinite(stats["ppo/loss/total"])
    assert float(stats["objective/kl"]) == pytest.approx(0, abs=1e-4)


def test_the_value_head_reads_the_states_of_a_head_by_another_name():
    inner = tiny_recurrent.model("rwkv")
    model = trl.AutoModelForCausalLMWithValueHead.from_pretrained(inner).eval()
    with torch.no_grad():
        _, _, values_BT = model(torch.tensor([PROMPTS[0]]))
        states = inner.rwkv(torch.tensor([PROMPTS[0]])).last_hidden_state
        torch.testing.assert_close(values_BT, model.v_head(states).squeeze(-1))
