"""Release 0.12-0.19, course: callbacks, chat and rewards.

Rows: setup_chat_format; SFTConfig.use_mps_device.
"""

import tiny
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import SFTConfig, SFTTrainer, setup_chat_format

device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
model_name = tiny.folder("SmolLM2-135M", chat=False)
model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path=model_name).to(device)
tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path=model_name)
model, tokenizer = setup_chat_format(model=model, tokenizer=tokenizer)
messages = [{"role": "user", "content": "Write a haiku about programming"}]
print(tokenizer.apply_chat_template(messages, tokenize=False))
ds = load_dataset(path=tiny.data("smoltalk", tiny.MESSAGES))
sft_config = SFTConfig(
    output_dir="./sft_output", max_steps=2, per_device_train_batch_size=2, learning_rate=5e-5, logging_steps=1,
    save_steps=100, eval_strategy="steps", eval_steps=2, use_mps_device=device == "mps", hub_model_id="SmolLM2-FT",
    report_to="none",
)  # fmt: skip
trainer = SFTTrainer(
    model=model, args=sft_config, train_dataset=ds["train"], processing_class=tokenizer, eval_dataset=ds["test"]
)
trainer.train()
trainer.save_model("./SmolLM2-FT")
