"""DPO steps on one batch of 8 pairs."""

from common import SETTINGS, arguments, model, rows, tokenizer, train
from datasets import Dataset

from trl import DPOConfig, DPOTrainer

config = DPOConfig(**arguments(per_device_train_batch_size=8, **SETTINGS))
trainer = DPOTrainer(
    model=model(), args=config, train_dataset=Dataset.from_list(rows("pairs")), processing_class=tokenizer()
)
train(trainer, {"loss": "loss", "chosen": "logps/chosen", "rejected": "logps/rejected"})
