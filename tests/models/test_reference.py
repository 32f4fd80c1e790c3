"""The reference in its three forms, and that the policy is as it was afterwards."""

import pytest
import torch
from tiny_models import lora, tiny_model
from torch.testing import assert_close

from trl.models.modeling_base import create_reference_model
from trl.models.modeling_value_head import AutoModelForCausalLMWithValueHead
from trl.models.peft_support import add_adapter
from trl.models.reference import Reference
from trl.models.unwrap import below_accelerate

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model):
    output = model(input_ids=IDS)
    return output[0] if isinstance(output, tuple) else output.logits


def adapted(wrapped):
    """A policy with an adapter that is new, and no LoRA of zeros."""
    model = add_adapter(tiny_model("llama"), lora(lora_dropout=0.5))
    return AutoModelForCausalLMWithValueHead.from_pretrained(model) if wrapped else model


def test_given_model_is_frozen_and_used():
    policy, given = tiny_model("llama"), tiny_model("gpt2").train()
    reference = Reference(policy, given)
    with reference.model() as model:
        assert model is given
        assert not model.training
        assert not logits(model).requires_grad
    assert not any(parameter.requires_grad for parameter in given.parameters())


def test_a_reference_of_another_dtype_is_said(caplog):
    Reference(tiny_model("llama"), tiny_model("llama"))
    assert not caplog.messages
    Reference(tiny_model("llama"), tiny_model("llama").to(torch.bfloat16))
    (message,) = caplog.messages
    assert message.startswith("the reference is stored in torch.bfloat16 and the policy in torch.float32: by rounding")


def test_frozen_copy_keeps_the_policy_of_its_making():
    policy = tiny_model("llama").train()
    before = logits(policy).detach()
    reference = Reference(policy)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    with reference.model() as model:
        assert_close(logits(model), before)
    assert policy.training


@pytest.mark.parametrize("wrapped", [False, True])
def test_policy_without_its_adapter(wrapped):
    policy = adapted(wrapped).train()
    frozen_part = policy.get_submodule("pretrained_model" if wrapped else "base_model").base_model
    frozen_part.eval()
    training = {name: module.training for name, module in policy.named_modules()}
    asks = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    reference = Reference(policy)
    assert reference.adapter_off
    assert reference.frozen is None
    with reference.model() as model:
        assert model is policy
        assert not any(module.training for module in model.modules())
        answer = logits(model)
    assert_close(answer, logits(tiny_model("llama")))
    assert not answer.requires_grad
    assert not torch.allclose(answer, logits(policy.eval()))
    policy.train()
    frozen_part.eval()
    assert {name: module.training for name, module in policy.named_modules()} == training
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == asks


def test_policy_is_restored_after_an_error_and_stays_frozen_where_it_was():
    policy = adapted(False).train().requires_grad_(False)
    with pytest.raises(RuntimeError, match="mine"), Reference(policy).model():
        raise RuntimeError("mine")
    assert policy.training
    assert torch.is_grad_enabled()
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    assert not torch.allclose(logits(policy.eval()), logits(tiny_model("llama")))


def test_policy_below_other_wrappers():
    policy = adapted(True)
    parallel = torch.nn.DataParallel(policy)
    assert below_accelerate(parallel) is policy
    reference = Reference(parallel)
    assert reference.adapter_off
    reference = Reference(policy)
    reference.policy = parallel  # as after `accelerator.prepare`
    with reference.model() as model:
        assert model is parallel
        assert_close(logits(model), logits(tiny_model("llama")))
    compiled = torch.compile(tiny_model("llama"), backend="eager")
    assert below_accelerate(Reference(compiled).frozen) is not below_accelerate(compiled)


def test_precomputed_reference_is_no_model():
    with Reference(tiny_model("llama"), precomputed=True).model() as model:
        assert model is None


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_sync_mixes_policy_into_reference(alpha):
    policy = tiny_model("llama")
    reference = Reference(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    old = {name: parameter.clone() for name, parameter in reference.frozen.named_parameters()}
    reference.sync(alpha)
    for name, parameter in reference.frozen.named_parameters():
        assert_close(parameter, old[name] + alpha)
        assert not parameter.requires_grad
    assert_close(policy.lm_head.weight, old["lm_head.weight"] + 1.0)


def test_sync_leaves_shared_layers_alone():
    policy = tiny_model("llama")
    shared = create_reference_model(policy, num_shared_layers=1)
    reference = Reference(policy, shared)
    before = policy.model.embed_tokens.weight.clone()
    reference.sync(0.3)
    assert torch.equal(shared.model.embed_tokens.weight, before)


def test_what_cannot_be():
    policy = tiny_model("llama")
    with pytest.raises(ValueError, match="the policy itself"):
        Reference(policy, policy)
    with pytest.raises(ValueError, match="pass one of them"):
        Reference(policy, tiny_model("llama"), precomputed=True)
    with pytest.raises(ValueError, match="the policy without its adapter"):
        Reference(adapted(False)).sync(0.5)
    with pytest.raises(ValueError, match="alpha=2 is a weight"):
        Reference(policy).sync(2)
    with pytest.raises(ValueError, match="the policy has no parameter"):
        Reference(policy, tiny_model("gpt2")).sync(0.5)
