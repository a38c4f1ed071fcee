"""Values as people write them: what is read, what it becomes, and what is refused in which words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from plait.errors import RequestError
from plait.settings import assignment, build, one_of, read_toml


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    levels: tuple[int, ...]
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    inner: Inner
    other: Inner | None = None
    shapes: tuple[tuple[int, int], ...] = ()
    names: tuple[str, ...] = ()
    mode: Literal["a", "b"] = "a"
    count: int | None = None
    fast: bool = True
    knobs: dict[str, Any] = field(default_factory=dict[str, Any])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cells=16384", ("cells", 16384)),
        (" a.b = [1, 2] ", ("a.b", [1, 2])),
        ("path=a=b.gguf", ("path", "a=b.gguf")),
        ("on=true", ("on", True)),
        ("name=", ("name", "")),
        ("=3", None),
        ("cells", None),
        ("", None),
    ],
)
def test_an_assignment_is_a_name_and_a_toml_value_or_text(text: str, expected: Any) -> None:
    assert assignment(text) == expected


def test_tables_become_dataclasses_and_lists_tuples() -> None:
    built = build(Outer, {"inner": {"levels": [1, 2], "share": 1}, "shapes": [[1, 2], [3, 4]], "knobs": {"x": [1]}})
    assert built == Outer(inner=Inner(levels=(1, 2)), shapes=((1, 2), (3, 4)), knobs={"x": [1]})
    assert type(built.inner.share) is float
    assert build(Outer, {"inner": {"levels": []}, "other": None, "count": None}) == Outer(inner=Inner(levels=()))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"inner": {"levels": []}, "shape": []}, "unknown name in the config 'shape'; did you mean 'shapes'"),
        ({"inner": {"level": []}}, r"unknown name in \[inner\] 'level'; did you mean 'levels'"),
        ({"inner": {"levels": 3}}, r"levels in \[inner\] is 3; it must be a list"),
        ({"inner": 3}, r"inner in the config is 3; it must be a section, \[inner\]"),
        ({}, r"\[inner\]: missing 1 required keyword-only argument: 'levels'"),
        (
            {"inner": {"levels": []}, "names": ["a", 3]},
            r"names in the config is \['a', 3\]; it must be a list of strings",
        ),
        ({"inner": {"levels": []}, "count": 1.5}, "count in the config is 1.5; it must be of type int"),
        ({"inner": {"levels": []}, "count": True}, "count in the config is True; it must be of type int"),
        ({"inner": {"levels": []}, "fast": None}, "fast in the config is None; it must be of type bool"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_place(values: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        build(Outer, values)


def test_an_override_goes_into_sections_and_not_through_values(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("a = 1\n[b]\nc = 2\n")
    assert read_toml(path, {"b.d.e": 3, "a": 4}) == {"a": 4, "b": {"c": 2, "d": {"e": 3}}}
    with pytest.raises(RequestError, match=r"cannot set a\.b: a is a value, not a section"):
        read_toml(path, {"a.b": 1})
    with pytest.raises(RequestError, match="cannot read the config"):
        read_toml(tmp_path / "none.toml")


def test_a_value_that_is_not_allowed_is_told_the_nearest() -> None:
    one_of("json", ("json", "plain"), "log")
    with pytest.raises(RequestError, match=r"unknown log 'jsn'; did you mean 'json'\? \(known: json, plain\)"):
        one_of("jsn", ("json", "plain"), "log")
