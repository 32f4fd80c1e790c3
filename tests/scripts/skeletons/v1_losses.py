"""Release 1.x, documentation: names and modules.

Rows: loss_type luspo, vespo, sigmoid_norm, chunked_nll.
"""

import tiny
from datasets import Dataset

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

name = tiny.folder("Qwen3-0.6B")
common = {"max_steps": 1, "report_to": "none"}
args = SFTConfig("sft", loss_type="chunked_nll", per_device_train_batch_size=2, **common)
SFTTrainer(name, args, train_dataset=Dataset.from_list(tiny.MESSAGES)).train()
args = DPOConfig("dpo", loss_type=["sigmoid_norm"], per_device_train_batch_size=2, **common)
DPOTrainer(name, args=args, train_dataset=Dataset.from_list(tiny.CHAT_PAIRS)).train()
for fields in (
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3, "epsilon_high": 2.5e-3},
    {"loss_type": "vespo", "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
):
    folder = fields["loss_type"]
    args = GRPOConfig(
        folder, per_device_train_batch_size=4, num_generations=2, max_completion_length=6, **fields, **common
    )
    trainer = GRPOTrainer(
        name, lambda completions, **kwargs: [float(len(c)) for c in completions], args=args,
        train_dataset=Dataset.from_list(tiny.PROMPTS),
    )  # fmt: skip
    trainer.train()
