"""Values by type hints: from YAML and from words."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from transformers.trainer_utils import IntervalStrategy

from trl.scripts.describe import settings_of
from trl.scripts.hints import in_words, read_value, schema_of, takes_no_word, takes_several
from trl.scripts.jobs import JOBS
from trl.scripts.training import dataclasses_of


@dataclass
class Part:
    path: str
    weight: float = 1.0


@pytest.mark.parametrize(
    ("hint", "value", "read"),
    [
        (int, "3", 3), (int, 3.0, 3), (int, "1e3", 1000), (float, "1e-5", 1e-5), (float, 2, 2.0),
        (bool, "no", False), (bool, True, True), (bool, "1", True), (str, 5, "5"), (str, "a", "a"),
        (int | None, "none", None), (int | None, None, None), (str | None, "none", "none"),
        (bool | str, "group", "group"), (bool | str, "false", False),
        (str | list[str], "a", "a"), (str | list[str], ["a", "b"], ["a", "b"]), (str | list[str], '["a"]', ["a"]),
        (list[str] | None, "a", ["a"]), (list[float], ["1", "2.5"], [1.0, 2.5]),
        (float | str | list[float | None] | None, "2", 2.0),
        (float | str | list[float | None] | None, ["2", "none"], [2.0, None]),
        (tuple[float, float] | None, ["-1", "1"], (-1.0, 1.0)), (tuple[float, float], "[0, 2]", (0.0, 2.0)),
        (dict[str, Any] | None, '{"a": 1}', {"a": 1}), (dict | str | None, "file.json", "file.json"),
        (dict | str | None, {"a": 1}, {"a": 1}),
        (IntervalStrategy | str, "steps", "steps"), (IntervalStrategy | str, False, "no"),
        (Literal["group", True, False], "false", False), (Literal["group", True, False], "group", "group"),
        (Literal["yes", "no", "all"], False, "no"), (Literal["yes", "no", "all"], "True", "yes"),
        (Literal["yes", "no", "all"], "all", "all"),
        (list[Part], [{"path": "x", "weight": 2}], [Part("x", 2.0)]), (list[Part], "x", [Part("x")]),
        (Any, object, object),
    ],
)  # fmt: skip
def test_a_value_is_read(hint, value, read):
    got = read_value("field", hint, value)
    assert got == read
    assert type(got) is type(read)


@pytest.mark.parametrize(
    ("hint", "value", "way_out"),
    [
        (int, "many", "a whole number"), (int, 2.5, "a whole number"), (int, True, "a whole number"),
        (float, "fast", "a number"), (float | None, "fast", "a number"), (bool, "maybe", "true or false"),
        (str, True, "a text"), (str, ["a"], "a text"), (list[int], ["a"], "a list"),
        (dict[str, Any], "{", r"an object \(JSON\)"), (dict[str, Any], "3", r"an object \(JSON\)"),
        (tuple[float, float], [1.0], "a list of 2"), (Literal["a", "b"], "c", "one of a, b"),
        (IntervalStrategy | str, "sometimes", "one of no, steps, epoch"), (list[Part], [{"x": 1}], "a list"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_the_way_out(hint, value, way_out):
    with pytest.raises(ValueError, match=f"^field=.*: give {way_out}"):
        read_value("field", hint, value)


def test_how_many_words_follow():
    assert takes_several(str | list[str])
    assert takes_several(tuple[float, float] | None)
    assert not takes_several(float | None)
    assert takes_no_word(bool | None)
    assert not takes_no_word(str)
    assert in_words(int | None) == "a whole number"


def test_schemas():
    assert schema_of(int) == {"type": "integer"}
    assert schema_of(float | None) == {"anyOf": [{"type": "null"}, {"type": "number"}]}
    assert schema_of(list[str]) == {"type": "array", "items": {"type": "string"}}
    assert schema_of(Literal["a", "b"]) == {"enum": ["a", "b"]}
    assert schema_of(IntervalStrategy | str) == {"enum": ["no", "steps", "epoch"]}
    assert schema_of(dict[str, Any]) == {"type": "object"}
    assert schema_of(Part)["required"] == ["path"]
    assert schema_of(Any) == {}


@pytest.mark.parametrize("name", JOBS)
def test_every_default_of_every_job_is_a_value_of_its_hint(name):
    names = []
    for one in dataclasses_of(JOBS[name]):
        for setting in settings_of(one):
            names.append(setting.name)
            assert setting.meaning, f"{one.__name__}.{setting.name} says nothing"
            assert schema_of(setting.hint) is not None
            if setting.default is not None:
                default = getattr(setting.default, "value", setting.default)
                assert read_value(setting.name, setting.hint, default) == default
                if isinstance(default, bool | int | float | str):
                    assert read_value(setting.name, setting.hint, str(default)) == default
    assert len(names) == len(set(names))
