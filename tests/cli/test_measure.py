"""`trl eval` and `trl compare`: their figures against plain transformers, and what they say of them."""

import json
import re
import sys
import types

import numpy as np
import peft
import pytest
import torch
from tiny_models import lora, tiny_model
from tokenizers_for_tests import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from trl.cli.main import run
from trl.reports.comparison import Comparison, Line, number, render, short_names
from trl.reports.intervals import Interval, interval_of
from trl.scripts.measure import hold, of_rows, wins
from trl.scripts.open_model import open_model

TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two models, `a` and `b`, in the working folder."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    for name, seed in (("a", 1), ("b", 2)):
        model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    return tmp_path


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path.name


def talks(answers=("Me.", "You, of course.", "Nobody knows.", "They.")):
    return [{"messages": [TALK[0], {"role": "assistant", "content": text}]} for text in answers]


def pairs(count=4):
    return [{"prompt": f"{i}: ", "chosen": "yes" * (i + 1), "rejected": "no", "right": "e"} for i in range(count)]


def logprobs(name, prompt, answer):
    """Of the answer's tokens, by transformers alone; and whether each is the likeliest one."""
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    asked, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    with torch.no_grad():
        logits = model(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1]
    found = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).flatten()
    return found.numpy(), (logits.argmax(-1) == torch.tensor(said)).numpy()


# -- figures -------------------------------------------------------------------------------------


def test_loss_and_accuracy_are_those_of_what_the_assistant_says(place):
    data = write(place / "talks.jsonl", talks())
    loss, accuracy = of_rows(open_model("a"), hold(data, None, None))
    ask = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    wanted = [logprobs("a", ask, f"{row['messages'][1]['content']}<|im_end|>") for row in talks()]
    assert loss.totals == pytest.approx([-each.sum() for each, _ in wanted], rel=1e-4)
    assert loss.counts.tolist() == [len(each) for each, _ in wanted]
    assert accuracy.totals.tolist() == [each.sum() for _, each in wanted]
    assert loss.value == pytest.approx(-sum(e.sum() for e, _ in wanted) / sum(len(e) for e, _ in wanted), rel=1e-4)


def bare(place, name="a"):
    """The model without its chat template, as a base model is."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    (place / name / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(name)


def test_a_base_model_reads_conversations_in_words(place, capsys):
    """As `trl chat` puts them to it; what counts is what the assistant says."""
    bare(place)
    reward = "def length(completions, **columns):\n    return [float(len(one[0]['content'])) for one in completions]\n"
    (place / "mine.py").write_text(reward)
    data = write(place / "talks.jsonl", talks(["Me."]))
    words = ["--data", data, "--reward", "mine.py:length", "--max-new-tokens", "3", "--temperature", "0"]
    assert run(["eval", "a", *words, "--json", "found.json"]) == 0
    seen = capsys.readouterr()
    line = "note: a has no chat template: turns are put to it as `User: ...` and `Assistant: ...`"
    assert seen.err.splitlines().count(line) == 1
    found = json.loads((place / "found.json").read_text())["measures"]
    wanted, _ = logprobs("a", "User: Who?\n\nAssistant:", " Me.")
    assert found["loss"]["value"] == pytest.approx(-wanted.mean(), rel=1e-3)
    assert found["reward length"]["rows"] == 1
    assert run(["compare", "a", "b", *words[:2], "--samples", "1", "--max-new-tokens", "2"]) == 0
    seen = capsys.readouterr()
    assert seen.err.splitlines().count(line) == 1  # the other has a template
    assert "b against a, 1 row\n" in seen.out
    assert run(["generate", "a", "--data", data, "--max-new-tokens", "2", "--output", "out.jsonl"]) == 0
    assert "wrote out.jsonl: 1 answer to 1 prompt" in capsys.readouterr().out
    assert run(["generate", "a", "Who?", "--chat", "--max-new-tokens", "2", "--output", "more.jsonl"]) == 0
    assert line in capsys.readouterr().err.splitlines()


def test_pairs_are_ahead_in_log_probability(place):
    accuracy, margin = of_rows(open_model("a"), hold(write(place / "pairs.jsonl", pairs()), None, None))
    eos = byte_tokenizer().eos_token
    sums = [
        [logprobs("a", row["prompt"], row[side] + eos)[0].sum() for side in ("chosen", "rejected")] for row in pairs()
    ]
    wanted = [chosen - rejected for chosen, rejected in sums]
    assert margin.totals == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    assert accuracy.totals.tolist() == [float(each > 0) for each in wanted]


def judge_model(place):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, num_labels=1,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained("judge")
    tokenizer.save_pretrained("judge")


def test_a_reward_model_is_measured_on_pairs(place, capsys):
    judge_model(place)
    data = write(place / "pairs.jsonl", pairs())
    _, margin = of_rows(open_model("judge", wants=None), hold(data, None, None))
    tokenizer, model = AutoTokenizer.from_pretrained("judge"), LlamaForSequenceClassification.from_pretrained("judge")
    for row, found in zip(pairs(), margin.totals, strict=True):
        texts = [row["prompt"] + row[side] + tokenizer.eos_token for side in ("chosen", "rejected")]
        with torch.no_grad():
            chosen, rejected = (model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts)
        assert found == pytest.approx(chosen - rejected, abs=1e-4)
    assert run(["eval", "judge", "--data", write(place / "talks.jsonl", talks())]) == 2
    assert "it is a reward model, which is measured on pairs" in capsys.readouterr().err


def test_a_reward_adapter_has_the_head_that_its_base_lacks(place, capsys):
    """And merged it judges as before."""
    base = LlamaForSequenceClassification.from_pretrained("a", num_labels=1)
    torch.manual_seed(4)
    peft.get_peft_model(base, lora(task_type="SEQ_CLS")).save_pretrained("judge")
    data = write(place / "pairs.jsonl", pairs())
    assert run(["merge", "judge", "--output", "merged"]) == 0
    out = capsys.readouterr()
    assert "its scores of 32 tokens are the adapter's" in out.out
    for name in ("judge", "merged"):
        assert run(["eval", name, "--data", data, "--json", f"{name}.json"]) == 0
    found = [json.loads((place / f"{name}.json").read_text())["measures"]["margin"] for name in ("judge", "merged")]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert "made anew" not in out.err + capsys.readouterr().err


def test_only_good_answers_count_where_rows_say_which_are_good(place, capsys):
    rows = [{"prompt": "a ", "completion": "b", "label": good} for good in (True, False, True)]
    held = hold(write(place / "votes.jsonl", rows), None, None)
    assert len(held) == 2
    assert "the 2 good ones are measured" in capsys.readouterr().err


# -- trl eval ------------------------------------------------------------------------------------

REWARDS = """
def long(completions, **columns):
    return [None if not index else float(len(text)) for index, text in enumerate(completions)]

def right(completions, right, **columns):
    return [float(each in text) for text, each in zip(completions, right)]

def longer(prompts, pairs):
    return [0 if len(first) > len(second) else 1 if len(first) < len(second) else -1 for first, second in pairs]
"""


def test_eval_of_pairs_with_rewards_and_a_judge(place, capsys):
    (place / "mine.py").write_text(REWARDS)
    data = write(place / "pairs.jsonl", pairs())
    words = ["eval", "a", "--data", data, "--reward", "mine.py:long", "--reward", "mine.py:right"]
    more = ["--judge", "mine.py:longer", "--max-new-tokens", "6", "--temperature", "0", "--json", "out/found.json"]
    assert run([*words, *more]) == 0
    found = json.loads((place / "out" / "found.json").read_text())["measures"]
    names = ["pair accuracy", "margin", "reward long", "reward right", "answer tokens", "cut answers"]
    assert list(found) == [*names, "wins over the rows"]
    assert (found["reward long"]["rows"], found["reward right"]["rows"]) == (3, 4)
    assert found["margin"]["low"] < found["margin"]["value"] < found["margin"]["high"]
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_the_same_line_gives_the_same_figures_and_n_answers_are_one_row(place):
    (place / "mine.py").write_text(REWARDS)
    data = write(place / "pairs.jsonl", pairs())
    words = ["eval", "a", "--data", data, "--reward", "mine.py:right", "--n", "3", "--max-new-tokens", "4"]
    for name in ("first.json", "again.json"):
        assert run([*words, "--temperature", "1", "--json", name]) == 0
    first, again = (json.loads((place / name).read_text()) for name in ("first.json", "again.json"))
    assert first == again
    assert first["measures"]["reward right"]["rows"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "--data: say which rows to measure on"),
        (["a", "--data", "prompts.jsonl"], "it has prompts without answers; say --reward or --judge"),
        (["a", "--data", "none.jsonl"], "there is no such file"),
        (["a", "--data", "odd.jsonl"], "has none of the columns that are needed"),
        (["a", "--data", "prompts.jsonl", "--judge", "mine.py:longer"], "have no answers to compare with"),
        (
            ["a", "--data", "pairs.jsonl", "--judge", "mine.py:nobody"],
            "--judge mine.py:nobody: mine.py has no function",
        ),
        (["a", "--data", "pairs.jsonl", "--reward", "mine.py:fails"], "reward function 'fails' failed"),
        (["a", "--tasks", "arc_easy"], "it needs lm-evaluation-harness; pip install lm_eval"),
        (["./nowhere", "--data", "pairs.jsonl"], "there is no such folder"),
    ],
)
def test_a_wrong_line_is_one_line(words, message, place, capsys):
    (place / "mine.py").write_text(REWARDS + "\ndef fails(completions, **columns):\n    raise ValueError('no')\n")
    write(place / "pairs.jsonl", pairs())
    write(place / "prompts.jsonl", [{"prompt": "a"}])
    write(place / "odd.jsonl", [{"question": "a"}])
    assert run(["eval", *words, "--max-new-tokens", "2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_tasks_go_to_the_harness(place, monkeypatch, capsys):
    """Its public calls: `HFLM` of a loaded model, and `simple_evaluate`."""
    asked = {}

    class HFLM:
        def __init__(self, pretrained, tokenizer):
            asked["model"] = type(pretrained).__name__

    def simple_evaluate(model, tasks, limit):
        asked.update(tasks=tasks, limit=limit)
        figures = {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.05}
        return {"results": {"arc_easy": figures}}

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.models.huggingface"].HFLM = HFLM
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert run(["eval", "a", "--tasks", "arc_easy, hellaswag", "--limit", "7"]) == 0
    assert asked == {"model": "LlamaForCausalLM", "tasks": ["arc_easy", "hellaswag"], "limit": 7}
    assert capsys.readouterr().out.splitlines()[-1] == "arc_easy: acc 0.25 ± 0.098"


# -- trl compare ---------------------------------------------------------------------------------


def test_a_model_is_not_distinguishable_from_a_copy_of_it(place, capsys):
    import shutil

    shutil.copytree("a", "copy")
    data = write(place / "talks.jsonl", talks())
    assert run(["compare", "a", "copy", "--data", data, "--samples", "0", "--json", "found.json"]) == 0
    found = json.loads((place / "found.json").read_text())["lines"]
    assert [line["verdict"] for line in found] == ["not distinguishable"] * 2
    assert {line["difference"]["value"] for line in found} == {0.0}
    out = capsys.readouterr().out
    assert "copy against a, 4 rows" in out
    assert out.count("not distinguishable") == 2


def test_what_differs_is_what_the_two_differ_by(place, capsys):
    data = write(place / "talks.jsonl", talks())
    words = ["compare", "a", "b", "--data", data, "--max-new-tokens", "5", "--temperature", "0"]
    assert run([*words, "--html", "c.html", "--json", "found.json"]) == 0
    held = hold(data, None, None)
    before, after = (of_rows(open_model(name), held)[0] for name in ("a", "b"))
    line = json.loads((place / "found.json").read_text())["lines"][0]
    assert line["measure"] == "loss"
    assert line["difference"]["value"] == pytest.approx(after.value - before.value)
    assert (line["before"]["low"], line["after"]["high"]) == (interval_of(before).low, interval_of(after).high)
    page = (place / "c.html").read_text()
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script|<link|https?://""", page)
    assert "b against a" in page
    assert page.count('class="said"') == 4  # as many rows as there are


def test_win_rates_of_three_models(place, capsys):
    (place / "mine.py").write_text(REWARDS)
    judge_model(place)
    data = write(place / "pairs.jsonl", pairs())
    words = ["compare", "a", "b", "a/", "--data", data, "--reward", "mine.py:right", "--judge", "mine.py:longer"]
    assert run([*words, "--max-new-tokens", "4", "--temperature", "0", "--json", "found.json"]) == 0
    lines = json.loads((place / "found.json").read_text())["lines"]
    assert [(x["model"], x["measure"]) for x in lines if x["measure"].startswith("wins")] == [
        ("b", "wins by right"), ("b", "wins by the judge"), ("a/", "wins by right"), ("a/", "wins by the judge"),
    ]  # fmt: skip
    of_copy = [x for x in lines if x["model"] == "a/"]
    assert {x["difference"]["value"] for x in of_copy} == {0.0}


def test_a_judge_that_likes_the_first_place_prefers_nobody():
    first = lambda prompts, pairs: [0] * len(pairs)  # noqa: E731
    assert wins(first, ["q"] * 4, ["a"] * 4, ["b"] * 4) == [0.0, 1.0, 0.0, 1.0]
    longest = lambda prompts, pairs: [max((0, 1), key=lambda i: len(pair[i])) for pair in pairs]  # noqa: E731
    assert wins(longest, ["q"] * 3, ["a", "aaa", "a"], ["bb", "b", "bb"]) == [1.0, 0.0, 1.0]
    talk = [{"role": "user", "content": "q"}]
    undecided = lambda prompts, pairs: [-1 for pair in pairs if pair[0][0]["role"] == "assistant"]  # noqa: E731
    assert wins(undecided, [talk, talk], ["a", "a"], ["b", "b"]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["a"], "give two models or more"), (["a", "a"], "a model stands there twice"), (["a", "./no"], "no such folder")],
)
def test_what_cannot_be_compared_is_one_line(words, message, place, capsys):
    data = write(place / "talks.jsonl", talks())
    assert run(["compare", *words, "--data", data]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_nothing_on_the_page_is_taken_for_html(place):
    evil = "<script>alert(1)</script>\x1b[31m"
    one = Interval(0.5, 0.2, 0.8, 3)
    line = Line(evil, f"x/{evil}", one, one, one, 1)
    page = render(Comparison(["x/a", f"x/{evil}"], evil, 3, [line], [(evil, ["a", evil])], [(evil, evil)]))
    assert "<script" not in page
    assert "\x1b" not in page


def test_numbers_in_words():
    assert [number(x) for x in (0.03456, 0.5, 3.14159, 45.678, 123.456, 12345.6, float("nan"))] == [
        "0.0346", "0.500", "3.142", "45.68", "123.5", "12,346", "-",
    ]  # fmt: skip
    assert number(0.25, sign=True) == "+0.250"
    assert short_names(["runs/a/out", "runs/b/out"]) == ["a/out", "b/out"]
    assert short_names(["m", "runs/b/"]) == ["m", "b"]
    assert np.isnan(Interval(0.0, np.nan, np.nan, 1).low)
