"""Reward-model steps on one batch of 8 pairs."""

from common import FOLDER, SETTINGS, arguments, rows, tokenizer, train
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from trl import RewardConfig, RewardTrainer

config = RewardConfig(**arguments(per_device_train_batch_size=8, **SETTINGS))
trainer = RewardTrainer(
    model=AutoModelForSequenceClassification.from_pretrained(FOLDER / "reward"),
    args=config,
    train_dataset=Dataset.from_list(rows("pairs")),
    processing_class=tokenizer(),
)
train(trainer, {"loss": "loss"})
