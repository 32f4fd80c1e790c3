"""Figures of a model on rows: the loss of answers, pairs, rewards of what it says, the choice of a judge."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl.data.any_text import many
from trl.reports.intervals import Measure
from trl.scripts.generate import Turns, answered, check_sees, prompt_row, read_rows
from trl.scripts.open_model import LANGUAGE_MODEL, Opened
from trl.scripts.quiet import say
from trl.scripts.sampling import Asked

if TYPE_CHECKING:
    from trl.data.records import PackedBatch, TokenTree

TOKENS_AT_ONCE = 2048
"""of rows in one forward pass"""


@dataclass
class Held:
    """Rows to measure on."""

    name: str
    dataset: Any
    kind: str
    """`RowKind` of the rows"""
    talks: bool = False
    """whether the rows are conversations"""
    prompts: list[dict[str, Any]] = field(default_factory=list)
    """the rows with their `prompt`, where answers are sampled"""

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass(frozen=True)
class Judging:
    """How answers are sampled and what judges them."""

    asked: Asked
    rewards: tuple[str, ...] = ()
    judge: str | None = None
    n: int = 1
    seed: int = 0
    chat: bool = False
    """texts of rows are a user's turn"""


@dataclass
class Measured:
    """A model with its figures and what it has said."""

    name: str
    measures: list[Measure]
    answers: list[list[str]] = field(default_factory=list)
    """to each prompt"""
    pictures: list[tuple[int, ...]] = field(default_factory=list)
    """of each prompt, by their numbers"""


def hold(data: str, split: str | None, limit: int | None) -> Held:
    """The rows, with what they are for."""
    from trl.data.formats import RowKind, detect_format

    dataset = read_rows(data, split, limit)
    if "label" in dataset.column_names and "completion" in dataset.column_names:
        dataset = dataset.filter(lambda row: bool(row["label"]))
        good = many(len(dataset), "good one is", "good ones are")
        say(f"{data}: of answers that are good or not, the {good} measured")
    if not len(dataset):
        raise ValueError(f"--data {data}: it has no rows; give one or more")
    kinds = (RowKind.PREFERENCE, RowKind.PROMPT_COMPLETION, RowKind.MESSAGES, RowKind.TEXT, RowKind.PROMPT)
    found = detect_format(dataset, kinds, name="given")
    return Held(data, dataset, found.kind, found.conversational)


# -- what the weights say ------------------------------------------------------------------------


def of_rows(opened: Opened, held: Held) -> list[Measure]:
    """What the model makes of the rows as they stand; nothing is sampled."""
    if held.kind == "preference":
        return _of_pairs(opened, held)
    if opened.found.kind != LANGUAGE_MODEL:
        raise ValueError(
            f"{opened.found.name}: it is a {opened.found.kind}, which is measured on pairs; --data {held.name} has "
            f"{held.kind} rows"
        )
    return [] if held.kind == "prompt-only" else _of_answers(opened, held)


def _of_answers(opened: Opened, held: Held) -> list[Measure]:
    """Loss and accuracy of the tokens that training would learn."""
    from trl.data.batches import sequence_trees
    from trl.models.scoring import score
    from trl.trainer.sft_trainer import SFTConfig, SFTTrainer

    talks = held.kind == "conversation"
    rows = _tokenised(opened, held, SFTTrainer.row_job, SFTConfig, assistant_only_loss=talks)
    totals, right, counts = (np.full(len(held), np.nan) for _ in range(3))
    counts[:] = 0
    trees = {place: sequence_trees([columns])[0] for place, columns in rows.items()}
    for places, packed in _batches(opened.model, trees):
        scores = score(opened.model, packed, tops=True)
        mask_BT = packed.mask_BT.float()
        assert scores.top_BT is not None
        totals[places] = -(scores.logprobs_BT * mask_BT).sum(-1).cpu().numpy()
        right[places] = (scores.top_BT * mask_BT).sum(-1).cpu().numpy()
        counts[places] = mask_BT.sum(-1).cpu().numpy()
    return [Measure("loss", totals, counts, -1), Measure("token accuracy", right, counts)]


def _of_pairs(opened: Opened, held: Held) -> list[Measure]:
    """How often, and by how much, the chosen answer is ahead: in log-probability, or in a reward model's score."""
    from trl.data.batches import pair_tree
    from trl.models.scoring import rewards, score
    from trl.trainer.dpo_trainer import DPOConfig, DPOTrainer
    from trl.trainer.reward_trainer import RewardConfig, RewardTrainer

    writes = opened.found.kind == LANGUAGE_MODEL
    if not writes and opened.found.kind != "reward model":
        raise ValueError(f"{opened.found.name}: it is a {opened.found.kind}, of which pairs say nothing")
    if writes:
        rows = _tokenised(opened, held, DPOTrainer.row_job, DPOConfig)
    else:
        rows = _tokenised(opened, held, RewardTrainer.row_job, RewardConfig)
    margins, ones = np.full(len(held), np.nan), np.ones(len(held))
    trees = {place: pair_tree(columns) for place, columns in rows.items()}
    for places, packed in _batches(opened.model, trees):
        if writes:
            scores_B = (score(opened.model, packed).logprobs_BT * packed.mask_BT).sum(-1)
        else:
            scores_B = rewards(opened.model, packed).float()
        margins[places] = (scores_B[0::2] - scores_B[1::2]).cpu().numpy()
    ahead = np.where(np.isnan(margins), np.nan, (margins > 0) + 0.5 * (margins == 0))
    return [Measure("pair accuracy", ahead, ones), Measure("margin", margins, ones)]


def _tokenised(
    opened: Opened, held: Held, row_job: Callable[..., Any], config: Any, **settings: Any
) -> dict[int, Mapping[str, Any]]:
    """The rows as a trainer learns them, by their places; those of which it learns nothing are left out."""
    from trl.data.tokenize import noted

    with tempfile.TemporaryDirectory(prefix="trl-") as folder:
        made = config(output_dir=folder, report_to="none", max_length=None, **settings)
    job = row_job(opened.tokenizer, made, opened.model)
    notes = list(noted(held.dataset, job, name="given").notes)
    kept: dict[int, Mapping[str, Any]] = {note.index: note.columns for note in notes if not note.left_out}
    if len(kept) < len(notes):
        empty = len(notes) - len(kept)
        verbs = ("has", "does") if empty == 1 else ("have", "do")
        say(f"{held.name}: {empty:,} of {many(len(notes), 'row')} {verbs[0]} nothing to learn and {verbs[1]} not count")
    cut = sum(note.cut > 0 for note in notes)
    if cut:
        say(f"{held.name}: {many(cut, 'row is', 'rows are')} longer than the model's context and cut")
    if not kept:
        raise ValueError(f"--data {held.name}: none of its rows has something to learn; `trl inspect` shows them")
    return kept


def _batches(model: Any, trees: Mapping[int, TokenTree]) -> Iterator[tuple[list[int], PackedBatch]]:
    """Rows that are computed together, with their places."""
    from trl.data.packing import pack
    from trl.models.forward import eval_no_grad

    device = next(model.parameters()).device
    sizes = {place: len(tree.prompt) + sum(len(each.ids) for each in tree.branches) for place, tree in trees.items()}
    places: list[int] = []
    with eval_no_grad(model):
        for place in sorted(trees, key=sizes.__getitem__):
            if places and sum(sizes[one] for one in places) + sizes[place] > TOKENS_AT_ONCE:
                yield places, pack([trees[one] for one in places]).to(device)
                places = []
            places.append(place)
        if places:
            yield places, pack([trees[one] for one in places]).to(device)


# -- what it says --------------------------------------------------------------------------------


def prompts_of(held: Held) -> list[dict[str, Any]]:
    """The rows with their prompts; read once."""
    if not held.prompts:
        held.prompts = [prompt_row(row, place) for place, row in enumerate(held.dataset)]
    return held.prompts


def of_samples(opened: Opened, held: Held, judging: Judging) -> Measured:
    """Rewards and lengths of what the model says to each prompt, and what that is."""
    rows, n = prompts_of(held), judging.n
    check_sees(opened, rows)
    answers = list(answered(opened, rows, judging.asked, Turns(judging.chat), n=n, seed=judging.seed))
    texts = [[one.text for one in answers[start : start + n]] for start in range(0, len(answers), n)]
    ones = np.ones(len(rows))
    scored = _rewards(judging, rows, answers, opened)
    measures = [Measure(f"reward {name}", _means(scores, n), ones) for name, scores in scored.items()]
    lengths = [float(len(one.ids)) for one in answers]
    cut = [float(one.finish_reason == "length") for one in answers]
    measures += [Measure("answer tokens", _means(lengths, n), ones, 0), Measure("cut answers", _means(cut, n), ones, 0)]
    return Measured(opened.found.name, measures, texts, [one.pictures for one in answers[::n]])


def _means(values: Sequence[float], n: int) -> np.ndarray:
    """The mean of each n values that are there."""
    table = np.asarray(values, dtype=float).reshape(-1, n)
    known = np.isfinite(table)
    totals, counts = np.where(known, table, 0.0).sum(-1), known.sum(-1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def _rewards(
    judging: Judging, rows: Sequence[Mapping[str, Any]], answers: Sequence[Any], opened: Opened
) -> dict[str, list[float]]:
    if not judging.rewards:
        return {}
    from trl.rewards.named import reward_panel
    from trl.rollout.prompts import with_opened_pictures
    from trl.scripts.training import reward_function

    device = next(opened.model.parameters()).device
    panel = reward_panel([reward_function(name) for name in judging.rewards], device=device)
    names = sorted({name for row in rows for name in row} - {"prompt"})
    columns: dict[str, Any] = {name: [rows[one.place].get(name) for one in answers] for name in names}
    columns = with_opened_pictures(columns, opened.tokenizer) | {
        "prompts": [rows[one.place]["prompt"] for one in answers],
        "completions": [said(rows[one.place]["prompt"], one.text) for one in answers],
        "completion_ids": [one.ids for one in answers],
    }
    verdict = panel(len(answers), columns)
    return dict(zip(panel.names, verdict.scores, strict=True))


def said(prompt: Any, text: str) -> Any:
    """An answer as reward functions and judges read it: a message to a conversation, a text to a text."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def given_answers(held: Held) -> list[str]:
    """What the rows themselves answer: what is chosen, completes the prompt, or is said last."""
    from trl.data.formats import maybe_convert_to_chatml
    from trl.rewards.texts import text_of

    found = []
    for row in held.dataset:
        row = maybe_convert_to_chatml(dict(row))
        name = next((name for name in ("chosen", "completion", "messages") if row.get(name) is not None), None)
        if name is None:
            raise ValueError(
                f"--judge: the rows of {held.name} have no answers to compare with; `trl compare A B --judge ...` "
                "compares two models"
            )
        value = row[name]
        found.append(value if isinstance(value, str) else text_of(value[-1:]))
    return found


def wins(judge: Any, prompts: Sequence[Any], before: Sequence[str], after: Sequence[str]) -> list[float]:
    """Of each prompt 1 where `after` is judged better than `before`, 0 where worse, 0.5 without an opinion.

    Every other pair is shown in the other order, so that a judge's liking for one place cancels out.
    """
    from trl.rewards.named import pairwise

    pairs = list(zip(before, after, strict=True))
    shown = [pair[::-1] if place % 2 else pair for place, pair in enumerate(pairs)]
    asked = [prompt for prompt in prompts for _ in range(2)]
    flat = [said(prompt, text) for prompt, pair in zip(prompts, shown, strict=True) for text in pair]
    scores = pairwise(judge)(asked, flat)
    chosen = [scores[2 * place + (place + 1) % 2] for place in range(len(pairs))]
    return [0.5 if score is None else float(score) for score in chosen]


def judge_of(name: str) -> Any:
    """A judge of pairs: `package.module:name`, or `file.py:name`."""
    from trl.rewards.named import judge_named
    from trl.scripts.training import function_of_file

    place, _, function = name.partition(":")
    if function and Path(place).suffix == ".py":
        found = function_of_file(name, place, function, "judge")
        return found() if isinstance(found, type) else found
    return judge_named(name)
