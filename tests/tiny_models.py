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


def byte_model(folder: Any) -> Any:
    """The same Llama of bytes, with its tokenizer and a chat template, in a folder; returns the tokenizer."""
    from tokenizers_for_tests import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    return tokenizer


def word_model(folder: Any, **changes: Any) -> None:
    """A Llama of words, without a chat template, and its tokenizer in a folder."""
    from tokenizers_for_tests import word_tokenizer

    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = t.LlamaConfig(**IDS | WIDE | {"vocab_size": len(tokenizer), "max_position_embeddings": 64} | changes)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MIXTURE = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
"""sizes of a mixture of experts"""


def tiny_mixture(kind: Any, noise: float, **sizes: Any) -> Any:
    """A mixture whose routers choose otherwise for each token; in eval mode."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(kind(**MIXTURE | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()


def trees_of_mixtures(third: Any) -> Any:
    """A prompt that two rows share, and two rows of other lengths. third: the prompt of the last one."""
    from trl.data.packing import pack
    from trl.data.records import Branch, TokenTree

    return pack(
        [
            TokenTree([5, 6, 9, 4, 8, 7, 3, 11], [Branch([9, 8, 7]), Branch([11])]),
            TokenTree([5], [Branch([7, 6])]),
            TokenTree(third, [Branch([20, 21, 22, 23, 24])]),
        ]
    )


def lora(name: str = "llama", task_type: str = "CAUSAL_LM", **changes: Any) -> Any:
    """The config of a LoRA adapter whose effect shows from the first step."""
    import peft

    fields = {"r": 2, "target_modules": LORA_TARGETS[name], "init_lora_weights": False, "task_type": task_type}
    return peft.LoraConfig(**fields | {"fan_in_fan_out": name == "gpt2"} | changes)
