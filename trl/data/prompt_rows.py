"""Rows with a prompt of their own: preferences, single judged answers, bare prompts and judged steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from datasets import Value

from trl.data.batches import pair_ids
from trl.data.chat import ChatTemplate, read_tools
from trl.data.encode import Ids, TextEncoder, common_prefix
from trl.data.formats import Format, RowKind, extract_prompt, maybe_convert_to_chatml
from trl.data.mapping import IDS, Made, Row, at_row
from trl.data.report import NO_FLAGS, RowFlag
from trl.data.supervised_rows import ids_of, list_of, messages_of, needs_closing, says_nothing, text_of
from trl.data.truncation import Limits, cut


@dataclass
class _Draft:
    """A prompt and its answers before length limits."""

    prompt: Ids
    answers: list[Ids]
    flags: RowFlag = NO_FLAGS


@dataclass
class _Texts:
    prompt: str
    answers: list[str]
    flags: RowFlag = NO_FLAGS


@dataclass
class _PromptJob:
    """What all jobs with prompts have in common."""

    encoder: TextEncoder
    format: Format
    limits: Limits
    template_kwargs: dict[str, Any]
    name: str

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.encoder.tokenizer, self.template_kwargs)

    def _key(self, *options: Any) -> str:
        own = (type(self).__name__, self.format, self.limits, sorted(self.template_kwargs.items()), options)
        return repr(own) + self.encoder.fingerprint()

    def _opened(self, ids: Ids) -> tuple[Ids, RowFlag]:
        """Prompt ids with one BOS at their start where one belongs; a chat template has put its own."""
        extra = self.encoder.drop_double_bos(ids)
        double = extra > 0
        ids = ids[extra:]
        if not self.format.conversational:
            ids, brought = self.encoder.open_row(ids)
            double = double or brought
        return ids, RowFlag.DOUBLE_BOS if double else NO_FLAGS

    def _pinned(self, ids: Ids) -> int:
        return int(bool(ids) and ids[0] == self.encoder.bos_id)


@dataclass
class AnswersJob(_PromptJob):
    """Makes `prompt_ids` and a column of ids for each answer: chosen and rejected, or a completion with its label."""

    answers: tuple[str, ...] = ("chosen", "rejected")
    add_eos: bool = True
    is_encoder_decoder: bool = False

    @property
    def features(self) -> dict[str, Any]:
        columns: dict[str, Any] = {"prompt_ids": IDS} | {f"{answer}_ids": IDS for answer in self.answers}
        return columns | ({"label": Value("bool")} if self.answers == ("completion",) else {})

    def key(self) -> str:
        return self._key(self.answers, self.add_eos, self.is_encoder_decoder)

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        if self.format.kind is RowKind.TOKENIZED:
            drafts = self._tokenised(rows, indices)
        elif self.format.implicit_prompt and not self.format.conversational:
            drafts = self._whole(rows, indices)
        else:
            drafts = self._apart(rows, indices)
        made = [self._finish(draft) for draft in drafts]
        if self.answers == ("completion",):
            for index, row, one in zip(indices, rows, made, strict=True):
                with at_row(index, self.name):
                    one.columns["label"] = _label(row.get("label"))
        return made

    def _tokenised(self, rows: list[Row], indices: Sequence[int]) -> list[_Draft]:
        drafts = []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                own = row if "prompt_ids" in self.format.columns else pair_ids(row)
                drafts.append(_Draft(ids_of(own, "prompt_ids"), [ids_of(own, f"{a}_ids") for a in self.answers]))
        return drafts

    def _texts(self, row: Row) -> _Texts:
        if not self.format.conversational:
            texts = [text_of(row, answer) for answer in self.answers]
            empty = RowFlag.EMPTY_COMPLETION if any(not text.strip() for text in texts) else NO_FLAGS
            return _Texts(text_of(row, "prompt"), texts, empty)
        row = maybe_convert_to_chatml(row)
        if self.format.implicit_prompt and len(self.answers) == 2:
            row = extract_prompt(row)
        elif self.format.implicit_prompt:
            whole = messages_of(row, "completion")
            row = {**row, "prompt": whole[:-1], "completion": whole[-1:]}
        prompt = messages_of(row, "prompt") if row.get("prompt") else []
        answers = [messages_of(row, answer) for answer in self.answers]
        tools, template = read_tools(row.get("tools")), self._template.of_row(row)
        if not prompt:
            raise ValueError("the conversation has no message before its answer, so there is no prompt")
        rendered = template.split(prompt, answers, tools)
        flags = RowFlag.REWRITTEN if rendered.rewritten else NO_FLAGS
        flags |= RowFlag.EMPTY_COMPLETION if any(map(says_nothing, answers)) else flags
        spelled = any(template.needs_spelling([*prompt, *answer], tools) for answer in answers)
        return _Texts(rendered.prompt, rendered.answers, flags | RowFlag.SPELLED_TOOLS if spelled else flags)

    def _apart(self, rows: list[Row], indices: Sequence[int]) -> list[_Draft]:
        """Prompt and answers tokenised each by itself, as at generation time."""
        texts = []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                texts.append(self._texts(row))
        prompts = self.encoder.encode([one.prompt for one in texts])
        answer_texts = [text for one in texts for text in one.answers]
        tokenise = self.encoder.encode if self.is_encoder_decoder else self.encoder.continuations
        answer_ids = iter(tokenise(answer_texts))
        drafts = []
        for one, prompt_ids in zip(texts, prompts, strict=True):
            opened, flags = (prompt_ids, NO_FLAGS) if self.is_encoder_decoder else self._opened(prompt_ids)
            answers = [self._closed(next(answer_ids), text) for text in one.answers]
            drafts.append(_Draft(opened, answers, flags | one.flags))
        return drafts

    def _whole(self, rows: list[Row], indices: Sequence[int]) -> list[_Draft]:
        """Answers that hold the prompt: tokenised whole, the prompt is what their tokens share."""
        texts: list[str] = []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                texts += [text_of(row, answer) for answer in self.answers]
        encoded = iter(zip(texts, self.encoder.encode(texts), strict=True))
        drafts = []
        for _ in rows:
            sequences, flags = [], NO_FLAGS
            for _ in self.answers:
                text, ids = next(encoded)
                opened, flag = self._opened(ids)
                sequences.append(self._closed(opened, text))
                flags |= flag | (RowFlag.EMPTY_COMPLETION if not text.strip() else NO_FLAGS)
            shared = common_prefix(sequences[0], sequences[-1]) if len(sequences) > 1 else len(self.encoder.head)
            shared = max(0, min(shared, *(len(ids) - 1 for ids in sequences)))
            drafts.append(_Draft(sequences[0][:shared], [ids[shared:] for ids in sequences], flags))
        return drafts

    def _closed(self, ids: Ids, text: str) -> Ids:
        if self.format.conversational or not self.add_eos or not needs_closing(self.encoder, ids, text):
            return ids
        return ids + self.encoder.tail

    def _finish(self, draft: _Draft) -> Made:
        flags, eos = draft.flags, self.encoder.eos_id
        before = len(draft.prompt) + sum(map(len, draft.answers))
        prompt, answers = self.limits.fit_answers(draft.prompt, draft.answers, self._pinned(draft.prompt))
        if self.is_encoder_decoder and self.format.kind is not RowKind.TOKENIZED:
            prompt = self._encoder_input(prompt)
        after = len(prompt) + sum(map(len, answers))
        if any(not answer for answer in answers):
            lost = any(old and not new for old, new in zip(draft.answers, answers, strict=True))
            flags |= RowFlag.ANSWER_CUT if lost else RowFlag.UNLEARNED
        elif len(answers) == 2 and answers[0] == answers[1]:
            flags |= RowFlag.IDENTICAL
        elif after >= before and self.add_eos and eos is not None and any(eos not in answer for answer in answers):
            flags |= RowFlag.MISSING_EOS
        columns = {"prompt_ids": prompt} | dict(zip((f"{a}_ids" for a in self.answers), answers, strict=True))
        flags |= RowFlag.TRUNCATED if after < before else flags
        return Made(columns, flags, max(0, before - after), after, sum(map(len, answers)))

    def _encoder_input(self, prompt: Ids) -> Ids:
        """The prompt with what the tokenizer puts around an encoder's input, within the prompt's limit."""
        head, tail = self.encoder.head, self.encoder.source_tail
        if self.limits.max_prompt_length is not None:
            room = max(0, self.limits.max_prompt_length - len(head) - len(tail))
            prompt = cut(prompt, room, self.limits.truncation_mode)
        return head + prompt + tail


def _label(value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError(f"column 'label' should be true (a good answer) or false, got {value!r}")
    return bool(value)


@dataclass
class PromptsJob(_PromptJob):
    """Makes `prompt_ids` that end where the model is to continue."""

    context_length: int | None = None
    features: dict[str, Any] = field(default_factory=lambda: {"prompt_ids": IDS})

    def key(self) -> str:
        return self._key(self.context_length)

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        flags = [NO_FLAGS] * len(rows)
        if self.format.kind is RowKind.TOKENIZED:
            encoded = []
            for index, row in zip(indices, rows, strict=True):
                with at_row(index, self.name):
                    encoded.append(ids_of(row, "prompt_ids"))
        else:
            texts = []
            for position, (index, row) in enumerate(zip(indices, rows, strict=True)):
                with at_row(index, self.name):
                    text, flags[position] = self._text(row)
                    texts.append(text)
            encoded = self.encoder.encode(texts)
        made = []
        for index, ids, flag in zip(indices, encoded, flags, strict=True):
            with at_row(index, self.name):
                made.append(self._finish(ids, flag))
        return made

    def _text(self, row: Mapping[str, Any]) -> tuple[str, RowFlag]:
        if not self.format.conversational:
            return text_of(row, "prompt"), NO_FLAGS
        messages = messages_of(maybe_convert_to_chatml(row), "prompt")
        tools, template = read_tools(row.get("tools")), self._template.of_row(row)
        spelled = RowFlag.SPELLED_TOOLS if template.needs_spelling(messages, tools) else NO_FLAGS
        return template.prompt(messages, tools), spelled

    def _finish(self, ids: Ids, flags: RowFlag) -> Made:
        if self.format.kind is not RowKind.TOKENIZED:
            ids, double = self._opened(ids)
            flags |= double
        if not ids:
            raise ValueError("the prompt has no tokens: the model needs at least one (a BOS token would do)")
        before, limit = len(ids), self.limits.max_prompt_length
        if limit is not None and before > limit:
            ids = cut(ids, limit, self.limits.truncation_mode, self._pinned(ids))
            flags |= RowFlag.TRUNCATED
        if self.context_length is not None and len(ids) >= self.context_length:
            raise ValueError(
                f"the prompt has {len(ids):,} tokens but the model's context holds {self.context_length:,}, so nothing "
                "could be sampled: set `max_prompt_length` to cut such prompts, or leave them out"
            )
        return Made({"prompt_ids": ids}, flags, before - len(ids), len(ids), len(ids))


@dataclass
class StepwiseJob(_PromptJob):
    """Makes `input_ids`, and `step_labels` that hold each step's label at the step's last token and -100 elsewhere."""

    step_separator: str = "\n"
    last_step_only: bool = False
    features: dict[str, Any] = field(default_factory=lambda: {"input_ids": IDS, "step_labels": IDS})

    def key(self) -> str:
        return self._key(self.step_separator, self.last_step_only)

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        prompts, steps, labels = [], [], []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                prompts.append(self._prompt(row))
                steps.append(self._steps(row))
                labels.append(self._labels(row))
        step_ids = iter(self.encoder.continuations([step for one in steps for step in one]))
        (separator,) = self.encoder.continuations([self.step_separator])
        made = []
        for prompt, row_steps, row_labels in zip(self.encoder.encode(prompts), steps, labels, strict=True):
            ids: Ids = []
            marks: Ids = []
            for _, label in zip(row_steps, row_labels, strict=True):
                step = next(step_ids) + separator
                ids += step
                marks += [-100] * (len(step) - 1) + [label] if step else []
            made.append(self._finish(prompt, ids, marks))
        return made

    def _prompt(self, row: Mapping[str, Any]) -> str:
        if not isinstance(row.get("prompt"), list | tuple):
            return text_of(row, "prompt")
        return self._template.of_row(row).prompt(messages_of(row, "prompt"), read_tools(row.get("tools")))

    def _steps(self, row: Mapping[str, Any]) -> list[str]:
        steps = row.get("completions")
        if not isinstance(steps, list | tuple) or not all(isinstance(step, str) and step for step in steps):
            raise ValueError(f"column 'completions' should be a list of texts, a step each, got {steps!r:.80}")
        return list(steps)

    def _labels(self, row: Mapping[str, Any]) -> Ids:
        labels, steps = list_of(row.get("labels") or []), row["completions"]
        if len(labels) != len(steps):
            raise ValueError(f"column 'labels' has {len(labels)} entries for {len(steps)} steps in 'completions'")
        wrong = [label for label in labels if label not in (0, 1)]
        if wrong:
            raise ValueError(f"column 'labels' should hold true or false for each step, got {wrong[0]!r}")
        if self.last_step_only:
            return [-100] * (len(labels) - 1) + [int(labels[-1])] if labels else []
        return [int(label) for label in labels]

    def _finish(self, prompt: Ids, ids: Ids, marks: Ids) -> Made:
        opened, flags = self._opened(prompt)
        kept_prompt, (kept,) = self.limits.fit_answers(opened, [ids], self._pinned(opened))
        marks = marks[: len(kept)]
        labels = [-100] * len(kept_prompt) + marks
        learned = sum(label != -100 for label in labels)
        before, after = len(opened) + len(ids), len(kept_prompt) + len(kept)
        flags |= RowFlag.TRUNCATED if after < before else flags
        if not learned:
            flags |= RowFlag.ANSWER_CUT if after < before else RowFlag.UNLEARNED
        return Made({"input_ids": kept_prompt + kept, "step_labels": labels}, flags, before - after, after, learned)
