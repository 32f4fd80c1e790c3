"""`trl chat`, `trl generate` and `trl merge`: what a run has left is used."""

import io
import json
import sys
import warnings

import peft
import pytest
import torch
from tiny_models import byte_model, lora, tiny_model
from tokenizers_for_tests import byte_tokenizer, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl.cli.main import run
from trl.generation.local import LocalSampler, make_sampler
from trl.generation.sampler import SamplingParams
from trl.generation.text_stream import TextStream
from trl.generation.transformers_sampler import TransformersSampler
from trl.models.peft_support import find_adapter
from trl.scripts.chat import Chat, Wrapped
from trl.scripts.open_model import find_model, open_model
from trl.scripts.sampling import Asked


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A model in the folder `base`, which is the working folder's."""
    monkeypatch.chdir(tmp_path)
    byte_model("base")
    return tmp_path


def adapter(name="adapter", base="base", **changes):
    """Save an adapter of the model in `base`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings, tied ones too
        peft.get_peft_model(model, lora(**changes)).save_pretrained(name)
    return name


def typed(monkeypatch, text):
    """The standard input, which is no terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# -- tokens as they come -------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True])
def test_tokens_are_told_as_they_come_and_are_those_of_sample(captured, chat_tokenizer):
    model = tiny_model("llama", vocab_size=len(chat_tokenizer))
    params = SamplingParams(20, seed=3, stop_token_ids=())
    told = []
    on_tokens = lambda rows: told.append([(len(row.ids), row.finish_reason) for row in rows])  # noqa: E731
    ((got,),) = LocalSampler(model, captured=captured, on_tokens=on_tokens).sample([[5, 6, 7]], params)
    ((plain,),) = LocalSampler(model, captured=captured).sample([[5, 6, 7]], params)
    assert got.ids == plain.ids
    ends = [1, 17, 20] if captured else list(range(1, 21))  # 16 steps of a captured engine are looked at together
    assert told == [[(end, "length" if end == 20 else "")] for end in ends]


def test_generate_of_transformers_tells_them_too(chat_tokenizer):
    told = []
    sampler = TransformersSampler(
        tiny_model("bloom"), on_tokens=lambda rows: told.append([row.ids[-1] for row in rows])
    )
    ((got,),) = sampler.sample([[5, 6, 7]], SamplingParams(4, seed=3, stop_token_ids=()))
    assert [token for (token,) in told] == got.ids


@pytest.mark.parametrize("text", ["plain words", "Grüße, 世界 🙂 zu Ende"])
def test_text_comes_in_whole_characters(text, chat_tokenizer):
    ids = chat_tokenizer(text)["input_ids"]
    stream = TextStream(chat_tokenizer)
    pieces = [stream.push(ids[:count]) for count in range(1, len(ids) + 1)]
    assert "".join(pieces) + stream.push(ids, finished=True) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 5


def test_a_stop_string_is_never_shown(chat_tokenizer):
    ids = chat_tokenizer("One.\n\nUse it.\n\nUser: two")["input_ids"]
    stream = TextStream(chat_tokenizer, stop_strings=("\n\nUser:",))
    shown = "".join(stream.push(ids[:count]) for count in range(1, len(ids) + 1)) + stream.push(ids, finished=True)
    assert shown == "One.\n\nUse it."
    cut = TextStream(chat_tokenizer, stop_strings=("\n\nUser:",))
    ids = chat_tokenizer("One.\n\nUse")["input_ids"]
    assert cut.push(ids) + cut.push(ids, finished=True) == "One.\n\nUse"
    assert cut.text == "One.\n\nUse"


# -- what lies where -----------------------------------------------------------------------------


def test_a_model_is_found_where_a_run_has_left_it(base, capsys):
    adapter("run/checkpoint-10")
    adapter("run/checkpoint-20")
    adapter("run/checkpoint-30")
    for step in (10, 20):
        (base / "run" / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    found = find_model("run")
    assert (found.place, found.kind, found.base) == ("run/checkpoint-20", "language model", "base")
    assert "the run has not saved its last model, checkpoint-20 is taken" in capsys.readouterr().err
    opened = open_model("run/checkpoint-30")
    assert opened.tokenizer.chat_template == AutoTokenizer.from_pretrained("base").chat_template
    assert not any(weight.requires_grad for weight in opened.model.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no such folder"),
        ("empty", "no model lies there, neither config.json nor adapter_config.json"),
        ("rows.txt", "it is a file"),
        ("judge", "it is a reward model, which writes nothing"),
        ("images", "it draws images"),
    ],
)
@pytest.mark.parametrize("command", [["chat"], ["generate"], ["merge", "--output", "out"]])
def test_what_is_no_language_model_is_one_line(name, message, command, base, monkeypatch, capsys):
    for folder in ("empty", "judge", "images"):
        (base / folder).mkdir()
    (base / "rows.txt").write_text("a\n")
    (base / "judge" / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    (base / "images" / "model_index.json").write_text("{}")
    typed(monkeypatch, "Hello\n")
    assert run([command[0], name, *command[1:]]) == 2
    error = capsys.readouterr().err
    wanted = "it is a whole model already" if command[0] == "merge" and name == "judge" else message
    assert wanted in error
    assert error.count("\n") == 1
    assert not (base / "out").exists()


# -- chat ----------------------------------------------------------------------------------------


def talk(base, write=lambda text: None, **changes):
    asked = Asked(**{"max_new_tokens": 6, "temperature": 0.0, **changes})
    return Chat(open_model("base"), asked, None, 1, write)


def test_an_answer_is_what_the_sampler_gives_and_turns_add_up(base):
    pieces = []
    chat = talk(base, pieces.append, temperature=1.0)
    asked = []
    for question in ("Who?", "Where?"):
        asked += [{"role": "user", "content": question}]
        ids = chat.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        params = SamplingParams(6, seed=1, stop_token_ids=chat.ends)
        ((wanted,),) = make_sampler(chat.opened.model, chat.tokenizer).sample([ids], params)
        assert chat.take(question)
        said = [token for token in wanted.ids if token not in chat.ends]
        assert chat.messages[-1]["content"] == chat.tokenizer.decode(said)
        asked += chat.messages[-1:]
    assert chat.messages == asked
    assert "".join(pieces) == f"{asked[1]['content']}\n{asked[3]['content']}\n"


def test_commands(base, capsys):
    chat = talk(base)
    chat.take("Who?")
    assert len(chat.messages) == 2
    assert chat.take("/system Be kind.")
    assert chat.messages == [{"role": "system", "content": "Be kind."}]
    chat.take("Who?")
    assert chat.take("/clear")
    assert chat.messages == [{"role": "system", "content": "Be kind."}]
    assert chat.take("/seed 12")
    assert chat.seed == 12
    assert chat.take("/seed")
    assert chat.seed is None
    assert not chat.take("/exit")
    capsys.readouterr()
    for wrong in ("/seed x", "/tree"):
        assert chat.take(wrong)
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "error: /seed x: give a whole number, or nothing",
        "error: /tree: there is no such command; /help lists them",
    ]


def test_ctrl_c_stops_the_answer_and_what_was_said_stays(base):
    said = []

    def write(text):
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    chat = talk(base, write)
    with pytest.raises(KeyboardInterrupt):
        chat.take("Who?")
    assert chat.messages[-1]["content"] == "".join(said).rstrip("\n")
    chat.write = lambda text: None
    assert chat.take("And now?")
    assert len(chat.messages) == 4


def test_lines_that_are_piped_in_are_answered_one_by_one(base, monkeypatch, capsys):
    typed(monkeypatch, "Who?\n\n/nonsense\nWhere?\n/exit\nnever\n")
    assert run(["chat", "base", "--temperature", "0", "--max-new-tokens", "5", "--seed", "0"]) == 0
    chat = talk(base, max_new_tokens=5)
    chat.take("Who?")
    chat.take("Where?")
    out, error = capsys.readouterr()
    answers = [turn["content"] for turn in chat.messages[1::2]]
    from trl.data.any_text import visible

    assert out == "".join(f"{visible(text)}\n" for text in answers)
    assert "/nonsense: there is no such command" in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three four", "one two\nthree four"),
        ("one twotwotwo\n\nx", "one \ntwotwotwo\n\nx"),
        ("世界世界世 abc", "世界世界世\nabc"),  # two columns each
        ("abcdefghijklmnop", "abcdefghij\nklmnop"),
    ],
)
def test_an_answer_is_broken_between_words(text, expected):
    """Whatever pieces it comes in, each of them as soon as its words are whole."""
    for size in (1, 3, 50):
        shown = []
        wrapped = Wrapped(shown.append, width=10)
        for start in range(0, len(text), size):
            wrapped(text[start : start + size])
        wrapped("\n")
        assert [line.rstrip() for line in "".join(shown).split("\n")][:-1] == [
            line.rstrip() for line in expected.split("\n")
        ]
        assert size > 3 or len([piece for piece in shown if piece]) >= 2


def test_a_conversation_longer_than_the_context_is_one_line_and_the_turn_is_forgotten(base, capsys):
    chat = talk(base)
    assert chat.take("x" * 400)
    assert chat.messages == []
    error = capsys.readouterr().err
    assert "the model's context 256" in error
    assert "/clear begins anew" in error
    assert chat.take("Who?")
    assert len(chat.messages) == 2


def test_an_input_with_a_turn_that_is_too_long_ends_with_2(base, monkeypatch, capsys):
    """The other turns are answered; an unknown command leaves no question without its answer."""
    words = ["chat", "base", "--temperature", "0", "--max-new-tokens", "3"]
    for text, code in ((f"Who?\n{'x' * 400}\nWhere?\n", 2), ("Who?\n/nonsense\n", 0)):
        typed(monkeypatch, text)
        assert run(words) == code
        out, error = capsys.readouterr()
        assert out.count("\n") == (2 if code else 1)
        assert "prompts[" not in error
    assert "there is no such command" in error


def test_a_base_model_is_talked_to_in_words(base, capsys):
    AutoTokenizer.from_pretrained("base")
    plain = word_tokenizer()
    plain.save_pretrained("words")
    tiny_model("llama", vocab_size=len(plain)).save_pretrained("words")
    chat = Chat(open_model("words"), Asked(3, temperature=0.0), None, 0, lambda text: None)
    assert "has no chat template: turns are put to it as `User: ...`" in capsys.readouterr().err
    assert chat.take("hello world")
    assert chat.params.stop_strings == ("\n\nUser:",)
    assert chat.messages[0] == {"role": "user", "content": "hello world"}


# -- generate ------------------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_of_the_line_several_answers_each_and_seeds(base, capsys):
    words = ["generate", "base", "Who?", "Where?", "--n", "2", "--max-new-tokens", "5", "--temperature", "1"]
    for at, seed in enumerate((0, 0, 7)):
        assert run([*words, "--seed", str(seed), "--output", f"{at}.jsonl"]) == 0
    first, again, other = (lines_of(base / f"{at}.jsonl") for at in range(3))
    assert [(one["prompt"], one["sample"]) for one in first] == [("Who?", 0), ("Who?", 1), ("Where?", 0), ("Where?", 1)]
    assert first == again
    assert [one["completion"] for one in first] != [one["completion"] for one in other]
    assert {"completion", "finish_reason", "tokens"} <= set(first[0])
    assert "wrote 0.jsonl: 4 answers to 2 prompts" in capsys.readouterr().out


def test_what_a_file_holds_stays_until_there_is_an_answer(base, capsys):
    assert run(["generate", "base", "Who?", "--max-new-tokens", "2", "--output", "out.jsonl"]) == 0
    before = (base / "out.jsonl").read_text()
    for words in (["nowhere/at/all", "Who?"], ["base", "Who?", "--temperature", "0", "--top-p", "0.5"]):
        assert run(["generate", *words, "--output", "out.jsonl", "--overwrite"]) != 0
        assert (base / "out.jsonl").read_text() == before
    more = ["--max-new-tokens", "2", "--output", "out.jsonl", "--overwrite"]
    assert run(["generate", "base", "What then?", *more]) == 0
    assert [one["prompt"] for one in lines_of(base / "out.jsonl")] == ["What then?"]


def rows_file(base, kind):
    """The same two questions in a file of another kind."""
    from datasets import Dataset

    if kind == "messages.jsonl":
        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "no"}] for q in ("Who?", "Where?")]
        (base / kind).write_text("\n".join(json.dumps({"messages": one, "id": 1}) for one in turns))
    elif kind == "pairs.csv":
        (base / kind).write_text("prompt,chosen,rejected,id\nWho?,a,b,1\nWhere?,a,b,1\n")
    elif kind == "prompts.parquet":
        Dataset.from_list([{"prompt": "Who?", "id": 1}, {"prompt": "Where?", "id": 1}]).to_parquet(base / kind)
    else:
        (base / kind).write_text("Who?\nWhere?\n")
    return kind


@pytest.mark.parametrize(
    ("kind", "chat"),
    [("messages.jsonl", True), ("pairs.csv", False), ("prompts.parquet", False), ("prompts.txt", True)],
)
def test_prompts_of_a_file(kind, chat, base):
    """Conversations go through the template, texts of rows stand as they are, lines of text are a user's."""
    words = ["--temperature", "0", "--max-new-tokens", "4"]
    assert run(["generate", "base", "--data", rows_file(base, kind), "--output", "out.jsonl", *words]) == 0
    tokenizer, model = AutoTokenizer.from_pretrained("base"), AutoModelForCausalLM.from_pretrained("base")
    got = lines_of(base / "out.jsonl")
    assert len(got) == 2
    for line, question in zip(got, ("Who?", "Where?"), strict=True):
        turn = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) if chat else question
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        wanted = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert line["tokens"] == len(wanted)
        assert line["completion"] == tokenizer.decode(wanted, skip_special_tokens=True)
        assert ("id" in line) == (kind != "prompts.txt")
        assert not {"messages", "chosen", "rejected"} & set(line)


def test_prompts_that_are_piped_in(base, monkeypatch, capsys):
    more = ["--temperature", "0", "--max-new-tokens", "3"]
    for text in ("Who?\n\nWhere?\n", '{"prompt": "Who?", "id": 4}\n{"prompt": "Where?", "id": 5}\n'):
        typed(monkeypatch, text)
        assert run(["generate", "base", *more]) == 0
        got = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [one["prompt"] for one in got] == ["Who?", "Where?"]
    assert [one["id"] for one in got] == [4, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no prompts: give them on the line, in a file with --data"),
        (["a", "--data", "rows.jsonl"], "the line has prompts too"),
        (["a", "--output", "taken.jsonl"], "the file is there already; name another one, or add --overwrite"),
        (["a", "--output", "."], "that is a folder"),
        (["a", "--temperature", "0", "--top-p", "0.5"], "temperature=0 always takes the most probable token"),
        (["--data", "rows.jsonl"], "row 1 of the given data set"),
        (["x" * 300], "has 3"),
    ],
)
def test_a_wrong_line_is_one_line(words, message, base, monkeypatch, capsys):
    typed(monkeypatch, "")
    (base / "taken.jsonl").write_text("{}\n")
    (base / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n')
    assert run(["generate", "base", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert (base / "taken.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("before", [None, "old\n"])
def test_a_prompt_that_is_too_long_is_named_before_any_answer_and_no_file_changes(before, base, capsys):
    """Its row is that of the file, not of the 64 that are sampled together."""
    (base / "rows.jsonl").write_text("".join(json.dumps({"prompt": "x" * (300 if at in (66, 68) else 3)}) + "\n"
                                             for at in range(70)))  # fmt: skip
    if before is not None:
        (base / "out.jsonl").write_text(before)
    assert run(["generate", "base", "--data", "rows.jsonl", "--output", "out.jsonl", "--overwrite"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "row 66: its prompt has 300 tokens, the model's context 256, and 1 further prompt is too long" in error
    assert (base / "out.jsonl").read_text() == before if before else not (base / "out.jsonl").exists()


def test_a_file_that_is_replaced_holds_the_new_lines_alone(base):
    (base / "out.jsonl").write_text("old\n" * 50)
    words = ["--output", "out.jsonl", "--overwrite", "--max-new-tokens", "2"]
    assert run(["generate", "base", "Who?", "Where?", *words]) == 0
    assert [line["prompt"] for line in lines_of(base / "out.jsonl")] == ["Who?", "Where?"]
    (base / "out.jsonl").write_text("old\n")
    assert run(["generate", "./nowhere", "Who?", *words]) == 2
    assert (base / "out.jsonl").read_text() == "old\n"


def test_an_output_that_cannot_be_written_is_one_line(base, capsys):
    (base / "file").write_text("")
    assert run(["generate", "base", "Who?", "--output", "file/out.jsonl"]) == 2
    assert "--output file/out.jsonl: it cannot be written there: " in capsys.readouterr().err


# -- merge ---------------------------------------------------------------------------------------


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(4, 20)[None]).logits


@pytest.mark.parametrize(
    "changes", [{}, {"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ["embed_tokens"]}]
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_a_merged_folder_is_what_the_adapter_was(changes, tied, base, capsys):
    model = tiny_model("llama", vocab_size=len(byte_tokenizer()), max_position_embeddings=256, tie_word_embeddings=tied)
    model.save_pretrained("base")
    adapter(**changes)
    assert run(["merge", "adapter", "--output", "merged"]) == 0
    out = capsys.readouterr().out
    assert "wrote merged: float32, its log-probabilities of 32 tokens are the adapter's" in out
    merged = AutoModelForCausalLM.from_pretrained("merged")
    below = AutoModelForCausalLM.from_pretrained("base")
    before = logits_of(below)
    wanted = logits_of(peft.PeftModel.from_pretrained(below, "adapter"))
    assert torch.allclose(logits_of(merged), wanted, atol=1e-4)
    assert not torch.allclose(before, wanted, atol=1e-2)
    assert find_adapter("merged") is None
    assert AutoTokenizer.from_pretrained("merged").chat_template == byte_tokenizer().chat_template
    ends = merged.generation_config.eos_token_id
    assert byte_tokenizer().eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_halves_are_written_as_the_base_was_saved(base, capsys):
    AutoModelForCausalLM.from_pretrained("base").to(torch.bfloat16).save_pretrained("base")
    adapter()
    assert run(["merge", "adapter", "--output", "merged"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("merged").dtype == torch.bfloat16
    assert run(["merge", "adapter", "--output", "wide", "--dtype", "float32"]) == 0
    assert AutoModelForCausalLM.from_pretrained("wide").dtype == torch.float32


def test_a_merge_that_goes_wrong_writes_nothing(base, monkeypatch, capsys):
    """The adapter belongs to another model than the one that is named now; or the disk is full."""
    adapter()
    (base / "merged").mkdir()
    (base / "merged" / "mine.txt").write_text("keep")
    from trl.scripts import merge

    real = merge.measured
    calls = []
    monkeypatch.setattr(merge, "measured", lambda *given: calls.append(1) or real(*given) + 0.1 * (len(calls) == 3))
    assert run(["merge", "adapter", "--output", "merged", "--overwrite"]) == 2
    assert "the folder differs from the adapter by 0.1" in capsys.readouterr().err
    assert [path.name for path in (base / "merged").iterdir()] == ["mine.txt"]
    assert not [path for path in base.iterdir() if path.name.startswith(".")]
    monkeypatch.setattr(merge, "measured", real)
    assert run(["merge", "adapter", "--output", "merged", "--overwrite"]) == 0
    assert "mine.txt" not in {path.name for path in (base / "merged").iterdir()}


def test_what_cannot_be_merged_is_one_line(base, capsys):
    adapter()
    (base / "full").mkdir()
    (base / "full" / "a.txt").write_text("a")
    model = AutoModelForCausalLM.from_pretrained("base")
    peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        "virtual"
    )
    cases = [
        (["base", "--output", "out"], "it is a whole model already"),
        (["adapter", "--output", "full"], "the folder is not empty; name another one, or add --overwrite"),
        (["adapter", "--output", "adapter", "--overwrite"], "the adapter itself lies there"),
        (["virtual", "--output", "out"], "learns tokens before the prompt, not weights"),
    ]
    for words, message in cases:
        assert run(["merge", *words]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    config = json.loads((base / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "base" / "config.json").write_text(json.dumps(config))
    assert run(["merge", "adapter", "--output", "out"]) == 2
    assert "its base base is quantised (bitsandbytes)" in capsys.readouterr().err
    assert not (base / "out").exists()
