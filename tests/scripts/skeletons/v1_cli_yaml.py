"""Release 1.x, documentation: command line.

Rows: ModelConfig; DatasetMixtureConfig; get_dataset; SFTConfig.warmup_ratio.
"""

import os
from pathlib import Path

import tiny

tiny.folder("Qwen2.5-0.5B")
Path("sft_config.yaml").write_text(f"""
model_name_or_path: Qwen2.5-0.5B
datasets:
  - path: {tiny.data("stanfordnlp-imdb", tiny.TEXTS)}
  - path: {tiny.data("more-imdb", tiny.TEXTS)}
dataset_text_field: text
env:
  TRL_SKELETON: "1"
learning_rate: 1.0e-4
warmup_ratio: 0.1
max_steps: 1
per_device_train_batch_size: 2
output_dir: from-yaml
""")
tiny.shell("trl sft --config sft_config.yaml --output_dir from-line --packing true --max_length 64")
assert Path("from-line").is_dir()
assert os.environ["TRL_SKELETON"] == "1"
