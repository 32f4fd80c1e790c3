"""`TrlParser`: the dataclasses of a script, read from a command line and from the YAML file that it names."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_origin

from transformers import HfArgumentParser

from trl.scripts.hints import read_value, settings_hints
from trl.scripts.model_config import ModelConfig


def take_config(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file that `--config` names, and the other words."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?", const="")
    found, others = finder.parse_known_args(list(words))
    return found.config, others


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a YAML file, `-` in their names as `_`."""
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"--config {path}: there is no such file")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: this is not YAML ({' '.join(str(error).split())})") from error
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f"--config {path}: give one `setting: value` a line")
    return {str(name).replace("-", "_"): value for name, value in (settings or {}).items()}


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error about a typo: the known name that is closest to it; empty where none is close."""
    near = difflib.get_close_matches(name, list(known), 1, 0.75)
    return f"; did you mean {near[0]}?" if near else ""


def set_environment(variables: Any) -> None:
    """Set the variables of `env:` for this process and those that it starts."""
    if not isinstance(variables, Mapping):
        raise ValueError(f"env={variables!r}: give a mapping of environment variables to their values")
    os.environ.update({str(name): str(value) for name, value in variables.items()})


class TrlParser(HfArgumentParser):
    """`HfArgumentParser` that also reads a YAML file: its values are defaults, which the command line overrides.

    ```python
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    ```

    `python script.py --config settings.yaml --learning_rate 1e-5`: the variables under `env:` in the file are set as
    environment variables.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any):
        if dataclass_types is None:
            dataclass_types = []
        listed = list(dataclass_types) if isinstance(dataclass_types, Iterable) else [dataclass_types]
        for one in listed:
            if "config" in {entry.name for entry in fields(one)}:
                raise ValueError(f"{one.__name__} has a field `config`: rename it; --config names the YAML file")
        super().__init__(listed, **kwargs)
        hints = {name: hint for one in listed for name, hint in settings_hints(one).items()}
        for action in self._actions:
            if get_origin(action.type) is dict:  # which `HfArgumentParser` would call with the word
                action.type = partial(read_value, action.dest, hints[action.dest])

    def parse_args_and_config(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
    ) -> tuple[Any, ...]:
        """The dataclasses, from the words in `args` (None: of this process) and the file that `--config` names.

        return_remaining_strings: also return the words that no dataclass knows, those of the file included.
        fail_with_unknown_args: such words are a ValueError, unless they are returned.
        """
        path, words = take_config(sys.argv[1:] if args is None else args)
        unknown: list[str] = []
        if path is not None:
            settings = read_yaml(path)
            set_environment(settings.pop("env", {}))
            unknown = self.set_defaults_with_config(**settings)
            if unknown and fail_with_unknown_args and not return_remaining_strings:
                names = [word.removeprefix("--") for word in unknown[::2]]
                near = suggestion(names[0], (action.dest for action in self._actions))
                raise ValueError(f"--config {path}: no field is called {', '.join(names)}{near}")
        *parsed, rest = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if rest and fail_with_unknown_args and not return_remaining_strings:
            near = suggestion(rest[0].partition("=")[0], self._option_string_actions)
            raise ValueError(f"Some specified arguments are not used by the parser: {rest}{near}")
        trusting = any(getattr(one, "trust_remote_code", False) for one in parsed)
        for one in parsed:
            if isinstance(one, ModelConfig):  # the field is the config's; older scripts read it here
                one.__dict__["trust_remote_code"] = trusting
        return (*parsed, unknown + rest) if return_remaining_strings else tuple(parsed)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Make the values defaults, of sub-commands too.

        Returns the settings for which there is no argument, as words of a line: `--name`, `value`, ...
        """
        hints = {name: hint for one in self.dataclass_types for name, hint in settings_hints(one).items()}
        known: dict[str, Any] = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    rest = command.set_defaults_with_config(**kwargs) if isinstance(command, TrlParser) else []
                    known |= {name: kwargs[name] for name in kwargs if f"--{name}" not in rest}
            elif action.dest in kwargs:
                name = action.dest
                known[name] = read_value(name, hints[name], kwargs[name]) if name in hints else kwargs[name]
                action.required = False
        self.set_defaults(**known)
        return [word for name, value in kwargs.items() if name not in known for word in (f"--{name}", str(value))]


def init_zero_verbose() -> None:
    """Warnings and logs as one short line each."""
    from rich.logging import RichHandler

    logging.basicConfig(format="%(message)s", datefmt="[%X]", handlers=[RichHandler()], level=logging.ERROR)

    def one_line(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        logging.warning(f"{category.__name__}: {message}")

    warnings.showwarning = one_line
