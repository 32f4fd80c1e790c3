"""Preference optimisation on pairs, with any loss of the family (sigmoid, ipo, apo_zero, ...), alone or added up.

Without arguments a tiny model learns in seconds to prefer "yes". With a real one, and LoRA:

    python examples/dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/ultrafeedback_binarized --lora
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or Hub name of a causal language model")
parser.add_argument("--dataset", help="name of a data set with `chosen` and `rejected`")
parser.add_argument("--loss", nargs="+", default=["sigmoid"], help="one loss, or several to be added")
parser.add_argument("--lora", action="store_true", help="train an adapter instead of the whole model")
parser.add_argument("--steps", type=int, default=15)
parser.add_argument("--output", default="dpo-output")
arguments = parser.parse_args()
config = DPOConfig(
    output_dir=arguments.output, max_steps=arguments.steps, per_device_train_batch_size=16, learning_rate=5e-6,
    loss_type=arguments.loss, precompute_ref_log_probs=True, max_tokens_per_microbatch=8192, logging_steps=5,
    save_strategy="no", report_to="none", disable_tqdm=True,
)  # fmt: skip

if arguments.model:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    rows = load_dataset(arguments.dataset, split="train")
else:
    words = ["<pad>", "<end>", "yes", "no", "is", "it", "red", "blue", "big"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(0)
    tiny = LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, eos_token_id=1, pad_token_id=0)  # fmt: skip
    model = AutoModelForCausalLM.from_config(tiny)
    config.learning_rate = 1e-3
    questions = [f"is it {word} " for word in ("red", "blue", "big")] * 20
    rows = Dataset.from_list([{"prompt": question, "chosen": "yes", "rejected": "no"} for question in questions])

adapter = None
if arguments.lora:
    from peft import LoraConfig

    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
parts = rows.train_test_split(test_size=min(200, len(rows) // 5), seed=0)
trainer = DPOTrainer(model, args=config, train_dataset=parts["train"], eval_dataset=parts["test"],
                     processing_class=tokenizer, peft_config=adapter)  # fmt: skip
trainer.train()
trainer.save_model()
metrics = trainer.evaluate()
print(f"held-out margin {metrics['eval_rewards/margins']:.3f}, accuracy {metrics['eval_rewards/accuracies']:.2f}")
