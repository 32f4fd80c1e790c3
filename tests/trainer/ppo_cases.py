"""Models, batches and trainers that the tests of PPO share."""

import pytest
import torch
import transformers as t

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

COMMON = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 5}
STAT_KEYS = {
    "objective": ["kl", "kl_dist", "logprobs", "ref_logprobs", "kl_coef", "entropy"],
    "ppo": ["mean_non_score_reward", "mean_scores", "std_scores", "learning_rate"],
    "tokens": [f"{which}_{what}" for which in ("queries", "responses") for what in ("len_mean", "len_std", "dist")],
    "ppo/loss": ["policy", "value", "total"],
    "ppo/policy": ["entropy", "approxkl", "policykl", "clipfrac", "advantages", "advantages_mean", "ratio"],
    "ppo/returns": ["mean", "var"],
    "ppo/val": ["vpred", "error", "clipfrac", "mean", "var", "var_explained"],
    "time/ppo": ["forward_pass", "compute_rewards", "compute_advantages", "optimize_step", "calc_stats", "total"],
}


def causal(kind=t.LlamaConfig, peft_config=None, **fields):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(kind(**{**COMMON, **fields}))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=peft_config)


def gpt2():
    torch.manual_seed(0)
    config = t.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return AutoModelForCausalLMWithValueHead.from_pretrained(t.AutoModelForCausalLM.from_config(config))


def lora(**fields):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **fields)


def maker(tiny_tokenizer):
    """A function that makes a PPO trainer of a model and of fields of its config."""

    def build(model=None, *, dataset=None, **fields):
        given = {name: fields.pop(name) for name in ("ref_model", "optimizer", "lr_scheduler", "num_shared_layers",
                                                     "value_model", "data_collator") if name in fields}  # fmt: skip
        config = PPOConfig(**{"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-3, "ppo_epochs": 2, **fields})
        return PPOTrainer(
            config, causal() if model is None else model, tokenizer=tiny_tokenizer, dataset=dataset, **given
        )

    return build


def batch(rows=4, seed=1, response_length=5):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(4, 100, (n,), generator=g)  # noqa: E731
    queries = [draw(3 + i % 3) for i in range(rows)]
    responses = [draw(response_length - i % 2) for i in range(rows)]
    return queries, responses, [torch.tensor(float(i % 3) - 0.5) for i in range(rows)]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(actual), torch.tensor(expected), atol=atol, rtol=0)
