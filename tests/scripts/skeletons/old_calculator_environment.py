"""Release 0.7, official example: older trainers.

Rows: none.
"""

import tiny
import torch

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TextEnvironment


def exact_match_reward(responses, answers=None):
    return [1.0 if answer in response else 0.1 for response, answer in zip(responses, answers, strict=True)]


class SimpleCalculatorTool:
    """Adds and subtracts."""

    def __call__(self, text):
        return str(eval(text))


name = tiny.folder("gpt2-calculator")
model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
model_ref = AutoModelForCausalLMWithValueHead.from_pretrained(name)
tokenizer = tiny.tokenizer()
prompt = "What is 13-3?\n<request><SimpleCalculatorTool>13-3<call>10.0<response>\nResult=10<submit>\n"
generation_kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 6}
ppo_trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=1, ppo_epochs=1), model, model_ref, tokenizer)
text_env = TextEnvironment(
    model, tokenizer, {"SimpleCalculatorTool": SimpleCalculatorTool()}, exact_match_reward, prompt, max_turns=2,
    generation_kwargs=generation_kwargs | {"pad_token_id": 0, "eos_token_id": -1},
)  # fmt: skip
queries, responses, masks, rewards, histories = text_env.run(["What is 1+2?", "What is 3-2?"], answers=["3", "1"])
rewards = [torch.tensor(float(reward)) for reward in rewards]
train_stats = ppo_trainer.step(queries, responses, rewards, masks)
print(train_stats["ppo/mean_scores"], histories[0].text)
