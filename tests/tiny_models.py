"""Language models of a few thousand weights, built from their configs: no files, no network."""

from typing import Any

import torch
import transformers as t

IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER_DECODER = IDS | {"decoder_start_token_id": 0}

CAUSAL = {
    "llama": t.LlamaConfig(**IDS, **WIDE, max_position_embeddings=64),
    "qwen2": t.Qwen2Config(**IDS, **WIDE, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True),
    "gpt_neox": t.GPTNeoXConfig(**IDS, **WIDE, max_position_embeddings=64),
    "gpt2": t.GPT2Config(**IDS, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "opt": t.OPTConfig(
        **IDS,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=8,
        max_position_embeddings=64,
    ),
    "bloom": t.BloomConfig(**IDS, hidden_size=16, n_layer=2, n_head=2),
}
SEQ2SEQ = {
    "t5": t.T5Config(**ENCODER_DECODER, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
    "bart": t.BartConfig(
        **ENCODER_DECODER,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        forced_eos_token_id=None,
    ),
}
LORA_TARGETS = {"llama": ["q_proj"], "gpt2": ["c_attn"], "t5": ["q"]}


def tiny_model(name: str, **changes: Any) -> Any:
    """The same model every time, in eval mode; random weights, large enough that every path shows in its logits."""
    config = (CAUSAL | SEQ2SEQ)[name]
    config = type(config).from_dict(config.to_dict() | changes)
    auto_class = t.AutoModelForSeq2SeqLM if name in SEQ2SEQ else t.AutoModelForCausalLM
    torch.manual_seed(1)
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def lora(name: str = "llama", task_type: str = "CAUSAL_LM", **changes: Any) -> Any:
    """The config of a LoRA adapter whose effect shows from the first step."""
    import peft

    fields = {"r": 2, "target_modules": LORA_TARGETS[name], "init_lora_weights": False, "task_type": task_type}
    return peft.LoraConfig(**fields | {"fan_in_fan_out": name == "gpt2"} | changes)
