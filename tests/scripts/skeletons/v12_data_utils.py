"""Release 0.12-0.28, third party: names and modules.

Rows: none.
"""

import tiny
from datasets import Dataset

from trl import SFTConfig
from trl.data_utils import apply_chat_template, is_conversational, maybe_apply_chat_template
from trl.trainer import SFTTrainer
from trl.trainer.utils import pad, selective_log_softmax

tokenizer = tiny.tokenizer()
dataset = Dataset.from_list(tiny.CHAT_PROMPTS)
assert is_conversational(dataset[0])
assert apply_chat_template(dataset[0], tokenizer)["prompt"].endswith("assistant\n")
dataset = Dataset.from_list(tiny.MESSAGES).map(maybe_apply_chat_template, fn_kwargs={"tokenizer": tokenizer})
model = tiny.model()
args = SFTConfig(output_dir="out", max_steps=1, per_device_train_batch_size=2, report_to="none")
trainer = SFTTrainer(model, args=args, train_dataset=dataset.select_columns("text"), processing_class=tokenizer)
trainer.train()
ids = pad([tokenizer(row["text"], return_tensors="pt").input_ids[0] for row in tiny.TEXTS[:2]], padding_value=0)
print(selective_log_softmax(model(ids).logits[:, :-1], ids[:, 1:]).mean())
