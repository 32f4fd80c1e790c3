"""A whole training step on heads and attentions that are not plain: packed rows equal padded ones."""

import pytest
import torch
import transformers as t
from conformity import history, pairs, texts, tokenizer
from peft import LoraConfig

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

SMALL = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "tied": t.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "softcap": t.Gemma2Config(
        **SMALL, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=3.0, sliding_window=4
    ),
    "windows": t.MistralConfig(**SMALL, sliding_window=4),
    "scaled": t.CohereConfig(**SMALL, logit_scale=0.3),
    "biased": t.PhiConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
}
HEAD = {
    "none": None,
    "lora-head": LoraConfig(
        r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM",
        ensure_weight_tying=False,
    ),
    "saved-head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
}  # fmt: skip


CASES = [*((name, "none") for name in MODELS)]
CASES += [("softcap", "lora-head"), ("softcap", "saved-head"), ("biased", "lora-head"), ("biased", "saved-head")]
CASES += [("scaled", "lora-head")]
"""a tied head is the embedding, which PEFT adapts together with it or not at all"""


def model_of(name):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(MODELS[name])
    with torch.no_grad():  # wide enough that caps and scales show
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def settings(tmp_path, **more):
    return {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3, **more,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize(("name", "head"), CASES)
def test_packed_equals_padded(name, head, tmp_path):
    seen = []
    for packed in (True, False):
        sft = SFTTrainer(
            model_of(name), SFTConfig(**settings(tmp_path, padding_free=packed)), train_dataset=texts(),
            processing_class=tokenizer(), peft_config=HEAD[head],
        )  # fmt: skip
        sft.train()
        dpo = DPOTrainer(
            model_of(name), None, args=DPOConfig(**settings(tmp_path, padding_free=packed)), train_dataset=pairs(),
            processing_class=tokenizer(), peft_config=HEAD[head],
        )  # fmt: skip
        dpo.train()
        seen.append(
            [value for trainer in (sft, dpo) for key in ("loss", "grad_norm") for value in history(trainer, key)]
        )
    assert seen[1] == pytest.approx(seen[0], rel=5e-5)
    assert min(seen[0]) > 0
