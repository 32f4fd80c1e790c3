import json
import random
import time

import pytest
import torch
from tokenizers_for_tests import CHATML, COUNTING, LLAMA3, TOOLS, byte_tokenizer

from trl.data.chat import ChatTemplate
from trl.data.records import Completion
from trl.environment.chat_environment import Answer, AnswerRenderer, ChatEnvironment
from trl.environment.tool_calls import JsonCalls, ToolCall
from trl.environment.turns import SampledTurns
from trl.generation.sampler import SamplingParams

QWEN = (  # answers of one round share a turn of the user; reasoning stays only behind the last question
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ '\n' }}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = TOOLS.replace(
    "{{ message['content'] }}", "{{ message['content'] if loop.last else message['content'][:0] }}"
)
NUMBERED = TOOLS.replace("<|im_start|>{{ message['role'] }}", "<|im_start|>{{ loop.index }} {{ message['role'] }}")


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def shout(text: str) -> str:
    """Write in capitals.

    Args:
        text: What to write.
    """
    return text.upper()


def fail(text: str) -> str:
    """Fail.

    Args:
        text: Nothing.
    """
    raise OSError("of course")


class Counter:
    """Counts to its goal."""

    def __init__(self) -> None:
        self.count, self.reward, self.done = 0, 0.0, False

    def reset(self, goal: int = 3) -> str:
        self.goal = goal
        return f" Count to {goal}."

    def up(self, by: int = 1) -> str:
        """Count on.

        Args:
            by: How far.
        """
        self.count += by
        self.reward += by / 10
        self.done = self.count >= self.goal
        return f"now {self.count}"

    def _hidden(self) -> None:
        raise AssertionError


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class ScriptedSampler:
    """Says what `script(text so far, turn)` says, and keeps what it was given."""

    def __init__(self, tokenizer, script, end="<|im_end|>"):
        self.tokenizer, self.script, self.end, self.given = tokenizer, script, end, []

    def sample(self, prompts, params, n=1):
        self.given += [list(prompt) for prompt in prompts]
        return [[self._completion(prompt, params)] for prompt in prompts]

    def _completion(self, prompt, params):
        text = self.tokenizer.decode(prompt)
        ids = self.tokenizer(self.script(text, text.count("<|im_start|>assistant") - 1) + self.end).input_ids
        ids = ids[: params.max_new_tokens]
        return Completion(ids, [-1.0] * len(ids), [-1.0] * len(ids), "stop")


def chat(environment, script, rows, template=TOOLS, limit=1000, end="<|im_end|>"):
    tokenizer = byte_tokenizer(template)
    environment = environment.for_policy(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])
    sampler = ScriptedSampler(tokenizer, script, end)
    turns = SampledTurns(sampler, SamplingParams(max_new_tokens=limit))
    return environment.rollout(rows, turns, range(len(rows)), limit), sampler, tokenizer


def row(text="hi", **columns):
    return {"prompt": [{"role": "user", "content": text}], **columns}


def two_rounds(text, turn):
    return ["Let me see.\n" + call("add", a=1, b=2) + call("shout", text="x"), call("add", a=3, b=4), "It is 7."][turn]


# --- token-exact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TOOLS, QWEN, CHATML])
def test_prompt_model_and_tool_tokens_are_what_the_model_saw(template):
    rollout, sampler, tokenizer = chat(ChatEnvironment([add, shout]), two_rounds, [row()], template)
    (prompt,), (completion,), (mask,) = rollout.prompts, rollout.completions, rollout.masks
    whole = prompt + completion
    starts = [i for i in range(len(mask)) if mask[i] and not (i and mask[i - 1])]
    assert sampler.given == [whole[: len(prompt) + start] for start in starts]
    sampled = [tokenizer.decode(piece) for piece in runs(completion, mask)]
    assert sampled == [two_rounds("", turn) + "<|im_end|>" for turn in range(3)]
    assert rollout.metadata["turn_ends"] == [
        [end + 1 for end in range(len(mask)) if mask[end : end + 2] in ([1, 0], [1])]
    ]


def runs(ids, mask):
    pieces, last = [], 0
    for token, counted in zip(ids, mask, strict=True):
        if counted and not last:
            pieces.append([])
        if counted:
            pieces[-1].append(token)
        last = counted
    return pieces


@pytest.mark.parametrize("template", [TOOLS, QWEN])
def test_what_the_model_sees_is_the_template_s_own_rendering(template):
    def script(text, turn):
        one = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
        spelled = (
            one if template is TOOLS else "\n" + one.replace("<tool_call>", "<tool_call>\n").replace("}</", "}\n</")
        )
        return spelled if turn < 2 else "Three."

    rollout, _, tokenizer = chat(ChatEnvironment([add]), script, [row()], template)
    (said,) = rollout.metadata["completions"]
    assert [message["role"] for message in said] == ["assistant", "tool", "assistant", "tool", "assistant"]
    whole = tokenizer.apply_chat_template([*row()["prompt"], *said], tools=[add], tokenize=False)
    assert tokenizer.decode(rollout.prompts[0] + rollout.completions[0]) == whole.rstrip("\n")


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        (REWRITING, "another way"),
        (COUNTING, "another way"),
        (NUMBERED, "another way in later rounds"),
        (LLAMA3, "none of the model's end tokens"),
    ],
)
def test_a_template_that_cannot_be_continued_is_refused(template, wrong):
    tokenizer = byte_tokenizer(template, bos="<s>")
    with pytest.raises(ValueError, match=wrong):
        ChatEnvironment([add]).for_policy(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])


def test_the_template_closes_a_turn_that_ended_by_another_token():
    rollout, _, tokenizer = chat(ChatEnvironment([add, shout], max_iterations=1), two_rounds, [row()], end="")
    text = tokenizer.decode(rollout.completions[0])
    assert "</tool_call><|im_end|>\n<|im_start|>tool\n3<|im_end|>" in text
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [m for token, m in zip(rollout.completions[0], rollout.masks[0], strict=True) if token == end]
    assert ends == [0] * 3


def test_answers_are_tokenised_alone():
    tokenizer = byte_tokenizer(TOOLS, merges=[("Ċ", "<"), ("n", "o")])
    renderer = AnswerRenderer(ChatTemplate(tokenizer), [tokenizer.convert_tokens_to_ids("<|im_end|>")])
    text, ids = renderer([Answer("tool", "no")], closed=True)
    assert text == "\n<|im_start|>tool\nno<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer(text, add_special_tokens=False).input_ids


# --- calls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call", "no call", []),
        ('so <tool_call>{"name": "f"}</tool_call>', "so", [ToolCall("f")]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>', "", [ToolCall("f", {"a": [1]})]),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [ToolCall("f", {"a": 1})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [ToolCall("f", {"a": 1})]),
        (
            '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>',
            "",
            [ToolCall("f"), ToolCall("g")],
        ),
    ],
)
def test_calls_are_found(text, content, calls):
    spoken = JsonCalls()(text)
    assert (spoken.content, spoken.calls) == (content, calls)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>{'name': 'f'}</tool_call>", "no JSON"),
        ("<tool_call>[1]</tool_call>", '"name" and "arguments"'),
        ('<tool_call>{"name": 1}</tool_call>', '"name" and "arguments"'),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "JSON object of the arguments"),
        ('<tool_call>{"name": "f", "arguments": "{"}</tool_call>', "the arguments are no JSON"),
        ('<tool_call>{"name": "f"}', "not closed by </tool_call>"),
        ("<tool_call>" + "[" * 60_000 + "</tool_call>", "no JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "the call is longer than 65536 characters"),
    ],
)
def test_what_is_wrong_with_a_call_is_said(text, error):
    assert error in JsonCalls()(text).calls[0].error


def test_other_tags_and_another_parser():
    assert JsonCalls("[", "]")('[{"name": "f"}]').calls == [ToolCall("f")]
    with pytest.raises(ValueError, match="opening, closing"):
        JsonCalls("", "]")


@pytest.mark.parametrize("timeout", [None, 5])
@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (call("add", a=1, b=2), "3"),
        (call("shout", text="a"), "A"),
        (call("nope"), "Unknown tool nope."),
        (call("fail", text=""), "Tool error: of course"),
        (call("add", a=1), "Tool error: add() missing 1 required positional argument: 'b'"),
        (
            "<tool_call>{</tool_call>",
            "Tool error: the call is no JSON: Expecting property name enclosed in double quotes",
        ),
    ],
)
def test_answers(timeout, said, answer):
    environment = ChatEnvironment([add, shout, fail], tool_timeout=timeout)
    rollout, _, _ = chat(environment, lambda text, turn: "end" if turn else said, [row()])
    assert rollout.metadata["completions"][0][1]["content"].startswith(answer)
    assert rollout.metadata["completed"] == [True]


def test_a_slow_tool_is_answered_for():
    def wait(text: str) -> str:
        """Wait.

        Args:
            text: Nothing.
        """
        time.sleep(0.5)
        return text

    environment = ChatEnvironment([wait], tool_timeout=0.05)
    rollout, _, _ = chat(environment, lambda text, turn: "end" if turn else call("wait", text="x"), [row()])
    assert rollout.metadata["completions"][0][1]["content"] == "Tool error: no answer within 0.05 s"


def test_the_number_of_rounds_is_limited():
    rollout, _, _ = chat(ChatEnvironment([add], max_iterations=2), lambda text, turn: call("add", a=turn, b=0), [row()])
    roles = [message["role"] for message in rollout.metadata["completions"][0]]
    assert roles == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert rollout.metadata["truncated"] == [False]


@pytest.mark.parametrize("limit", [20, 70, 100, 200])
def test_episodes_fit_into_the_limit(limit):
    rollout, _, _ = chat(ChatEnvironment([add]), lambda text, turn: call("add", a=turn, b=0), [row()], limit=limit)
    assert len(rollout.completions[0]) == len(rollout.masks[0]) == len(rollout.logprobs[0]) == limit
    assert rollout.metadata["truncated"] == [True]
    assert rollout.metadata["turn_ends"][0][-1] <= limit


def test_long_results_are_cut():
    environment = ChatEnvironment([shout], max_tool_response=10)
    rollout, _, _ = chat(environment, lambda text, turn: "end" if turn else call("shout", text="x" * 20), [row()])
    assert rollout.metadata["completions"][0][1]["content"] == "XXXXXXX..."


# --- environments of a row's own ----------------------------------------------------------------------------------


def test_every_row_has_its_own_environment():
    environment = ChatEnvironment(environment_factory=Counter)
    assert [schema["function"]["name"] for schema in environment.schemas] == ["up"]
    assert environment.gives_rewards
    rows = [row(goal=2), row(goal=1), row()]
    rollout, _, _ = chat(environment, lambda text, turn: call("up"), rows)
    assert [env.count for env in rollout.metadata["environments"]] == [2, 1, 3]
    assert rollout.rewards == pytest.approx([0.2, 0.1, 0.3])
    assert rollout.metadata["turn_rewards"] == [pytest.approx([0.1] * n) for n in (2, 1, 3)]
    assert [len(ends) for ends in rollout.metadata["turn_ends"]] == [2, 1, 3]
    assert all(rollout.metadata["completed"])


def test_reset_speaks_in_the_prompt():
    rollout, _, tokenizer = chat(ChatEnvironment(environment_factory=Counter), lambda *_: "no", [row("Go!", goal=7)])
    assert "<|im_start|>user\nGo! Count to 7.<|im_end|>" in tokenizer.decode(rollout.prompts[0])


def waiting(delays):
    def wait(text: str) -> str:
        """Wait.

        Args:
            text: What to say.
        """
        time.sleep(delays.random() * 0.03)
        return text[::-1]

    return wait


def test_rollouts_do_not_depend_on_the_timing_of_tools():
    rollouts = []
    for trial in range(4):
        environment = ChatEnvironment([waiting(random.Random(trial))], tool_timeout=None if trial == 0 else 5)

        def script(text, turn):
            start = text.index("user\n") + 5
            return call("wait", text=f"{text[start]}.{turn}") * (turn + 1) if turn < 2 else "end"

        rollouts.append(chat(environment, script, [row(f"{i}") for i in range(5)])[0])
    assert all(rollout.completions == rollouts[0].completions for rollout in rollouts)
    assert all(rollout.masks == rollouts[0].masks for rollout in rollouts)


# --- wrong uses ---------------------------------------------------------------------------------------------------


def undescribed(x):
    return x


class NoReset:
    pass


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({}, "tools: give at least one"),
        ({"tools": [undescribed]}, "tools: undescribed cannot be described"),
        ({"tools": [add, add]}, "same name"),
        ({"tools": [add], "max_iterations": 0}, "max_iterations=0"),
        ({"tools": [add], "max_tool_response": 0}, "max_tool_response=0"),
        ({"environment_factory": NoReset}, "NoReset has no method reset"),
    ],
)
def test_wrong_settings(arguments, wrong):
    with pytest.raises(ValueError, match=wrong):
        ChatEnvironment(**arguments)


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [("text", "tools need conversations"), ([{"role": "assistant", "content": "x"}], "not the user's")],
)
def test_wrong_prompts(prompt, wrong):
    with pytest.raises(ValueError, match=wrong):
        chat(ChatEnvironment(environment_factory=Counter), lambda *_: "", [{"prompt": prompt}])


def test_log_probabilities_of_sampled_tokens_alone():
    rollout, _, _ = chat(ChatEnvironment([add, shout]), two_rounds, [row()])
    assert torch.equal(-torch.tensor(rollout.logprobs[0]), torch.tensor(rollout.masks[0]).float())


# --- complete when constructed ------------------------------------------------------------------------------------


def turns_of(tokenizer):
    return SampledTurns(ScriptedSampler(tokenizer, two_rounds), SamplingParams(max_new_tokens=1000))


def test_it_plays_with_the_tokenizer_that_it_was_given():
    tokenizer = byte_tokenizer(TOOLS)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    environment = ChatEnvironment([add, shout], tokenizer=tokenizer, end_ids=[end])
    rollout = environment.rollout([row()], turns_of(tokenizer), [0], 1000)
    assert rollout.completions == chat(ChatEnvironment([add, shout]), two_rounds, [row()])[0].completions
    assert environment.for_policy(byte_tokenizer(TOOLS), [end + 1]) is environment


def test_without_a_tokenizer_it_says_so():
    with pytest.raises(ValueError, match=r"tokenizer=None: an environment needs one .*for_policy"):
        ChatEnvironment([add]).rollout([row()], turns_of(byte_tokenizer(TOOLS)), [0], 100)


def test_a_policy_lends_what_is_missing_and_changes_nothing():
    tokenizer = byte_tokenizer(TOOLS)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    bare, named = ChatEnvironment([add]), ChatEnvironment([add], end_ids=[end])
    ready = bare.for_policy(tokenizer, [end])
    assert (ready.tokenizer, ready.tools, bare.tokenizer) == (tokenizer, bare.tools, None)
    assert named.for_policy(tokenizer, [end + 1]).renderer.end_id == end  # its own end tokens count
    with pytest.raises(ValueError, match="another vocabulary"):
        ready.check_settings(byte_tokenizer(TOOLS, merges=[("n", "o")]))
