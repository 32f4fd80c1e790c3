"""`trl inspect` shows the rows of every training command as they will be learned, without a model's weights."""

import json

import pytest
from tokenizers_for_tests import word_tokenizer
from transformers import LlamaConfig

from trl.cli.main import run
from trl.scripts.jobs import JOBS

LONG = {"prompt": "a b a b a b a b a b", "completion": "c d e"}
PAIR = {"prompt": "a b ", "chosen": "c d", "rejected": "e", "source": "mine"}
ROWS = {
    "text": [{"text": "a b c"}, {"text": "<b>x</b> [bold]"}],
    "given": [{"prompt": "a b ", "completion": "c d"}, LONG],
    "pair": [PAIR, PAIR],
    "steps": [{"prompt": "a b", "completions": ["c d", "e"], "labels": [True, False]}],
    "prompt": [{"prompt": "a b", "solution": "1"}],
}
KINDS = {"sft": "given", "prm": "steps", "grpo": "prompt", "rloo": "prompt", "raft": "prompt", "online_dpo": "prompt"}
KINDS |= {"distillation": "prompt", "gkd": "given"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with rows, a model's config and its tokenizer, and no weights."""
    folder, tokenizer = tmp_path_factory.mktemp("inspected"), word_tokenizer()
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ).save_pretrained(folder / "model")  # fmt: skip
    tokenizer.save_pretrained(folder / "model")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def inspect(place, capsys):
    def run_it(job, kind, *words, model="model"):
        line = ["inspect", job, "--model", str(place / model), "--data", str(place / f"{kind}.jsonl"), *words]
        code = run(line)
        out, err = capsys.readouterr()
        return code, out, err

    return run_it


@pytest.mark.parametrize("job", [job for job in JOBS if job != "ppo"])
def test_every_training_command_has_rows_to_show(inspect, job):
    code, out, err = inspect(job, KINDS.get(job, "pair"))
    assert code == 0, err
    assert JOBS[job].trainer in out
    assert "tokens of a row" in out
    assert "row 0: " in out


def test_what_is_learned_stands_in_brackets(inspect):
    _, out, _ = inspect("sft", "given", "--rows", "1")
    assert "a b⟦ c d <eos>⟧" in out
    assert "learned: between ⟦ and ⟧" in out
    assert "row 1" not in out
    _, out, _ = inspect("sft", "given", "--completion_only_loss", "False", "--row", "0")
    assert "a⟦ b c d <eos>⟧" in out  # nothing predicts the first token
    _, out, _ = inspect("prm", "steps")
    assert "a b c⟦ d⟧⟦✗ e⟧" in out
    _, out, _ = inspect("grpo", "prompt")
    assert "⟦" not in out


def test_pairs_are_shown_part_by_part(inspect):
    _, out, _ = inspect("dpo", "pair", "--rows", "1")
    assert [line.strip() for line in out.splitlines() if line.strip()][-7:] == [
        "prompt", "a b", "chosen", "⟦c d <eos>⟧", "rejected", "⟦e <eos>⟧", "learned: between ⟦ and ⟧",
    ]  # fmt: skip
    assert "no one reads the column 'source'" in out
    _, out, _ = inspect("kto", "pair", "--row", "3")
    assert "completion (bad)\n  ⟦e⟧" in out or "completion (bad)\n  ⟦e <eos>⟧" in out


def test_what_was_cut_is_counted_and_found(inspect):
    _, out, _ = inspect("sft", "given", "--max_length", "12", "--found")
    assert "12 tokens; 1 row was cut" in out
    assert "truncated (2 tokens cut)" in out
    assert "row 1: " in out
    assert "row 0: " not in out


def test_packing_is_told_ahead(inspect):
    _, out, _ = inspect("sft", "given", "--packing", "--max_length", "20")
    assert "2 rows fill 1 rows of 20 tokens to 95.0%" in out


def test_ends_of_tokens(inspect):
    _, out, _ = inspect("sft", "given", "--tokens", "--row", "0")
    assert "a│ b│⟦ c⟧│⟦ d⟧│⟦ <eos>⟧" in out


def test_the_page_holds_texts_as_they_are(inspect, tmp_path):
    code, out, _ = inspect("sft", "text", "--html", str(tmp_path / "rows.html"))
    page = (tmp_path / "rows.html").read_text()
    assert code == 0
    assert f"wrote {tmp_path / 'rows.html'}" in out
    assert "<b>" not in page
    assert "http" not in page
    assert "<script" not in page
    assert 'class="piece learned"' in page


def test_only_a_sample_is_read(inspect):
    _, out, _ = inspect("sft", "given", "--sample", "1")
    assert "1 (the first ones)" in out
    _, out, _ = inspect("sft", "given", "--sample", "0")
    assert "rows" in out
    assert "the first ones" not in out


def test_the_base_of_an_adapter_is_read(inspect, place):
    (place / "adapter").mkdir(exist_ok=True)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(place / "model"), "task_type": "CAUSAL_LM", "r": 4}
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    word_tokenizer().save_pretrained(place / "adapter")
    code, out, err = inspect("sft", "given", model="adapter")
    assert code == 0, err
    assert "a b⟦ c d <eos>⟧" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "given", "--row", "7"], "--row 7: the data set has 2 rows"),
        (["sft", "given", "--max_lenght", "7"], "max_lenght: SFTConfig has no such field; did you mean max_length?"),
        (["stf", "given"], "stf: no training command of that name; choose one of sft"),
        (["sft", "pair", "--rows", "many"], "--rows"),
        (["dpo", "prompt"], "prompt"),
        (["ppo", "prompt"], "ppo reads its prompts while it samples: `trl inspect grpo` shows"),
    ],
)
def test_a_wrong_word_is_one_line(inspect, words, message):
    code, out, err = inspect(*words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert "row 0" not in out
