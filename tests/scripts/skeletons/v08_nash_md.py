"""Release 0.11, documentation: names and modules.

Rows: trainer NashMD.
"""

import tiny
from datasets import Dataset

from trl import NashMDConfig, NashMDTrainer

args = NashMDConfig(
    output_dir="nash-md", max_new_tokens=6, mixture_coef=0.5, missing_eos_penalty=1.0, per_device_train_batch_size=2,
    max_steps=2, report_to="none",
)  # fmt: skip
reward_model = tiny.reward_folder("reward")
trainer = NashMDTrainer(
    model=tiny.model(), ref_model=tiny.model(), reward_model=reward_model, args=args, tokenizer=tiny.tokenizer(),
    train_dataset=Dataset.from_list(tiny.CHAT_PROMPTS),
)  # fmt: skip
trainer.train()
