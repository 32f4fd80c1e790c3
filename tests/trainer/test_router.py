"""M8: the balance loss of a mixture's routers is transformers' own on padded rows, however the rows are laid out."""

from dataclasses import replace

import pytest
import torch
import transformers as t
from conformity import CASES, build, history
from tiny_models import MIXTURE, lora, tiny_mixture, trees_of_mixtures

from trl.losses.loss_sum import LossSum
from trl.models.forward import plan_of, rows_padded
from trl.models.router import balance_weight, token_counts, with_balance
from trl.models.scoring import score

MIXTURES = {
    "mixtral": (t.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (t.Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}),
    "gpt_oss": (
        t.GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
}  # fmt: skip


def mixture(name, **more):
    kind, sizes = MIXTURES[name]
    return tiny_mixture(kind, 0.1, **{**sizes, **more})


def trees():
    return trees_of_mixtures([])


def own_balance(model, packed):
    """The model's own balance loss on padded rows with their attention mask."""
    rows = [packed.ids_N[packed.row_indices(row)] for row in range(packed.rows)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_packed_and_padded_rows_give_the_models_own_balance(name, padded):
    model, packed = mixture(name), trees()
    expected = own_balance(model, packed)
    expected.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with rows_padded(padded):
        result = with_balance(model, 0.5, lambda: LossSum(0.0 * score(model, packed).logprobs_BT.sum(), 7))
    assert plan_of(model).packed or padded
    assert result.total.item() == pytest.approx(0.5 * 7 * expected.item(), rel=1e-5)
    assert result.metrics["aux_loss"][0].item() == pytest.approx(7 * expected.item(), rel=1e-5)
    (result.total / 3.5).backward()
    routers = [key for key in gradients if "gate" in key or "router" in key]
    assert routers
    for key, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[key].grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_shared_prompt_counts_in_each_of_its_rows():
    counts = token_counts(trees()).tolist()
    assert counts == [2.0] * 8 + [1.0] * (len(counts) - 8)


def test_whether_a_model_is_balanced_and_how_much():
    model = mixture("mixtral", router_aux_loss_coef=0.02)
    assert balance_weight(model, None) == 0
    assert balance_weight(model, 0.3) == 0.3
    model.config.output_router_logits = True
    assert balance_weight(model, None) == 0.02
    assert balance_weight(model, 0.0) == 0
    dense = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**MIXTURE))
    assert balance_weight(dense, 0.1) == 0
    no_loss = t.AutoModelForCausalLM.from_config(
        t.Llama4TextConfig(**MIXTURE, num_local_experts=2, intermediate_size_mlp=24)
    )
    assert balance_weight(no_loss, None) == 0
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.1: transformers has no balance loss for Llama4ForC"):
        balance_weight(no_loss, 0.1)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Trains a case of the conformity suite on a mixture."""

    def train(case, name, **settings):
        arguments = CASES[case].arguments()
        model = mixture(name, vocab_size=100)
        with monkeypatch.context() as patch:
            patch.setitem(CASES, case, replace(CASES[case], arguments=lambda: {**arguments, "model": model}))
            trainer = build(case, tmp_path, **settings)
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize("case", ["sft", "dpo-sigmoid", "kto", "grpo"])
def test_trainers_add_the_balance(case, trained):
    """The loss of the first step grows by the coefficient times the metric, and routers learn otherwise."""
    plain, balanced = (trained(case, "qwen3_moe", router_aux_loss_coef=weight, max_steps=1) for weight in (0.0, 0.7))
    (auxiliary,) = history(balanced, "aux_loss")
    assert auxiliary > 1
    assert not history(plain, "aux_loss")
    grown = history(balanced, "loss")[0] - history(plain, "loss")[0]
    assert grown == pytest.approx(0.7 * auxiliary, abs=2e-3)
    assert balanced.args.padding_free


def test_padding_changes_nothing_and_neither_does_a_checkpointed_pass(trained):
    runs = [
        trained("sft", "mixtral", router_aux_loss_coef=0.3, **more)
        for more in ({}, {"padding_free": False}, {"gradient_checkpointing": True})
    ]
    for name in ("loss", "aux_loss", "grad_norm"):
        first, *others = [history(run, name) for run in runs]
        for other in others:
            assert other == pytest.approx(first, rel=1e-4)


def test_micro_batches_weigh_as_their_counts_do(trained):
    """A product of means: the balance of two micro-batches is not that of both, but its mean, which is logged."""
    whole = trained("sft", "mixtral", router_aux_loss_coef=0.3, max_steps=1)
    halves = trained(
        "sft", "mixtral", router_aux_loss_coef=0.3, max_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    for run in (whole, halves):
        assert history(run, "loss")[0] > 0.3 * history(run, "aux_loss")[0]
    nll = [history(run, "loss")[0] - 0.3 * history(run, "aux_loss")[0] for run in (whole, halves)]
    assert nll[1] == pytest.approx(nll[0], rel=1e-4)
    assert history(halves, "aux_loss")[0] == pytest.approx(history(whole, "aux_loss")[0], rel=0.1)


def test_an_adapter_learns_the_balance_too():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(mixture("qwen3_moe"), lora("llama"))
    packed = trees()
    result = with_balance(model, 1.0, lambda: LossSum(0.0 * score(model, packed).logprobs_BT.sum(), 1))
    assert result.total.item() == pytest.approx(own_balance(model, packed).item(), rel=1e-5)
    result.total.backward()
    assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora" in name)
