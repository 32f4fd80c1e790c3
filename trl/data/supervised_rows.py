"""The job for supervised rows: it makes `input_ids` and a `loss_mask` that is 1 on the tokens to learn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from trl.data.picture_rows import COLUMNS, FLAGS, NUMBERS, Shown, spoils
from trl.data.pictures import pictures_among
from trl.data.report import NO_FLAGS, NOTHING_MET, Met, RowFlag
from trl.data.row_job import (
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
    hidden: Ids = field(default_factory=list)
    """1 where pictures stand; empty where there are none"""

    def grown(self, before: int, after: int) -> None:
        """Tokens that are none of a picture's were put around."""
        self.hidden = [0] * before + self.hidden + [0] * after if self.hidden else []


def tokenised_mask(
    row: Mapping[str, Any], ids: Ids, completion_only: bool | None = None, assistant_only: bool = False
) -> Ids:
    """The loss mask of a row with these `input_ids`, which is tokenised already.

    From `loss_mask`, else `labels` (-100 = not learned), else `completion_mask` (unless `completion_only` is False) and
    `assistant_masks` (if `assistant_only`), else every token. A wish that the row cannot meet is a ValueError.
    """
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


def supervised_row(row: Mapping[str, Any], pictured: bool = False) -> dict[str, Ids]:
    """`input_ids` and `loss_mask` of one tokenised row; padding (attention_mask 0) is taken out.

    pictured: its tokens may be those of pictures, which are never learned.
    """
    ids = ids_of(row, "input_ids", pictured)
    mask = [m & (own >= 0) for m, own in zip(tokenised_mask(row, ids), ids, strict=True)]
    if row.get("attention_mask") is not None:
        attended = mask_for(row, "attention_mask", ids)
        ids = [i for i, a in zip(ids, attended, strict=True) if a]
        mask = [m for m, a in zip(mask, attended, strict=True) if a]
    return {"input_ids": ids, "loss_mask": [0, *mask[1:]]}


def format_rows(dataset: Any, formatting_func: Callable[[Any], Any], name: str = "train") -> Any:
    """The data set as rows with a column `text` that `formatting_func` makes, and their columns of pictures.

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

    names = column_names(dataset, name)
    pictures = [column for column in COLUMNS if column in names]
    if isinstance(dataset, Dataset | IterableDataset):
        return dataset.map(one, batched=batched, remove_columns=[own for own in names if own not in pictures])
    texts = [formatting_func(row) for row in dataset] if not batched else None
    if texts is None:
        texts = formatting_func({column: [row.get(column) for row in dataset] for column in names})
    kept = [{column: row[column] for column in pictures if column in row} for row in dataset]
    return [{"text": text, **own} for text, own in zip(texts, kept, strict=True)]


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

    @property
    def features(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "loss_mask": MASK}

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
        dataset, kind = job.opened(dataset), job.format.kind
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
                ids = self.tokenised_ids(row, "input_ids")
                mask = tokenised_mask(row, ids, self.completion_only_loss, self.assistant_only_loss)
                plain = supervised_row({**row, "loss_mask": mask}, self.pictures is not None)
                if row.get(_LENGTHS) is not None:
                    self._check_packed(row, plain)
            ids = plain["input_ids"]
            pictures = pictures_among(ids)
            hidden = [int(own < 0) for own in ids] if pictures else []
            sequences.append(_Sequence(ids, plain["loss_mask"], met=Met(pictures=len(pictures)), hidden=hidden))
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
        texts, flags = [], []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                row = self.with_numbers(row)
                texts.append(self.shown(text_of(row, self.text_field), row.get(NUMBERS, [])))
                flags.append(RowFlag(row.get(FLAGS, 0)))
        sequences = []
        encoded = self.pictured(texts, self.encoder.encode([one.text for one in texts]), indices)
        for one, (ids, hidden), flag in zip(texts, encoded, flags, strict=True):
            sequence = self._opened(ids, hidden)
            sequence.mask = [1] * len(sequence.ids)
            self._close(sequence, one.text)
            sequence.flags |= flag | (RowFlag.EMPTY_COMPLETION if not one.text.strip() else NO_FLAGS)
            sequence.met = Met(pictures=len(one.numbers))
            sequences.append(sequence)
        return sequences

    def _opened(self, ids: Ids, hidden: Ids) -> _Sequence:
        opened, double = self.encoder.open_row(ids) if self.add_special_tokens else (ids, False)
        sequence = _Sequence(list(opened), [], RowFlag.DOUBLE_BOS if double else NO_FLAGS, hidden=hidden)
        sequence.grown(len(opened) - len(ids), 0)
        return sequence

    def _close(self, sequence: _Sequence, text: str) -> None:
        if self.add_eos and needs_closing(self.encoder, sequence.ids, text):
            sequence.ids += self.encoder.tail
            sequence.mask += [1] * len(self.encoder.tail)
            sequence.grown(0, len(self.encoder.tail))

    def _texts_of(self, row: Row) -> Answered[str]:
        row = self.with_numbers(row)
        if not self.format.conversational:
            return self.counted(row, self.plain(row, ("completion",)), row.get(NUMBERS, []))
        row = _in_parts(row)
        prompt, completion = messages_of(row, "prompt"), messages_of(row, "completion")
        messages, numbers = self.placed(row, prompt + completion)
        prompt, completion = messages[: len(prompt)], messages[len(prompt) :]
        return self.counted(row, self.rendered(row, prompt, [completion]), numbers)

    def _shown(self, one: Answered[str], everything: bool) -> tuple[Shown, Shown]:
        """Prompt and completion with the row's pictures; `everything`: all of the completion is learned."""
        (answer,) = one.answers
        shared = 0 if self.pictures is None else one.prompt.count(self.pictures.placeholder)
        spans = [(0, len(answer))] if everything else one.said[0]
        return self.shown(one.prompt, one.pictures[:shared]), self.shown(answer, one.pictures[shared:], spans)

    def _answers(self, rows: list[Row], indices: Sequence[int]) -> list[_Sequence]:
        everything = self.completion_only_loss is False or self.learn_tool_results or not self.format.conversational
        texts, shown = [], []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                texts.append(self._texts_of(row))
                shown.append(self._shown(texts[-1], everything))
        asked, said = [one for one, _ in shown], [one for _, one in shown]
        prompts = self.pictured(asked, self.encoder.encode([one.text for one in asked]), indices)
        masked = self.encoder.continuations_with_masks([one.text for one in said], [one.spans for one in said])
        answers = self.pictured(said, [ids for ids, _ in masked], indices, continuing=True)
        sequences = []
        for prompt, answer, (_, mask), one in zip(prompts, answers, masked, texts, strict=True):
            sequence = (
                _Sequence(prompt[0], [], hidden=prompt[1]) if self.format.conversational else self._opened(*prompt)
            )
            if prompt[1] or answer[1]:
                sequence.hidden = (sequence.hidden or [0] * len(sequence.ids)) + (answer[1] or [0] * len(answer[0]))
            sequence.mask = [int(self.completion_only_loss is False)] * len(sequence.ids) + mask
            sequence.ids = sequence.ids + answer[0]
            sequence.flags |= one.flags
            sequence.met = one.met
            if not self.format.conversational:
                self._close(sequence, one.answers[0])
            sequences.append(sequence)
        return sequences

    def _conversations(self, rows: list[Row], indices: Sequence[int]) -> list[_Sequence]:
        texts, flags, met = [], [], []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                row = self.with_numbers(row)
                messages, first, flag = self._messages(row)
                messages, numbers = self.placed(row, messages)
                tools, template = read_tools(row.get("tools"), self.keep_nulls), self.template.of_row(row)
                if self.assistant_only_loss:
                    text, spans, reading = template.conversation(messages, tools, first)
                else:
                    reading = template.read(messages, tools, strict=False)
                    text, spans = reading.text, [(0, len(reading.text))]
                met.append(met_of(reading, len(messages))._replace(pictures=len(numbers)))
                flag |= flags_of(reading, met[-1]) | RowFlag(row.get(FLAGS, 0))
                if not self.assistant_only_loss:
                    flag &= ~RowFlag.REWRITTEN  # no turn is told apart
                    unheard = any(m["role"] == "assistant" and not is_learned(m) for m in messages)
                    flag |= RowFlag.UNREAD_WEIGHTS if unheard else flag
                flag |= RowFlag.EMPTY_COMPLETION if says_nothing(messages) else flag
                texts.append(self.shown(text, numbers, spans))
                flags.append(flag)
        plain = [one.text for one in texts]
        if self.assistant_only_loss:
            masked = self.encoder.encode_with_masks(plain, [one.spans for one in texts])
        else:
            masked = [(ids, [1] * len(ids)) for ids in self.encoder.encode(plain)]
        encoded = self.pictured(texts, [ids for ids, _ in masked], indices)
        return [
            _Sequence(ids, mask, flag, own, hidden)
            for (ids, hidden), (_, mask), flag, own in zip(encoded, masked, flags, met, strict=True)
        ]

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
        ids, mask, flags, hidden = sequence.ids, sequence.mask, sequence.flags, sequence.hidden
        single = self.encoder.without_double_bos(ids)
        if len(single) < len(ids):
            double, flags = len(ids) - len(single), flags | RowFlag.DOUBLE_BOS
            ids, mask, hidden = single, mask[double:], hidden[double:]
        mask = [m & ~h for m, h in zip(mask, hidden, strict=True)] if hidden else mask
        mask = [0, *mask[1:]] if mask else []
        had_any, pinned = any(mask), self.pinned(ids)
        kept, kept_mask = self.limits.fit_row(ids, mask, pinned)
        kept_mask = [0, *kept_mask[1:]] if kept_mask else []
        if len(kept) < len(ids):
            flags |= RowFlag.TRUNCATED
        if not any(kept_mask):
            flags |= RowFlag.ANSWER_CUT if had_any else RowFlag.UNLEARNED
        elif hidden and self._spoils(hidden, pinned):
            flags |= RowFlag.PICTURE_CUT
        elif len(kept) == len(ids):
            flags |= self._stop_flag(kept, kept_mask)
        columns, learned = {"input_ids": kept, "loss_mask": kept_mask}, sum(kept_mask)
        return Made(columns, flags, len(ids) - len(kept), len(kept), learned, sequence.met)

    def _spoils(self, hidden: Ids, pinned: int) -> bool:
        kept, _ = self.limits.fit_row(hidden, hidden, pinned)
        return spoils(hidden, kept, pinned, self.limits.truncation_mode == "keep_end")

    def _stop_flag(self, ids: Ids, mask: Ids) -> RowFlag:
        if not self.stops or (not self.add_eos and not self.format.conversational):
            return NO_FLAGS
        if not self.stops.isdisjoint(compress(ids, mask)):
            return NO_FLAGS
        return RowFlag.MISSING_EOS if self.stops.isdisjoint(ids[1:]) else RowFlag.STOP_MASKED
