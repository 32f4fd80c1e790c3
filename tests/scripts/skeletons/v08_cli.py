"""Release 0.8-0.11, documentation: command line.

Rows: none.
"""

import tiny

tiny.folder("opt")
tiny.data("imdb", tiny.TEXTS)
tiny.shell(
    "trl sft --model_name_or_path opt --dataset_name imdb --output_dir opt-sft-imdb --dataset_text_field text "
    "--max_steps 1 --per_device_train_batch_size 2 --report_to none"
)
