"""Calls in the format of any chat template: rendered once, read back (E5, E6, E8).

`tests/data/tool_calls/STYLE.txt` shows what a style's template prints of some calls and what is read of it. Run this
file to write them anew, and read the difference before you commit it.
"""

import json
import re
import sys
import time
from datetime import date
from decimal import Decimal
from enum import Enum
from functools import partial

import numpy as np
import pytest
import torch
from call_styles import FOLDER, NAMES, WRITTEN, chatml, each, tokenizer_of
from tokenizers_for_tests import byte_tokenizer

from trl.data.chat import ChatTemplate
from trl.data.records import Completion
from trl.data.rendering import shared_start
from trl.environment import ChatEnvironment, JsonCalls
from trl.environment.call_formats import ToolCall
from trl.environment.tool_calls import error_text
from trl.environment.turns import SampledTurns
from trl.generation.sampler import SamplingParams
from trl.rollout.report import record
from trl.rollout.rewards import Rewards
from trl.trainer.metrics import named


def note(
    text: str,
    count: int | None = 0,
    flag: bool = False,
    many: list | None = None,
    deep: dict | None = None,
    ratio: float = 0.0,
) -> str:
    """Note.

    Args:
        text: What.
        count: How many.
        flag: Whether.
        many: Which.
        deep: Further.
        ratio: How much.
    """
    return json.dumps([text, count, flag, many, deep, ratio])


def now() -> str:
    """Now."""
    return "noon"


CALLS = {
    "a text": [ToolCall("note", {"text": "two words"})],
    "no arguments": [ToolCall("now")],
    "numbers": [ToolCall("note", {"text": "1", "count": -3, "flag": True, "ratio": 0.25})],
    "null": [ToolCall("note", {"text": "true", "count": None, "flag": False})],
    "nested": [
        ToolCall("note", {"text": "", "many": [1, [2, {"a": None, "b": [True]}], "drei"], "deep": {"k": {"l": [0.5]}}})
    ],
    "quotes": [ToolCall("note", {"text": 'say "it", it\'s \\ {x} [y] (z), a=1'})],
    "lines": [ToolCall("note", {"text": "one\ntwo\n\tthree"})],
    "letters": [ToolCall("note", {"text": "Köln 東京 😀", "deep": {"ü": "é"}})],
    "two": [ToolCall("note", {"text": "a", "count": 1}), ToolCall("now"), ToolCall("note", {"text": "b"})],
}
ALONE = ("llama3_1", "handwritten_llama3", "handwritten_gpt_oss")
"""their templates write one call a turn"""


class Case:
    """A style, ready to play."""

    def __init__(self, name):
        self.tokenizer, self.ends = tokenizer_of(name)
        self.environment = ChatEnvironment([note, now]).for_policy(self.tokenizer, self.ends)
        self.template = ChatTemplate(self.tokenizer, keep_nulls=True)

    def turn(self, calls):
        """What the assistant says when it makes these calls, up to its end token."""
        said = {"tool_calls": [call.message(place) for place, call in enumerate(calls)]}
        messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", **said}]
        text = self.template.render(messages, self.environment.schemas)
        opened = self.template.render(messages[:1], self.environment.schemas, open_turn=True)
        text = text[shared_start(opened, text) :]
        return text.split(self.environment.renderer._end)[0]

    def read(self, text):
        return self.environment.renderer.reader(text).calls


def shown(name):
    case, parts = Case(name), []
    for title, calls in CALLS.items():
        if len(calls) > 1 and name in ALONE:
            continue
        text = case.turn(calls)
        read = [
            f"{call.error or call.name}({json.dumps(call.arguments, ensure_ascii=False)})" for call in case.read(text)
        ]
        parts.append(f"===== {title} =====\n{text}\n----- read -----\n" + "\n".join(read) + "\n")
    return f"# {name}: a call ends with {case.environment.renderer._end!r}\n\n" + "\n".join(parts)


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_read_back_as_the_template_writes_them(name):
    """E5: one call and several; quotes, lines, letters, nested values, numbers, booleans, null, no arguments."""
    assert shown(name) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    case = Case(name)
    for calls in CALLS.values():
        if len(calls) == 1 or name not in ALONE:
            assert case.read(case.turn(calls)) == calls


# --- as the policy plays ------------------------------------------------------------------------------------------


class Says:
    """A sampler that says these turns, each closed by one of the given tokens, and keeps what it was given."""

    def __init__(self, tokenizer, turns):
        self.tokenizer, self.turns, self.given, self.stops = tokenizer, list(turns), [], set()

    def sample(self, prompts, params, n=1):
        self.stops = set(params.stop_token_ids or ())
        self.given += [list(prompt) for prompt in prompts]
        ids = self.tokenizer(self.turns.pop(0), add_special_tokens=False)["input_ids"]
        return [[Completion(ids, [-1.0] * len(ids), [-1.0] * len(ids), "stop")] for _ in prompts]


def play(case, *turns):
    """The messages of an episode in which the policy says these turns, and its rollout."""
    sampler = Says(case.tokenizer, turns)
    row = {"prompt": [{"role": "user", "content": "Go."}]}
    turns = SampledTurns(sampler, SamplingParams(max_new_tokens=4000))
    rollout = case.environment.rollout([row], turns, [0], 4000)
    return rollout.metadata["completions"][0], rollout, sampler


def answers(messages):
    return [message["content"] for message in messages if message["role"] == "tool"]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_policy_writes_in_its_format_runs_and_stays_as_it_was_sampled(name):
    """E5: token in, token out."""
    case = Case(name)
    calls = CALLS["nested"] if name in ALONE else [*CALLS["nested"], *CALLS["no arguments"]]
    said, end = case.turn(calls), case.environment.renderer._end
    last = "Done." + case.tokenizer.decode([case.ends[0]])
    messages, rollout, sampler = play(case, said + end, last)
    wanted = json.dumps(["", 0, False, calls[0].arguments["many"], {"k": {"l": [0.5]}}, 0.0])
    assert answers(messages) == [wanted, "noon"][: len(calls)]
    whole = rollout.prompts[0] + rollout.completions[0]
    assert [whole[: len(given)] for given in sampler.given] == sampler.given
    first = case.tokenizer(said + end, add_special_tokens=False)["input_ids"]
    assert rollout.completions[0][: len(first)] == first
    assert rollout.masks[0][: len(first)] == [1] * len(first)
    text = case.tokenizer.decode(rollout.completions[0][len(first) : -1])
    assert all(answer in text or json.dumps(answer) in text for answer in answers(messages))
    assert rollout.metadata["tools_called"] == [len(calls)]
    assert rollout.metadata["tools_failed"] == [0]


@pytest.mark.parametrize(
    ("name", "given", "end"),
    [
        ("llama3_1", ("<|eot_id|>",), "<|eom_id|>"),
        ("handwritten_gpt_oss", ("<|return|>",), "<|call|>"),
        ("handwritten_glm", ("<|endoftext|>", "<|user|>"), "<|observation|>"),
    ],
)
def test_the_token_by_which_a_call_ends_stops_a_turn(name, given, end):
    """E5: though it is none of the model's end tokens; those still stop it too."""
    case = Case(name)
    ids = case.tokenizer.convert_tokens_to_ids
    case.environment = ChatEnvironment([note, now]).for_policy(case.tokenizer, [ids(one) for one in given])
    messages, _, sampler = play(case, case.turn(CALLS["no arguments"]) + end, "Done." + given[0])
    assert answers(messages) == ["noon"]
    assert sampler.stops == {ids(one) for one in (*given, end)}


def test_end_tokens_that_are_known_are_left_to_the_sampler():
    sampler = play(Case("hermes"), "Done.<|im_end|>")[2]
    assert sampler.stops == set()


NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
OTHER = '<tool_call>{"name": "note", "arguments": {"text": "draft"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"<think>maybe {OTHER}</think>{NOW}", ["now"]),
        (f"<think>maybe {OTHER}", []),
        (f"maybe {OTHER}</think>\n\n{NOW}", ["now"]),
        (f"<think>a</think>{NOW}<think>{OTHER}</think>{NOW}", ["now", "now"]),
        (f"[THINK]{OTHER}[/THINK]{NOW}", ["now"]),
        (f"<think></think>{NOW}", ["now"]),
        (f"<think>one <think>two</think>{NOW}", ["now"]),
        ('<tool_call>{"name": "note", "arguments": {"text": "</think><think>"}}</tool_call>', ["note"]),
        (f"{OTHER} and <think>{NOW}", ["note"]),
    ],
)
def test_a_call_drafted_inside_the_reasoning_is_none(text, names):
    """E8"""
    assert [call.name for call in JsonCalls()(text).calls] == names
    assert [call.name for call in Case("hermes").read(text)] == names


@pytest.mark.parametrize("ends", ["<think>\n", "<think>"])
def test_reasoning_that_the_prompt_opened(ends):
    """E8, variant: the turn itself holds no opening tag."""
    template = tokenizer_of("hermes")[0].chat_template
    case = Case("hermes")
    case.tokenizer.chat_template = template.replace(
        "<|im_start|>assistant\n{% endif", f"<|im_start|>assistant\n{ends}{{% endif"
    )
    case.environment = ChatEnvironment([note, now]).for_policy(case.tokenizer, case.ends)
    assert answers(play(case, f"no: {OTHER}</think>{NOW}<|im_end|>", "</think>Done.<|im_end|>")[0]) == ["noon"]
    assert answers(play(case, f"only thoughts: {OTHER}<|im_end|>")[0]) == []


def test_reasoning_in_the_tags_of_the_template():
    """E8, variant: tags that no model has, learned of the template."""
    thoughts = "{% if message.reasoning_content %}<ponder>{{ message.reasoning_content }}</ponder>{% endif %}"
    calls = each('<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</tool_call>')
    template = chatml(calls).replace("{{ message.content or", thoughts + "{{ message.content or")
    tokenizer = byte_tokenizer(template)
    environment = ChatEnvironment([note, now]).for_policy(tokenizer, [tokenizer.eos_token_id])
    assert [call.name for call in environment.renderer.reader(f"<ponder>{OTHER}</ponder>{NOW}").calls] == ["now"]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (
            "<|channel|>analysis<|message|>I call <|channel|>commentary to=functions.note<|message|>{}<|end|>"
            "<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}",
            [ToolCall("now")],
        ),
        ("<|channel|>analysis to=functions.note<|message|>{}<|end|>", []),
        (' to=functions.note<|channel|>commentary json<|message|>{"text": "a"}', [ToolCall("note", {"text": "a"})]),
        ("<|channel|>commentary to=functions.now<|message|>", [ToolCall("now")]),
        ("<|channel|>final<|message|>It is noon.", []),
    ],
)
def test_channels_of_gpt_oss(text, calls):
    """E5, E8: a call is a message to a function, wherever its receiver stands; the reasoning's channel makes none."""
    assert Case("handwritten_gpt_oss").read(text) == calls


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        ("llama3_1", '<|python_tag|>{"name": "now", "parameters": {}}', [ToolCall("now")]),
        ("llama3_1", '{"type": "function", "name": "now", "parameters": null}', [ToolCall("now")]),
        ("llama3_1", 'I look.\n{"name": "now", "parameters": {}}', [ToolCall("now")]),
        ("llama3_1", '<think>{"name": "note"}</think>{"name": "now", "parameters": {}}', [ToolCall("now")]),
        ("llama3_1", '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}', [ToolCall("now")] * 2),
        ("llama3_1", '{"answer": 3}', []),
        ("llama3_1", '{"name": "Bob", "age": 3}', []),
        ("llama3_1", 'Write {"name": "now", "parameters": {}} to call it.', []),
        ("llama_pythonic", "[now()]", [ToolCall("now")]),
        ("llama_pythonic", "[note(text='it\\'s', count=-1, deep={'a': None}), now()]",
         [ToolCall("note", {"text": "it's", "count": -1, "deep": {"a": None}}), ToolCall("now")]),
        ("llama_pythonic", "[note('a', 2)]", [ToolCall("note", {"text": "a", "count": 2})]),
        ("llama_pythonic", "[text](http://x) and [1, 2]", []),
        ("gemma_tool_code", "```tool_code\nprint(now())\n```", [ToolCall("now")]),
        ("qwen3_coder", "<tool_call><function=note><parameter=text>a</parameter></function></tool_call>",
         [ToolCall("note", {"text": "a"})]),
        ("qwen3_coder",
         "<tool_call>\n<function=note>\n<parameter=text>\na </parameter> b\n</parameter>\n</function>\n</tool_call>",
         [ToolCall("note", {"text": "a </parameter> b"})]),
        ("handwritten_glm", "<tool_call>note\n<arg_key>text</arg_key>\n<arg_value>7</arg_value>\n</tool_call>",
         [ToolCall("note", {"text": "7"})]),
        ("mistral_nemo", '[TOOL_CALLS] {"name": "now", "arguments": {}}', [ToolCall("now")]),
        ("command_r", 'Action: ```json\n[{"tool_name": "now", "parameters": {}}]\n```', [ToolCall("now")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', [ToolCall("now")]),
        ("hermes", '<tool_call>{"name": "note", "arguments": {"text": "a\nb"}}</tool_call>',
         [ToolCall("note", {"text": "a\nb"})]),
        ("hermes", '<tool_call>{"name": "note", "arguments": {"text": "</tool_call>"}}</tool_call>',
         [ToolCall("note", {"text": "</tool_call>"})]),
    ],
)  # fmt: skip
def test_calls_are_read_as_models_write_them(name, text, calls):
    """E5, E6: blanks, quotes and wrappers differ from the template's; what is no call is an answer."""
    assert Case(name).read(text) == calls


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("llama3_1", '{"name": "now", "parameters": {', "the call is no JSON"),
        ("llama_pythonic", "[note(text=)]", "the arguments cannot be read"),
        ("qwen3_coder", '<tool_call>{"name": "now"}</tool_call>', "does not begin with the name of a tool"),
        ("qwen3_coder", "<tool_call><function=now></function>", "not closed by </tool_call>"),
        ("handwritten_glm", "<tool_call>note\n<arg_key>text</arg_key><arg_value>1</tool_call>", "text is not closed"),
        ("handwritten_deepseek",
         "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n[]\n```<｜tool▁call▁end｜>",
         "they are no JSON object"),
        ("mistral_v11", "[TOOL_CALLS]now[ARGS]{1}[TOOL_CALLS]now[ARGS]{}", "the arguments cannot be read"),
        ("lfm2", "<|tool_call_start|>[note(text='a]<|tool_call_end|>", "a text is not closed by '"),
        ("function_gemma", "<start_function_call>call:note{text:<escape>a}<end_function_call>", "not closed by <e"),
        ("handwritten_gpt_oss", "<|channel|>commentary to=functions.note<|message|>{", "the arguments are no JSON"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_be_read_gets_an_error_for_an_answer(name, text, error):
    """E5: it never ends the run."""
    case = Case(name)
    first = case.read(text)[0]
    assert error in first.error
    end = case.environment.renderer._end
    messages, rollout, _ = play(case, text + end, "Done." + case.tokenizer.decode([case.ends[0]]))
    assert answers(messages)[0] == f"Tool error: {first.error}"
    assert rollout.metadata["tools_failed"] == [1]


@pytest.mark.parametrize(
    ("calls", "shown"),
    [
        (each("{{ f.name | length }} letters"), "does not print them"),
        (each("<|im_end|>\n<|im_start|>call\n{{ f | tojson }}"), "does not print them in the assistant's turn"),
        (each("<{{ f.name }}: {{ f.arguments.values() | list }}>"), r"it prints .<zqname: "),
        (each("{{ f.name }}" + "{% for key in f.arguments %}?{{ key }}{% endfor %}"), r"it prints 'zqname\?zqkey'"),
    ],
)
def test_a_format_that_cannot_be_read_back_is_refused(calls, shown):
    """E5: when the trainer is made, with the way out; which works."""
    tokenizer = byte_tokenizer(chatml(calls))
    with pytest.raises(ValueError, match=rf"^tools: the chat template .*{shown}.*parser=.*[^\n]*$"):
        ChatEnvironment([note]).for_policy(tokenizer, [tokenizer.eos_token_id])
    ChatEnvironment([note], parser=JsonCalls()).for_policy(tokenizer, [tokenizer.eos_token_id])


def test_a_template_without_calls_gets_the_tokens_that_its_tokenizer_has_for_them():
    """E5, variants: LFM2 and Phi-4 mini, whose templates say nothing of calls; the others are told of Hermes' tags."""
    plain = chatml("").replace("{% if message.tool_calls %}<|im_end|>{% else %}<|im_end|>{% endif %}", "<|im_end|>")
    for tokens, text in (
        (["<|tool_call_start|>", "<|tool_call_end|>"], "<|tool_call_start|>[now()]<|tool_call_end|>"),
        (["<|tool_call|>", "<|/tool_call|>"], '<|tool_call|>[{"name": "now", "arguments": {}}]<|/tool_call|>'),
        ([], NOW),
    ):
        tokenizer = byte_tokenizer(plain)
        tokenizer.add_tokens(tokens)
        environment = ChatEnvironment([note, now]).for_policy(tokenizer, [tokenizer.eos_token_id])
        assert environment.renderer.reader(text).calls == [ToolCall("now")]


def test_a_template_that_lists_no_tools_is_told_of(caplog):
    template = WRITTEN["hermes"].template.replace("{% if tools %}", "{% if tools and shown %}")
    tokenizer = byte_tokenizer(template)
    ChatEnvironment([note, now]).for_policy(tokenizer, [tokenizer.eos_token_id])
    assert "the chat template does not list note, now in the prompt" in caplog.text


def test_frequencies_of_calls_are_logged():
    """The share of completions in which a tool was called, and of these calls that failed."""
    case, logged = Case("hermes"), {}
    bad = NOW.replace("now", "then") + '<tool_call>{"name": "note"}</tool_call><tool_call>{</tool_call>'
    rollouts = [play(case, *turns)[1] for turns in (("Done.",), (NOW + bad, "Done."), (NOW, "Done."))]
    rollout, *further = rollouts
    for other in further:
        for name in ("prompts", "completions", "masks", "texts"):
            getattr(rollout, name).extend(getattr(other, name))
        for name in ("truncated", "turn_ends", "tools_called", "tools_failed"):
            rollout.metadata[name] = rollout.metadata[name] + other.metadata[name]
    record(lambda name, *sums: logged.update({name: sums}), lambda *_: None, rollout, Rewards.none(3), 1)
    assert logged["tools/call_frequency"] == (2.0, 3)
    assert logged["tools/failure_frequency"] == (3.0, 5.0)
    assert named("GRPO", "eval_tools/failure_frequency") is not None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"town": "Köln", "sky": ["東京", None]}, '{"town": "Köln", "sky": ["東京", null]}'),
        (["ü", 1], '["ü", 1]'),
        ({1: b"x"}, '{"1": "x"}'),
        (None, ""),
        ("Köln\n".encode(), "Köln\n"),
        (b"\xff", "\\xff"),
        (np.float32(2.5), "2.5"),
        ({"n": np.int64(3), "at": torch.tensor([1, 2])}, '{"n": 3, "at": [1, 2]}'),
        ([Decimal("2.50"), {4}], '["2.50", [4]]'),
        (date(2024, 1, 2), "2024-01-02"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (map(str, [1]), "Tool error: the tool gave a map and not what it holds; return a list"),
    ],
)
def test_results_are_readable(given, text):
    """E6"""

    def look() -> str:
        """Look."""
        return given

    case = Case("hermes")
    case.environment = ChatEnvironment([look]).for_policy(case.tokenizer, case.ends)
    assert answers(play(case, NOW.replace("now", "look") + "<|im_end|>", "Done.<|im_end|>")[0]) == [text]


class Colour(Enum):
    RED, BLUE = "red", "blue"


def paint(colour: Colour, others: list[Colour] = (), last: Colour | None = None) -> str:  # type: ignore[assignment]
    """Paint.

    Args:
        colour: The colour.
        others: More of them.
        last: The last one.
    """
    return " ".join(each.name for each in [colour, *others, *([last] if last else [])])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"colour": "red"}, "RED"),
        ({"colour": "red", "others": ["blue", "red"], "last": "blue"}, "RED BLUE RED BLUE"),
        ({"colour": "blue", "last": None}, "BLUE"),
        ({"colour": "RED"}, "Tool error: 'RED' is not a valid Colour"),
    ],
)
def test_a_tool_with_an_enum_gets_its_members(arguments, text):
    """E1: the schema says the members' values, so that is what the model writes."""
    case = Case("hermes")
    case.environment = ChatEnvironment([paint]).for_policy(case.tokenizer, case.ends)
    said = f"<tool_call>{json.dumps({'name': 'paint', 'arguments': arguments})}</tool_call><|im_end|>"
    assert answers(play(case, said, "Done.<|im_end|>")[0]) == [text]


def test_errors_whose_text_says_nothing_are_named():
    assert [error_text(error) for error in (KeyError("town"), AssertionError(), OSError("gone"))] == [
        "Tool error: KeyError('town')", "Tool error: AssertionError()", "Tool error: gone"
    ]  # fmt: skip


# --- tools of other kinds -----------------------------------------------------------------------------------------


def weigh(thing: str, unit: str, places: int = 1) -> str:
    """Weigh.

    Args:
        thing: What to weigh.
        unit: The unit.
        places: How exactly.
    """
    return f"{thing} {unit} {places}"


class Scale:
    """Weighs things."""

    def __call__(self, thing: str) -> str:
        """Weigh a thing.

        Args:
            thing: What to weigh.
        """
        return f"{thing} is heavy"

    def lift(self, thing: str) -> str:
        """Lift.

        Args:
            thing: What.
        """
        return f"{thing} lifted"


class Echo:
    """Say it again.

    Args:
        text: What.
    """

    async def __call__(self, text: str) -> str:
        return text


@pytest.mark.parametrize(
    ("tool", "name", "keys", "arguments", "answer"),
    [
        (partial(weigh, unit="g"), "weigh", ["thing", "places"], {"thing": "a"}, "a g 1"),
        (partial(weigh, "b"), "weigh", ["unit", "places"], {"unit": "kg", "places": 2}, "b kg 2"),
        (partial(partial(weigh, "b"), places=3), "weigh", ["unit"], {"unit": "kg"}, "b kg 3"),
        (partial(Scale().lift), "lift", ["thing"], {"thing": "a"}, "a lifted"),
        (Scale(), "Scale", ["thing"], {"thing": "a"}, "a is heavy"),
        (Scale().lift, "lift", ["thing"], {"thing": "a"}, "a lifted"),
        (Echo(), "Echo", ["text"], {"text": "a"}, "a"),
        (partial(Echo(), text="b"), "Echo", [], {}, "b"),
        (partial(weigh, unit="g"), "weigh", ["thing", "places"], {"thing": "a", "unit": "kg"},
         "Tool error: weigh() got an unexpected argument 'unit'"),
    ],
)  # fmt: skip
def test_tools_need_not_be_functions(tool, name, keys, arguments, answer):
    """E4: what a partial fixes is not the model's to choose."""
    case = Case("hermes")
    case.environment = ChatEnvironment([tool]).for_policy(case.tokenizer, case.ends)
    ((schema,),) = ([each["function"] for each in case.environment.schemas],)
    assert schema["name"] == name
    assert list(schema["parameters"]["properties"]) == keys
    said = f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call><|im_end|>"
    assert answers(play(case, said, "Done.<|im_end|>")[0]) == [answer]


def by_place(a: int, /) -> int:
    """Place.

    Args:
        a: A number.
    """
    return a


def several(*numbers: int) -> int:
    """Add.

    Args:
        numbers: To add.
    """
    return sum(numbers)


def counts() -> str:
    """Count."""
    yield "one"


async def counts_later() -> str:
    """Count."""
    yield "one"


@pytest.mark.parametrize(
    ("tool", "what"),
    [
        (by_place, "tools: by_place takes a by position, and models give arguments by name"),
        (several, "tools: several takes *numbers by position"),
        (counts, "tools: counts yields, and a call has one answer"),
        (counts_later, "tools: counts_later yields"),
    ],
)
def test_tools_that_no_call_could_use_are_named(tool, what):
    with pytest.raises(ValueError, match=re.escape(what)):
        ChatEnvironment([tool])


def test_further_keywords_are_no_argument_of_a_schema():
    def look(town: str, **further: str) -> str:
        """Look.

        Args:
            town: Where.
            further: Whatever.
        """

    (schema,) = ChatEnvironment([look]).schemas
    assert list(schema["function"]["parameters"]["properties"]) == ["town"]


def test_tools_may_have_names_of_their_own():
    environment = ChatEnvironment({"first": partial(weigh, unit="g"), "second": weigh})
    assert [schema["function"]["name"] for schema in environment.schemas] == ["first", "second"]


@pytest.mark.parametrize(
    ("tools", "wrong"),
    [
        ([{"type": "function", "function": {"name": "add", "parameters": {}}}], r"tools\[0\]: a JSON schema of 'add' "),
        ([weigh, {"name": "add"}], r"tools\[1\]: a JSON schema of 'add' holds no code"),
        ({"type": "function", "function": {"name": "add"}}, r"tools\[0\]: a JSON schema of 'add' holds no code"),
        (["weigh"], r"tools\[0\]: a str holds no code that could run"),
        ([weigh, partial(weigh, unit="g")], r"tools: several have the same name \(weigh\)"),
        ([partial(lambda x: x, 1)], "tools: <lambda> cannot be described to the model"),
        ([partial(print)], r"tools: print takes \*args by position"),
    ],
)
def test_tools_that_cannot_be_used(tools, wrong):
    """E4"""
    with pytest.raises(ValueError, match=wrong):
        ChatEnvironment(tools)


# --- time ---------------------------------------------------------------------------------------------------------

TIMED = ("llama3_1", "llama_pythonic", "qwen3_coder", "handwritten_glm", "minimax", "deepseek_v3_1", "function_gemma",
         "command_r", "mistral_v11", "glm4_9b", "handwritten_gpt_oss", "hermes")  # fmt: skip


@pytest.mark.parametrize("name", TIMED)
def test_reading_takes_linear_time(name):
    """Eight times the text takes about eight times the time; squares would take 64."""
    case = Case(name)
    whole = case.turn(CALLS["nested"])
    units = [
        whole,
        whole[: len(whole) // 2],
        whole[len(whole) // 2 :],
        "\n",
        "\n{",
        "\n[",
        "<think>",
        "</think>",
        "(",
        "\n[f(",
    ]
    units += ['{"name": ', '\n{"name": "', "\n[f(a=[", "\n[f(a='", whole[:-1] + "\n", "<|start|>", whole[:20] + "\n"]

    def seconds(unit, size):
        text = (unit * (size // len(unit) + 1))[:size]
        began = time.process_time()
        case.environment.renderer.reader(text)
        return time.process_time() - began

    for unit in units:
        few, many = (min(seconds(unit, size) for _ in range(2)) for size in (10_000, 80_000))
        assert many < max(20 * few, 0.05), unit


def test_long_calls_are_not_handed_on():
    said = '{"name": "note", "parameters": {"text": "' + "x" * 65_536 + '"}}'
    (call,) = Case("llama3_1").read(said)
    assert "longer than 65536 characters" in call.error
    for name in ("qwen3_coder", "mistral_v11", "handwritten_gpt_oss", "lfm2"):
        (call,) = (case := Case(name)).read(case.turn([ToolCall("note", {"text": "x" * 65_536})]))
        assert "longer than 65536 characters" in call.error


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for style in sys.argv[1:] or NAMES:
        (FOLDER / f"{style}.txt").write_text(shown(style), encoding="utf-8")
