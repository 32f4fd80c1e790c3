"""Sources of rollouts: a sampler, `generate`, an environment, or a function of the user; a trainer chooses one."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from trl.data.columns import at_row, shown
from trl.data.formats import column_names
from trl.data.pictures import Album, PictureReader, number_of
from trl.data.records import Rollout
from trl.data.user_functions import Begun, in_order, own
from trl.environment.chat_environment import ChatEnvironment
from trl.environment.episodes import Environment, lacks_prompt
from trl.environment.factories import ROUTE, Factory
from trl.environment.turns import SampledTurns
from trl.generation.sampler import Sampler, SamplingParams, is_exact

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]
"""of a data set, each with `prompt_ids`"""
Seed = int | tuple[int, ...] | None


class Source(Protocol):
    """Completes prompts."""

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        """`group` completions of each row's prompt, one row after the other.

        seed: None draws from torch's generator. places: of the rows among those of all ranks; rows at different places
        get different random numbers. None, for evaluation: equal prompts get equal completions.
        """
        ...


@dataclass
class SamplerSource:
    """Completions by a sampler, which shares the policy's weights or follows them."""

    sampler: Sampler
    params: Callable[[Seed], SamplingParams]
    reshaped: bool = False
    """whether filters change the distribution; the log-probabilities are then the model's, at temperature 1, where the
    sampler is exact; else they are what it sampled from"""
    measure: Callable[[Rollout], list[list[float]]] | None = None
    """the policy's log-probabilities, where the sampler's are of another distribution"""
    keeps_words: bool = False
    """whether a token is learned as chosen from the words that the filters left, where the sampler says them"""
    keeps_experts: bool = False
    """whether a mixture's experts are those of the sampler, where it says them"""

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        prompts = [list(row["prompt_ids"]) for row in rows]
        seeds = seed if seed is None or places is None else tuple(seed * 2**20 + place for place in places)
        groups = self.sampler.sample(prompts, self.params(seeds), n=group)
        flat = [completion for completions in groups for completion in completions]
        own = self.reshaped and is_exact(self.sampler)
        rollout = Rollout(
            prompts=[prompt for prompt in prompts for _ in range(group)],
            completions=[completion.ids for completion in flat],
            logprobs=[c.raw_logprobs if own else c.logprobs for c in flat],
            masks=[[1] * len(completion.ids) for completion in flat],
            metadata={"truncated": [completion.finish_reason == "length" for completion in flat]},
        )
        if self.keeps_words and all(completion.kept is not None for completion in flat):
            rollout.kept = [completion.kept for completion in flat]
        if self.keeps_experts and all(completion.experts is not None for completion in flat):
            rollout.experts = [completion.experts for completion in flat]
        if any(completion.versions for completion in flat):
            rollout.metadata["versions"] = [list(map(tuple, completion.versions)) for completion in flat]
        if self.measure is not None:
            rollout.logprobs = self.measure(rollout)
        return rollout


@dataclass
class GenerateSource:
    """Completions by a model's own `generate`, for what no sampler can do. Their log-probabilities are unknown."""

    generate: Callable[[list[Tensor]], list[Tensor]]
    """responses to a batch of 1-d prompts"""
    device: Any
    max_rows: int = 128

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        if seed is not None:
            raise ValueError(f"seed={seed}: `generate` draws from torch's generator; seed that")
        prompts = [list(row["prompt_ids"]) for row in rows for _ in range(group)]
        completions: list[list[int]] = []
        for start in range(0, len(prompts), self.max_rows):
            part = [torch.tensor(ids, device=self.device) for ids in prompts[start : start + self.max_rows]]
            completions += [response.tolist() for response in self.generate(part)]
        return Rollout(prompts, completions, logprobs=[], masks=[[1] * len(ids) for ids in completions])


@dataclass
class EnvironmentSource:
    """Episodes of an environment, in which a sampler makes the policy's turns."""

    environment: Any
    """a `TextEnvironment`, a `ChatEnvironment`, or an object with their `rollout`"""
    sampler: Sampler
    params: Callable[[Seed], SamplingParams]
    context: int | None
    """most tokens of a prompt and its completion together; None: no limit is known"""
    limit: int
    """most tokens of a completion"""
    first: int = 0
    """place of the first row of this process in an evaluation batch of all processes"""
    measure: Callable[[Rollout], list[list[float]]] | None = None
    """the policy's log-probabilities, where the sampler's are of another distribution"""

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        played = [own(dict(row)) for row in rows for _ in range(group)]
        if seed is None:
            first = int(torch.randint(2**62, ()))
            seeds = list(range(first, first + len(played)))
        else:
            places = range(self.first, self.first + len(rows)) if places is None else places
            seeds = [seed * 2**20 + place * group + i for place in places for i in range(group)]
        for at, row in enumerate(played):
            if lacks_prompt(row):  # the episodes of a group begin alike
                row.setdefault("seed", seeds[at - at % group] % 2**31)
        turns = SampledTurns(self.sampler, self.params(seed), self.context)
        rollout: Rollout = self.environment.rollout(played, turns, seeds, self.limit)
        check_groups(rollout, played, group)
        if self.measure is not None:
            rollout.logprobs = self.measure(rollout)
        return rollout


def check_groups(rollout: Rollout, rows: Rows, group: int) -> None:
    """ValueError where an environment said other prompts to other episodes of one group, which are compared."""
    said = rollout.metadata.get("prompts", rows)
    for at, row in enumerate(rows):
        if lacks_prompt(row) and said[at] != said[at - at % group]:
            raise ValueError(
                f"environment_factory: reset() said different prompts to the {group} episodes of a group, which are "
                f"compared ({shown(said[at - at % group])}, {shown(said[at])}): let it take `seed`, which they share"
            )


def with_own_prompts(rows: Rows, rollout: Rollout) -> list[Any]:
    """The rows of a rollout, one a group, with the prompts that the environment said where they have none."""
    said = rollout.metadata.get("prompts")
    if said is None or not len(rows):
        return list(rows)
    firsts = said[:: len(said) // len(rows)]
    return [{**row, "prompt": own} if lacks_prompt(row) else row for row, own in zip(rows, firsts, strict=True)]


@dataclass
class FunctionSource:
    """Rollouts of a user's function, which may ask another engine."""

    function: Callable[[list[dict[str, Any]]], Rollout | Mapping[str, Any]]
    """called with a row of the data set for each completion; gives a rollout, or what `rollout_of` reads"""
    measure: Callable[[Rollout], list[list[float]]] | None = None
    """the policy's log-probabilities, where the function does not know them"""
    words: float = math.inf
    """tokens that the policy knows"""
    pictures: PictureReader | None = None
    """what reads pictures for the policy; None: it reads text only"""

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        made = Begun(partial(self.function, [own(dict(row)) for row in rows for _ in range(group)])).result()
        rollout = rollout_of(made) if isinstance(made, Mapping) else made
        if not isinstance(rollout, Rollout):
            raise ValueError(
                f"rollout_func gave a {type(rollout).__name__}: return a `Rollout`, or a dict with prompt_ids, "
                "completion_ids and logprobs"
            )
        if len(rollout) != len(rows) * group:
            raise ValueError(f"rollout_func gave {len(rollout)} completions for {len(rows) * group} rows")
        if self.pictures is not None:
            shown = [row["prompt_ids"] for row in rows for _ in range(group) if "prompt_ids" in row]
            fill_pictures(rollout, shown, self.pictures)
        check_given(rollout, self.words)
        if not rollout.logprobs and self.measure is not None:
            rollout.logprobs = self.measure(rollout)
        return rollout


def fill_pictures(rollout: Rollout, shown: Sequence[Sequence[int]], reader: PictureReader) -> None:
    """Put the rows' pictures where prompts have the token that stands for a part of one, as a processor writes it.

    shown: the rows' own prompts. ValueError where it is not known which pictures those tokens are of.
    """
    token = reader.image_token_id
    for at, ids in enumerate(rollout.prompts):
        if token not in ids:
            continue
        numbers = reader.occurrences(shown[at]) if len(shown) == len(rollout) else []
        try:
            rollout.prompts[at] = reader.tokens(ids, numbers)
        except ValueError as error:
            raise ValueError(
                f"rollout_func: prompt_ids[{at}] does not show the {len(numbers)} pictures of its row ({error}): give "
                "the row's own `prompt_ids`, or none of these tokens"
            ) from None
    for at, ids in enumerate(rollout.completions):
        if token in ids:
            raise ValueError(
                f"rollout_func: completion_ids[{at}] has the token {token}, which stands for a part of a picture: give "
                "the tokens that `trl.data.pictures` has for the picture, or leave it out"
            )


def check_given(rollout: Rollout, words: float) -> None:
    """ValueError for tokens that a policy of so many words does not know, or log-probabilities that are none."""
    for name, rows in (("prompt_ids", rollout.prompts), ("completion_ids", rollout.completions)):
        for at, ids in enumerate(rows):
            unknown = [token for token in ids if not (0 <= token < words or _is_of_picture(token))]
            if unknown:
                raise ValueError(
                    f"rollout_func: {name}[{at}] has the token {unknown[0]}, and the policy knows 0 to {words - 1:g}; "
                    "give ids of its own tokenizer"
                )
    for at, (numbers, mask) in enumerate(zip(rollout.logprobs, rollout.masks, strict=False)):
        own_numbers = [number for number, counts in zip(numbers, mask, strict=False) if counts]
        wrong = [number for number in own_numbers if not -math.inf < number < _ROUND]
        if wrong:
            raise ValueError(
                f"rollout_func: logprobs[{at}] has {wrong[0]:g}; give natural logarithms of the tokens' probabilities, "
                "finite and at most 0, or None for all"
            )


def _is_of_picture(token: int) -> bool:
    """Whether an id below zero is of a picture that this machine has read."""
    return token < 0 and Album.path(number_of(token)).exists()


_ROUND = 0.1
"""a log-probability in half precision may be so much above 0"""
MASKS = ("env_mask", "tool_mask")
"""names of the mask in what a rollout function gives"""


def rollout_of(columns: Mapping[str, Any]) -> Rollout:
    """The rollout of a dict with a list for each of `prompt_ids`, `completion_ids`, `logprobs`: a value per completion.

    `logprobs` may be None or missing, where they are unknown; `env_mask` is 1 where the policy wrote a token. `rewards`
    are used where there are no reward functions; all further columns reach these by their names.
    """
    missing = [name for name in ("prompt_ids", "completion_ids") if name not in columns]
    if missing:
        raise ValueError(f"rollout_func: {missing[0]} is missing among {', '.join(columns)}; give a list of token ids")
    given = {name: _listed(name, values) for name, values in columns.items() if values is not None}
    completions, prompts = (_ids(name, given.pop(name)) for name in ("completion_ids", "prompt_ids"))
    logprobs = _logprobs(given.pop("logprobs", []))
    masks = next((given.pop(name) for name in MASKS if name in given), [[1] * len(ids) for ids in completions])
    for name, values in {"prompt_ids": prompts, **given}.items():
        if len(values) != len(completions):
            raise ValueError(f"rollout_func: {name} has {len(values)} values for {len(completions)} completions")
    for name, rows in (("logprobs", logprobs), ("env_mask", masks)):
        for row, (numbers, ids) in enumerate(zip(rows, completions, strict=len(rows) > 0)):
            if len(numbers) != len(ids):
                raise ValueError(f"rollout_func: {name}[{row}] has {len(numbers)} numbers for {len(ids)} tokens")
    masks = [list(map(int, mask)) for mask in masks]
    return Rollout(prompts, completions, logprobs, masks, given.get("rewards", []), metadata=given)


def _listed(name: str, values: Any) -> list[Any]:
    try:
        return in_order(values)
    except TypeError:
        raise ValueError(
            f"rollout_func: {name} is a {type(values).__name__}; give a list with a value for each completion"
        ) from None


def _ids(name: str, rows: Sequence[Any]) -> list[list[int]]:
    read: list[list[int]] = []
    for at, ids in enumerate(rows):
        try:
            read.append(list(map(int, in_order(ids))))
        except (TypeError, ValueError):
            raise ValueError(f"rollout_func: {name}[{at}] is {shown(ids)}; give a list of token ids") from None
    return read


def _logprobs(rows: Sequence[Any]) -> list[list[float]]:
    """Of each token; none where no row has any."""
    if all(row is None for row in rows):
        return []
    read: list[list[float]] = []
    for at, row in enumerate(rows):
        try:
            read.append([float(_first(number)) for number in row])
        except (TypeError, ValueError):
            raise ValueError(
                f"rollout_func: logprobs[{at}] is {shown(row)}; give a number for each token, or None for all rows"
            ) from None
    return read


def _first(number: Any) -> Any:
    """A token's log-probability; the first where those of several candidates are given."""
    return number[0] if isinstance(number, list | tuple) else number


def calls_of(
    function: Callable[..., Any], further: Sequence[Any], earlier: Sequence[Any]
) -> Callable[[list[Any]], Any]:
    """A user's `rollout_func` as a function of the rows.

    Its first argument is a list of rows, or of their prompts where it is called `prompts`. Then come `further`, the
    trainer; or `earlier`, the config and the tokenizer, where the second is called `args`.
    """
    try:
        names = [*inspect.signature(function).parameters, "", ""]
    except (TypeError, ValueError):
        names = ["", ""]
    more = earlier if names[1] == "args" else further

    def call(rows: list[Any]) -> Any:
        return function([row["prompt"] for row in rows] if names[0] == "prompts" else rows, *more)

    return call


# -- environments ------------------------------------------------------------------------------


def make_environment(
    environment: Any,
    tools: Sequence[Callable[..., Any]] | None,
    factory: Factory | Mapping[str, Factory] | None,
    *,
    max_iterations: int | None,
    template_kwargs: Mapping[str, Any] | None,
) -> Any:
    """The environment that was given, or one made of tools and a factory; None if nothing was given."""
    made_of_tools = tools is not None or factory is not None
    if environment is None and not made_of_tools:
        if max_iterations is not None:
            raise ValueError("max_tool_calling_iterations: no effect without `tools` or an `environment_factory`")
        return None
    if environment is None:
        return ChatEnvironment(tools or (), factory, max_iterations=max_iterations, template_kwargs=template_kwargs)
    if made_of_tools:
        raise ValueError("environment: it has its own tools; give it those of `tools` and `environment_factory`")
    if max_iterations is not None:
        raise ValueError("max_tool_calling_iterations: the environment has its own limit; set it there")
    return environment


def environment_for_policy(
    environment: Any,
    tokenizer: Any,
    end_ids: Sequence[int],
    *,
    reward_funcs: Any,
    needs_rewards: bool = True,
    max_prompt_length: int | None = None,
) -> Any:
    """The environment, ready to play with this tokenizer; ValueError for arguments that do not go together.

    end_ids: tokens that end a turn.
    """
    needs_rewards = needs_rewards and reward_funcs is None
    if isinstance(environment, Environment):
        environment.check_settings(tokenizer, max_prompt_length, reward_funcs)
        environment = environment.for_policy(tokenizer, end_ids)
        environment.needs_rewards = environment.asks_rewards = needs_rewards
        if reward_funcs is not None and environment.reward_names:
            names = ", ".join(dict.fromkeys(environment.reward_names.values()))
            logger.warning(
                "reward_funcs: they judge alone, get_reward() of %s is not called; leave reward_funcs out, or let one "
                "of them take `environments` and call it", names,
            )  # fmt: skip
    if needs_rewards and not environment.gives_rewards:
        raise ValueError("reward_funcs: the environment gives no rewards; give reward functions, or it a `reward`")
    return environment


def reward_names(environment: Any) -> dict[str | None, str] | None:
    """Under what the rewards of an environment's factories are logged; None: as one."""
    return environment.reward_names if isinstance(environment, Environment) else None


def close_objects(environment: Any) -> None:
    """Close the objects that an environment's factory has made."""
    if isinstance(environment, Environment):
        environment.close()


PROMPTS = ("prompt", "prompt_ids", "input_ids", "messages", "conversations")
"""columns of which a prompt can be made"""


def names_of(environment: Any) -> list[str] | None:
    """The names of an environment's factories, none of a single one; None where it has no factory."""
    factories = environment.factories if isinstance(environment, Environment) else None
    return None if factories is None else factories.names


def rows_without_prompts(names: Sequence[str], seed: int) -> IterableDataset:
    """Endless rows for environments that say their prompts: a `seed`, and one of the names in turn."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(_seeds, gen_kwargs={"names": [list(names)], "seed": seed})


def _seeds(names: list[list[str]], seed: int) -> Iterator[dict[str, Any]]:
    for place in count():
        row = {"seed": Random(f"{seed} {place}").getrandbits(31)}
        yield row | ({ROUTE: names[0][place % len(names[0])]} if names[0] else {})


def says_prompts(environment: Any, dataset: Any, name: str) -> bool:
    """Whether the environment has to say the prompts of a data set, or those of some of its rows."""
    if names_of(environment) is None or isinstance(dataset, Mapping) or not hasattr(dataset, "__iter__"):
        return False
    columns = column_names(dataset, name)
    if "prompt" in columns and not {"prompt_ids", "input_ids"} & set(columns) and hasattr(dataset, "__len__"):
        return any(
            map(lacks_prompt, dataset.select_columns(["prompt"]) if hasattr(dataset, "column_names") else dataset)
        )
    return not any(column in columns for column in PROMPTS)


def check_names(environment: Any, dataset: Any, name: str) -> None:
    """ValueError for a row that names no environment, where it has several; rows of a stream are read later."""
    if not names_of(environment) or not hasattr(dataset, "__len__"):
        return
    rows = dataset.select_columns([ROUTE]) if ROUTE in (getattr(dataset, "column_names", None) or ()) else dataset
    for index in range(len(rows)):
        with at_row(index, name):
            environment.factories.name_of(rows[index])
