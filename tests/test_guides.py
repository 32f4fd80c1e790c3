"""The commands and programs of the guides run in the order in which they stand, with a tiny model for the real one."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tokenizers_for_tests import byte_tokenizer

from trl.cli.main import run

ROOT = Path(__file__).parents[1]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT = {
    "sft": "--max_length 128 --assistant_only_loss True", "dpo": "--max_length 64",
    "grpo": "--max_completion_length 4 --per_device_train_batch_size 8 --gradient_accumulation_steps 1",
}  # fmt: skip
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained("tiny")
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained("tiny")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    sums = {"prompt": [{"role": "user", "content": "2 + 3?"}], "solution": "5"}
    (tmp_path / "sums.jsonl").write_text("\n".join([json.dumps(sums)] * 8))
    return tmp_path


def perform(kind, block, known):
    if kind == "text":  # what a command prints
        return
    if kind == "python":
        name = re.match(r"# (\w+\.py)\n", block)
        if name:
            Path(name[1]).write_text(block)
        exec(compile(block.replace(MODEL, "tiny"), "guide", "exec"), known)
    elif block.startswith("cat > "):
        subprocess.run(["bash", "-c", block], check=True)
    else:
        for line in block.replace("\\\n", " ").replace(MODEL, "tiny").splitlines():
            program, job, *words = shlex.split(line, comments=True)
            assert program == "trl"
            model = [] if "--model" in words else ["--model", "tiny"]
            short = ["--max_steps", "2", *model, *SHORT[job].split()] if job in SHORT else []
            assert run([job, *words, *short]) == 0, line


def test_the_first_hour(place, capsys):
    for kind, block in BLOCK.findall((ROOT / "docs" / "first_hour.md").read_text()):
        perform(kind, block, {})
    out = capsys.readouterr().out
    assert "learned: between ⟦ and ⟧" in out
    assert "What is 8 plus 3?" in out
    assert (place / "sums" / "adapter_model.safetensors").exists()


def test_the_programs_of_both_pasts(place):
    from transformers import AutoTokenizer

    blocks = BLOCK.findall((ROOT / "docs" / "migration.md").read_text())
    assert [kind for kind, _ in blocks] == ["python", "python"]
    for kind, block in blocks:
        perform(kind, block, {"name": "tiny", "tokenizer": AutoTokenizer.from_pretrained("tiny")})


def test_links_lead_somewhere():
    wrong = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert not wrong
