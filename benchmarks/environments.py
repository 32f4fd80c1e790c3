"""An environment of its own for each peer, made once from the package registry."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("TRL_BENCH_CACHE", Path.home() / ".cache" / "trl" / "bench"))
TORCH = "torch==2.13.0"
PEERS = {
    "trl 1.16.0": [TORCH, "trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2"],
    "trl 0.7.7": [
        TORCH,
        "trl==0.7.7",
        "transformers==4.36.2",
        "accelerate==0.25.0",
        "peft==0.7.1",
        "datasets==2.15.0",
        "pyarrow==14.0.2",
        "numpy<2",
    ],
    "transformers 5.23.0": [TORCH, "transformers==5.23.0", "accelerate==1.15.0"],
}
OURS = Path(__file__).resolve().parent.parent


def folder_of(peer: str) -> Path:
    """The environment's folder; another list of packages is another folder."""
    mark = hashlib.sha256(" ".join([*PEERS[peer], sys.version]).encode()).hexdigest()[:8]
    return CACHE / f"{peer.replace(' ', '-')}-{mark}"


def python_of(peer: str | None) -> str:
    """The interpreter of a peer, built if need be; that of this process for None."""
    if peer is None:
        return sys.executable
    folder = folder_of(peer)
    python, done = folder / "bin" / "python", folder / "DONE"
    if not done.exists():
        print(f"building the environment of {peer} in {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip"]
        chosen = {"PIP": " ".join(pip), "TORCH": TORCH.split("==")[1]}  # the CPU build where there is no GPU
        subprocess.run(["sh", str(OURS / "scripts" / "install_torch.sh")], check=True, env={**os.environ, **chosen})
        subprocess.run([*pip, "install", "--quiet", *PEERS[peer]], check=True)
        done.write_text("\n".join(PEERS[peer]))
    return str(python)


def prepare_materials(folder: Path, real: bool) -> None:
    """Write what the jobs load, and the `real` ones; by another process: a large parent counts as its children."""
    command = [python_of(None), "-m", "benchmarks.materials", str(folder), *["--real"] * real]
    subprocess.run(command, cwd=OURS, check=True, stderr=subprocess.DEVNULL)


def versions(python: str, packages: tuple[str, ...] = ("torch", "transformers", "accelerate", "numpy")) -> str:
    """`torch 2.13.0, ...` as that interpreter has them."""
    code = f"from importlib.metadata import version as v\nprint(', '.join(f'{{p}} {{v(p)}}' for p in {packages!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
