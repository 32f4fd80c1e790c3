"""Release 1.x, documentation: names and modules.

Rows: ModelConfig; ScriptArguments; TrlParser; DatasetMixtureConfig.
"""

import runpy
import sys

import tiny

tiny.folder("Qwen3-0.6B")
tiny.data("capybara", tiny.MESSAGES)
line = "--model_name_or_path Qwen3-0.6B --dataset_name capybara --output_dir out --max_steps 1 --report_to none"
sys.argv = ["trl/scripts/sft.py", *line.split(), "--per_device_train_batch_size", "2"]
runpy.run_module("trl.scripts.sft", run_name="__main__")
