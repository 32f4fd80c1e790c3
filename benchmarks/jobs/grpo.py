"""GRPO steps on 8 prompts with 8 completions each, generation included."""

from common import SETTINGS, arguments, model, rows, tokenizer, train
from datasets import Dataset

from trl import GRPOConfig, GRPOTrainer


def even_words(completions: list, **kwargs: object) -> list:
    """The share of words with an even number: cheap, and different for every completion."""
    found = [completion.split() for completion in completions]
    return [sum(word[-1] in "02468" for word in each) / max(1, len(each)) for each in found]


name = SETTINGS.pop("model", "policy")
config = GRPOConfig(
    **arguments(per_device_train_batch_size=64, num_generations=8, max_completion_length=64, beta=0.04, **SETTINGS)
)
trainer = GRPOTrainer(
    model=model(name),
    reward_funcs=even_words,
    args=config,
    train_dataset=Dataset.from_list(rows("prompts")),
    processing_class=tokenizer(),
)
train(
    trainer, {"tokens a completion": "completions/mean_length", "loss": "loss"}, units=("completions/mean_length", 64)
)
