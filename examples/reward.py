"""A reward model from pairs: which of two answers did people prefer?

Without arguments a tiny model learns in seconds that longer is better. With a real one:

    python examples/reward.py --model HuggingFaceTB/SmolLM2-135M --dataset trl-lib/ultrafeedback_binarized
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from trl import RewardConfig, RewardTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or Hub name: causal models and encoders (BERT) both do")
parser.add_argument("--dataset", help="name of a data set with `chosen` and `rejected`")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", default="reward-output")
arguments = parser.parse_args()
config = RewardConfig(
    output_dir=arguments.output, max_steps=arguments.steps, per_device_train_batch_size=16, learning_rate=1e-5,
    center_rewards_coefficient=0.01, max_tokens_per_microbatch=8192, logging_steps=10, save_strategy="no",
    report_to="none", disable_tqdm=True,
)  # fmt: skip

if arguments.model:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1)
    rows = load_dataset(arguments.dataset, split="train")
else:
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "ha": 2, "hm": 3}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(0)
    tiny = LlamaConfig(vocab_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                       eos_token_id=1, pad_token_id=0, num_labels=1)  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(tiny)
    config.learning_rate = 3e-3
    rows = Dataset.from_list(
        [{"prompt": "hm " * (n % 3), "chosen": "ha " * (n % 5 + 2), "rejected": "ha " * (n % 5 + 1)} for n in range(60)]
    )

parts = rows.train_test_split(test_size=min(200, len(rows) // 5), seed=0)
trainer = RewardTrainer(
    model, config, train_dataset=parts["train"], eval_dataset=parts["test"], processing_class=tokenizer
)
trainer.train()
trainer.save_model()
metrics = trainer.evaluate()
print(f"held-out accuracy {metrics['eval_accuracy']:.2f}, margin {metrics['eval_margin']:.2f}")
