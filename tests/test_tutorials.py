"""The programs of the tutorials run as they stand, four of them as notebooks; a tiny model for the real one."""

import json
import re
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tokenizers_for_tests import byte_tokenizer

from scripts.write_notebooks import TUTORIALS, file_of, notebook

ROOT = Path(__file__).parents[1]
PAGES = sorted(page.stem for page in (ROOT / "docs" / "tutorials").glob("*.md"))
MODEL = re.compile(r"HuggingFaceTB/SmolLM2-\d+M-Instruct|Qwen/Qwen[\w.-]+")
pytestmark = [
    pytest.mark.slow, pytest.mark.filterwarnings("ignore:You passed a model_id", "ignore:No dataset is provided")
]  # fmt: skip


def programs(tutorial):
    """Of the notebook where there is one."""
    if tutorial not in TUTORIALS:
        text = (ROOT / "docs" / "tutorials" / f"{tutorial}.md").read_text(encoding="utf-8")
        return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    cells = json.loads(file_of(tutorial).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_a_notebook_is_its_tutorial(tutorial):
    assert file_of(tutorial).read_text(encoding="utf-8") == notebook(tutorial), "run scripts/write_notebooks.py"


@pytest.mark.parametrize("tutorial", PAGES)
def test_it_runs(tutorial, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained("tiny")
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained("tiny")
    known = {}
    blocks = programs(tutorial)
    assert len(blocks) > 0
    for block in blocks:
        shorter = re.sub(r"max_steps=\d+", "max_steps=4" if "logging_steps=2" in block else "max_steps=10", block)
        shorter = re.sub(r"max_completion_length=\d+", "max_completion_length=8", shorter)
        exec(compile(MODEL.sub("tiny", shorter), f"tutorials/{tutorial}", "exec"), known)
    if tutorial == "ppo":
        assert capsys.readouterr().out.count("score") == 4
    else:
        assert known["trainer"].state.global_step > 0


def test_every_tutorial_is_on_the_site():
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"tutorials/{page}.md" in listed for page in PAGES)
