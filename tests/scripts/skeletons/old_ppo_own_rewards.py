"""Release 0.4-0.7.7, third party: overrides.

Rows: none.
"""

import tiny
import torch

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


class ShapedPPOTrainer(PPOTrainer):
    """PPO whose scores are a thousand times as large before the KL comes off."""

    def compute_rewards(self, scores, *rest, **keywords):
        return super().compute_rewards([score * 1000 for score in scores], *rest, **keywords)


tokenizer = tiny.tokenizer()
model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny.folder("gpt2"))
ppo_trainer = ShapedPPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1), model, None, tokenizer)
queries = [tokenizer.encode(row["prompt"], return_tensors="pt")[0] for row in tiny.PROMPTS[:2]]
responses = ppo_trainer.generate(queries, return_prompt=False, do_sample=True, max_new_tokens=5, pad_token_id=0)
stats = ppo_trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(1.0)])
assert stats["ppo/returns/mean"] > 100, "compute_rewards was not called"
