"""Architectures built tiny, with weights large enough that attention, windows and positions show in the logits."""

from typing import Any

import torch
import transformers as t

COMMON = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL_GPT = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip


def common(*without: str, **more: Any) -> dict[str, Any]:
    return {**{k: v for k, v in COMMON.items() if k not in without}, **more}


LOCAL = {
    "llama": (t.LlamaConfig, common()),
    "qwen2": (t.Qwen2Config, common()),
    "qwen3": (t.Qwen3Config, common(head_dim=8)),
    "phi3": (t.Phi3Config, common()),
    "gpt2": (t.GPT2Config, SMALL_GPT),
    "gpt_neox": (t.GPTNeoXConfig, common("num_key_value_heads")),
    "opt": (t.OPTConfig, common("intermediate_size", "num_key_value_heads", ffn_dim=48, word_embed_proj_dim=16)),
    "olmo2": (t.Olmo2Config, common()),
    "smollm3": (t.SmolLM3Config, common()),
    "granite": (t.GraniteConfig, common(logits_scaling=4.0)),
    "cohere": (t.CohereConfig, common(logit_scale=0.25)),
    "mistral": (t.MistralConfig, common(sliding_window=4)),
    "gemma2": (
        t.Gemma2Config,
        common(head_dim=8, sliding_window=4, final_logit_softcapping=5.0, attn_logit_softcapping=3.0),
    ),
    "gemma3": (t.Gemma3TextConfig, common(head_dim=8, sliding_window=4)),
    "gpt_oss": (
        t.GptOssConfig,
        common(
            head_dim=8, sliding_window=4, num_local_experts=4, num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
}  # fmt: skip
OTHERS = {
    "bloom": (t.BloomConfig, {**common("max_position_embeddings"), "n_layer": 2, "n_head": 4}),
    "gpt_neo": (
        t.GPTNeoConfig,
        {
            "vocab_size": 67,
            "hidden_size": 32,
            "num_layers": 2,
            "attention_types": [[["global"], 2]],
            "num_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "falcon": (t.FalconConfig, common("intermediate_size", alibi=False, new_decoder_architecture=True)),
    "mamba": (t.MambaConfig, common("num_attention_heads", "num_key_value_heads", state_size=4)),
}
(LOCAL if t.GPTJForCausalLM._supports_attention_backend else OTHERS)["gptj"] = (  # since transformers 5.24
    t.GPTJConfig,
    {**SMALL_GPT, "rotary_dim": 4},
)
SEQ2SEQ = {
    "t5": (
        t.T5Config,
        {"vocab_size": 67, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
         "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
    ),
    "bart": (
        t.BartConfig,
        {"vocab_size": 67, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
         "forced_eos_token_id": None},
    ),
}  # fmt: skip


def build(name: str, scale: float = 0.1, **changes: Any) -> Any:
    """The named architecture with random weights, in eval mode."""
    config_class, fields = (LOCAL | OTHERS | SEQ2SEQ)[name]
    auto = t.AutoModelForSeq2SeqLM if name in SEQ2SEQ else t.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config_class(**{**fields, **changes}))
    for parameter in model.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return model.eval()


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 67, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def next_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits of the token after `ids`, by a plain forward of the whole text. [V]"""
    return model(input_ids=torch.tensor([ids])).logits[0, -1].float()


@torch.no_grad()
def raw_logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probabilities of the completion's tokens at temperature 1, by a plain forward. [T]"""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)
