"""docs/gpu.md and its chart, from what `benchmarks.gpu.run` measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.plots import bars, write

HEAD = """# On a GPU

Written by `make gpu ARGS=--page` from `docs/gpu.json`, the results of `make gpu` (`python -m benchmarks.gpu.run`).
Without network, `--wheels DIR` installs what is missing into a folder of its own (`benchmarks/gpu/wheels.txt` says how
to fetch it). `--part 1,3` runs parts by number or name, in the order of what they say: exact, mismatch, head, sft,
policy, small, peer; `--peer SITE_PACKAGES` runs the last beside another release of `trl`. Each job is a process of its
own with a time limit, and one that fails leaves its error in the results.

- **Seconds** are read off the device's own events: the median of steps after three to warm up, optimizer step
  included. **Tokens** are those of all rows, each with its prompt, whatever the pass shares between rows.
- **MFU**: the operations that the mathematics needs, a shared prompt once, over what the card can do in that time by
  its data sheet (989 TFLOP/s in dense bfloat16 on an H100 or H200). Recomputation does not count as work.
- **Memory** is the most that tensors had at a time, in GiB.
- **Models** have random weights in the shapes of Qwen2.5 (1.5B and 0.5B; 151,936 words, head and embedding tied),
  stored in float32, computed in bfloat16 by autocast.
"""
ATTENTION = """
## Attention of packed rows

Rows that share a prompt are computed by FlexAttention, rows that share nothing in half precision by torch's flash
attention for rows of any lengths. A kernel of each kind (precision, heads, window, soft-cap, sinks) is compiled once,
for all lengths, and tried on a few tokens against attention segment by segment before it is used; one that fails is
left out, with one line that says so. Attention dropout is computed segment by segment.

The mask is two numbers a token and a list of the blocks of 128 x 128 that have anything to compute. It is laid out on
the host from the segments' bounds, once for all layers and passes over a batch. On one core of a CPU, for trees of
1,024 tokens with 6 branches of 512:

| tokens | numbers kept | seconds | before: memory at its peak | seconds |
| --- | --- | --- | --- | --- |
| 4,096 | 0.06 MB | 0.004 | 253 MB | 1.0 |
| 16,384 | 0.25 MB | 0.006 | 2,894 MB | 3.9 |
| 65,536 | 1.0 MB | 0.011 | 46 GB (not made) | |
| 262,144 | 4.0 MB | 0.065 | | |

`compile_layers="inductor"` (or `torch_compile=True`) has torch compile the layers of the model, and of a reference of
its kind: one graph for packed rows of every length, without a break. The first step then takes some 20 to 60 seconds;
sampling runs the layers as they are written. On a CPU it trains alike and gains little.
"""
PRECISION = """
## Precision and memory on a GPU

- Weights that are trained are float32, and passes compute in bfloat16 by autocast where the GPU has it: the default of
  all trainers here (`bf16=False`, or `accelerator_kwargs={"mixed_precision": "no"}` for `PPOTrainer`, undoes it).
- `fp16=True` computes in float16 with a scaler: a step whose gradient overflows is left out and the scale is halved. A
  loss that is not finite is handled by `on_non_finite`, as in every precision.
- The head's products have factors in that precision and sums in float32, in the backward pass too. It keeps at most 256
  MiB of logits, and as much again for their gradients, whatever the vocabulary; kernels of Triton walk them where that
  package is installed (torch brings it on Linux), else torch's operations.
- AdamW is one fused kernel (`optim="adamw_torch_fused"`, the default; `PPOTrainer` does so too).
- `use_liger_kernel=True` puts the kernels of the package liger-kernel into the model. A step of sampling has kernels of
  its own for norms, rotary embeddings and gates, with or without that package.
- What would not fit into the memory that is free is cut into smaller passes, or its layers are computed again in the
  backward pass, and a line says so ([scale.md](scale.md), `memory_plan`).
- Batches of rows are packed and pinned by a thread while the one before is computed; `dataloader_num_workers` gives
  that to processes. Same batches, same order. A collator or transform of yours, and a stream, stay out of the thread.
- TF32 is off unless `tf32=True`: only what is left in float32 (routers, value heads without autocast) would gain, and
  sampler and training pass would then agree less (`models/precision.py`).
- 4-bit bases with an adapter (bitsandbytes, the extra `quantization`) train in SFT, DPO and GRPO, on a CPU too.
"""
NOT_RUN = """
## Results

Not run: no results of a GPU are in `docs/gpu.json`. On a CPU the same jobs run in tiny sizes, which tests do.
"""
PEER_GOALS = {"sft": "no goal", "dpo": "1.8x", "grpo": "2.5x"}
GOALS = {"sft 1.5B": ("MFU of SFT on 8,192 tokens, 1.5B", 0.45)}


def number(value: Any, digits: int = 3) -> str:
    """At most so many digits that say something."""
    if value is None:
        return "–"
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines) + "\n"


def facts_of(results: dict[str, Any], part: str) -> Iterator[tuple[str, str, Any]]:
    """Job, name and value of all that a part found."""
    for job, found in results.get(part, {}).items():
        for name, value in found.items():
            yield job, name, value


def machine(results: dict[str, Any]) -> str:
    found = results.get("exact", {}).get("exact", {})
    about, ceilings = found.get("machine", {}), found.get("ceilings", {})
    versions = ", ".join(f"{name} {one}" for name, one in about.get("versions", {}).items() if one != "not installed")
    reached = ""
    if "bf16_tflops" in ceilings:
        reached = f" A product of 8,192 x 8,192 matrices in bfloat16 reaches {number(ceilings['bf16_tflops'])} TFLOP/s"
        reached += f" here, a copy {number(ceilings['copy_tb_s'])} TB/s."
    where = f"{about.get('card', 'unknown card')}, {results.get('date', '')}; Python {about.get('python')}, {versions}."
    return f"{where}{reached}\n"


def exactness(results: dict[str, Any]) -> str:
    rows = [
        [name, f"{value['error_found']:.1e}", f"{value['limit']:.0e}", "yes" if value["holds"] else "**no**"]
        for _, name, value in facts_of(results, "exact") if isinstance(value, dict) and "error_found" in value
    ]  # fmt: skip
    held = sum(row[3] == "yes" for row in rows)
    return f"{held} of {len(rows)} hold.\n\n" + table(["what", "relative error", "limit", "holds"], rows)


def mismatch(results: dict[str, Any]) -> str:
    rows = [
        [name, number(value["token"]), number(value["completion"]), f"{value['outside_clip']:.0%}"]
        for _, name, value in facts_of(results, "mismatch") if isinstance(value, dict) and "token" in value
    ]  # fmt: skip
    return table(["precision", "a token", "a completion", "completions whose ratio is off by more than 0.2"], rows)


def head(results: dict[str, Any]) -> str:
    rows = [
        [name, f"{1e3 * value['seconds']:.1f}", number(value["peak_gib"]), number(value["mfu"]),
         " / ".join(f"{off:.0e}" for off in value["from_full_logits"])]
        for _, name, value in facts_of(results, "head") if isinstance(value, dict) and "peak_gib" in value
    ]  # fmt: skip
    return table(["way", "ms", "GiB beside weights and their gradient", "MFU", "from full logits"], rows)


def steps(results: dict[str, Any]) -> str:
    rows = []
    for part in ("sft", "policy", "small", "peer"):
        for job, found in results.get(part, {}).items():
            step, name = found.get("step"), f"{job}{', the peer' if part == 'peer' else ''}"
            if step:
                peak = number(found.get("peak_gib"))
                rows.append([name, number(step["seconds"]), number(step["tokens_s"]), number(step["mfu"]), peak])
            elif "failed" in found and found.get("seconds") is not None:
                rows.append([name, "failed: " + found["failed"].strip().splitlines()[-1][:90], "", "", ""])
    return table(["step", "seconds", "tokens/s", "MFU", "GiB"], rows)


def sampling(results: dict[str, Any]) -> str:
    rows = [
        [f"{job}, {name}", number(value["tokens_s"]), number(value.get("peak_gib"))]
        for part in ("policy", "small", "peer") for job, name, value in facts_of(results, part)
        if isinstance(value, dict) and "tokens_s" in value and name != "step"
    ]  # fmt: skip
    return table(["sampling", "tokens/s", "GiB"], rows)


def against_the_peer(results: dict[str, Any]) -> str:
    """The best of our ways against the best of the peer's, a row a method."""
    rows = []
    for method, goal in PEER_GOALS.items():
        ours, theirs = (
            [(job, one) for part in parts for job, one in results.get(part, {}).items()
             if job.startswith(f"{method} 1.5B") and one.get("step")]
            for parts in (("sft", "policy"), ("peer",))
        )  # fmt: skip
        if not ours or not theirs:
            continue
        (job, best), (peer_job, peer) = (
            max(side, key=lambda each: each[1]["step"]["tokens_s"]) for side in (ours, theirs)
        )
        faster, smaller = best["step"]["tokens_s"] / peer["step"]["tokens_s"], best["peak_gib"] / peer["peak_gib"]
        drawing = "–"
        if "sampling" in best and "sampling" in peer:
            drawing = f"{best['sampling']['tokens_s'] / peer['sampling']['tokens_s']:.1f}x"
        rows.append([job, peer_job, f"{faster:.2f}x ({goal})", f"{smaller:.2f} (0.5)", drawing])
    columns = ["ours", "the peer's", "tokens/s of an update (goal)", "memory (goal)", "tokens/s of sampling"]
    return table(columns, rows)


def chart(results: dict[str, Any], file: Path) -> None:
    """Bars of MFU and of memory, a step each."""
    found = {
        f"{job}{' (peer)' * (part == 'peer')}": one for part in ("sft", "policy", "small", "peer")
        for job, one in results.get(part, {}).items() if one.get("step", {}).get("mfu")
    }  # fmt: skip
    if not found:
        return
    goals = {job: 100 * goal for job, (_, goal) in GOALS.items()}
    shares = [(name, "", 100 * one["step"]["mfu"], goals.get(name)) for name, one in found.items()]
    memory = [(name, "", one["peak_gib"], None) for name, one in found.items()]
    panels = [bars(shares, "MFU of a step", " %", 10), bars(memory, "Memory of a step", " GiB", 10)]
    write(file, panels, 1, {}, "the mark: the goal")


def page(results: dict[str, Any]) -> str:
    """The whole page; without results it says so."""
    if not results:
        return HEAD + ATTENTION + PRECISION + NOT_RUN
    parts = [HEAD, ATTENTION, PRECISION, "\n## Results\n\n", machine(results)]
    if any(part in results for part in ("sft", "policy", "small")):
        parts += ["\n![MFU and memory of a step](gpu.svg)\n\n", steps(results), "\n", sampling(results)]
    for job, (what, goal) in GOALS.items():
        ways = [
            one["step"]["mfu"] for name, one in results.get("sft", {}).items() if name.startswith(job) and "step" in one
        ]
        reached = max((mfu for mfu in ways if mfu), default=None)
        if reached is not None:
            parts.append(f"\n{what}: {reached:.1%} (goal {goal:.0%}).\n")
    if results.get("peer"):
        parts += ["\nAgainst trl 1.16.0:\n\n", against_the_peer(results)]
    if results.get("notes"):
        parts += ["\n", "\n".join(f"- {note}" for note in results["notes"]), "\n"]
    for part, title, section in (
        ("head", "The head alone: 8,192 tokens, width 1,536, 151,936 words, forward and backward", head),
        ("mismatch", "Sampler and training pass before any update", mismatch),
        ("exact", "Exactness", exactness),
    ):
        if part in results:
            parts.append(f"\n## {title}\n\n{section(results)}")
    return "".join(parts)


def write_page(docs: Path) -> None:
    """docs/gpu.md, and docs/gpu.svg where steps were measured."""
    file = docs / "gpu.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    (docs / "gpu.md").write_text(page(results))
    if results:
        chart(results, docs / "gpu.svg")
