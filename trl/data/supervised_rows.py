"""Rows for imitation: `input_ids` and a `loss_mask` that is 1 on the tokens to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any

from trl.data.chat import ChatTemplate, Messages, read_tools
from trl.data.encode import Ids, TextEncoder
from trl.data.formats import Format, RowKind, maybe_convert_to_chatml
from trl.data.mapping import IDS, MASK, Made, Row, at_row
from trl.data.report import NO_FLAGS, RowFlag
from trl.data.truncation import Limits


@dataclass
class _Draft:
    """A row before length limits."""

    ids: Ids
    mask: Ids
    flags: RowFlag = NO_FLAGS


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The row's text in that column."""
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column '{column}' should be a text, got {value!r:.80}")
    return value


def messages_of(row: Mapping[str, Any], column: str) -> Messages:
    """The row's conversation in that column."""
    value = row.get(column)
    if not isinstance(value, list | tuple) or not all(isinstance(m, Mapping) and m.get("role") for m in value):
        raise ValueError(f"column '{column}' should be a list of messages with `role` and `content`, got {value!r:.80}")
    return [dict(message) for message in value]


def ids_of(row: Mapping[str, Any], column: str) -> Ids:
    """The row's token ids in that column."""
    value = row.get(column)
    if value is None or isinstance(value, str) or not all(isinstance(i, Integral) for i in list_of(value)):
        raise ValueError(f"column '{column}' should be a list of token ids, got {value!r:.80}")
    return [int(i) for i in list_of(value)]


def list_of(value: Any) -> list[Any]:
    """A list, from a tensor or an array too."""
    return list(value.tolist() if hasattr(value, "tolist") else value)


def says_nothing(messages: Messages) -> bool:
    """Whether some assistant's message is empty."""
    return any(m["role"] == "assistant" and not (m.get("content") or m.get("tool_calls")) for m in messages)


def _same_length(row: Mapping[str, Any], column: str, ids: Ids) -> list[Any]:
    values = list_of(row[column])
    if len(values) != len(ids):
        raise ValueError(f"column '{column}' has {len(values)} entries for {len(ids)} `input_ids`")
    return values


def tokenised_mask(row: Mapping[str, Any], completion_only: bool | None = None, assistant_only: bool = False) -> Ids:
    """The loss mask of a row that is tokenised already.

    From `loss_mask`, else `labels` (-100 = not learned), else `completion_mask` (unless `completion_only` is False) and
    `assistant_masks` (if `assistant_only`), else every token. Wants that the row cannot meet are ValueErrors.
    """
    ids = ids_of(row, "input_ids")
    if row.get("loss_mask") is not None:
        return [int(bool(m)) for m in _same_length(row, "loss_mask", ids)]
    if row.get("labels") is not None:
        labels = _same_length(row, "labels", ids)
        wrong = [i for i, label in enumerate(labels) if label not in (-100, ids[i])]
        if wrong:
            raise ValueError(
                f"`labels` should be -100 or the same as `input_ids`; at position {wrong[0]} they are neither"
            )
        return [int(label != -100) for label in labels]
    mask = [1] * len(ids)
    wanted = {"completion_mask": completion_only, "assistant_masks": assistant_only}
    for column, want in wanted.items():
        if row.get(column) is not None and (want or (want is None and column == "completion_mask")):
            mask = [m & int(bool(v)) for m, v in zip(mask, _same_length(row, column, ids), strict=True)]
        elif want:
            option = "completion_only_loss" if column == "completion_mask" else "assistant_only_loss"
            raise ValueError(f"{option}=True needs a column '{column}' or 'labels' in tokenised rows")
    return mask


def supervised_row(row: Mapping[str, Any]) -> dict[str, Ids]:
    """`input_ids` and `loss_mask` of one tokenised row; padding (attention_mask 0) is taken out."""
    ids, mask = ids_of(row, "input_ids"), tokenised_mask(row)
    if row.get("attention_mask") is not None:
        attended = _same_length(row, "attention_mask", ids)
        ids = [i for i, a in zip(ids, attended, strict=True) if a]
        mask = [m for m, a in zip(mask, attended, strict=True) if a]
    return {"input_ids": ids, "loss_mask": [0, *mask[1:]]}


@dataclass
class SupervisedJob:
    """Makes `input_ids` and `loss_mask` from any of the supervised formats.

    The first token of a row is predicted by nothing, so it is never marked as learned.
    """

    encoder: TextEncoder
    format: Format
    text_field: str
    completion_only: bool | None
    assistant_only: bool
    limits: Limits
    add_eos: bool
    add_special_tokens: bool
    template_kwargs: dict[str, Any]
    name: str
    features: dict[str, Any] = field(default_factory=lambda: {"input_ids": IDS, "loss_mask": MASK})

    def key(self) -> str:
        options = (self.format, self.text_field, self.completion_only, self.assistant_only, self.limits, self.add_eos)
        return repr((type(self).__name__, options, self.add_special_tokens, sorted(self.template_kwargs.items()))) + (
            self.encoder.fingerprint()
        )

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        if self.format.kind is RowKind.TOKENIZED:
            drafts = self._tokenised(rows, indices)
        elif self.format.kind is RowKind.PROMPT_COMPLETION and not self.assistant_only:
            drafts = self._answers(rows, indices)
        elif self.format.conversational:
            drafts = self._conversations(rows, indices)
        else:
            drafts = self._texts(rows, indices)
        return [self._finish(draft) for draft in drafts]

    def _tokenised(self, rows: list[Row], indices: Sequence[int]) -> list[_Draft]:
        drafts = []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                mask = tokenised_mask(row, self.completion_only, self.assistant_only)
                plain = supervised_row({**row, "loss_mask": mask})
            drafts.append(_Draft(plain["input_ids"], plain["loss_mask"]))
        return drafts

    def _texts(self, rows: list[Row], indices: Sequence[int]) -> list[_Draft]:
        texts = []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                texts.append(text_of(row, self.text_field))
        drafts = []
        for text, ids in zip(texts, self.encoder.encode(texts), strict=True):
            draft = self._opened(ids)
            draft.mask = [1] * len(draft.ids)
            self._close(draft, text)
            if not text.strip():
                draft.flags |= RowFlag.EMPTY_COMPLETION
            drafts.append(draft)
        return drafts

    def _opened(self, ids: Ids) -> _Draft:
        opened, double = self.encoder.open_row(ids) if self.add_special_tokens else (ids, False)
        return _Draft(list(opened), [], RowFlag.DOUBLE_BOS if double else NO_FLAGS)

    def _close(self, draft: _Draft, text: str) -> None:
        if self.add_eos and needs_closing(self.encoder, draft.ids, text):
            draft.ids += self.encoder.tail
            draft.mask += [1] * len(self.encoder.tail)
            draft.flags |= RowFlag.EOS_ADDED

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.encoder.tokenizer, self.template_kwargs)

    def _split(self, row: Row) -> tuple[str, str, RowFlag]:
        """The texts of prompt and completion."""
        if not self.format.conversational:
            prompt, answer = text_of(row, "prompt"), text_of(row, "completion")
            return prompt, answer, NO_FLAGS if answer.strip() else RowFlag.EMPTY_COMPLETION
        before, after = messages_of(row, "prompt"), messages_of(row, "completion")
        tools, template = read_tools(row.get("tools")), self._template.of_row(row)
        rendered = template.split(before, [after], tools)
        flags = RowFlag.REWRITTEN if rendered.rewritten else NO_FLAGS
        flags |= RowFlag.SPELLED_TOOLS if template.needs_spelling([*before, *after], tools) else flags
        flags |= RowFlag.EMPTY_COMPLETION if says_nothing(after) else flags
        return rendered.prompt, rendered.answers[0], flags

    def _answers(self, rows: list[Row], indices: Sequence[int]) -> list[_Draft]:
        texts = []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                texts.append(self._split(row))
        prompts = self.encoder.encode([prompt for prompt, _, _ in texts])
        answers = self.encoder.continuations([answer for _, answer, _ in texts])
        drafts = []
        for prompt_ids, answer_ids, (_, answer, flags) in zip(prompts, answers, texts, strict=True):
            draft = _Draft(prompt_ids, []) if self.format.conversational else self._opened(prompt_ids)
            draft.mask = [int(self.completion_only is False)] * len(draft.ids) + [1] * len(answer_ids)
            draft.ids = draft.ids + answer_ids
            draft.flags |= flags
            if not self.format.conversational:
                self._close(draft, answer)
            drafts.append(draft)
        return drafts

    def _conversations(self, rows: list[Row], indices: Sequence[int]) -> list[_Draft]:
        texts, spans, flags = [], [], []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                messages, first = self._messages(row)
                tools = read_tools(row.get("tools"))
                template = self._template.of_row(row)
                flag = RowFlag.SPELLED_TOOLS if template.needs_spelling(messages, tools) else NO_FLAGS
                flag |= RowFlag.EMPTY_COMPLETION if says_nothing(messages) else flag
                if self.assistant_only:
                    text, row_spans, reading = template.conversation(messages, tools, first)
                    flag |= RowFlag.REWRITTEN if reading.rewritten else flag
                else:
                    text = template.render(messages, tools)
                    row_spans = [(0, len(text))]
                texts.append(text)
                spans.append(row_spans)
                flags.append(flag)
        if self.assistant_only:
            encoded = self.encoder.encode_with_masks(texts, spans)
        else:
            encoded = [(ids, [1] * len(ids)) for ids in self.encoder.encode(texts)]
        return [_Draft(ids, mask, flag) for (ids, mask), flag in zip(encoded, flags, strict=True)]

    def _messages(self, row: Row) -> tuple[Messages, int]:
        """The conversation, and the first message that can be learned."""
        if self.format.kind is RowKind.PROMPT_COMPLETION:
            prompt = messages_of(row, "prompt")
            return prompt + messages_of(row, "completion"), 0 if self.completion_only is False else len(prompt)
        column = self.format.columns[0]
        converted = maybe_convert_to_chatml({"messages": row.get(column)})
        return messages_of({column: converted["messages"]}, column), 0

    def _finish(self, draft: _Draft) -> Made:
        ids, mask, flags = draft.ids, draft.mask, draft.flags
        extra = self.encoder.drop_double_bos(ids)
        if extra:
            ids, mask, flags = ids[extra:], mask[extra:], flags | RowFlag.DOUBLE_BOS
        mask = [0, *mask[1:]] if mask else []
        had_any = any(mask)
        pinned = int(bool(ids) and ids[0] == self.encoder.bos_id)
        kept, kept_mask = self.limits.fit_row(ids, mask, pinned)
        kept_mask = [0, *kept_mask[1:]] if kept_mask else []
        if len(kept) < len(ids):
            flags |= RowFlag.TRUNCATED
        if not any(kept_mask):
            flags |= RowFlag.ANSWER_CUT if had_any else RowFlag.UNLEARNED
        elif len(kept) == len(ids):
            flags |= self._stop_flag(kept, kept_mask)
        return Made({"input_ids": kept, "loss_mask": kept_mask}, flags, len(ids) - len(kept), len(kept), sum(kept_mask))

    def _stop_flag(self, ids: Ids, mask: Ids) -> RowFlag:
        eos = self.encoder.eos_id
        if eos is None or (not self.add_eos and not self.format.conversational):
            return NO_FLAGS
        if any(m and i == eos for i, m in zip(ids, mask, strict=True)):
            return NO_FLAGS
        return RowFlag.STOP_MASKED if eos in ids[1:] else RowFlag.MISSING_EOS


def needs_closing(encoder: TextEncoder, ids: Ids, text: str) -> bool:
    """Whether the row still needs what closes it: it has no EOS at its end, blanks aside."""
    if ids[-len(encoder.tail) :] == encoder.tail:
        return False
    eos = encoder.tokenizer.eos_token
    return not (isinstance(eos, str) and text.rstrip().endswith(eos))
