"""Release 1.x, documentation: callbacks, chat and rewards.

Rows: clone_chat_template; trl.chat_template_utils.
"""

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import SFTConfig, SFTTrainer, clone_chat_template
from trl.chat_template_utils import get_training_chat_template

name = tiny.folder("Llama-3.2-1B", chat=False)
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
model, tokenizer, added_tokens = clone_chat_template(model, tokenizer, tiny.folder("Qwen3-0.6B"))
print(added_tokens, len(tokenizer))
tokenizer.chat_template = get_training_chat_template(tokenizer) or tokenizer.chat_template
args = SFTConfig(output_dir="cloned", max_steps=2, per_device_train_batch_size=2, report_to="none")
trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(tiny.MESSAGES), processing_class=tokenizer)
trainer.train()
