"""The tables that configs choose from, and the document that says where each formula comes from."""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest

from trl.losses.kl import KL_ESTIMATORS
from trl.losses.kto import UNPAIRED_LOSSES
from trl.losses.loss_sum import Aggregation
from trl.losses.pairs import F_DIVERGENCES
from trl.losses.policy import ADVANTAGES, CLIP_RULES, RATIO_LEVELS
from trl.losses.preference import PAIR_LOSSES
from trl.trainer.grpo_trainer import LOSS_TYPES

TEXT = (Path(__file__).parents[2] / "docs" / "papers.md").read_text()
TABLES: tuple[Iterable[str], ...] = (
    PAIR_LOSSES, UNPAIRED_LOSSES, F_DIVERGENCES, ADVANTAGES, CLIP_RULES, RATIO_LEVELS, KL_ESTIMATORS, LOSS_TYPES,
    get_args(Aggregation),
)  # fmt: skip
NAMES = [name for table in TABLES for name in table]


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_every_name_is_documented(name):
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+)\.(?:\w+))`", TEXT)) - {"trl.losses"}))
def test_every_function_in_the_document_exists(path):
    module, name = path.split(".")
    if module in ("preference", "kto") and name.isupper():
        return
    assert getattr(importlib.import_module(f"trl.losses.{module}"), name).__doc__
