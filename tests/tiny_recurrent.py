"""Recurrent architectures and hybrids, built tiny."""

from typing import Any

import torch
import transformers as t
from tokenizers_for_tests import word_tokenizer

SIZES = {
    "vocab_size": len(word_tokenizer()), "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HYBRID = {**SIZES, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4,
}  # fmt: skip
CONFIGS: dict[str, tuple[type[t.PretrainedConfig], dict[str, Any]]] = {
    "rwkv": (t.RwkvConfig, {**SIZES, "attention_hidden_size": 32, "context_length": 64}),
    "recurrent_gemma": (
        t.RecurrentGemmaConfig,
        {**HYBRID, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8},
    ),
    "mamba": (t.MambaConfig, {**SIZES, "state_size": 4}),
    "mamba2": (t.Mamba2Config, {**SIZES, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1,
                                "chunk_size": 4}),
    "falcon_mamba": (t.FalconMambaConfig, {**SIZES, "state_size": 4}),
    "bamba": (t.BambaConfig, {**HYBRID, **HEADS, "attn_layer_indices": [1]}),
    "jamba": (
        t.JambaConfig,
        {**HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
         "mamba_d_state": 4, "use_mamba_kernels": False},
    ),
    "lfm2": (t.Lfm2Config, {**HYBRID, "layer_types": ["conv", "full_attention"]}),
}  # fmt: skip


def model(name: str, moved: float = 0.1) -> Any:
    """A model whose weights are moved at random, biases too, so that all that it computes is seen in its logits."""
    kind, settings = CONFIGS[name]
    torch.manual_seed(0)
    built = t.AutoModelForCausalLM.from_config(kind(**settings))
    for parameter in built.parameters():
        parameter.data += moved * torch.randn_like(parameter)
    return built
