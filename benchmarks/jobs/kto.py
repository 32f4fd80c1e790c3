"""KTO steps on one batch of 16 rows, half of them desirable."""

from common import SETTINGS, arguments, model, rows, tokenizer, train
from datasets import Dataset

from trl import KTOConfig, KTOTrainer

config = KTOConfig(**arguments(per_device_train_batch_size=16, **SETTINGS))
trainer = KTOTrainer(
    model=model(), args=config, train_dataset=Dataset.from_list(rows("unpaired")), processing_class=tokenizer()
)
rewards = {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}  # zeros before the update, but for rounding
train(trainer, {**rewards, "gradient": "grad_norm"}, only_first=("gradient",), only_last=tuple(rewards))
