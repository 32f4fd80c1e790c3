"""Messages as people's rows hold them: what a template can print of them, and which are learned."""

import json
from typing import Any

import pytest
from tokenizers_for_tests import CHATML, CHATML_GENERATION, TOOLS, byte_tokenizer, styled_tokenizer

from trl.data.chat import ChatTemplate, read_tools
from trl.data.messages import is_learned

USER = {"role": "user", "content": "Rain?"}
CALLS = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] or '' }}{% for call in message.tool_calls or [] %}ARGUMENTS{% endfor %}",
)
AS_JSON = CALLS.replace("ARGUMENTS", "{{ call.function.name }}{{ call.function.arguments | tojson }}")
AS_TEXT = CALLS.replace("ARGUMENTS", "{{ call.function.name }}{{ call.function.arguments }}")
JOINED = CALLS.replace("ARGUMENTS", "{{ call.function.name + call.function.arguments }}")
ITEMS = CALLS.replace(
    "ARGUMENTS", "{{ call.function.name }}{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
)
NAMELESS = CALLS.replace("ARGUMENTS", "{{ '' + call.function.arguments }}")
PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOTH = PARTS_ONLY.replace(
    "{% for p in m.content %}{{ p.text }}{% endfor %}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
)
ONLY_STRINGS = CHATML.replace("message['content']", "message['content'] if message['content'] is string else ''")


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "rain", "arguments": arguments}
    return {"role": "assistant", **more, "tool_calls": [{"type": "function", "id": "call00001", "function": function}]}


def said(template: str | ChatTemplate, *messages: dict[str, Any], **options: Any) -> list[str]:
    chat = template if isinstance(template, ChatTemplate) else ChatTemplate(byte_tokenizer(template), **options)
    text, spans, _ = chat.conversation(list(messages))
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("arguments", [{"town": "Köln"}, '{"town": "Köln"}', json.dumps({"town": "Köln"})])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (AS_JSON, 'rain{"town": "Köln"}<|im_end|>'),
        (AS_TEXT, 'rain{"town": "Köln"}<|im_end|>'),
        (JOINED, 'rain{"town": "Köln"}<|im_end|>'),
        (ITEMS, "raintown=Köln;<|im_end|>"),
        (NAMELESS, '{"town": "Köln"}<|im_end|>'),
        (CHATML, '<tool_call>\n{"name": "rain", "arguments": {"town": "Köln"}}\n</tool_call><|im_end|>'),
    ],
    ids=["as JSON", "as text", "joined to text", "one by one", "without the name", "spelled by us"],
)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_arguments_are_printed_once_whatever_the_row_gives(
    arguments: Any, template: str, expected: str, content: Any
) -> None:
    if template in (AS_TEXT, JOINED, NAMELESS) and isinstance(arguments, str) and "\\u" in arguments:
        expected = expected.replace("Köln", "K\\u00f6ln")  # a template that wants text gets the row's own
    assert said(template, USER, calling(arguments, **content)) == [expected]


@pytest.mark.parametrize("arguments", ["Köln", "[1, 2]", "7", "{", ""])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    assert said(AS_JSON, USER, calling(arguments)) == [f"rain{json.dumps(arguments, ensure_ascii=False)}<|im_end|>"]


def test_arguments_as_text_are_decoded_in_preference_rows_too_and_counted() -> None:
    template = ChatTemplate(byte_tokenizer(AS_JSON))
    split = template.split([USER], [[calling('{"town": "Ulm"}')], [calling({"town": "Bonn"})]])
    assert split.answers == ['rain{"town": "Ulm"}<|im_end|>', 'rain{"town": "Bonn"}<|im_end|>']
    assert template.read([USER, calling('{"town": "Ulm"}'), calling({})]).met == {"arguments as JSON text": 1}


def test_tools_and_calls_that_we_spell_keep_their_letters() -> None:
    tools = [{"name": "rain", "description": "Für Städte"}]
    text = ChatTemplate(byte_tokenizer(CHATML)).render([USER, calling({"town": "Köln", "木": "ö"})], tools)
    assert '{"name": "rain", "description": "Für Städte"}' in text
    assert '{"name": "rain", "arguments": {"town": "Köln", "木": "ö"}}' in text


def test_calls_are_spelled_for_a_template_that_knows_tools_only_and_tools_are_left_to_it() -> None:
    tokenizer, _ = styled_tokenizer("handwritten_lfm2")
    template = ChatTemplate(tokenizer)
    tools = read_tools('[{"name": "rain"}]')
    prompt = template.prompt([USER], tools)
    split = template.split([USER], [[calling({})], [{"role": "assistant", "content": "No."}]], tools)
    assert 'List of tools: <|tool_list_start|>[{"name": "rain"}]<|tool_list_end|>' in prompt
    assert split.prompt == prompt
    assert split.answers[0] == '<tool_call>\n{"name": "rain", "arguments": {}}\n</tool_call><|im_end|>'
    assert template.needs_spelling([calling({})], tools)
    assert not template.needs_spelling([USER], tools)


def test_a_comment_in_a_template_says_nothing_about_what_it_knows() -> None:
    template = ChatTemplate(byte_tokenizer("{# without tools and\ntool_calls #}" + CHATML))
    assert template.needs_spelling([USER], [{"name": "rain"}])
    assert template.needs_spelling([calling({})], None)


def parts(*texts: str, kind: str = "text") -> list[dict[str, Any]]:
    return [{"type": kind, "text": text, "image": None} for text in texts]


@pytest.mark.parametrize("template", [CHATML, ONLY_STRINGS, BOTH, PARTS_ONLY], ids=["repr", "empty", "both", "only"])
@pytest.mark.parametrize("content", ["Oak.", parts("Oak."), parts("Oak.", kind="output_text"), ["Oak."]])
def test_lists_of_text_parts_are_printed_as_their_text(template: str, content: Any) -> None:
    question = {"role": "user", "content": content}
    answer = {"role": "assistant", "content": content}
    chat = ChatTemplate(byte_tokenizer(template))
    assert said(chat, question, answer, question, answer) == ["Oak.<|im_end|>", "Oak.<|im_end|>"]
    assert chat.prompt([question]) == "<|im_start|>user\nOak.<|im_end|>\n<|im_start|>assistant\n"


def test_several_parts_are_joined_where_the_template_reads_only_text_and_counted() -> None:
    answer = {"role": "assistant", "content": parts("Oak.", "Elm.")}
    chat = ChatTemplate(byte_tokenizer(CHATML))
    assert said(chat, USER, answer) == ["Oak.\nElm.<|im_end|>"]
    assert chat.read([USER, answer]).met == {"lists of text parts": 1}
    assert said(BOTH, USER, answer) == ["Oak.Elm.<|im_end|>"]


@pytest.mark.parametrize("part", [{"type": "image", "url": "x"}, {"type": "audio", "text": "x"}, {"type": "text"}, 3])
def test_other_parts_are_refused(part: Any) -> None:
    with pytest.raises(ValueError, match=r"message 1 has a part of kind .*only parts of kind 'text' can be trained"):
        said(CHATML, USER, {"role": "assistant", "content": [*parts("Oak."), part]})


def test_nulls_that_the_row_said_stay_in_calls_and_only_there() -> None:
    message = calling({"town": "Ulm", "day": None}, content=None)
    assert said(AS_JSON, USER, message) == ['rain{"town": "Ulm"}<|im_end|>']
    assert said(AS_JSON, USER, message, keep_nulls=True) == ['rain{"town": "Ulm", "day": null}<|im_end|>']
    assert said(AS_JSON, USER, calling('{"day": null}')) == ['rain{"day": null}<|im_end|>']
    assert said(ChatTemplate(byte_tokenizer(TOOLS), keep_nulls=True), USER, {**message, "content": "x"}) == [
        'x<tool_call>{"name": "rain", "arguments": {"town": "Ulm", "day": null}}</tool_call><|im_end|>'
    ]


def test_nulls_in_tools_given_as_text_were_said() -> None:
    assert read_tools('[{"name": "rain", "default": null}]') == [{"name": "rain", "default": None}]
    assert read_tools([{"name": "rain", "default": None}]) == [{"name": "rain"}]


YO = {"role": "assistant", "content": "yo"}
BYE = {"role": "assistant", "content": "bye"}


@pytest.mark.parametrize(
    "no", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": False}, {"loss": False}]
)
@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION])
def test_a_message_without_weight_is_not_learned(no: Any, template: str) -> None:
    assert said(template, USER, {**YO, **no}, {**USER, "weight": 0}, {**BYE, "weight": 1}) == ["bye<|im_end|>"]
    assert said(template, USER, {**YO, **dict.fromkeys(no)}, USER, BYE) == ["yo<|im_end|>", "bye<|im_end|>"]


def test_what_cannot_be_honoured_about_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight=0\.5: 1 .learn it. and 0 .do not. are known"):
        is_learned({**YO, "weight": 0.5})
    with pytest.raises(
        ValueError, match="field loss_weight=0, which seems to say whether it is learned; write `weight"
    ):
        is_learned({**YO, "loss_weight": 0})
    with pytest.raises(ValueError, match="field mask=True"):
        is_learned({**YO, "mask": True})
    assert is_learned({**YO, "trainer": "Ann", "score": 1, "mask": "x"})


def test_weights_hold_for_answers_too() -> None:
    split = ChatTemplate(byte_tokenizer()).split([USER], [[{**YO, "weight": 0}, USER, BYE]])
    (spans,) = split.spans
    assert [split.answers[0][start:end] for start, end in spans] == ["bye<|im_end|>"]
