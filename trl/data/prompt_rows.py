"""Jobs for rows with a prompt: preference pairs, labelled completions, prompts alone, solutions with labelled steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Value

from trl.data.batches import pair_ids
from trl.data.chat import read_tools
from trl.data.encode import Ids, common_prefix, cut
from trl.data.formats import RowKind, extract_prompt, maybe_convert_to_chatml, unpair_preference_dataset
from trl.data.report import NO_FLAGS, RowFlag
from trl.data.row_job import (
    IDS,
    Answered,
    Made,
    Row,
    RowJob,
    at_row,
    ids_of,
    list_of,
    messages_of,
    needs_closing,
    number_of,
    text_of,
)

PAIR_NUMBERS = (
    "margin",
    "reference_chosen_logps",
    "reference_rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
)
"""columns that the preference trainers read beside the ids"""


@dataclass(kw_only=True)
class _PromptJob(RowJob):
    """The base of the jobs with prompts."""

    def _opened(self, ids: Ids) -> tuple[Ids, RowFlag]:
        """Prompt ids with one BOS at their start, where one belongs; a chat template writes its BOS itself."""
        single = self.encoder.without_double_bos(ids)
        double = len(single) < len(ids)
        if not self.format.conversational:
            single, brought = self.encoder.open_row(single)
            double = double or brought
        return single, RowFlag.DOUBLE_BOS if double else NO_FLAGS


@dataclass(kw_only=True)
class _AnswersJob(_PromptJob):
    """Makes `prompt_ids` and a column of ids for each answer."""

    add_eos: bool = True
    is_encoder_decoder: bool = False

    answers: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if self.is_encoder_decoder and self.limits.max_length is not None:
            raise ValueError(
                f"max_length={self.limits.max_length} bounds prompt + answer, which an encoder-decoder holds apart: "
                "use `max_prompt_length` and `max_completion_length`"
            )

    @property
    def features(self) -> dict[str, Any]:
        return {"prompt_ids": IDS} | {f"{answer}_ids": IDS for answer in self.answers}

    def options(self) -> tuple[Any, ...]:
        return self.answers, self.add_eos, self.is_encoder_decoder

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):  # what is kept besides ids are numbers that the loss reads
                for column in [name for name in self.keep or () if name in row]:
                    number_of(row, column)
        if self.format.kind is RowKind.TOKENIZED:
            answered = self._tokenised(rows, indices)
        elif self.format.implicit_prompt and not self.format.conversational:
            answered = self._whole(rows, indices)
        else:
            answered = self._apart(rows, indices)
        return [self._finish(one) for one in answered]

    @abstractmethod
    def _with_prompt(self, row: Row) -> Row:
        """The conversational row whose prompt stands inside its answers, taken apart."""

    def _tokenised(self, rows: list[Row], indices: Sequence[int]) -> list[Answered[Ids]]:
        answered = []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                own = row if "prompt_ids" in self.format.columns else pair_ids(row)
                answered.append(Answered(ids_of(own, "prompt_ids"), [ids_of(own, f"{a}_ids") for a in self.answers]))
        return answered

    def _texts(self, row: Row) -> Answered[str]:
        if not self.format.conversational:
            return self.plain(row, self.answers)
        row = maybe_convert_to_chatml(row)
        row = self._with_prompt(row) if self.format.implicit_prompt else row
        prompt = messages_of(row, "prompt") if row.get("prompt") else []
        if not prompt:
            raise ValueError("the conversation has no message before its answer, so there is no prompt")
        return self.rendered(row, prompt, [messages_of(row, answer) for answer in self.answers])

    def _apart(self, rows: list[Row], indices: Sequence[int]) -> list[Answered[Ids]]:
        """Prompt and answers are tokenised separately, as at generation time."""
        texts = []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                texts.append(self._texts(row))
        prompts = self.encoder.encode([one.prompt for one in texts])
        answer_texts = [text for one in texts for text in one.answers]
        tokenise = self.encoder.encode if self.is_encoder_decoder else self.encoder.continuations
        answer_ids = iter(tokenise(answer_texts))
        answered = []
        for one, prompt_ids in zip(texts, prompts, strict=True):
            opened, flags = (prompt_ids, NO_FLAGS) if self.is_encoder_decoder else self._opened(prompt_ids)
            answers = [self._closed(next(answer_ids), text) for text in one.answers]
            answered.append(Answered(opened, answers, flags | one.flags))
        return answered

    def _whole(self, rows: list[Row], indices: Sequence[int]) -> list[Answered[Ids]]:
        """Answers that include the prompt are tokenised as a whole; the tokens that they share are the prompt."""
        texts: list[str] = []
        for index, row in zip(indices, rows, strict=True):
            with at_row(index, self.name):
                texts += [text_of(row, answer) for answer in self.answers]
        encoded = iter(zip(texts, self.encoder.encode(texts), strict=True))
        answered = []
        for _ in rows:
            sequences, flags = [], NO_FLAGS
            for _ in self.answers:
                text, ids = next(encoded)
                opened, flag = self._opened(ids)
                sequences.append(self._closed(opened, text))
                flags |= flag | (RowFlag.EMPTY_COMPLETION if not text.strip() else NO_FLAGS)
            shared = common_prefix(sequences[0], sequences[-1]) if len(sequences) > 1 else len(self.encoder.head)
            shared = max(0, min(shared, *(len(ids) - 1 for ids in sequences)))
            answered.append(Answered(sequences[0][:shared], [ids[shared:] for ids in sequences], flags))
        return answered

    def _closed(self, ids: Ids, text: str) -> Ids:
        if self.format.conversational or not self.add_eos or not needs_closing(self.encoder, ids, text):
            return ids
        return ids + self.encoder.tail

    def _finish(self, one: Answered[Ids]) -> Made:
        flags = one.flags
        before = len(one.prompt) + sum(map(len, one.answers))
        prompt, answers = self.limits.fit_answers(one.prompt, one.answers, self.pinned(one.prompt))
        if self.is_encoder_decoder and self.format.kind is not RowKind.TOKENIZED:
            prompt = self._encoder_input(prompt)
        after = len(prompt) + sum(map(len, answers))
        if any(not answer for answer in answers):
            lost = any(old and not new for old, new in zip(one.answers, answers, strict=True))
            flags |= RowFlag.ANSWER_CUT if lost else RowFlag.UNLEARNED
        elif len(answers) == 2 and answers[0] == answers[1]:
            flags |= RowFlag.IDENTICAL
        elif after >= before and self.add_eos and self.stops and any(map(self.stops.isdisjoint, answers)):
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


@dataclass(kw_only=True)
class PairsJob(_AnswersJob):
    """Makes `prompt_ids`, `chosen_ids` and `rejected_ids`; the prompt is tokenised once and shared to the token.

    Takes texts or conversations, with the prompt in its own column or inside both answers, and rows tokenised in our
    columns or in those of release 0.7.7.
    """

    keep: Sequence[str] | None = PAIR_NUMBERS
    answers = ("chosen", "rejected")
    accepts = (RowKind.TOKENIZED, RowKind.PREFERENCE)
    tokenised = (
        ("prompt_ids", "chosen_ids", "rejected_ids"),
        ("input_ids_chosen", "input_ids_rejected"),
        ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"),
        ("prompt_input_ids", "chosen_labels", "rejected_labels"),
    )

    def _with_prompt(self, row: Row) -> Row:
        return extract_prompt(row)


@dataclass(kw_only=True)
class CompletionsJob(_AnswersJob):
    """Makes `prompt_ids`, `completion_ids` and `label` (true = a good answer); pairs are taken apart first."""

    answers = ("completion",)
    accepts = (RowKind.TOKENIZED, RowKind.UNPAIRED, RowKind.PREFERENCE)
    tokenised = (("prompt_ids", "completion_ids", "label"),)

    @property
    def features(self) -> dict[str, Any]:
        return {**super().features, "label": Value("bool")}

    def reading(self, dataset: Any, name: str) -> tuple[Any, RowJob]:
        dataset, job = super().reading(dataset, name)
        if job.format.kind is not RowKind.PREFERENCE:
            return dataset, job
        if job.format.implicit_prompt:
            raise ValueError(
                f"the pairs of the {name} data set have no column 'prompt' that fits their answers: split them first "
                "with `extract_prompt`"
            )
        return super().reading(
            unpair_preference_dataset(list(dataset) if isinstance(dataset, tuple) else dataset), name
        )

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        made = super().__call__(rows, indices)
        for index, row, one in zip(indices, rows, made, strict=True):
            with at_row(index, self.name):
                if row.get("label") not in (0, 1):
                    value = row.get("label")
                    raise ValueError(f"column 'label' should be true (a good answer) or false, got {value!r}")
                one.columns["label"] = bool(row["label"])
        return made

    def _with_prompt(self, row: Row) -> Row:
        whole = messages_of(row, "completion")
        return {**row, "prompt": whole[:-1], "completion": whole[-1:]}


@dataclass(kw_only=True)
class PromptsJob(_PromptJob):
    """Makes `prompt_ids` that end where the model is to continue; the rows keep all their columns.

    A prompt that fills `context_length` (None: no limit is known) is a ValueError; `limits.max_prompt_length` cuts it.
    """

    context_length: int | None = None
    keep: Sequence[str] | None = None
    accepts = (RowKind.TOKENIZED, RowKind.PROMPT)
    tokenised = (("prompt_ids",),)
    features = {"prompt_ids": IDS}  # noqa: RUF012

    def options(self) -> tuple[Any, ...]:
        return (self.context_length,)

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
        tools, template = read_tools(row.get("tools"), self.keep_nulls), self.template.of_row(row)
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
            ids = cut(ids, limit, self.limits.truncation_mode, self.pinned(ids))
            flags |= RowFlag.TRUNCATED
        if self.context_length is not None and len(ids) >= self.context_length:
            raise ValueError(
                f"the prompt has {len(ids):,} tokens but the model's context holds {self.context_length:,}, so nothing "
                "could be sampled: set `max_prompt_length` to cut such prompts, or leave them out"
            )
        return Made({"prompt_ids": ids}, flags, before - len(ids), len(ids), len(ids))


@dataclass(kw_only=True)
class StepwiseJob(_PromptJob):
    """Makes `input_ids` and `step_labels` from `prompt`, `completions` (a text a step) and `labels` (true = right).

    `step_labels` holds 0 or 1 at the last token of each step, its separator's, and -100 elsewhere.
    """

    step_separator: str = "\n"
    train_on_last_step_only: bool = False
    accepts = (RowKind.STEPWISE,)
    features = {"input_ids": IDS, "step_labels": IDS}  # noqa: RUF012

    def options(self) -> tuple[Any, ...]:
        return self.step_separator, self.train_on_last_step_only

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
        return self.template.of_row(row).prompt(messages_of(row, "prompt"), read_tools(row.get("tools")))

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
        if self.train_on_last_step_only:
            return [-100] * (len(labels) - 1) + [int(labels[-1])] if labels else []
        return [int(label) for label in labels]

    def _finish(self, prompt: Ids, ids: Ids, marks: Ids) -> Made:
        opened, flags = self._opened(prompt)
        kept_prompt, (kept,) = self.limits.fit_answers(opened, [ids], self.pinned(opened))
        marks = marks[: len(kept)]
        labels = [-100] * len(kept_prompt) + marks
        learned = sum(label != -100 for label in labels)
        before, after = len(opened) + len(ids), len(kept_prompt) + len(kept)
        flags |= RowFlag.TRUNCATED if after < before else flags
        if not learned:
            flags |= RowFlag.ANSWER_CUT if after < before else RowFlag.UNLEARNED
        return Made({"input_ids": kept_prompt + kept, "step_labels": labels}, flags, before - after, after, learned)
