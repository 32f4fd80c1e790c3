"""`PPOTrainer.step` on 32 queries and responses: minibatches of 8, 4 epochs."""

import torch
from common import FOLDER, SETTINGS, STEPS, Clock, ids, report, tokenizer

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

model = AutoModelForCausalLMWithValueHead.from_pretrained(str(FOLDER / "policy"))
reference = AutoModelForCausalLMWithValueHead.from_pretrained(str(FOLDER / "policy"))
model.v_head.summary.load_state_dict(torch.load(FOLDER / "value_head.pt"))
config = PPOConfig(batch_size=32, ppo_epochs=4, seed=0, **{"mini_batch_size": 8, **SETTINGS})
trainer = PPOTrainer(config, model, reference, tokenizer())
episodes = ids("episodes")
queries = [torch.tensor(row["query"]) for row in episodes]
responses = [torch.tensor(row["response"]) for row in episodes]
scores = [torch.tensor(float(len(row["response"]) % 7)) for row in episodes]

clock, stats = Clock(), []
clock.start()
for _ in range(STEPS):
    stats.append(trainer.step(queries, responses, scores))
measured = clock.stop(STEPS)
names = ("ppo/mean_scores", "objective/entropy", "objective/kl")
for step in stats:
    print({name: step.get(name) for name in names})
report({name: [float(step[name]) for step in stats] for name in names[:2]}, measured)
