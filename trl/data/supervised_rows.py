"""The job for supervised rows: it makes `input_ids` and a `loss_mask` that is 1 on the tokens to learn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from typing import Any

from datasets import Dataset, IterableDataset

from trl.data.chat import Messages, read_tools
from trl.data.columns import ids_of, mask_for, same_length, shown, text_of, whole_numbers
from trl.data.encode import Ids
from trl.data.formats import (
    RowKind,
    as_messages,
    column_names,
    detect_format,
    first_row,
    maybe_convert_to_chatml,
    split_completion,
)
from trl.data.messages import is_learned, messages_of
from trl.data.report import NO_FLAGS, NOTHING_MET, Met, RowFlag
from trl.data.row_job import (
    IDS,
    MASK,
    Answered,
    Made,
    Row,
    RowJob,
    asks_nothing,
    flags_of,
    met_of,
    needs_closing,
    says_nothing,
)

_LENGTHS = "seq_lengths"
"""column of packed rows: how many tokens each sequence in it has"""


@dataclass
class _Sequence:
    """A row before length limits."""

    ids: Ids
    mask: Ids
    flags: RowFlag = NO_FLAGS
    met: Met = NOTHING_MET


def tokenised_mask(row: Mapping[str, Any], completion_only: bool | None = None, assistant_only: bool = False) -> Ids:
    """The loss mask of a row that is tokenised already.

    From `loss_mask`, else `labels` (-100 = not learned), else `completion_mask` (unless `completion_only` is False) and
    `assistant_masks` (if `assistant_only`), else every token. A wish that the row cannot meet is a ValueError.
    """
    ids = ids_of(row, "input_ids")
    if row.get("loss_mask") is not None:
        return mask_for(row, "loss_mask", ids)
    if row.get("labels") is not None:
        labels = same_length(whole_numbers(row, "labels"), "labels", ids)
        wrong = [i for i, label in enumerate(labels) if label not in (-100, ids[i])]
        if wrong:
            raise ValueError(
                f"column 'labels' should hold -100 or the same as `input_ids`; at position {wrong[0]} it is neither"
            )
        return [int(label != -100) for label in labels]
    mask = [1] * len(ids)
    wanted = {"completion_mask": completion_only, "assistant_masks": assistant_only}
    for column, want in wanted.items():
        if row.get(column) is not None and (want or (want is None and column == "completion_mask")):
            mask = [m & own for m, own in zip(mask, mask_for(row, column, ids), strict=True)]
        elif want:
            option = "completion_only_loss" if column == "completion_mask" else "assistant_only_loss"
            raise ValueError(f"{option}=True needs a column '{column}' or 'labels' in tokenised rows")
    return mask


def supervised_row(row: Mapping[str, Any]) -> dict[str, Ids]:
    """`input_ids` and `loss_mask` of one tokenised row; padding (attention_mask 0) is taken out."""
    ids, mask = ids_of(row, "input_ids"), tokenised_mask(row)
    if row.get("attention_mask") is not None:
        attended = mask_for(row, "attention_mask", ids)
        ids = [i for i, a in zip(ids, attended, strict=True) if a]
        mask = [m for m, a in zip(mask, attended, strict=True) if a]
    return {"input_ids": ids, "loss_mask": [0, *mask[1:]]}


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
        columns = {column: [row.get(column) for row in dataset] for column in column_names(dataset, name)}
        return [{"text": text} for text in formatting_func(columns)]
    return [one(row) for row in dataset]


def _in_parts(row: Row) -> Row:
    """A conversational row with its prompt apart; a prompt that is a text can stand in the completion's messages."""
    row = as_messages(row, ("completion",))
    return split_completion(row) if isinstance(row["prompt"], str) else row


@dataclass(kw_only=True)
class SupervisedJob(RowJob):
    """Makes `input_ids` and a `loss_mask` (1 = learned) from any of the supervised formats.

    Texts and completions get the EOS that they lack; conversations stay as the chat template makes them. The first
    token of a row is predicted by nothing, so it is never marked as learned.
    """

    text_field: str = "text"
    completion_only_loss: bool | None = None
    """None learns only the completion where rows have one"""
    assistant_only_loss: bool = False
    """learn only what the assistant says in conversations, stop tokens included"""
    learn_tool_results: bool = False
    """learn all of a completion, what tools and users say in it too"""
    add_eos: bool = True
    add_special_tokens: bool = True
    formatting_func: Callable[[Any], Any] | None = None
    """makes the text of a row or the texts of a batch, in place of `text_field`"""

    accepts = (RowKind.TOKENIZED, RowKind.MESSAGES, RowKind.PROMPT_COMPLETION, RowKind.TEXT)
    features = {"input_ids": IDS, "loss_mask": MASK}  # noqa: RUF012

    def options(self) -> tuple[Any, ...]:
        return (
            self.text_field,
            self.completion_only_loss,
            self.assistant_only_loss,
            self.learn_tool_results,
            self.add_eos,
            self.add_special_tokens,
        )

    def reading(self, dataset: Any, name: str) -> tuple[Any, RowJob]:
        job = copy.copy(self)
        if self.formatting_func is not None:
            dataset = format_rows(dataset, self.formatting_func, name)
            job.text_field, job.formatting_func = "text", None
        job.format, job.name = detect_format(dataset, self.accepts, text_field=job.text_field, name=name), name
        if job.format.kind is RowKind.TOKENIZED and _LENGTHS in column_names(dataset, name):
            job.keep = (*(self.keep or ()), _LENGTHS)
        job.keep_nulls = isinstance(dataset, list | tuple)
        kind = job.format.kind
        if self.completion_only_loss and kind in (RowKind.TEXT, RowKind.MESSAGES):
            raise ValueError(
                f"completion_only_loss=True needs the columns 'prompt' and 'completion'; the {name} data set has "
                f"{kind} rows (assistant_only_loss=True is for conversations)"
            )
        if self.assistant_only_loss and not job.format.conversational and kind is not RowKind.TOKENIZED:
            raise ValueError(
                f"assistant_only_loss=True needs conversations; the {name} data set has rows of plain text in "
                + ", ".join(f"'{column}'" for column in job.format.columns)
            )
        return dataset, job

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        if self.format.kind is RowKind.TOKENIZED:
            sequences = self._tokenised(rows, indices)
        elif self.format.kind is RowKind.PROMPT_COMPLETION and not self.assistant_only_loss:
            sequences = self._answers(rows, indices)
        elif self.format.conversational:
            sequences = self._conversations(rows, indices)
        else:
            sequences = self._texts(rows, indices)
        made = []
        for index, sequence in zip(indices, sequences, strict=True):
            with self.at_row(index):
                made.append(self._finish(sequence))
        return made

    def _tokenised(self, rows: list[Row], indices: Sequence[int]) -> list[_Sequence]:
        sequences = []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                mask = tokenised_mask(row, self.completion_only_loss, self.assistant_only_loss)
                plain = supervised_row({**row, "loss_mask": mask})
                if row.get(_LENGTHS) is not None:
                    self._check_packed(row, plain)
            sequences.append(_Sequence(plain["input_ids"], plain["loss_mask"]))
        return sequences

    def _check_packed(self, row: Row, plain: dict[str, Ids]) -> None:
        """Unmark the first token of each sequence of a packed row; ValueError where the row would not stay whole."""
        lengths = whole_numbers(row, _LENGTHS)
        if min(lengths, default=0) < 1:
            raise ValueError(f"column '{_LENGTHS}' should hold numbers of tokens of 1 or more, got {shown(lengths)}")
        if sum(lengths) != len(plain["input_ids"]):
            raise ValueError(
                f"column '{_LENGTHS}' says {sum(lengths)} tokens and the packed row has {len(plain['input_ids'])}"
            )
        limit = self.limits.max_length
        if limit is not None and sum(lengths) > limit:
            raise ValueError(f"a packed row has {sum(lengths)} tokens: set max_length to as many, or pack to {limit}")
        for start in accumulate(lengths[:-1]):
            plain["loss_mask"][start] = 0

    def _texts(self, rows: list[Row], indices: Sequence[int]) -> list[_Sequence]:
        texts = []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                texts.append(text_of(row, self.text_field))
        sequences = []
        for text, ids in zip(texts, self.encoder.encode(texts), strict=True):
            sequence = self._opened(ids)
            sequence.mask = [1] * len(sequence.ids)
            self._close(sequence, text)
            if not text.strip():
                sequence.flags |= RowFlag.EMPTY_COMPLETION
            sequences.append(sequence)
        return sequences

    def _opened(self, ids: Ids) -> _Sequence:
        opened, double = self.encoder.open_row(ids) if self.add_special_tokens else (ids, False)
        return _Sequence(list(opened), [], RowFlag.DOUBLE_BOS if double else NO_FLAGS)

    def _close(self, sequence: _Sequence, text: str) -> None:
        if self.add_eos and needs_closing(self.encoder, sequence.ids, text):
            sequence.ids += self.encoder.tail
            sequence.mask += [1] * len(self.encoder.tail)

    def _texts_of(self, row: Row) -> Answered[str]:
        if not self.format.conversational:
            return self.plain(row, ("completion",))
        row = _in_parts(row)
        return self.rendered(row, messages_of(row, "prompt"), [messages_of(row, "completion")])

    def _answers(self, rows: list[Row], indices: Sequence[int]) -> list[_Sequence]:
        texts = []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                texts.append(self._texts_of(row))
        prompts = self.encoder.encode([one.prompt for one in texts])
        everything = self.completion_only_loss is False or self.learn_tool_results or not self.format.conversational
        said = [[(0, len(one.answers[0]))] if everything else one.said[0] for one in texts]
        answers = self.encoder.continuations_with_masks([one.answers[0] for one in texts], said)
        sequences = []
        for prompt_ids, (answer_ids, mask), one in zip(prompts, answers, texts, strict=True):
            sequence = _Sequence(prompt_ids, []) if self.format.conversational else self._opened(prompt_ids)
            sequence.mask = [int(self.completion_only_loss is False)] * len(sequence.ids) + mask
            sequence.ids = sequence.ids + answer_ids
            sequence.flags |= one.flags
            sequence.met = one.met
            if not self.format.conversational:
                self._close(sequence, one.answers[0])
            sequences.append(sequence)
        return sequences

    def _conversations(self, rows: list[Row], indices: Sequence[int]) -> list[_Sequence]:
        texts, spans, flags, met = [], [], [], []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                messages, first, flag = self._messages(row)
                tools, template = read_tools(row.get("tools"), self.keep_nulls), self.template.of_row(row)
                if self.assistant_only_loss:
                    text, row_spans, reading = template.conversation(messages, tools, first)
                else:
                    reading = template.read(messages, tools, strict=False)
                    text, row_spans = reading.text, [(0, len(reading.text))]
                met.append(met_of(reading, len(messages)))
                flag |= flags_of(reading, met[-1])
                if not self.assistant_only_loss:
                    flag &= ~RowFlag.REWRITTEN  # no turn is told apart
                    unheard = any(m["role"] == "assistant" and not is_learned(m) for m in messages)
                    flag |= RowFlag.UNREAD_WEIGHTS if unheard else flag
                flag |= RowFlag.EMPTY_COMPLETION if says_nothing(messages) else flag
                texts.append(text)
                spans.append(row_spans)
                flags.append(flag)
        if self.assistant_only_loss:
            encoded = self.encoder.encode_with_masks(texts, spans)
        else:
            encoded = [(ids, [1] * len(ids)) for ids in self.encoder.encode(texts)]
        return [_Sequence(*one, flag, own) for one, flag, own in zip(encoded, flags, met, strict=True)]

    def _messages(self, row: Row) -> tuple[Messages, int, RowFlag]:
        """The conversation, the first message that can be learned, and whether its prompt is empty."""
        if self.format.kind is RowKind.PROMPT_COMPLETION:
            row = _in_parts(row)
            prompt = messages_of(row, "prompt")
            first = 0 if self.completion_only_loss is False else len(prompt)
            flag = RowFlag.EMPTY_PROMPT if asks_nothing(prompt) else NO_FLAGS
            return prompt + messages_of(row, "completion"), first, flag
        column = self.format.columns[0]
        converted = maybe_convert_to_chatml({"messages": row.get(column)})
        return messages_of({column: converted["messages"]}, column), 0, NO_FLAGS

    def _finish(self, sequence: _Sequence) -> Made:
        ids, mask, flags = sequence.ids, sequence.mask, sequence.flags
        single = self.encoder.without_double_bos(ids)
        if len(single) < len(ids):
            ids, mask, flags = single, mask[len(ids) - len(single) :], flags | RowFlag.DOUBLE_BOS
        mask = [0, *mask[1:]] if mask else []
        had_any = any(mask)
        kept, kept_mask = self.limits.fit_row(ids, mask, self.pinned(ids))
        kept_mask = [0, *kept_mask[1:]] if kept_mask else []
        if len(kept) < len(ids):
            flags |= RowFlag.TRUNCATED
        if not any(kept_mask):
            flags |= RowFlag.ANSWER_CUT if had_any else RowFlag.UNLEARNED
        elif len(kept) == len(ids):
            flags |= self._stop_flag(kept, kept_mask)
        columns, learned = {"input_ids": kept, "loss_mask": kept_mask}, sum(kept_mask)
        return Made(columns, flags, len(ids) - len(kept), len(kept), learned, sequence.met)

    def _stop_flag(self, ids: Ids, mask: Ids) -> RowFlag:
        if not self.stops or (not self.add_eos and not self.format.conversational):
            return NO_FLAGS
        if not self.stops.isdisjoint(compress(ids, mask)):
            return NO_FLAGS
        return RowFlag.MISSING_EOS if self.stops.isdisjoint(ids[1:]) else RowFlag.STOP_MASKED
