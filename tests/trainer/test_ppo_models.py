"""PPO on every kind of model, and what it generates with it."""

import weakref

import numpy as np
import pytest
import torch
import transformers as t
from ppo_cases import COMMON, SAMPLING, batch, causal, gpt2, lora, maker
from tiny_models import tiny_model

from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from trl.core import LengthSampler
from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.models import create_reference_model
from trl.models.forward import dropout_rates
from trl.models.prepare import enable_gradient_checkpointing
from trl.models.scoring import score

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")


@pytest.fixture
def make(tiny_tokenizer):
    return maker(tiny_tokenizer)


# --- models --------------------------------------------------------------------------------------------------------


def test_adapter_off_is_the_reference(make):
    trainer = make(causal(peft_config=lora(lora_dropout=0.3)), learning_rate=0.05)
    assert trainer.ref_model is None
    inner = trainer.model.pretrained_model
    frozen = {name: p.clone() for name, p in inner.named_parameters() if "lora" not in name}
    first = trainer.step(*batch())
    second = trainer.step(*batch())
    assert abs(first["objective/kl"]) < 1e-5 < abs(second["objective/kl"])
    assert first["objective/ref_logprobs"] == pytest.approx(second["objective/ref_logprobs"], abs=1e-5)
    assert all(torch.equal(p, frozen[name]) for name, p in inner.named_parameters() if "lora" not in name)
    assert all(p.requires_grad for name, p in inner.named_parameters() if "lora" in name)


def test_shared_layers_are_shared_and_frozen(make):
    model = gpt2()
    trainer = make(model, num_shared_layers=2)
    assert (
        trainer.ref_model.pretrained_model.transformer.h[0].ln_1.weight
        is model.pretrained_model.transformer.h[0].ln_1.weight
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.step(*batch())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert not any(".h.0." in name or ".h.1." in name or "wte" in name for name in moved)
    with pytest.warns(UserWarning, match="num_shared_layers is ignored"):
        make(model, ref_model=create_reference_model(model), num_shared_layers=2)
    with pytest.raises(ValueError, match="num_shared_layers=1"):
        make(causal(peft_config=lora()), num_shared_layers=1)


def test_only_one_response_for_each_query(make):
    with pytest.raises(ValueError, match="num_return_sequences: one response for each query"):
        make().generate(batch()[0], num_return_sequences=2)


# --- what a pass computes --------------------------------------------------------------------------------------------


def test_the_value_head_runs_where_values_are_read(make):
    """Once for the samples before the update, once for each of two minibatches; the reference has no say in values."""
    trainer, calls = make(causal(), mini_batch_size=2, ppo_epochs=1), []
    trainer.step(*batch())  # the probe
    for model in (trainer.model, trainer.ref_model):
        model.v_head.register_forward_hook(lambda *call: calls.append(1))
    trainer.step(*batch(seed=2))
    assert len(calls) <= 3


def test_a_pass_keeps_no_layers_states(make):
    """The states that reach a layer are gone when the head is computed: nobody asked for them."""
    trainer = make(causal(num_hidden_layers=4))
    network, states, alive = trainer.model.pretrained_model, [], []
    trainer.step(*batch())
    for layer in network.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: states.append(weakref.ref(output)))
    network.lm_head.register_forward_pre_hook(
        lambda module, inputs: alive.append(sum(state() is not None for state in states))
    )
    packed = pack([TokenTree([5, 6, 7], [Branch([8, 9])])])
    with torch.no_grad():
        assert score(trainer.model, packed, values=True).values_BT is not None
    assert len(states) == 4
    assert alive == [0]


def seq2seq():
    torch.manual_seed(0)
    config = t.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
                        eos_token_id=2, decoder_start_token_id=0)  # fmt: skip
    return AutoModelForSeq2SeqLMWithValueHead.from_pretrained(t.AutoModelForSeq2SeqLM.from_config(config))


def test_encoder_decoder(make):
    trainer = make(seq2seq(), learning_rate=1e-2)
    queries, _, scores = batch()
    responses = trainer.generate(queries, **SAMPLING)
    assert all(int(row[0]) == 0 for row in responses)
    stats = trainer.step(queries, responses, scores)
    assert stats["ppo/policy/advantages"].shape == (sum(len(row) - 1 for row in responses),)
    inputs = trainer.prepare_model_inputs(queries, responses)
    assert set(inputs) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    logprobs, _, values, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    assert logprobs.shape == values.shape == mask.shape
    assert mask.sum(1).tolist() == [len(row) - 2 for row in responses]  # from the second prediction on, as in the seed


def test_padded_architecture(make):
    torch.manual_seed(0)
    config = t.BloomConfig(
        vocab_size=100, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(t.AutoModelForCausalLM.from_config(config))
    stats = make(model).step(*batch())
    assert np.isfinite(stats["ppo/loss/total"])


@pytest.mark.filterwarnings("ignore:[0-9,]+ trained weights are stored in bfloat16")
def test_bfloat16(make):
    model = causal()
    model.pretrained_model.to(torch.bfloat16)
    trainer = make(model, gradient_accumulation_steps=2)
    queries, _, scores = batch()
    responses = trainer.generate(queries, return_prompt=False, **SAMPLING)
    stats = trainer.step(queries, responses, scores)
    assert np.isfinite(stats["ppo/loss/total"])


def test_separate_value_model(make):
    torch.manual_seed(3)
    critic = t.AutoModelForSequenceClassification.from_config(t.LlamaConfig(**COMMON, num_labels=1))
    before = critic.score.weight.clone()
    model = causal()
    trainer = make(model, value_model=critic)
    stats = trainer.step(*batch())
    assert np.isfinite(stats["ppo/loss/value"])
    assert not torch.equal(critic.score.weight, before)
    assert model.v_head.summary.weight.grad is None
    other = causal()
    with pytest.raises(ValueError, match="it holds no parameter of the `value_model`"):
        make(other, value_model=critic, optimizer=torch.optim.Adam(other.parameters()))
    with pytest.raises(ValueError, match="has no score head"):
        make(causal(), value_model=causal().pretrained_model)


# --- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "bart", "t5"])
def test_checkpointed_layers_that_hold_their_dropout_as_a_number(name, make):
    """They stay in training mode while the policy is measured and updated, and must not drop anything."""
    rates = {"dropout_rate": 0.3} if name == "t5" else {"dropout": 0.3, "attention_dropout": 0.3}
    wrapper = AutoModelForCausalLMWithValueHead if name == "opt" else AutoModelForSeq2SeqLMWithValueHead
    found = []
    for checkpointing in (False, True):
        model = tiny_model(name, vocab_size=1000, **rates)
        if checkpointing:
            enable_gradient_checkpointing(model)
        torch.manual_seed(0)
        trainer = make(wrapper.from_pretrained(model))
        held = [dropout_rates(module) for module in trainer.model.modules()]
        np.random.seed(0)
        found.append(trainer.step(*batch()))
        assert [dropout_rates(module) for module in trainer.model.modules()] == held
    for key in ("ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy"):
        assert found[1][key] == pytest.approx(found[0][key], abs=1e-4)


def test_generate_shapes(make):
    trainer = make()
    queries, *_ = batch()
    single = trainer.generate(queries[0], **SAMPLING)
    assert single.shape == (1, len(queries[0]) + 5) or int(single[0, -1]) == 2
    assert trainer.generate(queries[0], return_prompt=False, **SAMPLING).shape[1] <= 5
    rows = trainer.generate(queries, **SAMPLING)
    assert all(torch.equal(row[: len(query)], query) for row, query in zip(rows, queries, strict=True))
    pair = trainer.generate(queries, generate_ref_response=True, return_prompt=False, max_new_tokens=4)
    assert [row.tolist() for row in pair[0]] == [row.tolist() for row in pair[1]]  # greedy, and still the same model
    with pytest.raises(ValueError, match=r"query_tensor must be a tensor of shape \(`seq_len`\)"):
        trainer.generate(torch.ones(2, 3, dtype=torch.long))


def test_generate_greedy_equals_transformers(make):
    trainer = make()
    queries, *_ = batch()
    rows = trainer.generate(queries, batch_size=3, max_new_tokens=6, do_sample=False)
    for row, query in zip(rows, queries, strict=True):
        alone = trainer.model.generate(query[None], max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        assert row.tolist() == alone.tolist()


def test_generate_ends_at_eos_but_not_in_the_prompt(make):
    trainer = make()
    query = torch.tensor([5, 2, 6, 7])
    rows = trainer.generate([query, query[:2]], max_new_tokens=30, do_sample=True, top_k=0, top_p=1.0)
    assert rows[0][:4].tolist() == query.tolist()
    for row, prompt in zip(rows, (4, 2), strict=True):
        assert (row[prompt:-1] != 2).all()


def test_length_sampler(make):
    trainer = make()
    queries, *_ = batch()
    rows = trainer.generate(queries, length_sampler=LengthSampler(3, 4), return_prompt=False, do_sample=True, top_k=0)
    assert all(len(row) == 3 or int(row[-1]) == 2 for row in rows)
