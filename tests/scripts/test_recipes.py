"""Every recipe trains for two steps, on a tiny model in place of its own."""

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_model
from tokenizers_for_tests import byte_tokenizer

from trl.cli.main import run
from trl.import_utils import is_bitsandbytes_available

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "user", "content": "2 + 3?"}]
ROWS = {
    "sft": {"messages": [*ASKED, {"role": "assistant", "content": "5"}]},
    "dpo": {"prompt": "2 + 3? ", "chosen": "5", "rejected": "6"},
    "kto": {"prompt": "2 + 3? ", "completion": "5", "label": True},
    "grpo": {"prompt": ASKED, "solution": "$5$"},
    "ppo": {"prompt": "2 + 3? "},
    "distillation": {"prompt": ASKED},
}
ROWS["reward"] = ROWS["dpo"]
SHORTER = {"grpo": ["--max_completion_length", "4"], "distillation": ["--max_completion_length", "4"]}
SHORTER["ppo"] = ["--response_length", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("recipes"), byte_tokenizer(CHAT)
    tokenizer.save_pretrained(folder / "tiny")
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "tiny")
    for name, row in ROWS.items():
        rows = [row, {**row, "prompt": "1 + 1? ", "label": False}] if name == "kto" else [row]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows * 16)))
    (folder / "mine.py").write_text(
        "def my_reward(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    settings, job = yaml.safe_load(recipe.read_text()), recipe.stem.partition("-")[0]
    words = [job, "--config", str(recipe), "--data", f"{job}.jsonl", "--model", "tiny", "--max_steps", "2"]
    words += ["--output_dir", str(tmp_path), "--save_strategy", "no", "--max_grad_norm", "1", *SHORTER.get(job, [])]
    words += ["--teacher_model_name_or_path", "tiny"] if "teacher_model_name_or_path" in settings else []
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    words += ["--max_length", "64"] if "max_length" in settings else []
    words += ["--load_in_4bit", str(is_bitsandbytes_available())] if "load_in_4bit" in settings else []
    words += ["--reward", "mine.py:my_reward"] if job == "ppo" else []
    if "accelerate_config" in settings:  # one process here, without its launcher
        monkeypatch.setenv("TRL_LAUNCHED", "1")
    assert run(words) == 0, capsys.readouterr().err
    names = {path.name for path in tmp_path.iterdir()}
    assert ("adapter_model.safetensors" if settings.get("use_peft") else "model.safetensors") in names


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_to_call_it(recipe):
    head = [line[2:] for line in recipe.read_text().splitlines() if line.startswith("# ")]
    (call,) = [line.strip() for line in head if line.strip().startswith("trl ")]
    assert re.fullmatch(
        rf"trl {recipe.stem.partition('-')[0]} --config recipes/{recipe.name} --data \S+( --reward \S+)?", call
    )
    assert any(line.startswith("A row: ") for line in head)
    assert yaml.safe_load(recipe.read_text())["output_dir"] == recipe.stem
