"""The jobs with a real chat model, on a tiny one: each makes a step and writes its curve. Their rewards by hand."""

import json
import random
import warnings

import pytest

pytest.importorskip("peft")

from benchmarks import smollm2, sums_smollm2, tools_smollm2
from tests.tiny_models import tiny_model
from tests.tokenizers_for_tests import byte_tokenizer

NAMES = {"sums": {"right_number", "equation"}, "tools": {"some_call", "right_call", "right_answer"}}
FEW = ["--steps", "1", "--prompts", "2", "--group", "2", "--held-out", "2", "--tokens", "4", "--last-layers", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("tiny"), byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024, **ends).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def few_sums(count, seed, terms):
    return [{"prompt": [{"role": "user", "content": f"1 + {n} ="}], "answer": str(1 + n)} for n in range(8)]


@pytest.mark.parametrize("job", ["sums", "tools"])
def test_one_step(job, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sums_smollm2, "problems", few_sums)
    module = {"sums": sums_smollm2, "tools": tools_smollm2}[job]
    out = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        module.main(["--model", folder, "--out", str(out), "--seed", "3", *FEW])
    (step,) = smollm2.curve_of(out)
    report = json.loads((out / "report.json").read_text())
    for name in NAMES[job]:
        assert 0 <= step[name] <= 1
        assert 0 <= report["after"][f"eval_rewards/{name}/mean"] <= 1
    assert report["settings"]["seed"] == 3
    assert "held out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is there already"):
        module.main(["--model", folder, "--out", str(out), *FEW])


def said(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_rewards_of_sums():
    texts = said("4 - 6 = -2", "4 - 6 = 2", "It is -2.", "", "4 - 6 = -2.", "4-6=-2")
    assert sums_smollm2.right_number(texts, ["-2"] * 6) == [1, 0, 1, 0, 1, 1]
    assert sums_smollm2.equation(texts) == [1, 1, 0, 0, 0, 0]


def test_rewards_of_tools():
    row = tools_smollm2.problem(random.Random(0))
    function, numbers = row["call"]["name"], row["call"]["arguments"]

    def called(name, arguments, last):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        first = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [first, {"role": "tool", "content": "?"}, {"role": "assistant", "content": last}]

    other = "add" if function == "multiply" else "multiply"
    answer = row["answer"]
    completions = [
        called(function, numbers, f"It is {answer}."),
        called(other, numbers, f"{answer} or 1"),
        called("divide", numbers, ""),
        said(f"It is {answer}.")[0],
        [*called(function, numbers, "")[:1], {"role": "tool", "content": answer}],  # no room to say it
    ]
    rights = [row["call"]] * 5
    assert tools_smollm2.some_call(completions) == [1, 1, 0, 0, 1]
    assert tools_smollm2.right_call(completions, rights) == [1, 0, 0, 0, 1]
    assert tools_smollm2.right_answer(completions, [answer] * 5) == [1, 0, 0, 1, 0]
    assert row["prompt"][-1]["content"].startswith("What is")


def test_ends_of_a_curve_and_curves_of_several_runs(tmp_path):
    logs = [{"step": n + 1, "rewards/a/mean": n / 10, "rewards/a/std": 0.0, "loss": 1.0} for n in range(10)]
    logs = [{"step": 0, "eval_rewards/a/mean": 0.0}, *logs, {"step": 10, "train_loss": 1.0}]
    runs = [tmp_path / "one-0", tmp_path / "one-1"]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logs))
    assert smollm2.ends(smollm2.curve_of(runs[0]), "a") == pytest.approx((0.2, 0.7))
    smollm2.gather(runs, tmp_path / "all")
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert lines[11] == {"run": "one-1", "step": 2, "a": 0.1}
    drawn = (tmp_path / "all.svg").read_text()
    assert "one: a" in drawn
    assert drawn.count("seed ") == 2
