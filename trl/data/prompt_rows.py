"""Jobs for rows with a prompt: preference pairs, labelled completions, prompts alone, solutions with labelled steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset, Value

from trl.data.batches import pair_ids
from trl.data.chat import read_tools
from trl.data.columns import (
    at_row,
    check_text,
    flag_in,
    flags_in,
    ids_of,
    list_in,
    mask_for,
    number_of,
    same_length,
    shown,
    text_of,
    whole_numbers,
)
from trl.data.encode import Ids, Span, common_prefix, cut
from trl.data.formats import (
    CONVERSATION_COLUMNS,
    RowKind,
    column_names,
    extract_prompt,
    mapped_rows,
    maybe_convert_to_chatml,
    maybe_extract_prompt,
    split_completion,
    unpair_preference_dataset,
    with_prompt,
)
from trl.data.messages import messages_of
from trl.data.picture_rows import COLUMNS, FLAGS, NUMBERS, Shown, read_pictures, refuse_pictures, spoils
from trl.data.pictures import pictures_among
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

    def _prompt_of(self, row: Row) -> Answered[str]:
        """The text of the row's prompt, up to where the model is to continue."""
        row = self.with_numbers(row)
        if not self.format.conversational:
            text = text_of(row, "prompt")
            asked = Answered(text, [], NO_FLAGS if text.strip() else RowFlag.EMPTY_PROMPT)
            return self.counted(row, asked, row.get(NUMBERS, []))
        messages, numbers = self.placed(row, messages_of(maybe_convert_to_chatml(row), "prompt"))
        tools, template = read_tools(row.get("tools"), self.keep_nulls), self.template.of_row(row)
        asked = Answered(template.prompt(messages, tools), [], met=Met(len(messages)))
        asked.flags = RowFlag.EMPTY_PROMPT if asks_nothing(messages) else NO_FLAGS
        try:
            reading = template.read(messages, tools, strict=False)
        except ValueError:  # the template renders a question only with the prompt for its answer
            return self.counted(row, asked, numbers)
        asked.met = met_of(reading, len(messages))
        asked.flags |= flags_of(reading, asked.met) & ~RowFlag.REWRITTEN
        return self.counted(row, asked, numbers)

    def _spoils(self, prompt: Ids, hidden: Ids, answers: Sequence[Ids]) -> bool:
        """Whether the limits would cut a picture of the prompt."""
        pinned = self.pinned(prompt)
        kept, _ = self.limits.fit_answers(hidden, answers, pinned)
        return spoils(hidden, kept, pinned, self.limits.truncation_mode == "keep_end")


@dataclass(kw_only=True)
class _AnswersJob(_PromptJob):
    """Makes `prompt_ids` and a column of ids for each answer."""

    add_eos: bool = True
    is_encoder_decoder: bool = False
    learn_tool_results: bool = False
    """score all of an answer, what tools and users say in it too"""
    masked: bool = field(init=False, default=False)
    """each answer has a mask beside its ids: 1 where the assistant speaks"""

    answers: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if self.is_encoder_decoder and self.limits.max_length is not None:
            raise ValueError(
                f"max_length={self.limits.max_length} bounds prompt + answer, which an encoder-decoder holds apart: "
                "use `max_prompt_length` and `max_completion_length`"
            )

    @property
    def features(self) -> dict[str, Any]:
        masks = {f"{answer}_mask": MASK for answer in self.answers} if self.masked else {}
        return {"prompt_ids": self.ids} | {f"{answer}_ids": self.ids for answer in self.answers} | masks

    def options(self) -> tuple[Any, ...]:
        return self.answers, self.add_eos, self.is_encoder_decoder, self.learn_tool_results

    def reading(self, dataset: Any, name: str) -> tuple[Any, RowJob]:
        dataset, job = super().reading(dataset, name)
        assert isinstance(job, _AnswersJob)
        given = {f"{answer}_mask" for answer in self.answers} <= set(column_names(dataset, name))
        of_ids = job.format.kind is RowKind.TOKENIZED
        given = given or "chosen_labels" in job.format.columns
        job.masked = not self.learn_tool_results and (given if of_ids else job.format.conversational)
        return dataset, job

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        numbers = []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):  # what is kept besides ids are numbers that the loss reads
                numbers.append({name: number_of(row, name) for name in self.keep or () if name in row})
        if self.format.kind is RowKind.TOKENIZED:
            answered = self._tokenised(rows, indices)
        elif self.format.implicit_prompt and not self.format.conversational:
            answered = self._whole(rows, indices)
        else:
            answered = self._apart(rows, indices)
        made = []
        for index, one, own in zip(indices, answered, numbers, strict=True):
            with self.at_row(index):
                made.append(self._finish(one))
            made[-1].columns.update(own)
        return made

    def _with_prompt_ids(self, row: Mapping[str, Any], one: Answered[Ids]) -> Answered[Ids]:
        """A tokenised row with the ids of its prompt, which may have pictures."""
        one.prompt = self.tokenised_ids(row, "prompt_ids")
        one.met = Met(pictures=len(pictures_among(one.prompt)))
        one.hidden = [int(own < 0) for own in one.prompt] if one.met.pictures else []
        return one

    @abstractmethod
    def _with_prompt(self, row: Row) -> Row:
        """The conversational row whose prompt stands inside its answers, taken apart."""

    def _tokenised(self, rows: list[Row], indices: Sequence[int]) -> list[Answered[Ids]]:
        answered = []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                own = row if "prompt_ids" in self.format.columns else pair_ids(row)
                ids = [ids_of(own, f"{a}_ids") for a in self.answers]
                masks = [_mask_of(own, a, i) for a, i in zip(self.answers, ids, strict=True)] if self.masked else []
                answered.append(self._with_prompt_ids(own, Answered([], ids, masks=masks)))
        return answered

    def _texts(self, row: Row) -> Answered[str]:
        row = self.with_numbers(row)
        if not self.format.conversational:
            return self.counted(row, self.plain(row, self.answers), row.get(NUMBERS, []))
        given = row.get("prompt")
        row = with_prompt(row, self.answers, self._with_prompt)
        prompt = row["prompt"]
        if not prompt:
            missing = f"is {shown(given)}" if "prompt" in self.format.columns else "is missing too"
            raise ValueError(
                "the conversation has no message before its answer, so there is no prompt "
                f"(column 'prompt' {missing}): give it in that column"
            )
        if self.pictures is not None:
            for answer in self.answers:
                refuse_pictures(row[answer], answer)
        prompt, numbers = self.placed(row, prompt)
        return self.counted(row, self.rendered(row, prompt, [row[answer] for answer in self.answers]), numbers)

    def _apart(self, rows: list[Row], indices: Sequence[int]) -> list[Answered[Ids]]:
        """Prompt and answers are tokenised separately, as at generation time."""
        texts, asked = [], []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                texts.append(self._texts(row))
                asked.append(self.shown(texts[-1].prompt, texts[-1].pictures))
        prompts = self.pictured(asked, self.encoder.encode([one.text for one in asked]), indices)
        answer_texts = [text for one in texts for text in one.answers]
        said = [spans for one in texts for spans in one.said] if self.masked else []
        answer_ids, masks = self._answer_ids(answer_texts, said)
        answered = []
        for one, (prompt_ids, hidden) in zip(texts, prompts, strict=True):
            opened, flags = (prompt_ids, NO_FLAGS) if self.is_encoder_decoder else self._opened(prompt_ids)
            answers = [self._closed(next(answer_ids), text) for text in one.answers]
            own = [next(masks) for _ in answers] if self.masked else []
            hidden = _moved(hidden, len(opened) - len(prompt_ids))
            answered.append(Answered(opened, answers, flags | one.flags, met=one.met, masks=own, hidden=hidden))
        return answered

    def _answer_ids(self, texts: list[str], said: list[list[Span]]) -> tuple[Iterator[Ids], Iterator[Ids]]:
        """The ids of the answers, and their masks where it is known what is said in them."""
        encoder = self.encoder
        if not self.masked:
            tokenise = encoder.encode if self.is_encoder_decoder else encoder.continuations
            return iter(tokenise(texts)), iter(())
        masking = encoder.encode_with_masks if self.is_encoder_decoder else encoder.continuations_with_masks
        made = masking(texts, said)
        return iter([ids for ids, _ in made]), iter([mask for _, mask in made])

    def _whole(self, rows: list[Row], indices: Sequence[int]) -> list[Answered[Ids]]:
        """Answers that include the prompt are tokenised as a whole; the tokens that they share are the prompt."""
        texts: list[Shown] = []
        read: list[Row] = []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                read.append(self.with_numbers(row))
                numbers = read[-1].get(NUMBERS, [])
                texts += [self.shown(text_of(row, answer), numbers) for answer in self.answers]
        places = [index for index in indices for _ in self.answers]
        encoded = iter(
            zip(texts, self.pictured(texts, self.encoder.encode([t.text for t in texts]), places), strict=True)
        )
        answered = []
        for index, row in zip(indices, read, strict=True):
            sequences, flags, masks = [], RowFlag(row.get(FLAGS, 0)), []
            for _ in self.answers:
                one, (ids, hidden) = next(encoded)
                opened, flag = self._opened(ids)
                masks.append(_moved(hidden, len(opened) - len(ids)))
                sequences.append(self._closed(opened, one.text))
                flags |= flag | (RowFlag.EMPTY_COMPLETION if not one.text.strip() else NO_FLAGS)
            shared = common_prefix(sequences[0], sequences[-1]) if len(sequences) > 1 else len(self.encoder.head)
            shared = max(0, min(shared, *(len(ids) - 1 for ids in sequences)))
            flags |= RowFlag.EMPTY_PROMPT if shared <= len(self.encoder.head) else NO_FLAGS
            with self.at_row(index):
                if any(any(mask[shared:]) for mask in masks):
                    raise ValueError("the answers do not share the text before a picture: give a column 'prompt'")
            met = Met(pictures=len(row.get(NUMBERS, ())))
            answers = [ids[shared:] for ids in sequences]
            answered.append(Answered(sequences[0][:shared], answers, flags, met=met, hidden=masks[0][:shared]))
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
        masks = [mask[: len(answer)] for mask, answer in zip(one.masks, answers, strict=False)]
        scored = [sum(mask) for mask in masks] or [len(answer) for answer in answers]
        if not all(scored):
            had = [sum(mask) for mask in one.masks] or [len(answer) for answer in one.answers]
            lost = any(old and not new for old, new in zip(had, scored, strict=True))
            flags |= RowFlag.ANSWER_CUT if lost else RowFlag.UNLEARNED
        elif one.hidden and self._spoils(one.prompt, one.hidden, one.answers):
            flags |= RowFlag.PICTURE_CUT
        elif len(answers) == 2 and answers[0] == answers[1]:
            flags |= RowFlag.IDENTICAL
        elif after >= before and self.add_eos and self.stops and any(map(self.stops.isdisjoint, answers)):
            flags |= RowFlag.MISSING_EOS
        columns = {"prompt_ids": prompt} | dict(zip((f"{a}_ids" for a in self.answers), answers, strict=True))
        columns |= dict(zip((f"{a}_mask" for a in self.answers), masks, strict=True)) if self.masked else {}
        flags |= RowFlag.TRUNCATED if after < before else flags
        return Made(columns, flags, max(0, before - after), after, sum(scored), one.met)

    def _encoder_input(self, prompt: Ids) -> Ids:
        """The prompt with what the tokenizer puts around an encoder's input, within the prompt's limit."""
        head, tail = self.encoder.head, self.encoder.source_tail
        if self.limits.max_prompt_length is not None:
            room = max(0, self.limits.max_prompt_length - len(head) - len(tail))
            prompt = cut(prompt, room, self.limits.truncation_mode)
        return head + prompt + tail


def _moved(hidden: Ids, before: int) -> Ids:
    """1 where pictures stand, once tokens were put before the others (below 0: taken away)."""
    return [0] * before + hidden[max(0, -before) :] if hidden else []


def _mask_of(row: Mapping[str, Any], answer: str, ids: Ids) -> Ids:
    """Which tokens of an answer are scored: all of them where the row does not say."""
    column = f"{answer}_mask"
    return [1] * len(ids) if row.get(column) is None else mask_for(row, column, ids, f"{answer}_ids")


@dataclass(kw_only=True)
class PairsJob(_AnswersJob):
    """Makes `prompt_ids`, `chosen_ids` and `rejected_ids`; the prompt is tokenised once and shared to the token.

    Of conversations it also makes `chosen_mask` and `rejected_mask`.

    Takes texts or conversations, with the prompt in its own column or inside both answers, and rows tokenised in our
    columns or in those of older releases; of ids without a prompt apart, what both answers share is the prompt.
    """

    needs_prompt: bool = True
    """False: rows without a column for the prompt may have none (a reward model judges whole texts)"""
    keep: Sequence[str] | None = PAIR_NUMBERS
    answers = ("chosen", "rejected")
    accepts = (RowKind.TOKENIZED, RowKind.PREFERENCE)
    tokenised = (
        ("prompt_ids", "chosen_ids", "rejected_ids"),
        ("input_ids_chosen", "input_ids_rejected"),
        ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"),
        ("prompt_input_ids", "chosen_labels", "rejected_labels"),
        ("chosen_input_ids", "rejected_input_ids"),
        ("chosen_ids", "rejected_ids"),
    )
    no_prompt = "give a column 'prompt'; for texts that nothing asks for, the BOS token will do"

    def reads(self) -> set[str] | None:
        known = super().reads()
        return None if known is None else known | ({"prompt"} if self.format.conversational else set())

    def asks_prompt(self) -> bool:
        return self.needs_prompt or super().asks_prompt()

    def options(self) -> tuple[Any, ...]:
        return (*super().options(), self.needs_prompt)

    def _with_prompt(self, row: Row) -> Row:
        return extract_prompt(row)


@dataclass(kw_only=True)
class CompletionsJob(_AnswersJob):
    """Makes `prompt_ids`, `completion_ids` and `label` (true = a good answer); pairs are taken apart first."""

    answers = ("completion",)
    accepts = (RowKind.TOKENIZED, RowKind.UNPAIRED, RowKind.PREFERENCE)
    tokenised = (("prompt_ids", "completion_ids", "label"),)
    no_prompt = PairsJob.no_prompt

    @property
    def features(self) -> dict[str, Any]:
        return {**super().features, "label": Value("bool")}

    def reading(self, dataset: Any, name: str) -> tuple[Any, RowJob]:
        dataset, job = super().reading(dataset, name)
        if job.format.kind is not RowKind.PREFERENCE:
            return dataset, job
        dataset = list(dataset) if isinstance(dataset, tuple) else dataset
        pictured = job.pictures is not None
        how = {"name": name, "conversational": job.format.conversational, "pictured": pictured}
        options: dict[str, Any] = {"with_indices": True, "fn_kwargs": how, "state": job.files(dataset)}
        if pictured and not isinstance(dataset, list):  # numbers stand for the pictures, which are left behind
            columns = column_names(dataset, name)
            options["remove_columns"] = [column for column in COLUMNS if column in columns]
            options |= {"try_original_type": False} if isinstance(dataset, Dataset) else {}
        parts = mapped_rows(dataset, _in_parts, f"Splitting the {name} data", **options)
        return super().reading(unpair_preference_dataset(parts), name)

    def reads(self) -> set[str] | None:
        known = super().reads()
        return None if known is None else known | {_PLACE}

    def asks_prompt(self) -> bool:
        return True

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        indices = [row.get(_PLACE, index) for index, row in zip(indices, rows, strict=True)]
        made = super().__call__(rows, indices)
        for index, row, one in zip(indices, rows, made, strict=True):
            with self.at_row(index):
                label = flag_in(row.get("label"))
                if label is None:
                    value = shown(row.get("label"))
                    raise ValueError(f"column 'label' should be true (a good answer) or false, got {value}")
                one.columns["label"] = bool(label)
        return made

    def _with_prompt(self, row: Row) -> Row:
        return split_completion(row)


_PLACE = "_row"
"""column that says in which row of the data set an answer stood before pairs were taken apart"""


def _in_parts(row: Row, index: int, name: str, conversational: bool, pictured: bool) -> Row:
    """A pair with its prompt apart, its parts checked, its pictures read, and with its place."""
    names = ("prompt", "chosen", "rejected")
    with at_row(index, name, names[1:]):
        row = {**dict.fromkeys(names[1:]), **(read_pictures(row, CONVERSATION_COLUMNS) if pictured else row)}
        if conversational:
            return {**with_prompt(row, names[1:], extract_prompt), _PLACE: index}
        row = maybe_extract_prompt(row)
        return {**row, **{column: text_of(row, column) for column in names}, _PLACE: index}


@dataclass(kw_only=True)
class PromptsJob(_PromptJob):
    """Makes `prompt_ids` that end where the model is to continue; the rows keep all their columns.

    A prompt that fills `context_length` (None: no limit is known) is a ValueError; `limits.max_prompt_length` cuts it.
    """

    context_length: int | None = None
    keep: Sequence[str] | None = None
    accepts = (RowKind.TOKENIZED, RowKind.PROMPT)
    tokenised = (("prompt_ids",),)
    no_prompt = "the model has nothing to answer; to sample from nothing, give the BOS token as the prompt"

    @property
    def features(self) -> dict[str, Any]:
        return {"prompt_ids": self.ids}

    def options(self) -> tuple[Any, ...]:
        return (self.context_length,)

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        if self.format.kind is RowKind.TOKENIZED:
            return [self._tokenised(row, index) for index, row in zip(indices, rows, strict=True)]
        asked, shown = [], []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                asked.append(self._prompt_of(row))
                shown.append(self.shown(asked[-1].prompt, asked[-1].pictures))
        made = []
        encoded = self.pictured(shown, self.encoder.encode([one.text for one in shown]), indices)
        for index, one, (ids, hidden) in zip(indices, asked, encoded, strict=True):
            with self.at_row(index):
                opened, double = self._opened(ids)
                made.append(self._finish(opened, _moved(hidden, len(opened) - len(ids)), one.flags | double, one.met))
        return made

    def _tokenised(self, row: Row, index: int) -> Made:
        with self.at_row(index):
            ids = self.tokenised_ids(row, "prompt_ids")
            pictures = len(pictures_among(ids))
            hidden = [int(own < 0) for own in ids] if pictures else []
            return self._finish(ids, hidden, NO_FLAGS, Met(pictures=pictures))

    def _finish(self, ids: Ids, hidden: Ids, flags: RowFlag, met: Met) -> Made:
        if not ids:
            raise ValueError("the prompt has no tokens: the model needs at least one (a BOS token would do)")
        before, limit = len(ids), self.limits.max_prompt_length
        if limit is not None and before > limit:
            flags |= RowFlag.PICTURE_CUT if self._spoils(ids, hidden, [[]]) else NO_FLAGS
            ids = cut(ids, limit, self.limits.truncation_mode, self.pinned(ids))
            flags |= RowFlag.TRUNCATED
        if self.context_length is not None and len(ids) >= self.context_length:
            raise ValueError(
                f"the prompt has {len(ids):,} tokens but the model's context holds {self.context_length:,}, so nothing "
                "could be sampled: set `max_prompt_length` to cut such prompts, or leave them out"
            )
        return Made({"prompt_ids": ids}, flags, before - len(ids), len(ids), len(ids), met)


@dataclass(kw_only=True)
class StepwiseJob(_PromptJob):
    """Makes `input_ids` and `step_labels` from `prompt`, `completions` and `labels`: a text a step, and true = right.

    A step whose label is -100 is not learned.

    `step_labels` holds 0 or 1 at the last token of each step, its separator's, and -100 elsewhere. Tokenised rows have
    them as `labels`.
    """

    step_separator: str = "\n"
    train_on_last_step_only: bool = False
    accepts = (RowKind.TOKENIZED, RowKind.STEPWISE)
    tokenised = (("input_ids", "step_labels"), ("input_ids", "labels"))
    features = {"input_ids": IDS, "step_labels": IDS}  # noqa: RUF012
    no_prompt = "give the question in the column 'prompt'"

    def options(self) -> tuple[Any, ...]:
        return self.step_separator, self.train_on_last_step_only

    def __call__(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        if self.format.kind is RowKind.TOKENIZED:
            return self._tokenised(rows, indices)
        prompts, steps, labels = [], [], []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                prompts.append(self._prompt_of(row))
                if prompts[-1].pictures:
                    raise ValueError("the row has a picture, and steps are judged of texts only: leave it out")
                steps.append(self._steps(row))
                labels.append(self._labels(row, len(steps[-1])))
        step_ids = iter(self.encoder.continuations([step for one in steps for step in one]))
        (separator,) = self.encoder.continuations([self.step_separator])
        made = []
        prompt_ids = self.encoder.encode([one.prompt for one in prompts])
        for prompt, one, row_steps, row_labels in zip(prompt_ids, prompts, steps, labels, strict=True):
            ids: Ids = []
            marks: Ids = []
            for _, label in zip(row_steps, row_labels, strict=True):
                step = next(step_ids) + separator
                ids += step
                marks += [-100] * (len(step) - 1) + [label] if step else []
            opened, double = self._opened(prompt)
            made.append(self._finish(opened, ids, marks, one.flags | double, one.met))
        return made

    def _tokenised(self, rows: list[Row], indices: Sequence[int]) -> list[Made]:
        """Rows of ids, with a label or -100 for each of them."""
        column, made = self.format.columns[1], []
        for index, row in zip(indices, rows, strict=True):
            with self.at_row(index):
                ids, marks = ids_of(row, "input_ids"), whole_numbers(row, column)
                wrong = [mark for mark in same_length(marks, column, ids) if mark not in (-100, 0, 1)]
                if wrong:
                    raise ValueError(
                        f"column '{column}' should hold 0, 1 or -100 for each token, got {shown(wrong[0])}"
                    )
            places = [at for at, mark in enumerate(marks) if mark != -100]
            if self.train_on_last_step_only and places:
                marks = [-100] * places[-1] + marks[places[-1] :]
            made.append(self._finish([], ids, marks))
        return made

    def _steps(self, row: Mapping[str, Any]) -> list[str]:
        steps = list_in(row, "completions", "a list of texts, a step each")
        if not all(isinstance(step, str) and step for step in steps):
            raise ValueError(f"column 'completions' should be a list of texts, a step each, got {shown(steps)}")
        for step in steps:
            check_text(step, "column 'completions'")
        return steps

    def _labels(self, row: Mapping[str, Any], steps: int) -> Ids:
        what = "true or false for each step, or -100 for one that is not learned"
        labels = [] if row.get("labels") is None else flags_in(row, "labels", what, known=(0, 1, -100))
        if len(labels) != steps:
            raise ValueError(f"column 'labels' has {len(labels)} entries for {steps} steps in 'completions'")
        return [-100] * (len(labels) - 1) + labels[-1:] if self.train_on_last_step_only and labels else labels

    def _finish(self, opened: Ids, ids: Ids, marks: Ids, flags: RowFlag = NO_FLAGS, met: Met = NOTHING_MET) -> Made:
        kept_prompt, (kept,) = self.limits.fit_answers(opened, [ids], self.pinned(opened))
        marks = marks[: len(kept)]
        labels = [-100] * len(kept_prompt) + marks
        learned = sum(label != -100 for label in labels)
        before, after = len(opened) + len(ids), len(kept_prompt) + len(kept)
        flags |= RowFlag.TRUNCATED if after < before else flags
        if not learned:
            flags |= RowFlag.ANSWER_CUT if after < before else RowFlag.UNLEARNED
        columns = {"input_ids": kept_prompt + kept, "step_labels": labels}
        return Made(columns, flags, before - after, after, learned, met)
