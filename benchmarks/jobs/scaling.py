"""DPO-shaped work of one shape: a reference pass, a policy pass, a backward pass. Ours alone.

Settings: prompts, group, prompt, completion, vocabulary.
"""

import time

import torch
from common import FOLDER, SETTINGS, STEPS, Clock, report
from transformers import AutoModelForCausalLM

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.models.scoring import score


def sgemm_peak() -> float:
    """Best GFLOP/s of a square product of 1024."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(8):
        began = time.process_time()
        for _ in range(4):
            a @ b
        best = max(best, 4 * 2 * 1024**3 / (time.process_time() - began) / 1e9)
    return best


vocabulary = SETTINGS["vocabulary"]
name = "policy" if vocabulary == 32_000 else "policy-150k"
policy = AutoModelForCausalLM.from_pretrained(FOLDER / name)
reference = AutoModelForCausalLM.from_pretrained(FOLDER / name).requires_grad_(False)
generator = torch.Generator().manual_seed(0)


def words(count: int) -> list[int]:
    return torch.randint(3, vocabulary, (count,), generator=generator).tolist()


trees = [
    TokenTree(words(SETTINGS["prompt"]), [Branch(words(SETTINGS["completion"])) for _ in range(SETTINGS["group"])])
    for _ in range(SETTINGS["prompts"])
]
packed = pack(trees)


def step() -> None:
    with torch.no_grad():
        score(reference, packed)
    score(policy, packed).logprobs_BT.sum().backward()
    policy.zero_grad()


step()  # the probe and the first pages of memory
peak = sgemm_peak()
clock = Clock()
clock.start()
for _ in range(STEPS):
    step()
measured = clock.stop(STEPS)
peak = max(peak, sgemm_peak())
rows_tokens = SETTINGS["prompts"] * SETTINGS["group"] * (SETTINGS["prompt"] + SETTINGS["completion"])
shape = {"tokens": len(packed.ids_N), "rows_tokens": rows_tokens, "scored": len(packed.row_S)}
report({}, {**measured, **shape, "peak_gflops": peak})
