"""SFT steps of a real model with LoRA on all linear layers, on one batch of 8 prompt-completion rows."""

from common import SETTINGS, adapted, arguments, real_rows, real_tokenizer, train
from datasets import Dataset

from trl import SFTConfig, SFTTrainer

config = SFTConfig(**arguments(per_device_train_batch_size=8, **SETTINGS))
trainer = SFTTrainer(
    model=adapted(),
    args=config,
    train_dataset=Dataset.from_list(real_rows("supervised")),
    processing_class=real_tokenizer(),
)
train(trainer, {"loss": "loss"})
