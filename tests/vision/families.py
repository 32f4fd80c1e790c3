"""Vision-language models of a few thousand weights, their processors and rows: no files, network or torchvision.

A picture of 16 x 16 is 4 tokens (Qwen, Gemma 3, InternVL), 16 (LLaVA) or 20 (SmolVLM and Idefics3, in five tiles).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers as t
from datasets import Dataset
from PIL import Image
from tokenizers import AddedToken, processors
from tokenizers_for_tests import byte_tokenizer
from transformers import processing_utils
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_processing_utils import VideoProcessorMixin

FAMILIES: tuple[str, ...] = ("qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm", "idefics3", "llava", "internvl")
SIZED: tuple[str, ...] = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "internvl")
"""the families in which a picture's size says how many tokens it is"""

_NEWLINES = (("Ċ", "Ċ"), ("ĊĊ", "Ċ"))  # two and three of them are one token, as in the families' own vocabularies
_CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
_QWEN = [*_CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
_IDEFICS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILES]

QWEN_PARTS = (
    "{% for message in messages %}HEAD<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set images.value = images.value + 1 %}"
    "{% if add_vision_id %}Picture {{ images.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_HEAD = (
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
COUNTER = "{% set images = namespace(value=0) %}"
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}{%- set loop_messages = messages -%}"
    "{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
IDEFICS3 = (  # it prints parts only: a content that is a string is left out
    "<|begin_of_text|>{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA = (  # the same, and it prints the images of a message before its texts
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "qwen2_5_vl": COUNTER + QWEN_PARTS.replace("HEAD", QWEN_HEAD),
    "qwen3_vl": COUNTER + QWEN_PARTS.replace("HEAD", ""),
    "gemma3": GEMMA3,
    "smolvlm": processing_smolvlm.DEFAULT_CHAT_TEMPLATE,
    "idefics3": IDEFICS3,
    "llava": LLAVA,
    "internvl": INTERNVL,
}


class NoVideos(VideoProcessorMixin):
    """What stands for the video processors, which need torchvision; it is never called."""

    merge_size = 2
    num_frames = 1
    fps = 1


def _tokenizer(
    specials: Sequence[str], eos: str, bos: str | None = None, adds_bos: bool = False, **named: str
) -> t.PreTrainedTokenizerFast:
    """A byte a token, the special tokens of a family, and those which its processor asks the tokenizer for by name."""
    backend = byte_tokenizer(None, merges=_NEWLINES).backend_tokenizer
    marks = [*specials, *named.values(), eos, *([bos] if bos else [])]
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in dict.fromkeys(marks)])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        model_max_length=2048,
        extra_special_tokens=named or list(specials),
    )


def tokenizer_of(name: str) -> t.PreTrainedTokenizerFast:
    """The tokenizer in the family's processor; its ids are the same each time."""
    match name:
        case "qwen2_5_vl" | "qwen3_vl":
            return _tokenizer(_QWEN, "<|im_end|>")
        case "gemma3":
            named = {
                "image_token": "<image_soft_token>",
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
            }
            return _tokenizer(["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", "<bos>", adds_bos=True, **named)
        case "smolvlm":
            return _tokenizer([*_CHATML, *_IDEFICS], "<end_of_utterance>", "<|im_start|>")
        case "idefics3":
            return _tokenizer(_IDEFICS, "<end_of_utterance>", "<|begin_of_text|>", adds_bos=True)
        case "llava":
            return _tokenizer(["<image>"], "</s>", "<s>", adds_bos=True)
        case "internvl":
            named = {
                "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            }  # fmt: skip
            return _tokenizer(_CHATML, "<|im_end|>", **named)
    raise ValueError(name)


def processor_of(name: str) -> Any:
    """The family's own processor class, new each time, with an image processor of Pillow and pictures of 16 x 16.

    Qwen's, SmolVLM's and InternVL's processors insist on a video processor. All of those need torchvision, without
    which transformers does not even know the class that it checks for. So `NoVideos` is handed over, and the class is
    shown to that check while the processor is built. SmolVLM's asks for `num2words` too, for videos only.
    """
    with (
        mock.patch.object(
            processing_utils.transformers_module, "VideoProcessorMixin", VideoProcessorMixin, create=True
        ),
        mock.patch.object(processing_smolvlm, "num2words", str),
    ):
        return _processor(name, tokenizer_of(name), TEMPLATES[name])


def _processor(name: str, tokenizer: t.PreTrainedTokenizerFast, template: str) -> Any:
    square = {"height": 16, "width": 16}
    parts = {"tokenizer": tokenizer, "chat_template": template}
    tiles = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    match name:
        case "qwen2_5_vl" | "qwen3_vl":
            kind = t.Qwen2_5_VLProcessor if name == "qwen2_5_vl" else t.Qwen3VLProcessor
            size = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
            return kind(t.Qwen2VLImageProcessorPil(patch_size=4, size=size), video_processor=NoVideos(), **parts)
        case "gemma3":
            return t.Gemma3Processor(t.Gemma3ImageProcessorPil(size=square), image_seq_length=4, **parts)
        case "smolvlm":
            pictures = t.SmolVLMImageProcessorPil(**tiles)
            return t.SmolVLMProcessor(pictures, video_processor=NoVideos(), image_seq_len=4, **parts)
        case "idefics3":
            return t.Idefics3Processor(t.Idefics3ImageProcessorPil(**tiles), image_seq_len=4, **parts)
        case "llava":
            pictures = t.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
            settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
            return t.LlavaProcessor(pictures, **settings, **parts)
        case "internvl":
            pictures = t.GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=2)
            return t.InternVLProcessor(pictures, video_processor=NoVideos(), image_seq_length=4, **parts)
    raise ValueError(name)


WIDE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "initializer_range": 0.1}
VISION = WIDE | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
QWEN_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "initializer_range": 0.1,
}  # fmt: skip


def config_of(name: str) -> Any:
    """The config of `model_of`, with the ids of `tokenizer_of`."""
    known = tokenizer_of(name)
    ids = {token: known.convert_tokens_to_ids(token) for token in known.get_vocab()}
    text = WIDE | {
        "vocab_size": len(known), "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "pad_token_id": known.pad_token_id, "bos_token_id": known.bos_token_id, "eos_token_id": known.eos_token_id,
    }  # fmt: skip
    match name:
        case "qwen2_5_vl" | "qwen3_vl":
            return _qwen(name, text, ids)
        case "gemma3":
            kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512}
            return t.Gemma3Config(
                text_config=t.Gemma3TextConfig(**text, **kinds, head_dim=16, query_pre_attn_scalar=16),
                vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
                mm_tokens_per_image=4,
                image_token_index=ids["<image_soft_token>"],
                boi_token_index=ids["<start_of_image>"],
                eoi_token_index=ids["<end_of_image>"],
                initializer_range=0.1,
            )
        case "smolvlm" | "idefics3":
            kind = t.SmolVLMConfig if name == "smolvlm" else t.Idefics3Config
            return kind(
                text_config=t.LlamaConfig(**text),
                vision_config=VISION,
                image_token_id=ids["<image>"],
                scale_factor=2,
                pad_token_id=known.pad_token_id,
            )
        case "llava":
            return t.LlavaConfig(
                text_config=t.LlamaConfig(**text),
                vision_config=t.CLIPVisionConfig(**VISION | {"num_hidden_layers": 2}, projection_dim=32),
                image_token_index=ids["<image>"],
                image_seq_length=16,
            )
        case "internvl":
            return t.InternVLConfig(
                text_config=t.Qwen2Config(**text),
                vision_config=VISION,
                image_token_id=ids["<IMG_CONTEXT>"],
                image_seq_length=4,
            )
    raise ValueError(name)


def _qwen(name: str, text: dict[str, Any], ids: dict[str, int]) -> Any:
    tokens = {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
    }  # fmt: skip
    if name == "qwen2_5_vl":
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        vision = QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]}
        return t.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **tokens)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    more = {"rope_parameters": rope, "head_dim": 16}
    return t.Qwen3VLConfig(text_config=text | more, vision_config=vision, **tokens)


def model_of(name: str, seed: int = 0) -> Any:
    """The family's language model with pictures: float32, no dropout, weights large enough for pictures to matter."""
    torch.manual_seed(seed)
    model = t.AutoModelForImageTextToText.from_config(config_of(name), dtype=torch.float32)
    for title, weight in model.named_parameters():
        if title.endswith("mm_input_projection_weight"):  # Gemma 3 leaves it at 0: no picture would matter
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """An RGB picture, `size` wide and high, which only the seed and the size decide."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


SIZES = ((16, 16), (32, 16), (16, 24))
COUNTS = (1, 2, 1, 0, 1, 3, 1, 0)
"""how many pictures each row has"""
ANSWERS = ("red", "two cats", "a dog", "no", "blue", "one of three", "a ship", "none")


def pictures(row: int) -> list[Image.Image]:
    return [picture(10 * row + i, SIZES[(row + i) % len(SIZES)]) for i in range(COUNTS[row])]


def part(text: str | None = None) -> dict[str, str | None]:
    """A part of a message: a text, or where a picture stands."""
    return {"type": "image", "text": None} if text is None else {"type": "text", "text": text}


def asked(row: int) -> list[dict[str, Any]]:
    """The user's message: the pictures before the text, between two and after it, as the row's number has it."""
    images = [part() for _ in range(COUNTS[row])]
    content = [*images, part("What is it?")]
    if row % 3 == 1:
        content = [part("Look: "), *(p for image in images for p in (image, part(" and "))), part("what?")]
    elif row % 3 == 2:
        content = [part("Say what this is."), *images]
    return [{"role": "user", "content": content}]


def answered(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [part(text)]}]


def _plain(row: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is it, {row}?"}, {"role": "assistant", "content": ANSWERS[row]}]


def _with_urls(row: int) -> list[dict[str, Any]]:
    urls = [{"type": "image_url", "text": None, "image_url": {"url": data_url(image)}} for image in pictures(row)]
    text = {"type": "text", "text": "What is it?", "image_url": None}
    answer = {"type": "text", "text": ANSWERS[row], "image_url": None}
    return [{"role": "user", "content": [*urls, text]}, {"role": "assistant", "content": [answer]}]


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "conversations": lambda row: {"messages": asked(row) + answered(ANSWERS[row]), "images": pictures(row)},
    "data_urls": lambda row: {"messages": _with_urls(row)},
    "images": lambda row: {"messages": _plain(row), "images": pictures(row)},
    "prompt_completion": lambda row: {
        "prompt": asked(row), "completion": answered(ANSWERS[row]), "images": pictures(row)
    },
    "preference": lambda row: {
        "prompt": asked(row), "chosen": answered(ANSWERS[row]), "rejected": answered(ANSWERS[row - 3]),
        "images": pictures(row),
    },
    "unpaired": lambda row: {
        "prompt": asked(row), "completion": answered(ANSWERS[row]), "label": row % 3 > 0, "images": pictures(row)
    },
    "prompts": lambda row: {"prompt": asked(row), "images": pictures(row), "wanted": "abcdefgh"[row]},
}  # fmt: skip
"""one row of each kind: image parts and `images`; data URLs in the parts; plain texts and `images`; and so on"""


def rows(kind: str) -> Dataset:
    """Eight rows: with one picture, with two or three of different sizes, and two rows without."""
    made = [ROWS[kind](row) for row in range(len(COUNTS))]
    return Dataset.from_dict({column: [row[column] for row in made] for column in made[0]})
