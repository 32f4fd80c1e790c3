"""Imports and exactness: what this card computes against the CPU in float64, or against the plain way on the card."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from typing import Any

import torch
from common import CUDA, DEVICE, TINY, attempt, compared, distance, record, timed
from torch import Tensor

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "flash-attn", "numpy")
TIGHT, COARSE = 1e-4, 3e-2
"""what float32 and bfloat16 may be off by, relative to the whole"""


def machine() -> dict[str, Any]:
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    found = {"python": platform.python_version(), "versions": versions, "card": "none: a CPU"}
    if CUDA:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "card": card.name, "memory_gib": card.total_memory / 2**30, "processors": card.multi_processor_count,
            "cuda": torch.version.cuda,
        }  # fmt: skip
    return found


def ceilings() -> dict[str, float]:
    """What a product of matrices and a copy reach here."""
    n = 256 if TINY else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(lambda: a @ b, warm=5, times=20)
    source = torch.randn(n * n, device=DEVICE)
    copied = timed(lambda: source.clone(), warm=5, times=20)
    return {"bf16_tflops": 2 * n**3 / seconds / 1e12, "copy_tb_s": 2 * source.nbytes / copied / 1e12}


def names() -> dict[str, Any]:
    start = time.perf_counter()
    import trl

    missing: dict[str, str] = {}
    for name in trl.__all__:
        try:
            getattr(trl, name)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return {"names": len(trl.__all__), "seconds": time.perf_counter() - start, "missing": missing}


# -- the head ---------------------------------------------------------------------------------


def exact_head(hidden: Tensor, weight: Tensor, ids: Tensor, factor: Tensor, softcap: float | None) -> list[Tensor]:
    """Log-probabilities, entropies, and both gradients, in float64 on the CPU."""
    hidden, weight = (x.detach().double().cpu().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(-1)
    chosen = logp.gather(1, ids.cpu()[:, None]).squeeze(1)
    (chosen * factor.double().cpu()).sum().backward()
    return [chosen, -(logp.exp() * logp).sum(-1), hidden.grad, weight.grad]


def head(precision: str, trained: bool, softcap: float | None) -> None:
    from trl.models.scoring import Head, token_logprobs

    rows, width, words = (50, 16, 300) if TINY else (1500, 256, 20_000)
    torch.manual_seed(0)
    module = torch.nn.Linear(width, words, bias=False, device=DEVICE).requires_grad_(trained)
    hidden = (3 * torch.randn(rows, width, device=DEVICE)).requires_grad_()
    ids, factor = torch.randint(0, words, (rows,), device=DEVICE), torch.randn(rows, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
        logprobs, entropies, _ = token_logprobs(Head(module, words, 1.0, softcap), hidden, ids, entropy=True)
        (logprobs * factor).sum().backward()
    exact = exact_head(hidden, module.weight, ids, factor, softcap)
    found = [logprobs, entropies, hidden.grad, *([module.weight.grad] if trained else [])]
    what = ("log-probabilities", "entropies", "gradient of states", "gradient of weights")
    limit = TIGHT if precision == "float32" else COARSE
    for name, ours, theirs in zip(what, found, exact, strict=False):
        compared(
            f"head, {precision}{', trained' * trained}{', soft-cap' * bool(softcap)}: {name}",
            distance(ours, theirs),
            limit,
        )


# -- trees, and the sampler -------------------------------------------------------------------


def network(kind: str) -> Any:
    """Four layers with weights large enough that every path shows in the logits."""
    import transformers as t

    sizes = {
        "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if TINY:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = {
        "llama": t.LlamaConfig, "qwen3": t.Qwen3Config, "gemma2": t.Gemma2Config, "gemma3": t.Gemma3TextConfig
    }[kind]  # fmt: skip
    more = {"sliding_window": 64} if kind.startswith("gemma") else {}
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config(**sizes, **more))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    return model.eval().to(DEVICE)


def trees() -> Any:
    from trl.data.packing import pack
    from trl.data.records import Branch, TokenTree

    sizes = ((20, (6, 9)), (0, (12,))) if TINY else ((300, (150, 90, 40, 7)), (0, (500,)), (129, (1, 128)), (40, (60,)))
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 1000, (count,), generator=draw).tolist()

    return pack([TokenTree(ids(p), [Branch(ids(b)) for b in branches]) for p, branches in sizes]).to(DEVICE)


def tree(kind: str, precision: str) -> None:
    from trl.models.forward import plan_of, rows_padded
    from trl.models.scoring import score

    model, packed, found = network(kind), trees(), []
    for padded in (False, True):
        model.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            with rows_padded(padded):
                logprobs_BT = score(model, packed).logprobs_BT
            logprobs_BT.sum().backward()
            how = {"packed": plan_of(model).packed}
        found.append((logprobs_BT.detach(), torch.cat([w.grad.flatten() for w in model.parameters()])))
    limit = TIGHT if precision == "float32" else COARSE
    compared(f"tree = padded, {kind}, {precision}: log-probabilities", distance(found[0][0], found[1][0]), limit, **how)
    compared(f"tree = padded, {kind}, {precision}: gradients", distance(found[0][1], found[1][1]), 3 * limit, **how)


def sampler(precision: str) -> None:
    from trl.data.packing import pack
    from trl.data.records import Branch, TokenTree
    from trl.generation import LocalSampler
    from trl.generation.sampler import SamplingParams
    from trl.models.scoring import score

    model, tokens = network("llama"), 8 if TINY else 64
    prompts = [list(range(3, 3 + length)) for length in ((5, 9) if TINY else (5, 70, 130, 300))]
    params = SamplingParams(max_new_tokens=tokens, min_new_tokens=tokens, stop_token_ids=(), seed=0)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
        drawn = LocalSampler(model).sample(prompts, params, n=4)
        packed = pack([TokenTree(p, [Branch(c.ids) for c in group]) for p, group in zip(prompts, drawn, strict=True)])
        forward_BT = score(model, packed.to(DEVICE)).logprobs_BT
    raw = torch.tensor([c.raw_logprobs for group in drawn for c in group])
    compared(f"sampler = forward, {precision}", distance(raw, forward_BT), TIGHT if precision == "float32" else COARSE)


def main() -> None:
    torch.set_float32_matmul_precision("highest")
    record("machine", machine())
    for name, fact in (("names", names), ("ceilings", ceilings)):
        with attempt(name):
            record(name, fact())
    for precision in ("float32", "bf16"):
        for trained, softcap in ((False, None), (True, None), (True, 20.0)):
            with attempt(f"head, {precision}, trained={trained}, softcap={softcap}"):
                head(precision, trained, softcap)
        for kind in ("llama",) if TINY else ("llama", "qwen3", "gemma2", "gemma3"):
            with attempt(f"tree = padded, {kind}, {precision}"):
                tree(kind, precision)
        with attempt(f"sampler = forward, {precision}"):
            sampler(precision)


if __name__ == "__main__":
    main()
    sys.exit(0)
