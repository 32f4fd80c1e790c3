"""Settings and trainers that the tests of DPO share."""

from conformity import causal_lm, pairs, tokenizer
from transformers import TrainingArguments

from trl import DPOConfig, DPOTrainer

PLAIN = {
    "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 3,
}  # fmt: skip
COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")


def config(tmp_path, **more):
    return DPOConfig(output_dir=str(tmp_path), **{**PLAIN, **more})


def plain(tmp_path, **more):
    return TrainingArguments(output_dir=str(tmp_path), **{**PLAIN, **more})


def trainer_of(args, rows=None, model=None, ref_model=None, **more):
    rows = pairs() if rows is None else rows
    more.setdefault("processing_class", tokenizer())
    return DPOTrainer(model or causal_lm(), ref_model, args=args, train_dataset=rows, **more)
