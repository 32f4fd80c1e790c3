"""Packed rows equal padded rows, on real architectures built tiny."""

import pytest
import torch
import transformers as t
from dense_masks import dense_mask

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.models.forward import padded_inputs, plan_of, rows_padded
from trl.models.scoring import CHUNK_ELEMENTS, rewards, score

COMMON = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def common(*without: str, **more):
    return {**{k: v for k, v in COMMON.items() if k not in without}, **more}


ARCHITECTURES = {
    "llama": (t.LlamaConfig, common()),
    "qwen2": (t.Qwen2Config, common()),
    "qwen3": (t.Qwen3Config, common(head_dim=8)),
    "mistral": (t.MistralConfig, common(sliding_window=4)),
    "gemma2": (
        t.Gemma2Config,
        common(head_dim=8, sliding_window=4, final_logit_softcapping=5.0, attn_logit_softcapping=3.0),
    ),
    "gemma3": (t.Gemma3TextConfig, common(head_dim=8, sliding_window=4)),
    "phi3": (t.Phi3Config, common()),
    "gpt2": (t.GPT2Config, {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": (t.GPTNeoXConfig, common("num_key_value_heads")),
    "opt": (
        t.OPTConfig,
        common("intermediate_size", "num_key_value_heads", ffn_dim=48, word_embed_proj_dim=16),
    ),
    "olmo2": (t.Olmo2Config, common()),
    "smollm3": (t.SmolLM3Config, common()),
    "granite": (t.GraniteConfig, common(logits_scaling=4.0)),
    "cohere": (t.CohereConfig, common(logit_scale=0.25)),
}
PADDED = {
    "bloom": (t.BloomConfig, {"vocab_size": 67, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neo": (
        t.GPTNeoConfig,
        {"vocab_size": 67, "hidden_size": 32, "num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 4,
         "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
}  # fmt: skip
(ARCHITECTURES if t.GPTJForCausalLM._supports_attention_backend else PADDED)["gptj"] = (  # since transformers 5.24
    t.GPTJConfig,
    {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
)


def build(config_class, fields, auto=t.AutoModelForCausalLM):
    torch.manual_seed(0)
    model = auto.from_config(config_class(**fields))
    for parameter in model.parameters():  # random enough that every path matters
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def trees():
    g = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(3, 67, (n,), generator=g).tolist()  # noqa: E731
    return [
        TokenTree(ids(6), [Branch(ids(5)), Branch(ids(3), scored=[1, 0, 1])]),
        TokenTree([], [Branch(ids(7))]),
        TokenTree(ids(4), [Branch(ids(2))]),
        TokenTree(ids(3), [Branch(ids(2)), Branch([]), Branch(ids(6))]),
    ]


def plain_logprobs(model, packed):
    """Straight from the model's own logits, a row at a time."""
    out = torch.zeros(packed.rows, packed.width)
    for row in range(packed.rows):
        ids = packed.ids_N[packed.row_indices(row)]
        logprobs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        for s in (packed.row_S == row).nonzero().flatten().tolist():
            slot = int(packed.slot_S[s])
            out[row, slot] = logprobs[packed.prompt_tokens[row] + slot - 1, packed.target_S[s]]
    return out


@pytest.mark.parametrize("name", [*ARCHITECTURES, *PADDED])
def test_packed_equals_separate_rows(name):
    model = build(*{**ARCHITECTURES, **PADDED}[name])
    packed = pack(trees())
    with torch.no_grad():
        expected = plain_logprobs(model, packed)
        together = score(model, packed).logprobs_BT
        with rows_padded(True):
            apart = score(model, packed).logprobs_BT
    assert plan_of(model).packed == (name in ARCHITECTURES)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "cohere", "opt"])
def test_gradients_equal_those_of_the_plain_model(name):
    model = build(*ARCHITECTURES[name])
    packed = pack(trees())
    weight = torch.rand(packed.rows, packed.width)
    gradients = []
    for logprobs in (plain_logprobs(model, packed), score(model, packed, temperature=1.0).logprobs_BT):
        model.zero_grad()
        (logprobs * weight).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, packed_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(packed_gradient, plain, rtol=1e-3, atol=1e-4)


def test_temperature_entropy_and_frozen_head():
    model = build(*ARCHITECTURES["gemma2"])
    packed = pack(trees())
    states = {}
    for frozen in (False, True):
        model.zero_grad()
        model.get_output_embeddings().weight.requires_grad_(not frozen)
        result = score(model, packed, temperature=0.7, entropy=True)
        result.logprobs_BT.sum().backward()
        states[frozen] = (result.logprobs_BT.detach(), result.entropy_BT, model.model.layers[0].mlp.up_proj.weight.grad)
    slow = score(model, packed, temperature=0.7, entropy_gradient=True)
    for one, other in zip(states[False], states[True], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(slow.logprobs_BT.detach(), states[False][0])
    torch.testing.assert_close(slow.entropy_BT.detach(), states[False][1])
    assert slow.entropy_BT.requires_grad


def test_gradient_checkpointing_holds():
    model = build(*ARCHITECTURES["llama"]).train()
    packed = pack(trees())
    norms = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        score(model, packed).logprobs_BT.sum().backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]))
    torch.testing.assert_close(norms[0], norms[1])


def test_the_model_computes_what_it_did_before():
    model = build(*ARCHITECTURES["qwen2"])
    inputs = padded_inputs(pack(trees()))
    with torch.no_grad():
        before = model(**inputs).logits
        score(model, pack(trees()))
        after = model(**inputs).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_rewards_are_read_at_the_last_token(name):
    config_class, fields = ARCHITECTURES[name]
    fields = {**fields, "num_labels": 1, "pad_token_id": 0}
    model = build(config_class, fields, t.AutoModelForSequenceClassification)
    packed = pack(trees())
    with torch.no_grad():
        got = rewards(model, packed)
        expected = [
            model(input_ids=packed.ids_N[packed.row_indices(row)][None]).logits[0, 0] for row in range(packed.rows)
        ]
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder(name):
    small = {"vocab_size": 67, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = {
        "t5": lambda: t.T5Config(**small, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "bart": lambda: t.BartConfig(
            **small, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=48, decoder_ffn_dim=48, bos_token_id=2, forced_eos_token_id=1,
        ),
    }[name]()  # fmt: skip
    model = t.AutoModelForSeq2SeqLM.from_config(config).eval()
    packed = pack([tree for tree in trees() if tree.prompt and all(b.ids for b in tree.branches)])
    with torch.no_grad():
        got = score(model, packed).logprobs_BT
        for row in range(packed.rows):
            ids = packed.ids_N[packed.row_indices(row)]
            prompt, answer = ids[: packed.prompt_tokens[row]], ids[packed.prompt_tokens[row] :]
            logits = model(input_ids=prompt[None], labels=answer[None]).logits[0].log_softmax(-1)
            expected = logits.gather(1, answer[:, None]).squeeze(1) * packed.mask_BT[row, : len(answer)]
            torch.testing.assert_close(got[row, : len(answer)], expected, rtol=0, atol=1e-5)


def test_dense_mask_is_the_rule():
    segments = pack([TokenTree([5, 6], [Branch([7]), Branch([8, 9])])]).segments
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert dense_mask(segments).int().tolist() == expected


def test_large_vocabulary_stays_in_chunks():
    assert CHUNK_ELEMENTS * 4 <= 32 * 2**20
