"""Release 0.5-0.7.7, official example: parsers.

Rows: none.

Run: python sft.py --model_name guanaco --max_steps 2 --batch_size 2 --seq_length 64 --use_peft --peft_lora_r 4
"""

from dataclasses import dataclass, field

import tiny
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments

from trl import SFTTrainer


@dataclass
class ScriptArguments:
    """Names and numbers of this run."""

    model_name: str | None = field(default="facebook/opt-350m", metadata={"help": "the model"})
    learning_rate: float | None = field(default=1.41e-5)
    batch_size: int | None = field(default=64)
    seq_length: int | None = field(default=512)
    max_steps: int = field(default=-1)
    use_peft: bool | None = field(default=False)
    peft_lora_r: int | None = field(default=64)


script_args = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
tiny.folder(script_args.model_name)
dataset = load_dataset("json", data_files=tiny.jsonl("guanaco.jsonl", tiny.TEXTS), split="train")
training_args = TrainingArguments(
    output_dir="output", per_device_train_batch_size=script_args.batch_size, max_steps=script_args.max_steps,
    learning_rate=script_args.learning_rate, logging_steps=1, report_to="none",
)  # fmt: skip
peft_config = (
    LoraConfig(r=script_args.peft_lora_r, bias="none", task_type="CAUSAL_LM") if script_args.use_peft else None
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(script_args.model_name), args=training_args, train_dataset=dataset,
    max_seq_length=script_args.seq_length, dataset_text_field="text", peft_config=peft_config,
)  # fmt: skip
trainer.train()
trainer.save_model("output")
