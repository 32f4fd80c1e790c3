"""Packed rows give what each row alone gives: mixtures, chunked attention, each kind of adapter; or rows are padded."""

import peft
import pytest
import torch
import transformers as t

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.generation import make_sampler
from trl.generation.sampler import SamplingParams
from trl.models.forward import plan_of
from trl.models.scoring import score

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": (t.LlamaConfig, {}),
    "llama4": (
        t.Llama4TextConfig,
        {"attention_chunk_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
         "intermediate_size_mlp": 24},
    ),
    "qwen3_moe": (t.Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}),
    "gpt_oss": (
        t.GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
}  # fmt: skip
TASK = {"task_type": "CAUSAL_LM"}
LORA = {**TASK, "r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
ADAPTERS = {
    "none": lambda: None,
    "lora": lambda: peft.LoraConfig(**LORA),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "alora": lambda: peft.LoraConfig(**LORA, alora_invocation_tokens=[11, 12]),
    "prompt": lambda: peft.PromptTuningConfig(**TASK, num_virtual_tokens=5),
    "prefix": lambda: peft.PrefixTuningConfig(**TASK, num_virtual_tokens=5),
}
PACKED = {"none", "lora", "dora"}
"""adapters that see each token alone: their rows are packed, except where a row is longer than a chunk"""


def adapted(model, adapter):
    kind, more = MODELS[model]
    torch.manual_seed(0)
    network = t.AutoModelForCausalLM.from_config(kind(**SIZES, **more))
    config = ADAPTERS[adapter]()
    network = network if config is None else peft.get_peft_model(network, config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_((1.0 if "prompt_encoder" in name else 0.1) * torch.randn_like(parameter))
    return network.eval()


def trees(longest):
    """A shared prompt with the aLoRA's invocation in it, a row with it in the answer, and a row without it."""
    prompt = [5 + i % 40 if i not in (3, 4) else 8 + i for i in range(longest - 4)]
    return pack(
        [
            TokenTree(prompt, [Branch([9, 8, 7, 6]), Branch([21, 22])]),
            TokenTree([5, 30], [Branch([7, 11, 12, 6, 9])]),
            TokenTree([], [Branch([33, 34, 35])]),
        ]
    )


@torch.no_grad()
def by_rows(network, packed):
    """The log-probabilities that the model itself gives for each row alone."""
    expected_BT = torch.zeros(packed.rows, packed.width)
    for row in range(packed.rows):
        ids = packed.ids_N[packed.row_indices(row)]
        logprobs = network(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -len(ids) :]
        scored = packed.row_S == row
        place = packed.position_N[packed.scored_S[scored]]
        expected_BT[row, packed.slot_S[scored]] = logprobs.log_softmax(-1)[place, packed.target_S[scored]]
    return expected_BT


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("longest", [7, 21])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model", MODELS)
def test_rows_are_what_the_model_says_of_each_alone(model, adapter, longest):
    network, packed = adapted(model, adapter), trees(longest)
    found = score(network, packed).logprobs_BT
    torch.testing.assert_close(found, by_rows(network, packed), rtol=0, atol=2e-5)
    chunked = model == "llama4" and longest > 8
    assert plan_of(network).packed == (adapter in PACKED and not chunked)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("adapter", ["alora", "prompt", "prefix"])
def test_sampled_tokens_have_the_models_own_log_probabilities(adapter, tiny_tokenizer):
    """A sampler that feeds the tokens one by one would miss where the adapter begins, or its virtual tokens."""
    network = adapted("llama", adapter)
    network.generation_config.eos_token_id = None
    sampler = make_sampler(network, tiny_tokenizer)
    prompts = [[5, 30, 11, 12, 7], [11, 12], [33, 34, 35]]
    for prompt, (completion,) in zip(
        prompts, sampler.sample(prompts, SamplingParams(max_new_tokens=4, seed=1)), strict=True
    ):
        packed = pack([TokenTree(prompt, [Branch(completion.ids)])])
        expected = by_rows(network, packed)[0].tolist()
        assert completion.raw_logprobs == pytest.approx(expected, abs=1e-4)
