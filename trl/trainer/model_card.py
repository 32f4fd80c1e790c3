"""The README that a step-driven trainer writes beside the model."""

from __future__ import annotations

import os
import warnings

PPO_CARD = """---
license: apache-2.0
library_name: transformers
tags:
- trl
- ppo
- transformers
- reinforcement-learning
---

# {model_name}

A language model that was fine-tuned with proximal policy optimisation against a score of its responses, with `trl`.
It can be used for text generation.

## Usage

The model itself, with transformers:

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{model_id}")
outputs = generator("Hello, my llama is cute")
```

With its value head, to train on:

```python
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead

tokenizer = AutoTokenizer.from_pretrained("{model_id}")
model = AutoModelForCausalLMWithValueHead.from_pretrained("{model_id}")

inputs = tokenizer("Hello, my llama is cute", return_tensors="pt")
logits, _, values = model(**inputs)
```
"""


def write_model_card(path: str, model_name: str | None, template: str) -> None:
    """`README.md` in the folder, under the name of the Hub account at hand; without one, a warning instead."""
    from huggingface_hub import whoami

    try:
        user = whoami()["name"]
    except Exception:  # offline, not logged in, token refused: each has its own
        warnings.warn("Cannot retrieve user information assuming you are running in offline mode.")
        return
    os.makedirs(path, exist_ok=True)
    name = model_name or "TRL Model"
    with open(os.path.join(path, "README.md"), "w", encoding="utf-8") as file:
        file.write(template.format(model_name=name, model_id=f"{user}/{os.path.basename(os.path.normpath(path))}"))
