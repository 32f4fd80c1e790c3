"""One rendering tells whose the characters are: thirteen styles of template, and whatever is said in them."""

import json
import pickle
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, STYLES, byte_tokenizer, styled_tokenizer

from trl.data.chat import ChatTemplate

RENDERED = Path(__file__).parent / "rendered"
THOUGHTS = {"handwritten_gpt_oss": "thinking"}
TOOLS = [{
    "type": "function",
    "function": {
        "name": "rain",
        "description": "Will it rain?",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}]  # fmt: skip


def system(text: str = "Be brief.") -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", **({} if text is None else {"content": text}), **more}


def call(town: str = "Köln", number: int = 1) -> list[dict[str, Any]]:
    function = {"name": "rain", "arguments": {"town": town}}
    return [{"type": "function", "id": f"call0000{number}", "function": function}]


def told(text: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "name": "rain", "tool_call_id": f"call0000{number}", "content": text}


def conversations(style: str) -> dict[str, tuple[list[dict[str, Any]], Any]]:
    thought = THOUGHTS.get(style, "reasoning_content")
    agentic = [
        system(),
        user("Rain in Köln?"),
        assistant(tool_calls=call(), **{thought: "I look it up."}),
        told("no"),
        assistant("It stays dry.", **{thought: "The tool says no."}),
        user("And in Ulm?"),
        assistant(tool_calls=call("Ulm", 2), **{thought: "Once more."}),
        told("yes", 2),
        assistant("Take a coat.", **{thought: "It will rain."}),
    ]
    return {
        "plain": ([user("A tree?"), assistant("Oak.")], None),
        "system": ([system(), user("A tree?"), assistant("Oak.")], None),
        "turns": ([system(), user("A tree?"), assistant("Oak."), user("Another?"), assistant("Elm.")], None),
        "tool": ([user("Rain in Köln?"), assistant(tool_calls=call()), told("no"), assistant("It stays dry.")], TOOLS),
        "agentic": (agentic, TOOLS),
    }


def bracketed(text: str, spans: Any) -> str:
    for start, end in reversed(spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


def show(style: str) -> str:
    return shown(style, *styled_tokenizer(style))


def shown(style: str, tokenizer: Any, ends: list[int]) -> str:
    """Every conversation as the style renders it, the assistant's words in brackets."""
    template = ChatTemplate(tokenizer, ends=ends)
    lines = [f"# {style}: a turn ends with one of {json.dumps(template.end_texts, ensure_ascii=False)}"]
    for name, (messages, tools) in conversations(style).items():
        lines.append(f"\n===== {name} =====")
        try:
            reading = template.read(messages, tools)
        except ValueError as error:
            lines.append(f"refused: {error}")
            continue
        assert reading.text == template.render(messages, tools)
        lines.append(bracketed(reading.text, reading.spans()))
        lines += [f"-- not printed: {role}'s {name} ({n})" for (role, name), n in sorted(reading.unprinted.items())]
        lines += ["-- seen in another way when the model answers"] if reading.rewritten else []
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("style", STYLES)
def test_the_learned_text_of_every_style_is_the_one_that_was_read_by_eye(style: str) -> None:
    assert show(style) == (RENDERED / f"{style}.txt").read_text(encoding="utf-8")


# --- whatever is said ------------------------------------------------------------------------------------------------


class Printed(NamedTuple):
    """How a style prints a conversation without tools: `{}` is a content; the assistant's words are learned."""

    head: str
    asked: str
    said: str
    after: str = ""
    last: str | None = None
    """the last answer where it is printed in another way"""
    strips: bool = False
    end: str = ""

    def __call__(self, turns: list[tuple[str, str]]) -> list[tuple[bool, str]]:
        pieces = [(False, self.head)]
        for number, (question, answer) in enumerate(turns):
            if self.strips:
                question, answer = question.strip(), answer.strip()
            form = self.last if self.last is not None and number == len(turns) - 1 else self.said
            pieces += [(False, self.asked.replace("{}", question)), (True, form.replace("{}", answer))]
            pieces += [(False, self.after)]
        return [*pieces, (False, self.end)]


IM = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
HARMONY = "<|start|>user<|message|>{}<|end|><|start|>assistant"
HARMONY_HEAD = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final.<|end|>"
)
COMMAND = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
GRANITE = "<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
GRANITE_HEAD = (
    "<|start_of_role|>system<|end_of_role|>You are Granite, developed by IBM. You are a helpful AI assistant."
)
LLAMA3 = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3_HEAD = "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n<|eot_id|>"
PRINTED = {
    "handwritten_chatml": Printed(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", IM, "{}<|im_end|>", "\n"
    ),
    "handwritten_command": Printed("<BOS_TOKEN>", COMMAND, "<|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "handwritten_gemma": Printed(
        "<bos>", "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "{}<end_of_turn>", "\n", strips=True
    ),
    "handwritten_gpt_oss": Printed(
        HARMONY_HEAD, HARMONY, "<|channel|>final<|message|>{}<|end|>", last="<|channel|>final<|message|>{}<|return|>"
    ),
    "handwritten_granite": Printed(f"{GRANITE_HEAD}<|end_of_text|>\n", GRANITE, "{}<|end_of_text|>", "\n"),
    "handwritten_lfm2": Printed("<|startoftext|>", IM, "{}<|im_end|>", "\n"),
    "handwritten_llama3": Printed(f"<|begin_of_text|>{LLAMA3_HEAD}", LLAMA3, "{}<|eot_id|>", strips=True),
    "handwritten_phi3": Printed(
        "", "<|user|>\n{}<|end|>\n<|assistant|>\n", "{}<|end|>", "\n", last="{}<|end|>\n<|endoftext|>"
    ),
    "mistral_nemo": Printed("<s>", "[INST]{}[/INST]", "{}</s>"),
}
TEMPLATES: dict[str, ChatTemplate] = {}


def template_of(style: str) -> ChatTemplate:
    if style not in TEMPLATES:
        tokenizer, ends = styled_tokenizer(style)
        TEMPLATES[style] = ChatTemplate(tokenizer, ends=ends)
    return TEMPLATES[style]


def said_by_the_assistant(pieces: list[tuple[bool, str]]) -> list[tuple[int, int]]:
    spans, at = [], 0
    for learned, piece in pieces:
        spans += [(at, at + len(piece))] if learned else []
        at += len(piece)
    return spans


BITS = st.sampled_from(
    ["a", "user", "assistant", "Oak.", " ", "\n", "\t", '"', "\\", "{", "}", "ö", "木", "\ue000", "\u200b", "{{ x }}",
     "<|im_end|>", "<|im_start|>assistant\n", "<|end|>", "<|start|>assistant", "[/INST]", "</s>", "<end_of_turn>\n",
     "<|eot_id|>", "\n<|assistant|>\n", "<tool_call>", "</tool_call>", "<tool_response>", "<b>", "</b>", "zqsaid1"]
)  # fmt: skip
SAID = st.lists(BITS, max_size=5).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@pytest.mark.parametrize("style", PRINTED)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4))
@example([("hi", "hi"), ("hi", "hi")])
@example([("", ""), ("", "")])
@example([(" \n", "\n"), ("\n\n", " ")])
@example([("a ", " a\n"), ("a\n", "\na")])
@example([("\U00100000", "yes"), ("\U00100001", "no")])
@example([("\U00100000", "yes"), ("no", "")])
@example([("\U00100000", "user"), ("assistant", "s")])
@example([("\U00100000 ", " yes"), ("no\n", "\nmaybe ")])
def test_exactly_what_the_assistant_says_is_found_or_the_row_is_refused(
    style: str, turns: list[tuple[str, str]]
) -> None:
    pieces = PRINTED[style]([*turns])
    if style == "handwritten_phi3":  # the blank line after an inner turn is nobody's, after the last one there is none
        pieces = pieces[:-2]
    messages = [m for question, answer in turns for m in (user(question), assistant(answer))]
    private = any(c >= "\U00100000" for pair in turns for said in pair for c in said)
    with pytest.raises(ValueError, match="mark them with") if private else nullcontext():
        reading = template_of(style).read(messages)
        if private:  # found all the same, without marks
            assert reading.spans() == said_by_the_assistant(pieces)
            raise ValueError("mark them with")
    if private:
        return
    assert reading.text == "".join(piece for _, piece in pieces)
    assert reading.spans() == said_by_the_assistant(pieces)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(SAID, SAID, SAID), min_size=1, max_size=3))
def test_thoughts_that_the_template_cuts_off_are_not_taken_for_the_answer(turns: list[tuple[str, str, str]]) -> None:
    messages, expected = [], []
    for number, (question, thought, answer) in enumerate(turns):
        question, thought, answer = f"?{question}", thought.strip(), f"!{answer}"
        messages += [user(question), assistant(f"<think>\n{thought}\n</think>\n\n{answer}")]
        last = number == len(turns) - 1
        thinks = "<think>\n" + thought.strip("\n") + "\n</think>\n\n" if last else ""
        expected.append(f"{thinks}{answer}<|im_end|>")
    if any(c >= "\U00100000" for m in messages for c in m["content"]):
        return
    reading = template_of("qwen3").read(messages)
    assert [reading.text[a:b] for a, b in reading.spans()] == expected


VALUES = st.recursive(
    SAID | st.integers(-9, 9) | st.booleans(), lambda inner: st.dictionaries(SAID, inner, max_size=2), max_leaves=4
)
CALLED = {
    "qwen3": '<tool_call>\n{"name": "rain", "arguments": ARGUMENTS}\n</tool_call><|im_end|>',
    "handwritten_granite": '<|tool_call|>[{"name": "rain", "arguments": ARGUMENTS}]<|end_of_text|>',
    "handwritten_lfm2": '<tool_call>\n{"name": "rain", "arguments": ARGUMENTS}\n</tool_call><|im_end|>',
    "handwritten_llama3": '{"name": "rain", "parameters": ARGUMENTS}<|eot_id|>',
    "handwritten_gpt_oss": " to=functions.rain<|channel|>commentary json<|message|>ARGUMENTS<|call|>",
    "mistral_nemo": '[TOOL_CALLS][{"name": "rain", "arguments": ARGUMENTS, "id": "call00001"}]</s>',
    "handwritten_deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>rain\n```json\nARGUMENTS\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    ),
}


@pytest.mark.parametrize("style", CALLED)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.dictionaries(SAID, VALUES, max_size=2), SAID), min_size=1, max_size=3), st.booleans())
@example(rounds=[({"": {}, "a": "<|im_start|>assistant\n</s>"}, "")], as_text=False)
def test_exactly_the_calls_are_learned_whatever_is_in_them(
    style: str, rounds: list[tuple[dict[str, Any], str]], as_text: bool
) -> None:
    messages, expected = [user("Rain?")], []
    for arguments, result in rounds:
        text = json.dumps(arguments, ensure_ascii=False)
        if any(c >= "\U00100000" for c in text + result):
            return
        (one,) = call()
        one = {**one, "function": {"name": "rain", "arguments": text if as_text else arguments}}
        messages += [assistant(tool_calls=[one]), told(result)]
        expected.append(CALLED[style].replace("ARGUMENTS", text))
    reading = template_of(style).read(messages, TOOLS)
    assert [reading.text[a:b] for a, b in reading.spans()] == expected


def test_one_template_is_rendered_once_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, ends = styled_tokenizer("qwen3")
    template = ChatTemplate(tokenizer, ends=ends)
    rendered = type(tokenizer).apply_chat_template
    count = 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return rendered(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    rows = [[user(f"tree {i}?"), assistant(f"Oak {i}."), user("more?"), assistant(f"\nElm {i} ")] for i in range(50)]
    template.conversation(rows[0])
    count = 0
    for row in rows:
        template.conversation(row)
    assert count == 50


# --- the cases that people met ---------------------------------------------------------------------------------------


def learned(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    text, spans, _ = template.conversation(messages, tools)
    return [text[start:end] for start, end in spans]


INNER_END = (  # in the manner of gpt-oss: inner turns close with one token, the last one with another
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}[{{ m.tool_calls[0].function.name }}]{% endif %}"
    "{% if loop.last and m.role == 'assistant' %}<|endoftext|>{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TREES = [user("A tree?"), assistant("Oak."), user("Rain?"), assistant("I look.", tool_calls=call()), user("And?")]


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
def test_every_turn_is_learned_with_its_own_end(eos: str) -> None:
    template = ChatTemplate(byte_tokenizer(INNER_END, eos=eos))
    assert learned(template, [*TREES, assistant("Elm.")]) == [
        "Oak.<|im_end|>", "I look.[rain]<|im_end|>", "Elm.<|endoftext|>"
    ]  # fmt: skip
    ends = template.tokenizer.convert_ids_to_tokens(sorted(template.end_ids))
    assert ends == ["<|im_end|>", "<|endoftext|>"]


SYSTEM_LAST = (  # in the manner of Mistral v0.3: the system message stands in the last user turn
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<s>"
    "{% if loop.index0 == ns.last and s %}{{ s }}\n\n{% endif %}{{ m.content }}<|im_start|>"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def test_what_later_messages_move_does_not_hinder_and_is_said() -> None:
    template = ChatTemplate(byte_tokenizer(SYSTEM_LAST))
    dialogue = [user("A tree?"), assistant("Oak."), user("Another?"), assistant("Elm.")]
    assert learned(template, [system(), *dialogue]) == ["Oak.<|im_end|>", "Elm.<|im_end|>"]
    assert template.read([system(), *dialogue]).rewritten
    assert not template.read(dialogue).rewritten
    assert not template.read([system(), *dialogue[:2]]).rewritten


def test_the_next_role_ends_a_turn_where_it_is_an_end_token_of_the_model() -> None:
    tokenizer, ends = styled_tokenizer("handwritten_glm")
    dialogue = [user("A tree?"), assistant("Oak."), user("Rain?"), assistant(tool_calls=call()), told("no")]
    dialogue += [assistant("No.")]
    answers = ["\nOak.", "</tool_call>", "\nNo."]  # of the last one the template prints no end
    for ends_known, markers in ((ends, ["<|user|>", "<|observation|>", ""]), ([], ["", "", ""])):
        texts = learned(ChatTemplate(tokenizer, ends=ends_known), dialogue)
        tails = [answer + marker for answer, marker in zip(answers, markers, strict=True)]
        assert [text[-len(tail) :] for text, tail in zip(texts, tails, strict=True)] == tails


def test_end_tokens_are_those_of_the_model_the_tokenizer_and_the_template() -> None:
    tokenizer, _ = styled_tokenizer("handwritten_gemma")
    template = ChatTemplate(tokenizer)
    assert tokenizer.eos_token == "<eos>"
    assert sorted(tokenizer.convert_ids_to_tokens(template.end_ids)) == ["<end_of_turn>", "<eos>"]
    assert learned(template, [user("hi"), assistant("yo"), user("hi"), assistant("yo")]) == ["yo<end_of_turn>"] * 2


def test_end_tokens_of_a_model_that_the_tokenizer_does_not_know_end_nothing() -> None:
    tokenizer = byte_tokenizer()
    strangers = [tokenizer.convert_tokens_to_ids("y"), 50_256]  # a letter, and an id beyond the vocabulary
    template = ChatTemplate(tokenizer, ends=strangers)
    assert template.end_ids == {tokenizer.eos_token_id}
    assert learned(template, [user("hi"), assistant("yo"), user("hi")]) == ["yo<|im_end|>"]


@pytest.mark.parametrize(
    ("style", "field", "printed"),
    [
        ("handwritten_chatml", "reasoning_content", False),
        ("handwritten_gpt_oss", "thinking", True),
        ("handwritten_gpt_oss", "reasoning_content", True),
        ("qwen3", "reasoning", True),
        ("handwritten_command", "reasoning_content", False),
    ],
)
def test_fields_that_the_template_does_not_print_are_counted(style: str, field: str, printed: bool) -> None:
    reading = template_of(style).read([user("A tree?"), assistant("Oak.", **{field: "Hm, trees."})])
    assert reading.unprinted == ({} if printed else {("assistant", field): 1})
    assert ("Hm, trees." in bracketed(reading.text, reading.spans())) == printed


def test_tool_results_and_cut_thoughts_that_are_not_printed_are_counted() -> None:
    dialogue = [user("Rain?"), assistant(tool_calls=call()), told("no"), assistant("<think>\nHm\n</think>\n\nDry.")]
    assert template_of("handwritten_phi3").read(dialogue).unprinted == {("tool", "content"): 1}
    reading = template_of("handwritten_deepseek").read([user("Rain?"), dialogue[-1], user("Sure?"), assistant("Yes.")])
    assert reading.unprinted == {("assistant", "thoughts"): 1}


def test_thinking_and_calls_in_one_turn() -> None:
    dialogue = [user("Rain?"), assistant(tool_calls=call(), thinking="I look."), told("no")]
    template = template_of("handwritten_gpt_oss")
    assert learned(template, [*dialogue, assistant(tool_calls=call("Ulm"), thinking="Once more.")], TOOLS) == [
        "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant to=functions.rain<|channel|>commentary json"
        '<|message|>{"town": "Köln"}<|call|>',
        "<|channel|>analysis<|message|>Once more.<|end|><|start|>assistant to=functions.rain<|channel|>commentary json"
        '<|message|>{"town": "Ulm"}<|call|>',
    ]
    with pytest.raises(ValueError, match="Cannot pass both content and thinking"):
        learned(template, [user("Rain?"), assistant("Hm", tool_calls=call(), thinking="I look.")], TOOLS)


@pytest.mark.parametrize("style", ["qwen3", "mistral_nemo", "handwritten_deepseek", "handwritten_llama3"])
def test_an_answer_is_the_assistants_but_for_the_tools_results_in_it(style: str) -> None:
    answer = [assistant(tool_calls=call()), told("SECRET"), assistant("It stays dry.")]
    split = template_of(style).split([system(), user("Rain?")], [answer, [assistant("No.")]], TOOLS)
    texts = [[text[a:b] for a, b in spans] for text, spans in zip(split.answers, split.spans, strict=True)]
    assert "SECRET" in split.answers[0]
    assert len(texts[0]) == 2
    assert "Köln" in texts[0][0]
    assert "It stays dry." in texts[0][1]
    assert "SECRET" not in "".join(texts[0])
    assert texts[1] == [split.answers[1]]
    assert split.prompt == template_of(style).prompt([system(), user("Rain?")], TOOLS)


@pytest.mark.parametrize(
    "style", [style for style in STYLES if style not in ("handwritten_gpt_oss", "handwritten_glm")]
)
def test_a_prompt_ends_where_the_answer_begins(style: str) -> None:
    template = template_of(style)
    prompt, answer = [user("A tree?"), assistant("Oak."), user("Another?")], [assistant("Elm, I say.")]
    split = template.split(prompt, [answer])
    assert split.prompt == template.prompt(prompt)
    assert split.prompt + split.answers[0] == template.read([*prompt, *answer]).text.rstrip("\n")
    begun = [*prompt, assistant("Elm,")]
    opened = template.prompt(begun)
    assert opened.endswith("Elm,")
    continued = template.split(begun, [[assistant(" I say.")]])
    assert continued.prompt == opened
    assert continued.prompt + continued.answers[0] == split.prompt + split.answers[0]


ESCAPED = CHATML.replace("message['content']", "message['content'] | e")
UPPER = CHATML.replace("message['content']", "message['content'] | upper")
CUT = CHATML.replace("message['content']", "message['content'][:8]")
LETTERS = CHATML.replace("message['content']", "message['content'] | list | join('')")
TWICE = CHATML + "{{ messages[-1].content }}"
BACKWARDS = CHATML.replace("in messages %", "in messages | reverse %")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ESCAPED, ["&lt;b&gt;&amp;<|im_end|>", "bye<|im_end|>"]),
        (UPPER, ["<B>&<|im_end|>", "BYE<|im_end|>"]),
        (CUT, ["<b>&<|im_end|>", "bye<|im_end|>"]),
        (LETTERS, ["<b>&<|im_end|>", "bye<|im_end|>"]),
        (BACKWARDS, ["<b>&<|im_end|>", "bye<|im_end|>"]),
        (TWICE, ["<b>&<|im_end|>", "bye<|im_end|>"]),
    ],
    ids=["escaped", "upper", "cut", "letter by letter", "backwards", "twice"],
)
def test_templates_that_change_what_is_said(template: str, expected: list[str]) -> None:
    chat = ChatTemplate(byte_tokenizer(template))
    dialogue = [user("hi there"), assistant("<b>&"), user("more"), assistant("bye")]
    assert sorted(learned(chat, dialogue)) == sorted(expected)


NO_MARKS = CHATML.replace(  # refuses every letter that it does not know
    "{% for message in messages %}",
    "{% for message in messages %}{% for c in message.content %}"
    "{% if c > 'z' %}{{ raise_exception('letter') }}{% endif %}{% endfor %}",
)


def test_contents_are_located_in_order_where_marks_do_not_survive() -> None:
    chat = ChatTemplate(byte_tokenizer(NO_MARKS))
    assert learned(chat, [user("A tree?"), assistant("Oak."), user("Oak.?"), assistant(" Oak. ")]) == [
        "Oak.<|im_end|>", " Oak. <|im_end|>"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"content of message 1 \('assistant'\) cannot be found .* once and in order"):
        learned(chat, [user("A tree?"), assistant("assistant"), user("hm")])
    with pytest.raises(ValueError, match=r"content of message 1 \(''\) cannot be found"):
        learned(chat, [user("A tree?"), assistant("")])


@pytest.mark.parametrize(
    "content",
    [" " * 50_000 + "a" + "\n" * 50_000, "<a>" * 20_000 + "x" + "</a>" * 20_000, "<" * 50_000, "a b " * 30_000],
    ids=["blanks", "tags", "open", "text"],
)
def test_long_contents_take_no_longer_than_they_are_long(content: str) -> None:
    dialogue = [user(content), assistant(content), user(content + "b"), assistant(content + "c")]
    began = time.process_time()
    texts = learned(template_of("handwritten_lfm2"), dialogue)
    assert time.process_time() - began < 2
    assert texts == [content + "<|im_end|>", content + "c<|im_end|>"]


@pytest.mark.parametrize("thinking", [True, False])
def test_template_arguments_that_change_the_opening_of_a_turn(thinking: bool) -> None:
    tokenizer, ends = styled_tokenizer("qwen3")
    template = ChatTemplate(tokenizer, {"enable_thinking": thinking}, ends)
    dialogue = [user("A tree?"), assistant("Oak."), user("Another?"), assistant("Elm.")]
    opening = "<think>\n\n</think>\n\n"  # printed before the last answer; without thinking the prompt has it
    last = f"{opening if thinking else ''}Elm.<|im_end|>"
    assert learned(template, dialogue) == ["Oak.<|im_end|>", last]
    assert template.prompt(dialogue[:3]).endswith("assistant\n" if thinking else opening)
    assert template.split(dialogue[:3], [dialogue[3:]]).answers == [last]


def test_a_template_with_what_it_has_learned_can_be_sent_to_another_process() -> None:
    template = template_of("qwen3")
    dialogue = [user("A tree?"), assistant("Oak.")]
    assert learned(pickle.loads(pickle.dumps(template)), dialogue) == learned(template, dialogue)


def test_rows_with_arguments_of_their_own_share_what_was_learned_about_the_template() -> None:
    template = template_of("qwen3")
    own = template.of_row({"chat_template_kwargs": {"enable_thinking": False}})
    assert own is template.of_row({"chat_template_kwargs": {"enable_thinking": False, "other": None}})
    assert own is not template.of_row({"chat_template_kwargs": {"enable_thinking": True}})
    assert template.of_row({"chat_template_kwargs": None}) is template


@pytest.mark.parametrize("role", ["tool", "function", "ipython", "observation"])
def test_whoever_tells_the_result_it_is_not_learned(role: str) -> None:
    dialogue = [user("Rain?"), assistant("I look."), {"role": role, "content": "no"}, assistant("Dry.")]
    assert learned(template_of("handwritten_lfm2"), dialogue) == ["I look.<|im_end|>", "Dry.<|im_end|>"]


@pytest.mark.parametrize("result", ["no", {"rain": False}, ["no"], [{"rain": 1}], 7, ""])
@pytest.mark.parametrize("style", ["handwritten_llama3", "handwritten_lfm2", "mistral_nemo"])
def test_results_of_any_kind_are_not_learned(style: str, result: Any) -> None:
    dialogue = [user("Rain?"), assistant(tool_calls=call()), told("x") | {"content": result}, assistant("Dry.")]
    template = template_of(style)
    texts = learned(template, dialogue)
    assert len(texts) == 2
    assert "Köln" in texts[0]
    assert "Dry." in texts[1]
    assert "rain" not in texts[1]
    assert "TOOL_RESULTS" not in "".join(texts)


if __name__ == "__main__":
    for style in STYLES:
        (RENDERED / f"{style}.txt").write_text(show(style), encoding="utf-8")
