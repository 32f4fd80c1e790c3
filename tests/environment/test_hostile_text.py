"""Whatever a model writes is answered with text: no text, tool or parser ends the run (C10, C24, C28, R4)."""

import asyncio
import itertools
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_environment import add, chat
from tokenizers_for_tests import byte_tokenizer

from trl.environment import ChatEnvironment, JsonCalls, TextEnvironment
from trl.environment.tool_calls import LateCalls, ToolCall

SURROGATES = r"\ud800 x \udfff"
ROW = {"prompt": [{"role": "user", "content": "Go on."}]}


def echo(text: str) -> str:
    """Say it again.

    Args:
        text: What to say.
    """
    return text


def results(environment, said):
    """The results that the model reads after it has said this."""
    ended = itertools.chain([said], itertools.repeat("Done."))
    rollout, *_ = chat(environment, lambda text, turn: next(ended), [ROW], limit=20_000)
    return [message["content"] for message in rollout.metadata["completions"][0] if message["role"] == "tool"]


def test_an_environment_may_edit_its_row():
    """R2, variant: the columns of a row belong to all episodes of its group, and to the reward functions."""
    seen = []

    class Edits:
        def reset(self, wanted: list) -> None:
            seen.append(wanted[:])
            wanted.append("more")

        def look(self) -> str:
            """Look."""
            return ""

    row = {**ROW, "wanted": ["a"]}
    chat(ChatEnvironment(environment_factory=Edits), lambda text, turn: "Done.", [row, row], limit=99)
    assert seen == [["a"], ["a"]]
    assert row["wanted"] == ["a"]


# --- lone surrogates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "result"),
    [
        ('{"name": "\\ud800", "arguments": {}}', "Unknown tool \\ud800."),
        ('{"name": "echo", "arguments": {"text": "a\\ud800b"}}', "a\\ud800b"),
        ('{"name": "echo", "arguments": {"\\udc00": 1}}', "Tool error: "),
        ('{"name": "echo", "arguments": "{\\"text\\": \\"\\\\udfff\\"}"}', "\\udfff"),
        ('{"name": "add", "arguments": {"a": [{"\\ud800": "\\ud800"}], "b": 1}}', "Tool error: "),
        ('{"name": "echo", "arguments": {"text": "\\ud83d\\ude00"}}', "😀"),
        ('{"name": "echo", "arguments": ' + '{"text": ' * 200 + "1" + "}" * 200 + "}", "cannot be read: it is nested"),
        ('{"name": "echo", "arguments": {"text": ' + "9" * 5000 + "}}", "no JSON"),
        ('{"name": "<|im_end|>", "arguments": {}}', "Unknown tool <|im_end|>."),
    ],
)
def test_calls_of_any_text_are_answered(said, result):
    """C24: the tool reads it spelled out, and so do messages and templates."""
    (answer,) = results(ChatEnvironment(tools=[echo, add]), f"<tool_call>{said}</tool_call>")
    assert result in answer
    assert answer.encode()


def test_results_of_tools_are_spelled_out_too():
    """C24, variant: a tool makes them, in its result or in its error."""

    def bad(text: str) -> str:
        """Answer or fail.

        Args:
            text: Which.
        """
        if text == "fail":
            raise ValueError("\ud800")
        return {"x": "\udcff"} if text == "dict" else "\ud800"

    for text, answer in (("fail", "Tool error: \\ud800"), ("dict", '{"x": "\\udcff"}'), ("", "\\ud800")):
        said = f'<tool_call>{{"name": "bad", "arguments": {{"text": "{text}"}}}}</tool_call>'
        assert results(ChatEnvironment(tools=[bad]), said) == [answer]
    environment = TextEnvironment(None, byte_tokenizer(), {"bad": bad}, list)
    history = environment._open({"prompt": "p"}, "", None)
    history.append_segment("<request><bad>x<call>", environment._tokens("x", False), system=False)
    assert environment.step(history).last_text_segment == "\\ud800<response>"


def test_a_parser_that_fails_is_an_unreadable_call(caplog):
    """C24, variant"""

    def parser(text):
        return [][1] if text != "Done." else JsonCalls()(text)

    (answer,) = results(ChatEnvironment(tools=[echo], parser=parser), "anything")
    assert answer == "Tool error: the call cannot be read (IndexError)"
    assert "parser: it failed on 'anything': IndexError" in caplog.text


parts = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": ', '"echo"', '"arguments": {', "}", "\\ud800", "[", "\0"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(parts, st.text(max_size=5)), max_size=12).map("".join))
def test_any_text_is_parsed(text):
    for call in JsonCalls()(text).calls:
        assert isinstance(call, ToolCall)
        assert repr(call.message(0)).encode()
    environment = TextEnvironment(None, byte_tokenizer(), {"echo": echo}, list)
    assert isinstance(environment.call_tool(text), str)


# --- time ---------------------------------------------------------------------------------------------------------


UNITS = [
    "<request>",
    "<",
    "<request><",
    "<call>",
    "<request>\n<",
    "<tool_call>",
    "<tool_call>{",
    "[",
    "</tool_call>",
    ">",
]


@pytest.mark.parametrize("unit", UNITS)
def test_reading_calls_takes_linear_time(unit):
    """C10: eight times the text takes about eight times the time; squares would take 64."""
    environment, read_json = TextEnvironment(None, byte_tokenizer(), {"echo": echo}, list), JsonCalls()

    def seconds(size):
        text = (unit * size)[:size]
        began = time.process_time()
        environment.call_tool(text)
        environment.call_tool(f"<request><{text}<call>")
        read_json(text)
        return time.process_time() - began

    few, many = (min(seconds(size) for _ in range(3)) for size in (25_000, 200_000))
    assert many < max(20 * few, 0.05)


def test_what_is_too_long_is_not_handed_on():
    """C10: the length limit."""
    environment = TextEnvironment(None, byte_tokenizer(), {"echo": lambda text: str(len(text))}, list)
    assert environment.call_tool(f"<request><echo>{'x' * 65_536}<call>") == "65536"
    answer = "Tool error: the call is longer than 65536 characters"
    assert environment.call_tool(f"<request><echo>{'x' * 65_537}<call>") == answer
    assert JsonCalls()(f"<tool_call>{' ' * 65_537}</tool_call>").calls[0].error in answer


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("a <request><t>q<call>b", ("t", "q")),
        ("<request>x<t>q>r<call>", ("t", "q>r")),
        ("<request><a\n<t>q<call>", ("t", "q")),
        ("<request>><t>q<call>", ("t", "<t>q")),
        ("<request><a<t>q<call>", ("a<t", "q")),
        ("<call><request><t>q", (None, None)),
        ("<request>t>q<call>", (None, None)),
        ("<request><t\n>q<call>", (None, None)),
        ("", (None, None)),
    ],
)
def test_requests_are_read_as_before(text, call):
    assert TextEnvironment(None, byte_tokenizer(), [], list).parse_tool_call(text) == call


# --- tools that end or never do -----------------------------------------------------------------------------------


class CannotSay(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (SystemExit(0), "Tool error: 0"),
        (SystemExit("bye"), "Tool error: bye"),
        (GeneratorExit(), "Tool error: "),
        (asyncio.CancelledError("no"), "Tool error: no"),
        (CannotSay(), "Tool error: CannotSay"),
    ],
)
@pytest.mark.parametrize("timeout", [None, 20])
def test_a_tool_cannot_end_the_run(error, answer, timeout):
    """R4"""

    def leave(text: str) -> str:
        """Leave.

        Args:
            text: Nothing.
        """
        raise error

    said = '<tool_call>{"name": "leave", "arguments": {"text": ""}}</tool_call>'
    assert results(ChatEnvironment(tools=[leave], tool_timeout=timeout), said) == [answer]
    assert (
        TextEnvironment(None, byte_tokenizer(), {"leave": leave}, list).call_tool("<request><leave>x<call>") == answer
    )


def test_ctrl_c_is_no_answer():
    def interrupt(text):
        raise KeyboardInterrupt

    environment = TextEnvironment(None, byte_tokenizer(), {"t": interrupt}, list)
    with pytest.raises(KeyboardInterrupt):
        environment.call_tool("<request><t>x<call>")


def test_environments_cannot_end_the_run_either():
    """R4, variants: a reset, a constructor, a reward_fn."""

    class Leaves:
        def reset(self):
            raise SystemExit(0)

    def leave(*_):
        raise SystemExit(0)

    for factory, what in ((Leaves, r"Leaves.reset\(\)"), (leave, "environment_factory")):
        environment = TextEnvironment(None, byte_tokenizer(), environment_factory=factory)
        with pytest.raises(RuntimeError, match=rf"{what} asked the program to end: SystemExit\(0\)"):
            environment._begin([{"prompt": "p"}], [0])
    environment = TextEnvironment(None, byte_tokenizer(), [], leave)
    with pytest.raises(RuntimeError, match="reward_fn asked the program to end"):
        environment.compute_reward([environment._open({"prompt": "p"}, "", None)])


CALL = '<tool_call>{"name": "hang", "arguments": {"text": ""}}</tool_call>'


def test_tools_that_hang_do_not_pile_up(caplog):
    """C28: over 10 steps of 3 rows; the model reads why, and other tools still answer."""
    release = threading.Event()

    def hang(text: str) -> str:
        """Hang.

        Args:
            text: Nothing.
        """
        release.wait(30)
        return "late"

    environment = ChatEnvironment(tools=[hang, echo], tool_timeout=0.02, max_iterations=1)
    threads, seen = threading.active_count(), []
    for _ in range(10):
        chat(environment, lambda text, turn: CALL if turn == 0 else "Done.", [ROW] * 3)
        seen.append(threading.active_count() - threads)
    assert max(seen) <= 6  # 4 late calls, and those that began before they were late
    assert seen[-1] == seen[3]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("tool 'hang':")
    assert "is not called until one of them ends" in line
    assert results(environment, CALL)[0].endswith("earlier calls of hang still run after their time-out")
    assert results(environment, CALL.replace("hang", "echo").replace('""', '"on"')) == ["on"]
    release.set()
    while threading.active_count() > threads:
        time.sleep(0.01)
    assert results(environment, CALL) == ["late"]


def test_an_async_tool_past_its_time_is_cancelled():
    """C28, variant: its thread ends."""
    cancelled = threading.Event()

    async def hang(text: str) -> str:
        """Hang.

        Args:
            text: Nothing.
        """
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return ""

    threads = threading.active_count()
    (answer,) = results(ChatEnvironment(tools=[hang], tool_timeout=0.05), CALL)
    assert answer == "Tool error: no answer within 0.05 s"
    assert cancelled.wait(10)
    while threading.active_count() > threads:
        time.sleep(0.01)


def test_calls_that_wait_for_a_late_one_of_their_environment_end():
    """C28, variant: the methods of one environment run one at a time."""
    release = threading.Event()

    class Hangs:
        def reset(self):
            return None

        def hang(self, text: str = "") -> str:
            """Hang.

            Args:
                text: Nothing.
            """
            release.wait(30)
            return ""

        def other(self) -> str:
            """Another."""
            return "x"

    threads = threading.active_count()
    environment = ChatEnvironment(environment_factory=Hangs, tool_timeout=0.05)
    said = itertools.chain([CALL, CALL.replace("hang", "other").replace('"text": ""', "")], itertools.repeat("Done."))
    chat(environment, lambda text, turn: next(said), [ROW])
    time.sleep(0.2)
    assert threading.active_count() - threads == 1
    release.set()


def test_calls_that_are_not_late_are_not_counted():
    calls = LateCalls(timeout=60, most=1)
    with calls.calling("a"), calls.calling("a"), calls.calling("b"):
        assert calls.count("a") == 0
    untimed = LateCalls(None, most=1)
    with untimed.calling("a"), untimed.calling("a"):
        assert untimed.count("a") == 0
