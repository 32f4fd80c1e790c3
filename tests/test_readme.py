"""The README's programs run as they stand, with a tiny model in place of the real one."""

import re
import warnings
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tokenizers_for_tests import byte_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
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


def text_of(name):
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_numbers_in_the_documents_are_those_of_the_code():
    from trl.data.microbatches import CPU_TOKENS

    assert not re.search(r"\d+ losses", text_of("README.md"))  # docs/papers.md lists them, and a test reads that
    assert f"A single process on the CPU takes {CPU_TOKENS:,}" in text_of("docs/offline.md")
    assert f"about {CPU_TOKENS // 2} tokens" in text_of("docs/on_policy.md")
    longest = max(len(path.read_text().splitlines()) for path in (ROOT / "examples").glob("*.py"))
    (limit,) = re.findall(r"Whole scripts of under (\d+) lines", text_of("README.md"))
    assert longest < int(limit)


def test_numbers_in_the_help_are_those_of_the_code():
    import trl
    from trl.cli.training import field_docs
    from trl.data.microbatches import CPU_TOKENS

    budget = " ".join(field_docs(trl.SFTConfig)["max_tokens_per_microbatch"].split())
    assert f"a single process on the CPU, which takes {CPU_TOKENS:,} at a time" in budget
