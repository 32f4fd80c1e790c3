"""Weights that `save_pretrained` writes under other names than the model has come back when a run goes on."""

import copy
from dataclasses import replace

import pytest
import torch
from conformity import CASES, build, config, history, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from trl.models.weight_files import as_in_model, reads_saved_form
from trl.trainer.resharding import _model_state

SIZES = {"num_experts_per_tok": 2, "num_hidden_layers": 1}
KINDS = {
    "mixtral": MixtralConfig(**config().to_diff_dict() | SIZES | {"num_local_experts": 3, "model_type": "mixtral"}),
    "qwen3_moe": Qwen3MoeConfig(
        **config().to_diff_dict() | SIZES | {"num_experts": 3, "moe_intermediate_size": 8, "model_type": "qwen3_moe"}
    ),
}
each = pytest.mark.parametrize("kind", KINDS)


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(KINDS[kind])


def case(kind):
    return replace(CASES["sft"], model=lambda: model_of(kind))


@each
def test_a_resumed_run_goes_on_with_the_saved_weights(kind, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(case(kind), tmp_path, **settings)
    whole.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() - weights(whole).keys(), "the names are the same now: this test needs another model"
    resumed = build(case(kind), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(resumed, "loss")[-2:] == history(whole, "loss")[2:]
    got = weights(resumed)
    assert all(torch.equal(value, got[name]) for name, value in weights(whole).items())


def test_the_best_model_is_that_of_its_checkpoint(tmp_path):
    """A rate at which the second step spoils what the first has learned."""
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.5, "seed": 3}
    first = build(case("mixtral"), tmp_path / "first", max_steps=1, learning_rate=0.5)
    first.train()
    best = build(
        case("mixtral"), tmp_path / "both", load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="loss", max_steps=2, **settings,
    )  # fmt: skip
    best.train()
    assert best.state.best_global_step == 1
    got = weights(best)
    assert all(torch.equal(value, got[name]) for name, value in weights(first).items())


@each
def test_a_state_of_saved_names_is_read_and_others_are_left_alone(kind, tmp_path):
    model, other = model_of(kind), model_of(kind, seed=1)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    reads_saved_form(other)
    copied = copy.deepcopy(other)
    for own in (other, copied):
        assert own.load_state_dict(dict(saved), strict=True).missing_keys == []
        assert all(torch.equal(value, expected[name]) for name, value in own.state_dict().items())
    assert as_in_model(model, expected) is expected
    with pytest.raises(RuntimeError, match=r"Unexpected key.*neither"):
        other.load_state_dict({**saved, "neither": torch.ones(1)})
    assert all(torch.equal(value, expected[name]) for name, value in _model_state(tmp_path, model_of(kind, 1)).items())


def test_weights_of_two_precisions_keep_both(tmp_path):
    model, other = model_of("mixtral").bfloat16(), model_of("mixtral", seed=1).bfloat16()
    for own in (model, other):
        own.lm_head.float()
    model.save_pretrained(tmp_path)
    reads_saved_form(other)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert other.lm_head.weight.dtype == torch.float32
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
