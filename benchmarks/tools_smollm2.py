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


def problem(picker: random.Random) -> dict[str, Any]:
    """A sum or product of two numbers of 2 digits, after one that was computed with the tool."""
    messages: list[dict[str, Any]] = []
    for last in (False, True):
        sign, a, b = picker.choice("+*"), picker.randint(11, 99), picker.randint(11, 99)
        messages.append({"role": "user", "content": f"What is {a} {sign} {b}?"})
        tool, numbers = SIGNS[sign], {"a": a, "b": b}
        call = {"type": "function", "function": {"name": tool.__name__, "arguments": numbers}}
        if last:
            return {"prompt": messages, "call": call["function"], "answer": str(tool(a, b))}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": tool.__name__, "content": str(tool(a, b))},
            {"role": "assistant", "content": f"The answer is {tool(a, b)}."},
        ]
    raise AssertionError


def right_call(completions: list[list[dict[str, Any]]], call: list[dict[str, Any]]) -> list[float]:
    """1 if the first turn calls the tool of the question with its two numbers, 0.5 for another call of a tool."""
    rewards = []
    for messages, wanted in zip(completions, call, strict=True):
        calls = [made["function"] for made in messages[0].get("tool_calls", [])]
        readable = len(calls) == 1 and calls[0]["name"] in ("add", "multiply")
        rewards.append(1.0 if calls == [wanted] else 0.5 * readable)
    return rewards


def right_answer(completions: list[list[dict[str, Any]]], answer: list[str]) -> list[float]:
    """1 if the model's last words end with the answer as their last number."""
    said = [re.findall(r"-?\d+", messages[-1]["content"]) for messages in completions]
    return [float(numbers[-1:] == [right]) for numbers, right in zip(said, answer, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    asked = arguments(__doc__, argv, tokens=72, steps=16, prompts=4, learning_rate=8e-4, held_out=24)
    picker = random.Random(asked.seed)
    rows = [problem(picker) for _ in range(1000)]
    environment = ChatEnvironment([add, multiply], max_iterations=1, tool_timeout=None)
    learn(asked, rows, [right_call, right_answer], TEMPLATE, environment=environment)


if __name__ == "__main__":
    main()
