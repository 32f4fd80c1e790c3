"""C16: what is uploaded is the model, its card and what `from_pretrained` reads, unless more is asked for."""

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conformity import build
from transformers import AutoModelForCausalLM, AutoTokenizer

PRIVATE = ("rollouts", "metrics", "training_args", "extra_state", "optimizer", "trainer_state", "rng_state", "manifest")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Uploads as folders in `tmp_path/hub`, without a network."""
    uploads = []

    def upload(self, *, repo_id, folder_path, path_in_repo=None, allow_patterns=None, ignore_patterns=None,
               run_as_future=False, **rest):  # fmt: skip
        root = Path(folder_path)
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        kept = list(huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ))  # fmt: skip
        target = tmp_path / "hub" / str(len(uploads))
        for name in kept:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((root / name).read_bytes())
        uploads.append(SimpleNamespace(repo=repo_id, names=kept, place=path_in_repo, folder=target, **rest))
        job = Future()
        job.set_result("done")
        return job if run_as_future else "done"

    def create(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=f"me/{Path(repo_id).name}")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr("transformers.trainer.TrainingSummary.from_trainer",
                        lambda *args, **kwargs: SimpleNamespace(to_model_card=lambda: "# card\n"))  # fmt: skip
    return uploads


def check_model(upload):
    assert not [name for name in upload.names if any(word in name for word in PRIVATE)]
    assert AutoModelForCausalLM.from_pretrained(upload.folder).config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(upload.folder)


@pytest.mark.parametrize("blocking", [True, False])
def test_after_training(blocking, hub, tmp_path):
    folder = tmp_path / "mine"
    trainer = build("grpo", folder, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    (folder / "notes.txt").write_text("private")
    (folder / "bema").mkdir()
    (folder / "bema" / "model.safetensors").write_text("another model")
    trainer.push_to_hub(blocking=blocking)
    (upload,) = hub
    assert upload.repo == "me/mine"
    check_model(upload)
    assert "README.md" in upload.names
    assert not {"notes.txt", "bema/model.safetensors"} & {*upload.names}
    assert (folder / "rollouts").is_dir()
    assert (folder / "model.safetensors").exists()
    assert not list(folder.glob(".saving-*"))
    assert trainer.args.output_dir == str(folder)


def test_an_adapter(hub, tmp_path):
    trainer = build("sft", tmp_path / "mine", lora=True, max_steps=1)
    trainer.push_to_hub()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {*hub[0].names}
    assert not [name for name in hub[0].names if any(word in name for word in PRIVATE)]


@pytest.mark.parametrize(
    ("strategy", "place"), [("every_save", None), ("checkpoint", "last-checkpoint"), ("end", None)]
)
def test_while_it_trains(strategy, place, hub, tmp_path):
    trainer = build(
        "grpo", tmp_path / "mine", max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1,
        push_to_hub=True, hub_strategy=strategy,
    )  # fmt: skip
    trainer.train()
    models = [upload for upload in hub if upload.place is None]
    for upload in models:
        check_model(upload)
    assert len(models) == (0 if strategy == "end" else 2)
    whole = [upload for upload in hub if upload.place is not None]
    assert [upload.place for upload in whole] == ([place] * 2 if place else [])
    for upload in whole:  # all that a run needs to go on
        listed = json.loads((upload.folder / "manifest.json").read_text())["files"]
        assert {*upload.names} == {*listed, "manifest.json"}
