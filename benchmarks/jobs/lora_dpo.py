"""DPO steps of a real model with LoRA on all linear layers, on one batch of 4 pairs."""

from common import SETTINGS, adapted, arguments, real_rows, real_tokenizer, train
from datasets import Dataset

from trl import DPOConfig, DPOTrainer

config = DPOConfig(**arguments(per_device_train_batch_size=4, **SETTINGS))
trainer = DPOTrainer(
    model=adapted(), args=config, train_dataset=Dataset.from_list(real_rows("pairs")), processing_class=real_tokenizer()
)
train(trainer, {"loss": "loss", "chosen": "logps/chosen", "rejected": "logps/rejected"})
