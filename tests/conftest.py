"""One thread, no network, warnings are errors (pyproject.toml)."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from typing import Any

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long forms of tests, which `make test-long` runs")
    parser.addoption("--counts", help="a file that the tests of tests/chaos add lines of JSON to: what they did")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `long` are chosen by `--long`, and all others without it."""
    chosen = [item for item in items if (item.get_closest_marker("long") is not None) == config.getoption("--long")]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_tokenizer() -> Any:
    """Word level, 100 ids (<pad> 0, <bos> 1, <eos> 2, <unk> 3, a-z from 4, then words); no chat template."""
    from tokenizers_for_tests import word_tokenizer

    return word_tokenizer()


@pytest.fixture
def chat_tokenizer() -> Any:
    """Byte level with a ChatML template; EOS is <|im_end|>, there is no BOS."""
    from tokenizers_for_tests import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(autouse=True)
def shared_tokenizers_stay():
    """A test that changes the tokenizer that all tests share would change those that come after it."""
    yield
    shared = sys.modules.get("conformity")
    if shared is not None and shared.tokenizer.cache_info().currsize:
        known = shared.tokenizer()
        assert (known.eos_token, known.pad_token, known.chat_template) == ("<eos>", "<pad>", None)
