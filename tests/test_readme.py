"""The README's programs run as they stand, with a tiny model in place of the real one."""

import re
import warnings
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tokenizers_for_tests import byte_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_all_programs_are_found():
    assert len(PROGRAMS) == README.count("```python") == 2
    assert all(f'"{NAME}"' in program for program in PROGRAMS)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=("dpo", "ppo"))
def test_runs(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained("tiny")
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained("tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a program may warn its user
        exec(compile(program.replace(NAME, "tiny"), "README.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 3
