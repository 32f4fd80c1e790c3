"""SFT steps on one batch of 16 prompt-completion rows."""

from common import SETTINGS, arguments, model, rows, tokenizer, train
from datasets import Dataset

from trl import SFTConfig, SFTTrainer

config = SFTConfig(**arguments(per_device_train_batch_size=16, **SETTINGS))
trainer = SFTTrainer(
    model=model(), args=config, train_dataset=Dataset.from_list(rows("supervised")), processing_class=tokenizer()
)
train(trainer, {"loss": "loss"})
