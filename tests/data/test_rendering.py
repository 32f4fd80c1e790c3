"""One rendering tells whose the characters are: twelve styles of template, and whatever is said in them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import STYLES, styled_tokenizer

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
    """Every conversation as the style renders it, the assistant's words in brackets."""
    tokenizer, ends = styled_tokenizer(style)
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
        lines += [f"-- not printed: {what} ({count})" for what, count in sorted(reading.unprinted.items())]
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
    ["a", "user", "assistant", "Oak.", " ", "\n", "\t", '"', "\\", "{", "}", "ö", "木", "\ue000", "\u200b", "<|im_end|>",
     "<|im_start|>assistant\n", "<|end|>", "<|start|>assistant", "[/INST]", "</s>", "<end_of_turn>\n", "<tool_call>",
     "</tool_call>", "<tool_response>", "<b>", "</b>", "\n<|assistant|>\n", "{{ x }}", "<|eot_id|>", "zqsaid1"]
)  # fmt: skip
SAID = st.lists(BITS, max_size=5).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@pytest.mark.parametrize("style", PRINTED)
@settings(max_examples=150, deadline=None)
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
    try:
        reading = template_of(style).read(messages)
    except ValueError as error:
        assert private
        assert "mark them with {% generation %} in the template, or train on the whole text" in str(error)
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


if __name__ == "__main__":
    for style in STYLES:
        (RENDERED / f"{style}.txt").write_text(show(style), encoding="utf-8")
