"""One pass of batched tokenisation: rows of any known format become rows of token ids, and a report says what was met.

Every function takes a Dataset, a streamed IterableDataset or a list of rows, and gives back its like; another object
(a torch Dataset) is passed through. `name` says which data set it is in messages. Rows that have nothing to learn
(the answer was cut away whole, or everything is masked) are left out; when that is true of all, it is a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from trl.data.encode import TextEncoder
from trl.data.formats import RowKind, column_names, detect_format, first_row, unpair_preference_dataset
from trl.data.mapping import RowJob, map_rows
from trl.data.prompt_rows import AnswersJob, PromptsJob, StepwiseJob
from trl.data.report import TokenizationReport
from trl.data.supervised_rows import SupervisedJob, supervised_row
from trl.data.truncation import Limits

Tokenized = tuple[Any, TokenizationReport]

PAIR_EXTRAS = (
    "margin",
    "reference_chosen_logps",
    "reference_rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
)
"""columns that the preference trainers read beside the ids"""

_TOKENISED_PAIRS = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("input_ids_chosen", "input_ids_rejected"),
    ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"),
    ("prompt_input_ids", "chosen_labels", "rejected_labels"),
)


def has_rows(dataset: Any) -> bool:
    """Whether it is a data set whose rows we read, not one that a user has prepared (a torch Dataset)."""
    if dataset is None:
        raise ValueError("The dataset should not be None")
    return isinstance(dataset, Dataset | IterableDataset | list | tuple)


def _run(dataset: Any, job: RowJob, keep: Sequence[str], num_proc: int | None, batch_size: int, name: str) -> Tokenized:
    columns = column_names(dataset, name)
    return map_rows(dataset, job, columns=columns, keep=keep, num_proc=num_proc, batch_size=batch_size, name=name)


def format_rows(dataset: Any, formatting_func: Callable[[Any], Any], name: str = "train") -> Any:
    """The data set as rows with one column `text` that `formatting_func` makes.

    The function takes a row and returns a text, or takes a batch (a dict of lists) and returns a list of texts; which
    of the two is found out with the first row.
    """
    row = first_row(dataset, name)
    try:
        batched = isinstance(formatting_func({column: [value] for column, value in row.items()}), list)
    except Exception:  # a function of a single row need not bear a batch
        batched = False
    example = [row] if batched else row
    if not batched and not isinstance(formatting_func(row), str):
        raise ValueError(
            "The `formatting_func` should return a list of processed strings since it can lead to silent bugs. "
            f"Given a single row it returned {type(formatting_func(example))}"
        )

    def one(row: dict[str, Any]) -> dict[str, Any]:
        return {"text": formatting_func(row)}

    if isinstance(dataset, Dataset | IterableDataset):
        names = column_names(dataset, name)
        return dataset.map(one, batched=batched, remove_columns=names)
    if batched:
        columns = {column: [row[column] for row in dataset] for column in row}
        return [{"text": text} for text in formatting_func(columns)]
    return [one(row) for row in dataset]


def tokenize_supervised(
    dataset: Any,
    tokenizer: Any,
    *,
    text_field: str = "text",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    add_eos: bool = True,
    add_special_tokens: bool = True,
    formatting_func: Callable[[Any], Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    keep: Sequence[str] = (),
    num_proc: int | None = None,
    batch_size: int = 1000,
    name: str = "train",
) -> Tokenized:
    """Rows of `input_ids` and `loss_mask` (1 = learned) of texts, conversations, prompt-completions or tokenised rows.

    completion_only_loss: None learns only the completion where rows have one. assistant_only_loss: only what the
    assistant says in conversations, stop tokens included. Texts and completions get the EOS that they lack;
    conversations stay as the chat template makes them.
    """
    if not has_rows(dataset):
        return dataset, TokenizationReport()
    if formatting_func is not None:
        dataset, text_field = format_rows(dataset, formatting_func, name), "text"
    accepts = (RowKind.TOKENIZED, RowKind.MESSAGES, RowKind.PROMPT_COMPLETION, RowKind.TEXT)
    found = detect_format(dataset, accepts, text_field=text_field, name=name)
    if completion_only_loss and found.kind in (RowKind.TEXT, RowKind.MESSAGES):
        raise ValueError(
            f"completion_only_loss=True needs the columns 'prompt' and 'completion'; the {name} data set has "
            f"{found.kind} rows (assistant_only_loss=True is for conversations)"
        )
    if assistant_only_loss and not found.conversational and found.kind is not RowKind.TOKENIZED:
        raise ValueError(
            f"assistant_only_loss=True needs conversations; the {name} data set has rows of plain text in "
            + ", ".join(f"'{column}'" for column in found.columns)
        )
    job = SupervisedJob(
        encoder=TextEncoder(tokenizer),
        format=found,
        text_field=text_field,
        completion_only=completion_only_loss,
        assistant_only=assistant_only_loss,
        limits=Limits(max_length=max_length, truncation_mode=truncation_mode),
        add_eos=add_eos,
        add_special_tokens=add_special_tokens,
        template_kwargs=dict(template_kwargs or {}),
        name=name,
    )
    return _run(dataset, job, keep, num_proc, batch_size, name)


def tokenize_preference(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    truncation_mode: str = "keep_start",
    add_bos: bool | None = None,
    add_eos: bool = True,
    is_encoder_decoder: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    keep: Sequence[str] = PAIR_EXTRAS,
    num_proc: int | None = None,
    batch_size: int = 1000,
    name: str = "train",
) -> Tokenized:
    """Rows of `prompt_ids`, `chosen_ids` and `rejected_ids`; the prompt is tokenised once and shared to the token.

    Takes texts or conversations, with the prompt in its own column or inside both answers, and rows tokenised in our
    columns or the seed's. add_bos: None does as the tokenizer does, True puts BOS first wherever there is one.
    """
    if not has_rows(dataset):
        return dataset, TokenizationReport()
    accepts = (RowKind.TOKENIZED, RowKind.PREFERENCE)
    found = detect_format(dataset, accepts, tokenised=_TOKENISED_PAIRS, name=name)
    job = AnswersJob(
        encoder=TextEncoder(tokenizer, add_bos),
        format=found,
        limits=_limits(max_length, max_prompt_length, max_completion_length, truncation_mode, is_encoder_decoder),
        template_kwargs=dict(template_kwargs or {}),
        name=name,
        add_eos=add_eos,
        is_encoder_decoder=is_encoder_decoder,
    )
    return _run(dataset, job, keep, num_proc, batch_size, name)


def tokenize_unpaired(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    truncation_mode: str = "keep_start",
    add_bos: bool | None = None,
    add_eos: bool = True,
    is_encoder_decoder: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    keep: Sequence[str] = ("reference_logps", "ref_logps"),
    num_proc: int | None = None,
    batch_size: int = 1000,
    name: str = "train",
) -> Tokenized:
    """Rows of `prompt_ids`, `completion_ids` and `label` (true = a good answer); pairs are taken apart first."""
    if not has_rows(dataset):
        return dataset, TokenizationReport()
    tokenised = (("prompt_ids", "completion_ids", "label"),)
    accepts = (RowKind.TOKENIZED, RowKind.UNPAIRED, RowKind.PREFERENCE)
    found = detect_format(dataset, accepts, tokenised=tokenised, name=name)
    if found.kind is RowKind.PREFERENCE:
        if found.implicit_prompt:
            raise ValueError(
                f"the pairs of the {name} data set have no column 'prompt' that fits their answers: split them first "
                "with `extract_prompt`"
            )
        dataset = unpair_preference_dataset(list(dataset) if isinstance(dataset, tuple) else dataset)
        found = detect_format(dataset, (RowKind.UNPAIRED,), name=name)
    job = AnswersJob(
        encoder=TextEncoder(tokenizer, add_bos),
        format=found,
        limits=_limits(max_length, max_prompt_length, max_completion_length, truncation_mode, is_encoder_decoder),
        template_kwargs=dict(template_kwargs or {}),
        name=name,
        answers=("completion",),
        add_eos=add_eos,
        is_encoder_decoder=is_encoder_decoder,
    )
    return _run(dataset, job, keep, num_proc, batch_size, name)


def _limits(
    max_length: int | None, prompt: int | None, completion: int | None, mode: str, is_encoder_decoder: bool
) -> Limits:
    if is_encoder_decoder and max_length is not None:
        raise ValueError(
            f"max_length={max_length} bounds prompt + answer, which an encoder-decoder holds apart: use "
            "`max_prompt_length` and `max_completion_length`"
        )
    return Limits(max_length, prompt, completion, mode)


def tokenize_prompts(
    dataset: Any,
    tokenizer: Any,
    *,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_end",
    context_length: int | None = None,
    add_bos: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    num_proc: int | None = None,
    batch_size: int = 1000,
    name: str = "train",
) -> Tokenized:
    """The rows with all their columns, and `prompt_ids` that end where the model is to continue.

    A prompt that fills `context_length` (None: no limit is known) is a ValueError; `max_prompt_length` cuts instead.
    """
    if not has_rows(dataset):
        return dataset, TokenizationReport()
    found = detect_format(dataset, (RowKind.TOKENIZED, RowKind.PROMPT), tokenised=(("prompt_ids",),), name=name)
    job = PromptsJob(
        encoder=TextEncoder(tokenizer, add_bos),
        format=found,
        limits=Limits(max_prompt_length=max_prompt_length, truncation_mode=truncation_mode),
        template_kwargs=dict(template_kwargs or {}),
        name=name,
        context_length=context_length,
    )
    return _run(dataset, job, column_names(dataset, name), num_proc, batch_size, name)


def tokenize_stepwise(
    dataset: Any,
    tokenizer: Any,
    *,
    step_separator: str = "\n",
    train_on_last_step_only: bool = False,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    truncation_mode: str = "keep_start",
    add_bos: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    keep: Sequence[str] = (),
    num_proc: int | None = None,
    batch_size: int = 1000,
    name: str = "train",
) -> Tokenized:
    """Rows of `input_ids` and `step_labels` from `prompt`, `completions` (a text a step) and `labels` (true = right).

    `step_labels` holds 0 or 1 at the last token of each step, its separator's, and -100 elsewhere.
    """
    if not has_rows(dataset):
        return dataset, TokenizationReport()
    found = detect_format(dataset, (RowKind.STEPWISE,), name=name)
    job = StepwiseJob(
        encoder=TextEncoder(tokenizer, add_bos),
        format=found,
        limits=Limits(max_length, max_prompt_length, max_completion_length, truncation_mode),
        template_kwargs=dict(template_kwargs or {}),
        name=name,
        step_separator=step_separator,
        last_step_only=train_on_last_step_only,
    )
    return _run(dataset, job, keep, num_proc, batch_size, name)


__all__ = [
    "PAIR_EXTRAS",
    "TokenizationReport",
    "format_rows",
    "has_rows",
    "supervised_row",
    "tokenize_preference",
    "tokenize_prompts",
    "tokenize_stepwise",
    "tokenize_supervised",
    "tokenize_unpaired",
]
