"""Release 0.20-0.28, third party: callbacks, chat and rewards.

Rows: metric eval_mean_token_accuracy.
"""

import tiny
from datasets import Dataset

from trl import SFTConfig, SFTTrainer

dataset = Dataset.from_list(tiny.COMPLETED)
args = SFTConfig(
    output_dir="best", max_steps=4, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=2,
    save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_mean_token_accuracy",
    greater_is_better=True, report_to="none",
)  # fmt: skip
trainer = SFTTrainer(
    tiny.model(), args=args, train_dataset=dataset, eval_dataset=dataset.select(range(2)),
    processing_class=tiny.tokenizer(),
)  # fmt: skip
trainer.train()
print(trainer.state.best_metric)
