"""Chat templates for what they say about tool calls, written by hand in the styles of model families."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers_for_tests import STYLES, byte_tokenizer, styled_tokenizer


class Style(NamedTuple):
    """A template with the special tokens of its family; of the model they are the end tokens first."""

    template: str
    ends: tuple[str, ...]
    specials: tuple[str, ...] = ()


IM = ("<|im_start|>", "<|im_end|>")
_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
)
_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(calls: str, tail: str = "<|im_end|>") -> str:
    """A template in the manner of ChatML whose turns with calls print `calls`."""
    return (
        f"{_TOOLS}{{% for message in messages %}}<|im_start|>{{{{ message.role }}}}\n{{{{ message.content or '' }}}}"
        f"{{% if message.tool_calls %}}{calls}{tail}{{% else %}}<|im_end|>{{% endif %}}\n{{% endfor %}}{_OPEN}"
    )


def each(one: str, between: str = "") -> str:
    """Prints every call, with something between them."""
    last = f"{{% if not loop.last %}}{between}{{% endif %}}" if between else ""
    return f"{{% for call in message.tool_calls %}}{{% set f = call.function %}}{one}{last}{{% endfor %}}"


_PAIRS = "{% for key, value in f.arguments.items() %}"
_TAGGED = "{{ value if value is string else value | tojson }}"
_PYTHON = "{{ f.name }}(" + _PAIRS + "{{ key }}={{ value | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})"
_JSON = '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
_JSON_TEXT = '{"function": {"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson | tojson }}}}'

WRITTEN: dict[str, Style] = {
    "hermes": Style(chatml(each("\n<tool_call>\n" + _JSON + "\n</tool_call>")), ("<|im_end|>",), IM),
    "llama3_1": Style(
        "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{% for tool in tools %}"
        "{{ tool | tojson }}\n{% endfor %}<|eot_id|>{% endif %}{% for message in messages %}"
        "{% if message.tool_calls %}{% if message.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}"
        "{% endif %}<|start_header_id|>assistant<|end_header_id|>\n\n{% set f = message.tool_calls[0].function %}"
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eom_id|>'
        "{% else %}<|start_header_id|>{{ 'ipython' if message.role == 'tool' else message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|eot_id|>",),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
    ),
    "llama3_1_custom": Style(chatml(each("<function={{ f.name }}>{{ f.arguments | tojson }}</function>")), IM[1:], IM),
    "llama_pythonic": Style(chatml("[" + each(_PYTHON, ", ") + "]"), IM[1:], IM),
    "qwen3_coder": Style(
        chatml(
            each(
                "\n<tool_call>\n<function={{ f.name }}>\n"
                + _PAIRS
                + "<parameter={{ key }}>\n{{ value | tojson if value is mapping or value is sequence and value is not"
                " string else value | string }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
            )
        ),
        IM[1:],
        IM,
    ),
    "mistral_v11": Style(
        chatml(each("[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}"), "</s>"), ("</s>", "<|im_end|>"),
        ("[TOOL_CALLS]", "[ARGS]"),
    ),
    "mistral_v11_ids": Style(
        chatml(each("[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ call.id }}[ARGS]{{ f.arguments | tojson }}"), "</s>"),
        ("</s>", "<|im_end|>"), ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ),
    "gemma_tool_code": Style(chatml("```tool_code\n" + each("print(" + _PYTHON + ")\n") + "```"), IM[1:], IM),
    "function_gemma": Style(
        chatml(
            "{% macro put(value) %}{% if value is string %}<escape>{{ value }}<escape>"
            "{% elif value is mapping %}{{ '{' }}{% for k, v in value.items() %}{{ k }}:{{ put(v) }}"
            "{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}"
            "{% elif value is iterable %}[{% for v in value %}{{ put(v) }}{% if not loop.last %},{% endif %}"
            "{% endfor %}]{% else %}{{ value | tojson }}{% endif %}{% endmacro %}"
            + each(
                "<start_function_call>call:{{ f.name }}{{ '{' }}"
                + _PAIRS
                + "{{ key }}:{{ put(value) }}{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}<end_function_call>"
            )
        ),
        IM[1:],
        (*IM, "<escape>", "<start_function_call>", "<end_function_call>"),
    ),
    "command_r": Style(
        chatml(
            "Action:\n```json\n[\n"
            + each('  {\n    "tool_name": "{{ f.name }}",\n    "parameters": {{ f.arguments | tojson }}\n  }', ",\n")
            + "\n]```"
        ),
        IM[1:],
        IM,
    ),
    "deepseek_v3_1": Style(
        chatml(
            "<｜tool▁calls▁begin｜>"
            + each("<｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>{{ f.arguments | tojson }}<｜tool▁call▁end｜>")
            + "<｜tool▁calls▁end｜>",
            "<｜end▁of▁sentence｜>",
        ),
        ("<｜end▁of▁sentence｜>", "<|im_end|>"),
    ),
    "glm4_9b": Style(chatml(each("{{ f.name }}\n{{ f.arguments | tojson }}", "{{ '\n' }}")), IM[1:], IM),
    "granite4": Style(chatml(each("<tool_call>\n{{ f | tojson }}\n</tool_call>", "\n")), IM[1:], IM),
    "phi4_mini": Style(
        chatml("<|tool_call|>[" + each(_JSON, ",") + "]<|/tool_call|>"), IM[1:], ("<|tool_call|>", "<|/tool_call|>")
    ),
    "lfm2": Style(
        chatml("<|tool_call_start|>[" + each(_PYTHON, ", ") + "]<|tool_call_end|>"), IM[1:],
        ("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    "minimax": Style(
        chatml(
            "\n<minimax:tool_call>\n"
            + each(
                '<invoke name="{{ f.name }}">\n' + _PAIRS + '<parameter name="{{ key }}">' + _TAGGED
                + "</parameter>\n{% endfor %}</invoke>\n"
            )
            + "</minimax:tool_call>"
        ),
        IM[1:],
        IM,
    ),
    "tagged_json": Style(
        chatml(
            each(
                "<tool_call>{{ f.name }}\n"
                + _PAIRS
                + "<key>{{ key }}</key><value>{{ value | tojson }}</value>\n{% endfor %}</tool_call>"
            )
        ),
        IM[1:],
        IM,
    ),
    "openai_text": Style(
        chatml(each("<tool_call>" + _JSON_TEXT + "</tool_call>")),
        IM[1:],
        IM,
    ),
}  # fmt: skip
NAMES = (*WRITTEN, *(name for name in STYLES if name not in ("handwritten_lfm2", "handwritten_chatml")))


def tokenizer_of(name: str) -> tuple[Any, list[int]]:
    """A byte a token, with the template and special tokens of that style, and the model's end tokens."""
    if name in STYLES:
        tokenizer, ends = styled_tokenizer(name)
        return tokenizer, ends or [tokenizer.eos_token_id]
    style = WRITTEN[name]
    tokenizer = byte_tokenizer(style.template, eos=None, bos="<s>")
    tokenizer.add_special_tokens({"eos_token": style.ends[0]})
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*style.ends[1:], *style.specials})})
    return tokenizer, [tokenizer.convert_tokens_to_ids(end) for end in style.ends]


FOLDER = Path(__file__).parents[1] / "data" / "tool_calls"
