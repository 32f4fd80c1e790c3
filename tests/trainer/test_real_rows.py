"""Real instructions and tool calls, a real tokenizer and template: exactly the assistant's tokens are learned."""

import json
import re

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from trl import SFTConfig, SFTTrainer
from trl.quickstart.assets import DEMO_DATA, SMOLLM2, cached

pytestmark = [pytest.mark.asset, pytest.mark.slow]
ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


@pytest.fixture(scope="module")
def tokenizer():
    folder = cached(SMOLLM2)
    if folder is None:
        pytest.skip("SmolLM2 is not in the asset cache")
    return AutoTokenizer.from_pretrained(folder)


def rows_of(name):
    folder = cached(DEMO_DATA)
    if folder is None:
        pytest.skip("the demo data are not in the asset cache")
    return json.loads((folder / name).read_text(encoding="utf-8"))


def learned_and_expected(rows, tokenizer, tmp_path):
    """For each row the text whose tokens are learned, and what stands in assistant turns by the template's marks."""
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
        )
    )
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", assistant_only_loss=True, max_length=None)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    for row in trainer.train_dataset:
        learned = [i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
        whole = tokenizer.decode(row["input_ids"])
        yield tokenizer.decode(learned), ANSWER.findall(whole), whole


def test_999_instructions(tokenizer, tmp_path):
    source = rows_of("alpaca_en_demo.json")
    conversations = [
        [
            {"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()},
            {"role": "assistant", "content": row["output"]},
        ]
        for row in source
    ]
    seen = list(learned_and_expected(Dataset.from_dict({"messages": conversations}), tokenizer, tmp_path))
    assert len(seen) == 999
    for (learned, expected, whole), row in zip(seen, source, strict=True):
        assert learned == "".join(expected)
        assert learned == row["output"] + "<|im_end|>"
        assert row["instruction"].strip() in whole


def test_300_conversations_with_tools(tokenizer, tmp_path):
    source = rows_of("glaive_toolcall_en_demo.json")
    rows = Dataset.from_list([{"conversations": row["conversations"], "tools": row["tools"]} for row in source])
    calls = 0
    for (learned, expected, whole), row in zip(learned_and_expected(rows, tokenizer, tmp_path), source, strict=True):
        assert learned == "".join(expected)
        for message in row["conversations"]:
            if message["from"] == "gpt":
                assert message["value"] in learned
            if message["from"] == "function_call":
                calls += 1
                assert json.loads(message["value"])["name"] in learned  # a call is the assistant's own
            if message["from"] == "observation":
                assert message["value"] in whole
                assert message["value"] not in learned
    assert calls >= 153
