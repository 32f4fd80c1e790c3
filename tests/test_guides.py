"""The commands and programs of the guides run in the order in which they stand, with a tiny model for the real one."""

import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from families import model_of, picture, processor_of
from tiny_models import tiny_model
from tokenizers_for_tests import byte_tokenizer

from trl.cli.main import run

ROOT = Path(__file__).parents[1]
MODEL = re.compile(r"HuggingFaceTB/SmolLM2-135M-Instruct|Qwen/Qwen[\w.-]+")
SHORT = {
    "sft": "--max_length 128 --assistant_only_loss True", "dpo": "--max_length 64",
    "grpo": "--max_completion_length 4 --per_device_train_batch_size 8 --gradient_accumulation_steps 1",
}  # fmt: skip
SHORT_DIFFUSION = 'train_batch_size=3, num_epochs=1, sample_num_steps=2, mixed_precision="no")'
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 + 3?\n"))
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
        exec(compile(MODEL.sub("tiny", block), "guide", "exec"), known)
    elif block.startswith("cat > "):
        subprocess.run(["bash", "-c", block], check=True)
    else:
        for line in MODEL.sub("tiny", block.replace("\\\n", " ")).splitlines():
            program, job, *words = shlex.split(line, comments=True)
            assert program == "trl"
            model = [] if {"--model", "--model_name_or_path"} & set(words) else ["--model", "tiny"]
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


def chats():
    pair = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    return "\n".join([json.dumps({"messages": pair})] * 8)


def test_the_lines_of_the_readme(place):
    for name in ("chats.jsonl", "held-out.jsonl"):
        (place / name).write_text(chats())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for kind, block in BLOCK.findall((ROOT / "README.md").read_text()):
        if block.startswith("make "):
            assert set(block.split()) - {"make"} <= targets
        elif not kind:
            perform(kind, block, {})
    assert (place / "sft-laptop" / "report.html").exists()


def test_the_blocks_of_the_command_line(place, monkeypatch):
    from trl.scripts.jobs import JOBS
    from trl.scripts.training import read_settings

    pair = {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}
    (place / "rows.jsonl").write_text(chats())
    (place / "pairs.jsonl").write_text("\n".join([json.dumps(pair)] * 8))
    (place / "prompts.jsonl").write_text((place / "sums.jsonl").read_text())
    model_of("smolvlm").save_pretrained(place / "sees")
    processor_of("smolvlm").save_pretrained(place / "sees")
    for number, side in enumerate(("left", "right")):
        picture(number).save(place / f"{side}.png")
    known = {}
    line = ["script.py", "--model_name_or_path", "tiny", "--dataset_name", "rows.jsonl", "--output_dir", "out"]
    monkeypatch.setattr("sys.argv", line)
    monkeypatch.setenv("WANDB_PROJECT", "before")
    for kind, block in BLOCK.findall((ROOT / "docs" / "command_line.md").read_text()):
        if kind == "yaml":
            (place / "settings.yaml").write_text(block)
            _, settings = read_settings(JOBS["sft"], ["--config", "settings.yaml"])
            assert [one.path for one in settings["datasets"]] == ["trl-lib/Capybara", "json"]
            assert (settings["num_processes"], settings["learning_rate"]) == (4, 1e-4)
        else:
            perform(kind, block, known)
    assert known["script_args"].dataset_name == "rows.jsonl"
    assert known["training_args"].output_dir == "out"


def test_the_program_of_the_offline_guide(place):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = Dataset.from_list([{"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}] * 4)
    known = {"model": AutoModelForCausalLM.from_pretrained("tiny"), "pairs": pairs}
    known["tokenizer"] = AutoTokenizer.from_pretrained("tiny")
    for kind, block in BLOCK.findall((ROOT / "docs" / "offline.md").read_text()):
        perform(kind, block, known)
    assert known["trainer"].state.global_step > 0


def test_the_program_of_the_diffusion_guide(place):
    from tiny_diffusion import tiny_stable_diffusion

    tiny_stable_diffusion(place / "pictures")
    for kind, block in BLOCK.findall((ROOT / "docs" / "ddpo.md").read_text()):
        if kind == "bash":  # the examples have tests of their own
            assert set(re.findall(r"examples/\w+\.py", block)) == {"examples/ddpo.py"}
            continue
        block = block.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", "pictures")
        perform(kind, block.replace("train_batch_size=3)", SHORT_DIFFUSION), {})
    assert (place / "cat-of-few-bytes").is_dir()


def test_links_lead_somewhere():
    wrong = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert not wrong
