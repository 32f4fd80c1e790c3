"""Supervised fine-tuning on texts, prompt-completion rows or conversations; only the answers are learned.

Without arguments a tiny model learns in seconds to count. With a real one, and LoRA:

    python examples/sft.py --model HuggingFaceTB/SmolLM2-135M --dataset trl-lib/Capybara --lora
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or Hub name of a causal language model")
parser.add_argument("--dataset", help="name of a data set: `text`, `prompt` + `completion`, or `messages`")
parser.add_argument("--lora", action="store_true", help="train an adapter instead of the whole model")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--output", default="sft-output")
arguments = parser.parse_args()
config = SFTConfig(
    output_dir=arguments.output, max_steps=arguments.steps, per_device_train_batch_size=16, learning_rate=2e-4,
    max_tokens_per_microbatch=8192, logging_steps=20, save_strategy="no", report_to="none", disable_tqdm=True,
)  # fmt: skip

if arguments.model:
    model, tokenizer = arguments.model, AutoTokenizer.from_pretrained(arguments.model)
    rows = load_dataset(arguments.dataset, split="train")
else:
    words = ["<pad>", "<end>", *(str(number) for number in range(20))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(0)
    tiny = LlamaConfig(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                       num_attention_heads=4, eos_token_id=1, pad_token_id=0)  # fmt: skip
    model = AutoModelForCausalLM.from_config(tiny)
    config.learning_rate = 1e-2
    rows = Dataset.from_list([{"prompt": f"{n} {n + 1} ", "completion": f"{n + 2} {n + 3}"} for n in range(17)])

adapter = None
if arguments.lora:
    from peft import LoraConfig

    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
trainer.train()
trainer.save_model()
if not arguments.model:
    answer = trainer.model.generate(**tokenizer("5 6", return_tensors="pt"), do_sample=False, max_new_tokens=4)
    print("5 6 ->", tokenizer.decode(answer[0, 2:]))
