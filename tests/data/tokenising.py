"""`tokenize` with a job of each kind, whose options and limits are keywords."""

from functools import partial
from typing import Any

from trl.data.encode import Limits
from trl.data.prompt_rows import CompletionsJob, PairsJob, PromptsJob, StepwiseJob
from trl.data.report import TokenizationReport
from trl.data.row_job import RowJob
from trl.data.supervised_rows import SupervisedJob
from trl.data.tokenize import tokenize

LIMITS = ("max_length", "max_prompt_length", "max_completion_length", "truncation_mode")
PASS = ("name", "num_proc", "batch_size")


def tokenised(kind: type[RowJob], rows: Any, tokenizer: Any, **options: Any) -> tuple[Any, TokenizationReport]:
    limits = Limits(**{name: options.pop(name) for name in LIMITS if name in options})
    how = {name: options.pop(name) for name in PASS if name in options}
    return tokenize(rows, kind(tokenizer=tokenizer, limits=limits, **options), **how)


tokenize_supervised = partial(tokenised, SupervisedJob)
tokenize_preference = partial(tokenised, PairsJob)
tokenize_unpaired = partial(tokenised, CompletionsJob)
tokenize_prompts = partial(tokenised, PromptsJob, truncation_mode="keep_end")
tokenize_stepwise = partial(tokenised, StepwiseJob)
