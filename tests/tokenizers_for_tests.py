"""Tokenizers and chat templates built on the spot: no files, no network, ids that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
THINKING = (  # reasoning stays only in assistant turns after the last user message; the generation prompt opens it
    "{% set ns = namespace(last=-1) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content and loop.index0 < ns.last %}"
    "{{ content.split('</think>')[-1].lstrip('\n') }}"
    "{% elif message['role'] == 'assistant' and '</think>' not in content and loop.index0 > ns.last %}"
    "{{ '<think>\n\n</think>\n\n' + content }}"
    "{% else %}{{ content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTING = "{{ messages | length }} messages\n" + CHATML  # the head changes with every message: no prefix is stable
NO_GENERATION_PROMPT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"

_TEXT = """
the sky is blue green red big small cat dog sat on mat runs fast slow good bad yes no what which best worst color one
two three four five six seven eight nine ten hello world how are you i am fine thanks movie was great awful
"""
WORDS = tuple(_TEXT.split())


def word_tokenizer(
    words: Sequence[str] = WORDS,
    *,
    size: int = 100,
    bos: str | None = "<bos>",
    eos: str | None = "<eos>",
    pad: str | None = "<pad>",
    add_bos: bool = False,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Words apart by blanks; ids: <pad> 0, <bos> 1, <eos> 2, <unk> 3, letters a-z 4-29, then the words."""
    letters = [chr(ord("a") + i) for i in range(26)]
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *letters, *(w for w in words if w not in letters), "."]
    names += [f"<extra{i}>" for i in range(size - len(names))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token="<unk>",
        model_max_length=512,
        chat_template=chat_template,
    )


def char_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a letter: a = 1, b = 2, ... z = 26; <unk> 0, <pad> 98, <eos> 99; no BOS."""
    vocab = {chr(ord("a") + i): i + 1 for i in range(26)} | {"<unk>": 0, "<pad>": 98, "<eos>": 99}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=chat_template
    )


def byte_tokenizer(
    chat_template: str | None = CHATML,
    *,
    eos: str | None = "<|im_end|>",
    bos: str | None = None,
    add_bos: bool = False,
    merges: Sequence[tuple[str, str]] = (),
    trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte a token (any text round-trips), and the marks of the chat templates; `merges` are in GPT-2's spelling."""
    marks = ["<pad>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    marks += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>"]
    names = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if add_bos:
        assert bos is not None
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, names.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        model_max_length=2048,
        chat_template=chat_template,
    )


_IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_COMMAND = ["START_OF_TURN_TOKEN", "END_OF_TURN_TOKEN", "SYSTEM_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN"]
_COMMAND += ["START_RESPONSE", "END_RESPONSE", "START_ACTION", "END_ACTION", "START_THINKING", "END_THINKING"]
_DEEPSEEK = ["begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant"]
_DEEPSEEK += [f"tool▁{part}▁{edge}" for part in ("call", "calls", "output", "outputs") for edge in ("begin", "end")]
STYLES: dict[str, tuple[str | None, str, list[str], list[str]]] = {  # BOS, EOS, end tokens of the model, specials
    "handwritten_chatml": (None, "<|im_end|>", [], _IM),
    "handwritten_command": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", [], [f"<|{name}|>" for name in _COMMAND]),
    "handwritten_deepseek": (
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", [], [f"<｜{name}｜>" for name in [*_DEEPSEEK, "tool▁sep"]]
    ),
    "handwritten_gemma": ("<bos>", "<eos>", ["<eos>", "<end_of_turn>"], ["<start_of_turn>", "<end_of_turn>"]),
    "handwritten_glm": (
        None, "<|endoftext|>", ["<|endoftext|>", "<|user|>", "<|observation|>"],
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
    ),
    "handwritten_gpt_oss": (
        "<|startoftext|>", "<|return|>", ["<|return|>", "<|endoftext|>", "<|call|>"],
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>"],
    ),
    "handwritten_granite": (
        "<|end_of_text|>", "<|end_of_text|>", [], ["<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"]
    ),
    "handwritten_lfm2": ("<|startoftext|>", "<|im_end|>", [], [*_IM, "<|tool_list_start|>", "<|tool_list_end|>"]),
    "handwritten_llama3": (
        "<|begin_of_text|>", "<|eot_id|>", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>"],
    ),
    "handwritten_phi3": (
        "<s>", "<|endoftext|>", ["<|endoftext|>", "<|end|>", "<|assistant|>"],
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    ),
    "mistral_nemo": (
        "<s>", "</s>", [],
        ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]"],
    ),
    "qwen2_5": (None, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"], _IM),
    "qwen3": (None, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"], _IM),
}  # fmt: skip


def styled_tokenizer(style: str) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A byte a token with the template and the special tokens of a model family, and the model's end tokens."""
    bos, eos, ends, specials = STYLES[style]
    template = (Path(__file__).parent / "data" / "templates" / f"{style}.jinja").read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(template.removesuffix("\n"), eos=None)
    tokenizer.add_special_tokens({"eos_token": eos} | ({"bos_token": bos} if bos else {}))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*ends, *specials} - {eos, bos})})
    return tokenizer, [tokenizer.convert_tokens_to_ids(end) for end in ends]


def metaspace_tokenizer(chat_template: str | None = LLAMA2) -> PreTrainedTokenizerFast:
    """In the manner of Llama 2: a blank is put before every text, `▁` stands for blanks, BOS is added."""
    words = ["▁The", "▁sky", "▁is", "▁blue", "▁hi", "▁[INST]", "▁[/INST]"]
    names = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", *(chr(i) for i in range(33, 127)), *words]
    merges = []
    vocab = {name: i for i, name in enumerate(names)}
    for word in words:
        for cut in range(1, len(word)):
            pair = (word[:cut], word[cut])
            vocab.setdefault("".join(pair), len(vocab))
            if pair not in merges:
                merges.append(pair)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )


GPT2_IDS = {
    "###": 21017, "ĠHuman": 5524, ":": 25, "ĠHi": 15902, "Ġthere": 612, ".": 13, "ĠAssistant": 15286, "ĠHello": 18435,
    "!": 0, "ĠBye": 47843, "ĠSee": 4091, "Ġyou": 345, "Which": 13828, "Ġis": 318, "Ġthe": 262, "Ġbest": 1266,
    "Ġprogramming": 8300, "Ġlanguage": 3303, "?": 30, "ĠPython": 11361, "ĠC": 327, "++": 4880, "<|endoftext|>": 50256,
}  # fmt: skip


def gpt2_words_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's own ids for the few words that the golden values are about; BOS and EOS are <|endoftext|>."""
    backend = Tokenizer(models.WordLevel(dict(GPT2_IDS), unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("###", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=1024
    )
