"""Reading a conversation takes linear time, whatever it says (C10, for the marks and the rendering of chats)."""

import time

import pytest
from tokenizers_for_tests import CHATML, byte_tokenizer

from trl.data.chat import ChatTemplate

UNITS = (
    "a", " ", "<", "<b>", "</b>", "</b> ", "<think>", "</think>", "<|im_end|>", "<|im_start|>", "{", "\\", "\ue000",
    "</",
)  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_reading_takes_linear_time(unit):
    template = ChatTemplate(byte_tokenizer(CHATML))

    def seconds(size):
        said = unit * (size // len(unit))
        messages = [
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": said},
            {"role": "user", "content": said},
            {"role": "assistant", "content": f"ok{said}"},
        ]
        began = time.process_time()
        try:
            template.read(messages)
        except ValueError as error:  # two contents that cannot be told apart
            assert "cannot be found in its text once and in order" in str(error)  # noqa: PT017
        return time.process_time() - began

    seconds(1000)
    short, long = (min(seconds(size) for _ in range(2)) for size in (25_000, 100_000))
    assert long < 8 * short + 0.1
