"""What this library does on a GPU: `python -m benchmarks.gpu.run`, or `make gpu`.

Parts run in the order of what they say; each job of a part is a process of its own with a limit, and one that fails
leaves its error in the results. Results of several calls are merged into one file. `docs/gpu.md` is written from it
(`--page`). On a machine without a GPU the same jobs run in tiny sizes: a test of the jobs, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

OURS = Path(__file__).parents[2]
JOBS = Path(__file__).parent / "jobs"


@dataclass(frozen=True)
class Job:
    """A process of a part."""

    name: str
    script: str
    settings: dict[str, Any] = field(default_factory=dict)
    limit: int = 120
    """seconds"""
    on_cpu: bool = False
    peer: bool = False
    """whether it runs beside the other release of `trl`"""


@dataclass(frozen=True)
class Part:
    name: str
    jobs: Sequence[Job]
    at_once: bool = False
    """whether its jobs run beside each other: nothing is timed in them"""


HOW: dict[str, dict[str, Any]] = {
    "": {}, ", compiled": {"compile_layers": "inductor"}, ", Liger kernels": {"use_liger_kernel": True},
}  # fmt: skip
"""ways to compute the same step, by what the names of their jobs end with"""


def training(model: str, *, how: str = "", peer: bool = False, brief: bool = False) -> list[Job]:
    """Steps of SFT, DPO and GRPO: 8,192 tokens, 4 pairs of 1,024 + 2 x 512, groups of 8 on 1,024 with 512 new."""
    look = {"profile": not (peer or brief), "settings": HOW[how]}
    sizes = {
        "sft": {"rows": 1, "length": 8192}, "dpo": {"rows": 4, "length": 1024, "answer": 512},
        "grpo": {"rows": 1, "length": 1024, "answer": 512, "steps": 8},
    }  # fmt: skip
    return [
        Job(f"{method} {model}{how}", "train", {"method": method, "model": model, **size, **look}, 150, peer=peer)
        for method, size in sizes.items()
    ]


SFT, DPO, GRPO = training("1.5B")
OTHER_WAYS = [training("1.5B", how=how) for how in HOW if how]
SAMPLERS = [
    Job(f"sampler 1.5B{how}", "sample", {"model": "1.5B", "rows": [8, 64], "tokens": 128, "liger": bool(how)}, 150)
    for how in ("", ", Liger kernels")
]
SHORT_ROWS = Job(
    "sft 1.5B, 16 rows of 512", "train", {**SFT.settings, "rows": 16, "length": 512, "profile": False}, 120
)
SMALL_SFT = Job("sft 0.5B, 2,048 tokens", "train", {**SFT.settings, "model": "0.5B", "length": 2048}, 90)
PARTS = (
    Part("exact", (
        Job("exact", "exact", limit=150), Job("steps cpu", "steps", {"precision": "float32"}, on_cpu=True),
        Job("steps float32", "steps", {"precision": "float32"}), Job("steps bf16", "steps", {"precision": "bf16"}),
        Job("steps fp16", "steps", {"precision": "fp16"}),
    ), at_once=True),
    Part("mismatch", (Job("mismatch", "mismatch"),)),
    Part("head", (Job("head", "head"),)),
    Part("sft", (SFT, *(jobs[0] for jobs in OTHER_WAYS), SHORT_ROWS)),
    Part("policy", (DPO, GRPO, *(job for jobs in OTHER_WAYS for job in jobs[1:]), *SAMPLERS)),
    Part("small", (SMALL_SFT, *training("0.5B", brief=True)[1:])),
    Part("peer", (*training("1.5B", how=", Liger kernels", peer=True), *training("1.5B", peer=True))),
)  # fmt: skip


# -- a job ------------------------------------------------------------------------------------


def run_job(job: Job, out: Path, sites: Sequence[str], tiny: bool) -> dict[str, Any]:
    """What the job recorded; and its seconds, and the end of what it said where it did not end well."""
    facts = out / f"{job.name.replace(' ', '_').replace(',', '')}.jsonl"
    facts.unlink(missing_ok=True)
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sites), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    if job.on_cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    settings = {**job.settings, **({"tiny": True} if tiny else {})}
    command = [sys.executable, str(JOBS / f"{job.script}.py"), str(facts), json.dumps(settings)]
    start, log = time.perf_counter(), facts.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=out, env=environment, start_new_session=True
        )
        try:
            code: int | str = process.wait(job.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f"stopped at its limit of {job.limit} s"
    found = merged_facts(facts)
    found["seconds"] = round(time.perf_counter() - start, 1)
    if code != 0:
        found["failed"] = f"{code}\n{log.read_text(errors='replace')[-4000:]}"
    return found


def merged_facts(facts: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in facts.read_text().splitlines() if facts.exists() else ():
        found.update(json.loads(line))
    return found


def compare_steps(out: Path) -> dict[str, Any]:
    """How far a step moved the weights on the card, against the CPU in float32: relative to the CPU's move."""
    import torch

    moved = {name: out / f"steps_{name}.pt" for name in ("cpu", "float32", "bf16")}
    found: dict[str, Any] = {}
    if not moved["cpu"].exists():
        return found
    exact = torch.load(moved["cpu"])
    for precision, limit in (("float32", 1e-3), ("bf16", 0.1)):
        ours = torch.load(moved[precision]) if moved[precision].exists() else {}
        for method, move in exact.items():
            if method not in ours:
                continue
            off = float((ours[method] - move).norm() / move.norm())
            found[f"{method} = CPU, {precision}"] = {"error_found": off, "limit": limit, "holds": off <= limit}
    return found


# -- all of it --------------------------------------------------------------------------------


def install(wheels: Path, into: Path) -> str:
    """The wheels in a folder of their own, which this machine's packages stand behind."""
    into.mkdir(parents=True, exist_ok=True)
    files = sorted(str(each) for each in wheels.glob("*.whl"))
    how = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, "--target", str(into), *files], check=True)
    return str(into)


_saving = Lock()


def save(results: Path, part: str, job: str, found: dict[str, Any]) -> None:
    with _saving:
        saved = json.loads(results.read_text()) if results.exists() else {}
        saved.setdefault(part, {})[job] = found
        saved["date"] = date.today().isoformat()
        results.write_text(json.dumps(saved, indent=1) + "\n")


def summary(found: dict[str, Any]) -> str:
    """One line a fact: short ones whole."""
    lines = [f"  {name}: {json.dumps(value)[:230]}" for name, value in found.items() if "profile" not in name]
    return "\n".join(lines)


def chosen(text: str | None) -> list[Part]:
    """Parts by number or name, `1,3` or `exact,head`; all of them where nothing is said."""
    if not text:
        return list(PARTS)
    known = {str(number): part for number, part in enumerate(PARTS, 1)} | {part.name: part for part in PARTS}
    try:
        return [known[each] for each in text.split(",")]
    except KeyError as error:
        raise SystemExit(f"--part {text}: no part {error}; there are {', '.join(known)}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", help="parts to run, by number or name: " + ", ".join(part.name for part in PARTS))
    parser.add_argument("--job", help="only the job of this name, or jobs whose names contain this")
    parser.add_argument("--results", type=Path, help="file into which results are merged; default: in the folder --out")
    parser.add_argument("--out", type=Path, default=OURS / "build" / "gpu", help="folder of results.json and the logs")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels that are missing here (benchmarks/gpu/wheels.txt)"
    )
    parser.add_argument("--peer", help="site-packages with another release of trl; without it that part is left out")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no job after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a GPU too")
    parser.add_argument("--page", action="store_true", help="only write docs/gpu.md from docs/gpu.json")
    options = parser.parse_args()
    if options.page:
        from benchmarks.gpu.page import write_page

        write_page(OURS / "docs")
        return
    out, start = options.out.resolve(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    wheels = [install(options.wheels, out / "site")] if options.wheels else []
    results = (options.results or out / "results.json").resolve()
    for part in chosen(options.part):
        exact = any(job.name == options.job for job in part.jobs)
        asked = [job for job in part.jobs if job.name == options.job or (not exact and (options.job or "") in job.name)]
        jobs = [job for job in asked if options.peer or not job.peer]

        def one(job: Job, part: Part = part) -> None:
            if time.perf_counter() - start > options.seconds:
                return
            print(f"{part.name}: {job.name}", flush=True)
            sites = [options.peer if job.peer else str(OURS), *wheels]
            found = run_job(job, out, sites, options.tiny)
            save(results, part.name, job.name, found)
            print(f"{part.name}: {job.name}, found\n{summary(found)}", flush=True)

        with ThreadPoolExecutor(len(part.jobs) if part.at_once and (os.cpu_count() or 1) > 7 else 1) as pool:
            list(pool.map(one, jobs))
        if part.name == "exact":
            save(results, "exact", "steps", compare_steps(out))
            print(summary(compare_steps(out)), flush=True)
    print(results)


if __name__ == "__main__":
    main()
