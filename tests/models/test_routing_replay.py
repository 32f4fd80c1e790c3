"""Routing replay (R3): tokens go to the experts that an engine's mixture took, by gates of the trainer's own."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers as t
from tiny_models import tiny_mixture, tiny_model, trees_of_mixtures
from torch import nn

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.models.forward import rows_padded, watched_routers
from trl.models.router import routers_of
from trl.models.scoring import score

MIXTURES = {
    "mixtral": (t.MixtralConfig, {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        t.Qwen3MoeConfig,
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True},
    ),
    "olmoe": (t.OlmoeConfig, {"num_experts": 6, "num_experts_per_tok": 2, "eos_token_id": 1}),
    "gpt_oss": (
        t.GptOssConfig,
        {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 6,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "deepseek_v3": (
        t.DeepseekV3Config,
        {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "moe_intermediate_size": 12,
         "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
         "v_head_dim": 8, "n_shared_experts": 1},
    ),
}  # fmt: skip


def mixture(name, **more):
    kind, sizes = MIXTURES[name]
    return tiny_mixture(kind, 0.3, **{**sizes, **more})


def trees():
    return trees_of_mixtures([7, 20])


@contextmanager
def recorded(model, found):
    """What the last `topk` of each router gives, layer after layer, for each pass."""
    own = torch.topk

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func in (torch.topk, torch.Tensor.topk) and args[0].shape[-1] == 6:
                found.append(result[1].detach().clone())
            return result

    assert own is torch.topk
    with Watch():
        yield


def choices_of(model, packed):
    """The experts of each packed token, by a packed pass. [N, L, C]"""
    routers_of(model)  # what probes the model is not recorded
    score(model, packed)
    found = []
    with torch.no_grad(), recorded(model, found):
        score(model, replace(packed, experts_NLC=no_choice(packed)))  # the last layer sees all tokens then
    return torch.stack([each.view(-1, 2) for each in found[-2:]], 1).to(torch.int16)


def no_choice(packed, layers=2):
    return torch.full((len(packed.ids_N), layers, 2), -1, dtype=torch.int16)


def logprobs(model, packed, experts_NLC=None):
    return score(model, replace(packed, experts_NLC=experts_NLC)).logprobs_BT


@pytest.mark.parametrize("name", list(MIXTURES))
def test_own_choices_replayed_change_no_bit(name):
    model, packed = mixture(name), trees()
    found = choices_of(model, packed)
    with torch.no_grad():
        own, again = logprobs(model, packed, no_choice(packed)), logprobs(model, packed, found)
        assert torch.equal(own, again)
        torch.testing.assert_close(again, logprobs(model, packed), atol=1e-6, rtol=0)
        with rows_padded(True):
            torch.testing.assert_close(logprobs(model, packed, found), again, atol=1e-5, rtol=0)
    assert not torch.equal(found[:, 0], found[:, 1])


def other_choices(packed, layers=2):
    """Two different experts of six for each token and layer."""
    torch.manual_seed(3)
    return torch.rand(len(packed.ids_N), layers, 6).argsort(-1)[..., :2].to(torch.int16)


def forced_forward(module, normed, experts_NC, states):
    """A router of Qwen3 or Mixtral written by hand, whose choices are given."""
    logits = states.reshape(-1, states.shape[-1]) @ module.weight.t()
    gates = logits.softmax(-1)[torch.arange(len(logits))[:, None], experts_NC]
    return logits, gates / gates.sum(-1, keepdim=True) if normed else gates, experts_NC


@pytest.mark.parametrize(("name", "normed"), [("mixtral", True), ("qwen3_moe", True), ("olmoe", False)])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_given_choices_are_those_of_a_router_that_makes_them(name, normed, checkpoints):
    """Numbers and gradients, the router's too, also where the backward pass computes the layers again."""
    model, packed = mixture(name), trees()
    experts = other_choices(packed)
    by_hand = mixture(name)
    logprobs(by_hand, packed)
    routers = [each.module for each in routers_of(by_hand)]
    for layer, module in enumerate(routers):
        module.forward = partial(forced_forward, module, normed, experts[:, layer].long())
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    weights = [layer.mlp.gate.weight for layer in model.model.layers]
    got = torch.autograd.grad(logprobs(model, packed, experts).sum(), weights)
    with torch.no_grad():
        logprobs(model, packed)  # another pass in between changes nothing
    with watched_routers([]):  # the last layer sees all tokens
        expected = logprobs(by_hand, packed)
    wanted = torch.autograd.grad(expected.sum(), [module.weight for module in routers])
    with torch.no_grad():
        torch.testing.assert_close(logprobs(model, packed, experts), expected, atol=2e-6, rtol=0)
        assert (logprobs(model, packed) - expected).abs().max() > 0.01
    for ours, theirs in zip(got, wanted, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_padded_rows_and_single_tokens():
    """Half of the tokens go where they are told; whether rows are packed or padded does not matter."""
    model, packed = mixture("qwen3_moe"), trees()
    experts = other_choices(packed)
    experts[::2] = -1
    with torch.no_grad():
        got = logprobs(model, packed, experts)
        with rows_padded(True):
            torch.testing.assert_close(logprobs(model, packed, experts), got, atol=1e-5, rtol=0)
        both = logprobs(model, packed, other_choices(packed)), logprobs(model, packed)
    assert min((got - each).abs().max() for each in both) > 0.01


def test_an_engine_may_name_the_layers_without_a_router_too():
    model, packed = mixture("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1]), trees()
    assert [router.layer for router in routers_of(model)] == [0, 2]
    experts = other_choices(packed, layers=3)
    with torch.no_grad():
        whole, without = logprobs(model, packed, experts), logprobs(model, packed, experts[:, [0, 2]])
    assert torch.equal(whole, without)


def test_a_copy_of_the_model_is_told_nothing():
    model, packed = mixture("mixtral"), trees()
    with torch.no_grad():
        before = logprobs(model, packed)
        logprobs(model, packed, other_choices(packed))
        assert torch.equal(logprobs(copy.deepcopy(model), packed), before)
        assert torch.equal(logprobs(model, packed), before)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (lambda: tiny_model("llama"), lambda x: x, "LlamaForCausalLM has no router"),
        (lambda: mixture("mixtral"), lambda x: x[..., :1], "1 experts a token were given, MixtralForCausalLM takes 2"),
        (lambda: mixture("mixtral"), lambda x: x + 1, "expert 6 was given, MixtralForCausalLM has 6"),
        (lambda: mixture("mixtral"), lambda x: x[:, :1], "experts of 1 layers were given, MixtralForCausalLM has 2"),
    ],
)
def test_what_cannot_be_replayed_is_said(make, change, message):
    packed = trees()
    with pytest.raises(ValueError, match=message), torch.no_grad():
        logprobs(make(), packed, change(other_choices(packed)))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_replay_takes_away_what_other_routing_costs(name):
    """An engine whose routers are off, as by rounding: its choices replayed leave only its other gates."""
    model, engine = mixture(name), mixture(name)
    torch.manual_seed(5)
    rows = torch.randint(3, 60, (12, 40))
    packed = pack([TokenTree(row[:4], [Branch(row[4:])]) for row in rows])
    with torch.no_grad():
        for layer in engine.model.layers:
            layer.mlp.gate.weight.add_(0.01 * torch.randn_like(layer.mlp.gate.weight))
        experts, own = choices_of(engine, packed), choices_of(model, packed)
        theirs = logprobs(engine, packed)
        off, on = ((logprobs(model, packed, each) - theirs).abs().mean() for each in (None, experts))
    moved = (experts.sort(-1).values != own.sort(-1).values).any(-1).float().mean()
    print(moved, on, off)
    assert 0.001 < moved < 0.1
    assert on < 0.5 * off


def test_linear_layers_alone_have_no_router():
    assert isinstance(tiny_model("llama").lm_head, nn.Linear)
    assert routers_of(tiny_model("llama")) == []


def test_routers_are_found_beside_a_module_that_holds_nothing():
    """An empty `nn.Sequential` is false, and hands on what it is given."""
    model = mixture("mixtral")
    model.model.norm = nn.Sequential()
    assert [router.experts for router in routers_of(model)] == [6, 6]
