"""The assistant's tokens under many chat templates: found by rendering, not by knowing the template."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenising import tokenize_supervised
from tokenizers_for_tests import (
    CHATML,
    CHATML_GENERATION,
    COUNTING,
    DEFAULT_SYSTEM,
    LLAMA2,
    LLAMA3,
    NO_GENERATION_PROMPT,
    THINKING,
    TOOLS,
    byte_tokenizer,
    metaspace_tokenizer,
)

from trl.data.chat import ChatTemplate

USER = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}
MORE = {"role": "user", "content": "more"}
BYE = {"role": "assistant", "content": "bye"}
DIALOGUE = [USER, YO, MORE, BYE]
SYSTEM = {"role": "system", "content": "sys"}


def learned(tokenizer: Any, messages: Any, **row: Any) -> list[str]:
    """The runs of learned tokens as text."""
    rows, _ = tokenize_supervised([{"messages": messages, **row}], tokenizer, assistant_only_loss=True)
    runs: list[list[int]] = [[]]
    for token, counts in zip(rows[0]["input_ids"], rows[0]["loss_mask"], strict=True):
        if counts:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        (CHATML, {}, ["yo<|im_end|>", "bye<|im_end|>"]),
        (CHATML_GENERATION, {}, ["yo<|im_end|>", "bye<|im_end|>"]),
        (DEFAULT_SYSTEM, {}, ["yo<|im_end|>", "bye<|im_end|>"]),
        (LLAMA2, {"bos": "<s>", "eos": "</s>"}, [" yo </s>", " bye </s>"]),
        (LLAMA3, {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}, ["yo<|eot_id|>", "bye<|eot_id|>"]),
        (NO_GENERATION_PROMPT, {}, ["assistant: yo\n", "assistant: bye\n"]),
    ],
)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_assistant_tokens(template: str, options: dict[str, str], expected: list[str], trim_offsets: bool) -> None:
    tokenizer = byte_tokenizer(template, trim_offsets=trim_offsets, **options)
    assert learned(tokenizer, DIALOGUE) == expected


WORDS = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_whatever_is_said_exactly_the_assistant_is_learned(turns: list[tuple[str, str]]) -> None:
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert learned(byte_tokenizer(DEFAULT_SYSTEM), messages) == [answer + "<|im_end|>" for _, answer in turns]


def test_assistant_tokens_with_a_blank_before_every_text() -> None:
    tokenizer = metaspace_tokenizer()
    rows, _ = tokenize_supervised(
        [{"messages": [USER, {"role": "assistant", "content": "hi"}]}], tokenizer, assistant_only_loss=True
    )
    tokens = tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])
    assert tokens == ["<s>", "▁[INST]", "▁hi", "▁[/INST]", "▁hi", "▁", "</s>"]
    assert rows[0]["loss_mask"] == [0, 0, 0, 0, 1, 1, 1]


def test_assistant_tokens_without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert learned(tokenizer, [SYSTEM, *DIALOGUE]) == ["yo<|im_end|>", "bye<|im_end|>"]


def test_an_assistant_who_speaks_first() -> None:
    assert learned(byte_tokenizer(), [YO, MORE, BYE]) == ["yo<|im_end|>", "bye<|im_end|>"]


def test_reasoning_that_the_template_strips_from_earlier_turns() -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyo"}
    tokenizer = byte_tokenizer(THINKING)
    dialogue = [USER, thought, MORE, {**thought, "content": thought["content"] + "!"}]
    # the first turn as it stands in history; of the last one what follows the generation prompt "<think>\n"
    assert learned(tokenizer, dialogue) == ["yo<|im_end|>", "hm\n</think>\n\nyo!<|im_end|>"]
    _, report = tokenize_supervised([{"messages": dialogue}], tokenizer, assistant_only_loss=True)
    assert report.rewritten == 1


def test_content_that_begins_like_the_generation_prompt() -> None:
    # the prompt opens "<think>\n"; an earlier answer that starts with "<t" must not lose those letters
    tokenizer = byte_tokenizer(THINKING)
    assert learned(tokenizer, [USER, {**YO, "content": "<t>"}, MORE, BYE])[0] == "<t><|im_end|>"


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL_TURNS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    BYE,
]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_tool_calls_are_learned_and_tool_results_are_not() -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    assert learned(byte_tokenizer(TOOLS), TOOL_TURNS, tools=[ADD]) == [call, "bye<|im_end|>"]


def test_none_that_arrow_fills_in_is_not_rendered() -> None:
    filled = [{"tool_calls": None, **message} for message in TOOL_TURNS]
    filled[1]["content"] = None
    filled[1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}]
    template = ChatTemplate(byte_tokenizer(TOOLS))
    assert template.render(filled) == template.render(TOOL_TURNS)


def test_tools_are_spelled_out_for_a_template_that_knows_none() -> None:
    tokenizer = byte_tokenizer(CHATML)
    rows, report = tokenize_supervised(
        [{"messages": TOOL_TURNS, "tools": '[{"name": "add"}]'}], tokenizer, assistant_only_loss=True
    )
    text = tokenizer.decode(rows[0]["input_ids"])
    assert '<|im_start|>system\nYou may call these functions:\n<tools>\n{"name": "add"}\n</tools>' in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    assert report.spelled_tools == 1


def test_a_template_that_changes_what_it_has_rendered() -> None:
    tokenizer = byte_tokenizer(COUNTING)
    assert learned(tokenizer, DIALOGUE) == ["yo<|im_end|>", "bye<|im_end|>"]
    _, report = tokenize_supervised([{"messages": DIALOGUE}], tokenizer, assistant_only_loss=True)
    assert report.rewritten == 1


def test_a_template_that_forbids_a_role() -> None:
    tokenizer = byte_tokenizer(LLAMA2, bos="<s>", eos="</s>")
    with pytest.raises(ValueError, match=r"cannot render the roles system, user, .*Only user and assistant roles"):
        learned(tokenizer, [SYSTEM, *DIALOGUE])


def test_no_chat_template() -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template: .*chat_template_path"):
        learned(byte_tokenizer(None), DIALOGUE)


def test_template_arguments_of_the_call_and_of_the_row() -> None:
    tokenizer = byte_tokenizer("{{ mood }}{{ name }}" + CHATML)
    rows, _ = tokenize_supervised(
        [{"messages": DIALOGUE, "chat_template_kwargs": {"name": "Bo"}}],
        tokenizer,
        template_kwargs={"mood": "glad", "name": "Al"},
    )
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("gladBo<|im_start|>user")


def test_split_shares_the_prompt_and_ends_at_the_stop_token() -> None:
    template = ChatTemplate(byte_tokenizer())
    prompt, answers, spans, _, rewritten = template.split([USER], [[YO], [BYE]])
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert answers == ["yo<|im_end|>", "bye<|im_end|>"]
    assert spans == [[(0, 12)], [(0, 13)]]
    assert not rewritten


def test_split_where_answers_do_not_continue_the_generation_prompt() -> None:
    plain = THINKING.replace("{{ '<think>\n\n</think>\n\n' + content }}", "{{ content }}")
    template = ChatTemplate(byte_tokenizer(plain))
    prompt, answers, _, _, rewritten = template.split([USER], [[{**YO, "content": "<b>"}], [BYE]])
    assert prompt.endswith("<|im_start|>assistant\n")
    assert answers == ["<b><|im_end|>", "bye<|im_end|>"]
    assert rewritten


def test_split_continues_an_answer_that_the_prompt_begins() -> None:
    begun = {"role": "assistant", "content": "Sure, "}
    prompt, answers, *_ = ChatTemplate(byte_tokenizer()).split([USER, begun], [[YO]])
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nSure, "
    assert answers == ["yo<|im_end|>"]


def test_split_with_a_template_that_changes_what_it_has_rendered() -> None:
    # the prompt is the one that the model is prompted with, whatever becomes of it later
    split = ChatTemplate(byte_tokenizer(COUNTING)).split([USER], [[YO], [BYE, MORE, BYE]])
    assert split.prompt == "1 messages\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert split.answers[0] == "yo<|im_end|>"
    assert split.answers[1].startswith("bye<|im_end|>\n<|im_start|>user\nmore")
    assert split.rewritten


def test_split_where_prompts_differ_and_the_answers_are_not_prompted_for() -> None:
    thinks = COUNTING.removesuffix("{% endif %}") + "<think>\n{% endif %}"
    with pytest.raises(
        ValueError, match=r"renders the prompt in another way under each answer .from character 0: '2 m"
    ):
        ChatTemplate(byte_tokenizer(thinks)).split([USER], [[YO], [BYE, MORE, BYE]])
