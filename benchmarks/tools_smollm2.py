"""SmolLM2-135M-Instruct learns to call a calculator and to repeat what it says: GRPO with LoRA, two tools, two rewards.

    python -m benchmarks.tools_smollm2 --seed 0 --out runs/tools-0

The model's own chat template renders no tools, so the script gives one that does, in Hermes' form.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from benchmarks.smollm2 import arguments, learn
from trl.environment import ChatEnvironment

TEMPLATE = r"""
{%- if tools %}
    {{- "<|im_start|>system\nCompute with these tools." }}
    {%- for tool in tools %}
        {{- "\n" + tool.function.name + "(a, b): " + tool.function.description }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\n" + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>{"name": "' + call.function.name + '", ' }}
        {{- '"arguments": ' + call.function.arguments | tojson + "}</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
{%- endif %}"""


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


SIGNS = {"+": add, "*": multiply}


def question(picker: random.Random) -> tuple[str, dict[str, Any], str]:
    """A sum or product of two numbers of 2 digits, the call that computes it, and its result."""
    sign, a, b = picker.choice("+*"), picker.randint(11, 99), picker.randint(11, 99)
    tool = SIGNS[sign]
    return f"What is {a} {sign} {b}?", {"name": tool.__name__, "arguments": {"a": a, "b": b}}, str(tool(a, b))


def problem(picker: random.Random) -> dict[str, Any]:
    """A question after another one that was answered with the tool."""
    text, call, result = question(picker)
    shown = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": call["name"], "content": result},
        {"role": "assistant", "content": f"The answer is {result}."},
    ]
    text, call, result = question(picker)
    return {"prompt": [*shown, {"role": "user", "content": text}], "call": call, "answer": result}


def first_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the model's first turn calls."""
    return [made["function"] for made in messages[0].get("tool_calls", [])]


def some_call(completions: list[list[dict[str, Any]]]) -> list[float]:
    """1 if the first turn is one readable call of a tool that there is."""
    names = [[call["name"] for call in first_calls(messages)] for messages in completions]
    return [float(called in (["add"], ["multiply"])) for called in names]


def right_call(completions: list[list[dict[str, Any]]], call: list[dict[str, Any]]) -> list[float]:
    """1 if it is the tool of the question with its two numbers."""
    return [float(first_calls(messages) == [wanted]) for messages, wanted in zip(completions, call, strict=True)]


def right_answer(completions: list[list[dict[str, Any]]], answer: list[str]) -> list[float]:
    """1 if the last number that the model says after the tool, or without it, is the answer."""
    said = [messages[-1]["content"] if messages[-1]["role"] == "assistant" else "" for messages in completions]
    return [float(re.findall(r"-?\d+", text)[-1:] == [right]) for text, right in zip(said, answer, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    asked = arguments(__doc__, argv, tokens=72, steps=16, prompts=4, learning_rate=8e-4, held_out=24)
    picker = random.Random(asked.seed)
    rows = [problem(picker) for _ in range(1000)]
    environment = ChatEnvironment([add, multiply], max_iterations=1, tool_timeout=None)
    learn(asked, rows, [some_call, right_call, right_answer], TEMPLATE, environment=environment)


if __name__ == "__main__":
    main()
