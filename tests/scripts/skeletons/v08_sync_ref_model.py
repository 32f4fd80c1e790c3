"""Release 0.9-0.11, third party: callbacks, chat and rewards.

Rows: SyncRefModelCallback.
"""

import tiny
import torch
from datasets import Dataset

from trl import DPOConfig, DPOTrainer, SyncRefModelCallback

args = DPOConfig(
    output_dir="tr-dpo", per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, report_to="none",
    ref_model_sync_steps=2, ref_model_mixup_alpha=0.6,
)  # fmt: skip
ref_model = tiny.model()
before = ref_model.lm_head.weight.clone()
trainer = DPOTrainer(
    tiny.model(), ref_model, args=args, train_dataset=Dataset.from_list(tiny.PAIRS), tokenizer=tiny.tokenizer()
)
trainer.add_callback(SyncRefModelCallback(ref_model=trainer.ref_model, accelerator=trainer.accelerator))
trainer.train()
assert not torch.equal(before, trainer.ref_model.lm_head.weight.cpu()), "the reference did not follow"
