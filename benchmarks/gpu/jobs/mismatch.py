"""How far the sampler and the training pass are apart on one policy, a token and a completion, before any update."""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import DEVICE, SETTINGS, TINY, VOCABULARY, attempt, model, record

from trl.data.packing import pack
from trl.data.records import Branch, TokenTree
from trl.generation import LocalSampler
from trl.generation.sampler import SamplingParams
from trl.models.forward import plan_of
from trl.models.scoring import score

PROMPTS, GROUP, PROMPT, ANSWER = (2, 2, 6, 8) if TINY else (4, 8, 256, SETTINGS.get("answer", 512))
CLIP = 0.2
SHARPNESS = 7.0
"""the final norm's weight: with it random weights are about as sure of the next token as trained ones"""


def drawn(policy: Any) -> tuple[list[list[int]], Any]:
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (PROMPT,), generator=draw).tolist() for _ in range(PROMPTS)]
    params = SamplingParams(max_new_tokens=ANSWER, stop_token_ids=(), seed=1)
    return prompts, LocalSampler(policy).sample(prompts, params, n=GROUP)


def differences(found: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Of log-probabilities, [B, T] each; a completion's log-ratio is the sum of its tokens'."""
    apart = found - other
    whole = apart.sum(1)
    return {
        "token": float(apart.abs().mean()),
        "token_most": float(apart.abs().max()),
        "bias": float(apart.mean()),
        "completion": float(whole.abs().mean()),
        "outside_clip": float(((whole.exp() - 1).abs() > CLIP).float().mean()),
    }


def main() -> None:
    policy = model("0.5B").eval()
    with torch.no_grad():
        policy.model.norm.weight.fill_(SHARPNESS)
    scored: dict[str, torch.Tensor] = {}
    for precision in ("float32", "bf16"):
        with (
            attempt(precision),
            torch.no_grad(),
            torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            prompts, groups = drawn(policy)
            sampled = torch.tensor([c.raw_logprobs for group in groups for c in group])
            trees = [TokenTree(p, [Branch(c.ids) for c in group]) for p, group in zip(prompts, groups, strict=True)]
            packs = [pack([tree]).to(DEVICE) for tree in trees]
            found = [score(policy, packed, entropy=True) for packed in packs]
            trained = torch.cat([each.logprobs_BT for each in found]).cpu()
            entropy = float(torch.cat([each.entropy_BT for each in found]).mean())
            scored = {"sampler": sampled, "training pass": trained}
            record(
                precision,
                {
                    **differences(sampled, trained),
                    "entropy": entropy,
                    "tokens": ANSWER,
                    "packed": plan_of(policy).packed,
                },
            )
    if scored:
        with attempt("against float32"), torch.no_grad():
            exact = torch.cat([score(policy, packed).logprobs_BT for packed in packs]).cpu()
            for name in ("sampler", "training pass"):
                record(f"{name} against float32", differences(scored[name], exact))


if __name__ == "__main__":
    main()
    sys.exit(0)
