"""C18: a column of numbers holds finite ones, or the row and the column are named before training."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers_for_tests import word_tokenizer

from trl.data.encode import Limits
from trl.data.prompt_rows import CompletionsJob, PairsJob
from trl.data.tokenize import tokenize

PAIR = {"prompt": "a ", "chosen": "b", "rejected": "c"}
LABELLED = {"prompt": "a ", "completion": "b", "label": True}
BAD = [math.nan, math.inf, -math.inf, None, "1.5", [1.0], [], {"x": 1}, np.float32("nan"), torch.tensor([1.0, 2.0])]


def job(kind, **settings):
    return kind(tokenizer=word_tokenizer(), limits=Limits(), **settings)


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize("column", ["margin", "reference_chosen_logps"])
def test_pairs(column, value):
    rows = [{**PAIR, column: 0.5}, {**PAIR, column: value}]
    with pytest.raises(ValueError, match=rf"row 1 of the train data set: column '{column}' should be a finite number"):
        tokenize(rows, job(PairsJob))


def test_tables_of_numbers_and_of_others():
    with pytest.raises(ValueError, match=r"row 2 of the eval data set: column 'margin' .*, got nan"):
        tokenize(Dataset.from_list([{**PAIR, "margin": m} for m in (0.0, 1.0, math.nan)]), job(PairsJob), name="eval")
    with pytest.raises(ValueError, match=r"row 0 of the train data set: column 'margin' .*, got '1'"):
        tokenize(Dataset.from_list([{**PAIR, "margin": "1"}]), job(PairsJob))
    rows = [{**LABELLED, "reference_logps": value} for value in (0.0, math.inf)]
    with pytest.raises(ValueError, match=r"row 1 of the train data set: column 'reference_logps' .*, got inf"):
        tokenize(rows, job(CompletionsJob, keep=("reference_logps",)))


@pytest.mark.parametrize("value", [math.nan, "yes", [True], None, 2])
def test_labels(value):
    with pytest.raises(ValueError, match=r"row 1 of the train data set: column 'label' should be true"):
        tokenize([LABELLED, {**LABELLED, "label": value}], job(CompletionsJob))


@pytest.mark.parametrize("value", [1, 0.5, np.float32(2), torch.tensor(1.0), torch.tensor([3.0]), -1e30])
def test_numbers_pass(value):
    made, _ = tokenize([{**PAIR, "margin": value}], job(PairsJob))
    assert float(made[0]["margin"]) == float(value)
