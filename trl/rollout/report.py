"""Reports on a rollout: its metrics, a Parquet file of its rows, its texts in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl.data.any_text import console, encodable, json_text, visible
from trl.data.records import Rollout
from trl.losses.loss_sum import Extreme, extreme
from trl.models.weight_files import writing
from trl.rollout.experience import Experience
from trl.rollout.rewards import Rewards

Columns = dict[str, list[Any]]
TYPES = {"step": "int64", "prompt": "string", "completion": "string", "completion_ids": "list", "images": "pictures"}
"""of columns in the Parquet files; all others hold numbers"""
PICTURES = "images"
"""column with the numbers of the pictures that a row has; in the files paths of thumbnails, from the file's folder"""
LONGEST = 2000
"""characters of a prompt that are printed; the Parquet files hold all"""


def table_of(
    step: int,
    rollout: Rollout,
    prompts: Sequence[Any],
    rewards: Rewards,
    learned: Mapping[str, Sequence[Any]],
    pictures: bool = False,
) -> Columns:
    """A row per completion: the texts, each reward (None: no opinion) and what is learned from it.

    step: number of the first optimizer step that learns from them. pictures: the policy reads pictures, and the column
    `images` says which ones.
    """
    scores = dict(zip(rewards.names, rewards.scores_BF.T.tolist(), strict=True))
    return {
        "step": [step] * len(rollout),
        "prompt": list(prompts),
        "completion": rollout.texts,
        "completion_ids": rollout.completions,
        **({PICTURES: list(map(_pictures_of, rollout.prompts, rollout.completions))} if pictures else {}),
        **{f"reward_{name}": [None if math.isnan(x) else x for x in values] for name, values in scores.items()},
        **{name: list(values) for name, values in learned.items()},
        **rewards.logs.extra,
    }


def _pictures_of(prompt: Sequence[int], completion: Sequence[int]) -> list[int]:
    """The numbers of the pictures in a row's tokens, each once."""
    from trl.data.pictures import pictures_among

    return pictures_among([*prompt, *completion])


def record(
    add: Callable[[str, float, float], None],
    add_extreme: Callable[[str, Extreme], None],
    rollout: Rollout,
    rewards: Rewards,
    group: int,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> None:
    """The rollout's metrics: sums and counts by `add(name, total, count)`, and extremes.

    gather: collective; the list of all ranks of each rank's list. A standard deviation is that of all ranks' rewards.
    """
    truncated = rollout.metadata.get("truncated", [False] * len(rollout))
    lengths = [len(ids) for ids in rollout.completions]
    add("completions/mean_length", float(sum(lengths)), len(lengths))
    add("completions/clipped_ratio", float(sum(truncated)), len(lengths))
    ended = [length for length, cut in zip(lengths, truncated, strict=True) if not cut]
    add("completions/mean_terminated_length", float(sum(ended)), len(ended))
    for name, of in (("length", lengths), ("terminated_length", ended)):
        for which, largest in (("min", False), ("max", True)):
            add_extreme(f"completions/{which}_{name}", extreme(torch.tensor(of, dtype=torch.float32), largest=largest))
    if "turn_ends" in rollout.metadata:
        add("episodes/turns", float(sum(map(len, rollout.metadata["turn_ends"]))), len(lengths))
        add("episodes/sampled_tokens", float(sum(map(sum, rollout.masks))), len(lengths))
    if "tools_called" in rollout.metadata:
        called, failed = rollout.metadata["tools_called"], rollout.metadata["tools_failed"]
        add("tools/call_frequency", float(sum(map(bool, called))), len(lengths))
        add("tools/failure_frequency", float(sum(failed)), float(sum(called)))
    if not rewards.names:
        return
    all_BF = torch.tensor(gather(rewards.scores_BF.tolist())).view(-1, len(rewards.names))
    columns = zip(rewards.names, rewards.scores_BF.unbind(1), all_BF.unbind(1), rewards.timed_out, strict=True)
    for name, column_B, all_B, late in columns:
        known = column_B[~column_B.isnan()]
        add(f"rewards/{name}/mean", float(known.sum()), len(known))
        everywhere = all_B[~all_B.isnan()]
        if len(everywhere) > 1:
            add(f"rewards/{name}/std", float(everywhere.std()), 1)
        if late is not None:
            add(f"rewards/{name}/timed_out", float(late), 1)
    total_B = rewards.total_B()
    known = total_B[~total_B.isnan()]
    for name, numbers in rewards.logs.metrics.items():
        add(name, sum(numbers), len(numbers))
    add("reward", float(known.sum()), len(known))
    add("unscored_ratio", float(len(total_B) - len(known)), len(total_B))
    if group > 1:
        spread = [
            row[~row.isnan()].std().item() for row in total_B.unflatten(0, (-1, group)) if (~row.isnan()).sum() > 1
        ]
        add("reward_std", float(sum(spread)), len(spread))
        idle = ~rewards.informative_groups(group)
        add("frac_reward_zero_std", float(idle.sum()), len(idle))


def record_ahead(
    add: Callable[[str, float, float], None],
    add_extreme: Callable[[str, Extreme], None],
    ages: Sequence[Sequence[int]],
    spent: Any,
) -> None:
    """How old the weights were that sampled a rollout, and how the time since the last one was spent.

    ages: of each token that the policy sampled. spent: seconds `waited`, `idle` and `passed`, see `Ahead.spent`.
    """
    flat = [age for row in ages for age in row]
    add("sampling/staleness/mean", float(sum(flat)), len(flat))
    add_extreme("sampling/staleness/max", extreme(torch.tensor(flat, dtype=torch.float32), largest=True))
    add("sampling/waited", spent.waited, 1)
    add("sampling/idle", spent.idle, spent.passed)


def ages_of(rollout: Rollout, version: int, step: int, *, spans: bool = False) -> list[list[int]]:
    """For each token that the policy sampled: how many optimizer steps the weights that sampled it are behind.

    version: of the weights at the beginning of the rollout. spans: whether they may have changed within it, so that
    completions say by which weights each token was sampled.
    """
    nothing: list[Any] = [()] * len(rollout)
    ages = []
    for said, mask in zip(rollout.metadata.get("versions", nothing) if spans else nothing, rollout.masks, strict=True):
        own = [step - version] * len(mask)
        for stamp, start, end in said:
            inside = range(len(own))[start:end]  # a completion may have been cut since
            own[start:end] = [step - number_of(stamp, version)] * len(inside)
        ages.append([age for age, counts in zip(own, mask, strict=True) if counts])
    return ages


def number_of(stamp: str, otherwise: int) -> int:
    """The number at the end of the stamp of weights."""
    number = stamp.rpartition("-")[2]
    return int(number) if number.isdecimal() else otherwise


def record_objective(
    add: Callable[[str, float, float], None],
    rows: Experience,
    reference_BT: Tensor,
    mask_BT: Tensor,
    scores_B: Tensor,
    beta: float,
) -> None:
    """What a policy is held to by rewards and its reference, a number for each completion before the first update.

    mask_BT: the tokens that the policy sampled. scores_B: the rewards, NaN for a completion that nobody scored.
    """
    assert rows.old_logprobs_BT is not None
    kl_B = ((rows.old_logprobs_BT - reference_BT) * mask_BT).sum(-1)
    entropy_B = -(rows.old_logprobs_BT * mask_BT).sum(-1)
    columns = {
        "kl": kl_B, "entropy": entropy_B, "scores": scores_B, "non_score_reward": -beta * kl_B,
        "rlhf_reward": scores_B - beta * kl_B,
    }  # fmt: skip
    for name, column_B in columns.items():
        known = column_B[~column_B.isnan()]
        add(f"objective/{name}", float(known.sum()), len(known))


def write_parquet(directory: Path, number: int, columns: Mapping[str, Sequence[Any]]) -> Path:
    """The rows as `rollout-000123.parquet`; written beside, then renamed. Conversations are written as JSON.

    Types are the same in every file, so that `datasets` reads them all together. Thumbnails of pictures lie in the
    folder `pictures` beside the file, which has their paths.
    """
    import pyarrow
    from pyarrow import parquet

    paths = pyarrow.list_(pyarrow.string())
    arrow = {"int64": pyarrow.int64(), "string": pyarrow.string(), "list": pyarrow.list_(pyarrow.int64())}
    types = {name: _type_of(name, values) for name, values in columns.items()}
    schema = pyarrow.schema(
        [(name, paths if types[name] == "pictures" else arrow.get(types[name], pyarrow.float64())) for name in columns]
    )
    plain = {name: _written_column(types[name], values, directory) for name, values in columns.items()}
    name = f"rollout-{number:06d}.parquet"
    try:
        table = pyarrow.table(plain, schema=schema)
    except UnicodeEncodeError:  # lone surrogates
        texts = {name: list(map(_encodable, values)) for name, values in plain.items() if types[name] == "string"}
        table = pyarrow.table({**plain, **texts}, schema=schema)
    with writing(directory) as beside:
        parquet.write_table(table, beside / name)
    return directory / name


def _written_column(kind: str, values: Sequence[Any], directory: Path) -> list[Any]:
    """A column as it stands in a file of the folder."""
    if kind == "string":
        return [_written(value) for value in values]
    if kind != "pictures":
        return list(values)
    from trl.data.thumbnails import stored

    return [stored(_listed(value), directory) for value in values]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _type_of(name: str, values: Sequence[Any]) -> str:
    """The type of a column: that of `TYPES`, "number" where all values are numbers, "pictures", else "string"."""
    if name in TYPES and name != PICTURES:
        return TYPES[name]
    if all(_is_number(value) for value in values):
        return "number"
    each = [one for value in values for one in _listed(value)]
    if name == PICTURES and all(isinstance(one, int) for one in each):
        return "pictures"
    return "pictures" if each and all(hasattr(one, "getbands") for one in each) else "string"


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _written(value: Any) -> str | None:
    """A text, or a conversation as JSON, in which a picture is a mark."""
    return value if value is None or isinstance(value, str) else json_text(value)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    return str(value) if isinstance(value, str | int) else str(_written(value))


def _encodable(text: str | None) -> str | None:
    return None if text is None else encodable(text)


class Pictured(NamedTuple):
    """A prompt with the numbers of its pictures: the same text with other pictures is another prompt."""

    prompt: Any
    pictures: tuple[int, ...]


def print_table(columns: Mapping[str, Sequence[Any]], most: int | None, unique: bool) -> None:
    """Some completions with their rewards, in the terminal; `unique`: the first of each prompt."""
    further = [name for name in columns if name not in TYPES]
    prompts = list(columns["prompt"])
    if columns.get(PICTURES):
        prompts = [Pictured(*each) for each in zip(prompts, map(tuple, columns[PICTURES]), strict=True)]
    rows = list(range(len(prompts)))
    if unique:
        rows = [i for i in rows if prompts.index(prompts[i]) == i]
    samples = (
        (prompts[i], columns["completion"][i], {name: _shown(columns[name][i]) for name in further})
        for i in rows[:most]
    )
    print_samples(f"step {columns['step'][0]}", samples)


def print_samples(title: str, samples: Iterable[tuple[Any, str, Mapping[str, str]]]) -> None:
    """Prompts, each with its completions and what is said of them; literally, wrapped where the terminal ends."""
    from rich.rule import Rule
    from rich.text import Text

    screen, before = console(), None
    bar = "|" if screen.options.ascii_only else "\u2502"
    screen.print(Rule(Text(visible(title))))

    def write(text: str, prefix: str, style: str = "") -> None:
        for line in Text(visible(text), style).wrap(screen, max(screen.width - len(prefix), 1), overflow="fold"):
            whole = Text(prefix, "dim").append_text(line)
            whole.rstrip()
            screen.print(whole, soft_wrap=True)

    for prompt, completion, facts in samples:
        if prompt != before:
            write(prompt_text(prompt), "", "bold")
            before = prompt
        if facts:
            write("  ".join(f"{name} {value}" for name, value in facts.items()), f"  {bar} ", "dim")
        write(completion, f"  {bar}   ")
        screen.print()


def prompt_text(prompt: Any) -> str:
    """A prompt as it is read: a conversation as turns, pictures as marks, the middle of a long one left out."""
    marks: Iterator[str] = iter(())
    if isinstance(prompt, Pictured):
        from trl.data.thumbnails import mark

        prompt, marks = prompt.prompt, map(mark, prompt.pictures)
    if isinstance(prompt, list) and all(isinstance(turn, Mapping) for turn in prompt):
        text = "\n".join([f"{turn.get('role', '')}: {_said(turn, marks)}" for turn in prompt])
    else:
        text = str(prompt)
    text = "\n".join([*marks, text])  # pictures that stand in a column of their own come first
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n... {len(text) - 2 * half:,} characters ...\n{text[-half:]}"


def _said(turn: Mapping[str, Any], marks: Iterator[str]) -> str:
    """The text of a message, with marks for its pictures; what else it holds (parts, calls) as JSON."""
    content = turn.get("content")
    if isinstance(content, str) and not turn.get("tool_calls"):
        return content
    if isinstance(content, list) and not turn.get("tool_calls"):
        from trl.data.thumbnails import has_pictures, said_in

        if has_pictures([turn]):
            return said_in(content, marks)
    others = {name: value for name, value in turn.items() if name != "role" and value is not None}
    return str(_written(others))
