"""Preference trainers score what the policy says in an answer, and a process reward model counts every step once."""

import numpy as np
import pytest
import torch
from conformity import build, steps
from datasets import Dataset
from tokenizers_for_tests import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, ORPOConfig, ORPOTrainer

ASK = {"role": "user", "content": "Rain?"}
SAID = [("assistant", "I look."), ("tool", "no"), ("assistant", "Dry.")]
GOOD = [{"role": role, "content": text} for role, text in SAID]
BAD = [{"role": "assistant", "content": "Wet."}]
TOLD = "\n<|im_start|>tool\nno<|im_end|>\n<|im_start|>assistant\n"
PAIRS = [{"prompt": [ASK], "chosen": GOOD, "rejected": BAD}] * 2
SINGLE = [
    {"prompt": [ASK], "completion": GOOD, "label": True},
    {"prompt": [{**ASK, "content": "Sun?"}], "completion": GOOD[2:], "label": False},
]
KINDS = {
    "dpo": (DPOTrainer, DPOConfig, PAIRS), "orpo": (ORPOTrainer, ORPOConfig, PAIRS),
    "kto": (KTOTrainer, KTOConfig, SINGLE),
}  # fmt: skip


def tiny(chat):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(chat), pad_token_id=0, **size))


def trainer_of(kind, folder, rows=None, **settings):
    trainer, config, own = KINDS[kind]
    chat = byte_tokenizer()
    args = config(output_dir=str(folder), report_to="none", disable_tqdm=True, max_steps=1, save_strategy="no",
                  logging_steps=1, per_device_train_batch_size=2, **settings)  # fmt: skip
    rows = Dataset.from_list(own) if rows is None else rows
    return trainer(tiny(chat), args=args, train_dataset=rows, eval_dataset=rows, processing_class=chat)


def logps(chat, prompt, answer, told=True):
    """The log-probability of an answer by whole logits, with or without what the tool says."""
    prompt_ids, ids = (chat(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    counted = np.ones(len(ids), dtype=bool)
    if not told and TOLD in answer:
        start = len(chat(answer[: answer.index(TOLD)], add_special_tokens=False)["input_ids"])
        counted[start : start + len(chat(TOLD, add_special_tokens=False)["input_ids"])] = False
    with torch.no_grad():
        logits = tiny(chat)(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    scored = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    return scored[torch.tensor(counted)].sum().item()


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_log_probabilities_are_of_what_the_policy_says(kind, asked, tmp_path):
    trainer = trainer_of(kind, tmp_path, learn_tool_results=asked, per_device_eval_batch_size=1)
    found = trainer.evaluate()
    prompt = "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
    chosen = logps(byte_tokenizer(), prompt, f"I look.<|im_end|>{TOLD}Dry.<|im_end|>", told=asked)
    assert found["eval_logps/chosen"] == pytest.approx(chosen, abs=1e-3)
    if kind == "dpo":
        assert found["eval_logps/rejected"] == pytest.approx(
            logps(byte_tokenizer(), prompt, "Wet.<|im_end|>"), abs=1e-3
        )


def test_mismatched_completions_bring_their_masks(tmp_path):
    rows = trainer_of("kto", tmp_path).train_dataset
    assert [row["mismatched_mask"] for row in rows] == [row["completion_mask"] for row in rows][::-1]
    assert [len(row["mismatched_ids"]) for row in rows] == [len(row["mismatched_mask"]) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_made_packed_and_padded(kind, tmp_path):
    losses = []
    for packed in (True, False):
        trainer = trainer_of(kind, tmp_path, padding_free=packed)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    again = trainer_of(kind, tmp_path, rows=trainer.train_dataset)  # tokenised rows keep their masks
    name = "completion_mask" if kind == "kto" else "chosen_mask"
    assert list(again.train_dataset[name]) == list(trainer.train_dataset[name])


def test_every_step_counts_in_the_accuracy(tmp_path):
    """The rows of the last batch were as many as its steps were taken to be, so most steps did not count."""
    found = []
    for size in (8, 2, 1):
        trainer = build("prm", tmp_path, per_device_eval_batch_size=size)
        found.append(trainer.evaluate()["eval_accuracy"])
        output = trainer.predict(steps().select(range(3)))
        assert (output.label_ids != -100).sum() == sum(len(labels) for labels in steps()["labels"][:3])
    right = (output.predictions.argmax(-1) == output.label_ids)[output.label_ids != -100].mean()
    assert found == pytest.approx([right] * 3)
