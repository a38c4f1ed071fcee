"""Settings as people write them: `name=value`, TOML files, and dataclasses made of such plain values.

Knows no setting: what there is and what a value may be is said beside those who read it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from inspect import Parameter, signature
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from plait.errors import RequestError, nearest

T = TypeVar("T")


def assignment(text: str) -> tuple[str, Any] | None:
    """Name and value of `name=value`; None where it is none. A value that is not TOML is text.

    >>> assignment("cells=16384"), assignment("layers = [1, 2]"), assignment("lora=a.gguf"), assignment("cells")
    (('cells', 16384), ('layers', [1, 2]), ('lora', 'a.gguf'), None)
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        return None
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def read_toml(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of a TOML file, with overrides by dotted name.

    Raises:
        RequestError: The file is missing or not TOML, or an override goes through a value.
    """
    try:
        data = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise RequestError(f"cannot read the config {path}: {exc}") from exc
    for name, value in (overrides or {}).items():
        at = data
        *tables, last = name.split(".")
        for table in tables:
            at = at.setdefault(table, {})
            if not isinstance(at, dict):
                raise RequestError(f"cannot set {name}: {table} is a value, not a section")
        at[last] = value
    return data


def one_of(given: Any, allowed: Collection[str], what: str) -> None:
    """Refuse a value that is none of those allowed.

    Raises:
        RequestError: It is not; the message says which are, and the nearest.
    """
    if given not in allowed:
        raise nearest(str(given), list(allowed), what)


def within(
    name: str,
    value: float | None,
    least: float,
    most: float | None = None,
    *,
    above: bool = False,
    whole: bool = False,
    or_none: bool = True,
) -> None:
    """Refuse a number outside of a range, and what is none.

    Args:
        above: The least itself is refused too.
        whole: So is what is no whole number, infinity too.
        or_none: None passes.

    Raises:
        RequestError: It is outside; the message says what is allowed.
    """
    kind = type(value)
    if value is None:
        inside = or_none
    elif kind is int or (kind is float and not whole) or _takes(int if whole else float, value):
        inside = least <= value and (most is None or value <= most) and not (above and value == least)
    else:
        inside = False
    if not inside:
        kind = "a whole number" if whole else "a number"
        if most is None:
            bounds = f"above {least}" if above else f"of at least {least}"
        else:
            bounds = f"above {least} and at most {most}" if above else f"from {least} to {most}"
        raise RequestError(f"{name} is {value!r}; it must be {kind} {bounds}")


def of_type(hint: Any, value: Any, *, name: str) -> None:
    """Refuse a value that a parameter with this annotation does not take. What is inside a collection is not looked at.

    Raises:
        RequestError: It is of another kind, or none of those listed; the message says what is allowed.
    """
    hints = _kinds(hint)
    if any(_takes(kind, value) for kind in hints):
        return
    choices = [text for kind in hints if get_origin(kind) is Literal for text in get_args(kind)]
    if choices and isinstance(value, str):
        raise nearest(value, choices, name)
    raise RequestError(f"{name} is {value!r:.200}; it must be {in_words(hint)}")


def in_words(hint: Any) -> str:
    """What a parameter with this annotation takes: `a whole number or left out`."""
    hints = _kinds(hint)
    wanted = [_said(kind) for kind in hints if kind is not NoneType] + ["left out"] * (NoneType in hints)
    return " or ".join(dict.fromkeys(wanted))


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    """What a function or a class takes, by name; annotations are values where they can be."""
    try:
        return dict(signature(function, eval_str=True).parameters)
    except Exception:
        # Annotations may be names that only type checkers import, and anything else.
        return dict(signature(function).parameters)


def kind_of(hint: Any) -> Any:
    """What a field holds where it is not None: `tuple` for tuples of anything."""
    union = get_origin(hint) in (Union, UnionType)
    kind = next(kind for kind in get_args(hint) if kind is not NoneType) if union else hint
    return get_origin(kind) or kind


def fitted(hint: Any, value: Any, *, name: str, where: str) -> Any:
    """A plain value as a field of this type takes it: lists become tuples, whole numbers floats.

    Raises:
        RequestError: It is of another kind.
    """
    kind = kind_of(hint)
    texts = get_args(hint) == (str, ...)
    if kind is tuple and isinstance(value, (list, tuple)) and all(isinstance(v, str) or not texts for v in value):
        return _tuples(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind not in _PLAIN or type(value) is kind or (value is None and NoneType in get_args(hint)):
        return value
    wanted = ("a list of strings" if texts else "a list") if kind is tuple else f"of type {kind.__name__}"
    raise RequestError(f"{name} in {where} is {value!r}; it must be {wanted}")


def build(cls: type[T], values: Mapping[str, Any], section: str = "") -> T:
    """A dataclass from plain values, and those that its fields are from tables in them.

    One that has no default is built from nothing where it is not given, so that what it needs is said by its own names.

    Args:
        section: Its dotted name, for errors; empty for the whole config.

    Raises:
        RequestError: A name is unknown or missing, or a value is not allowed; says where.
    """
    where = f"[{section}]" if section else "the config"
    known = {f.name: f for f in fields(cls)}  # pyright: ignore[reportArgumentType]
    for name in values:
        one_of(name, known, f"name in {where}")
    hints = get_type_hints(cls)
    given: dict[str, Any] = {}
    for name, f in known.items():
        kind: type[Any] = kind_of(hints[name])
        if not hasattr(kind, "__dataclass_fields__"):
            if name in values:
                given[name] = fitted(hints[name], values[name], name=name, where=where)
        elif values.get(name) is not None or (f.default is MISSING and f.default_factory is MISSING):
            table, inner = values.get(name) or {}, f"{section}.{name}".lstrip(".")
            if not isinstance(table, Mapping):
                raise RequestError(f"{name} in {where} is {table!r}; it must be a section, [{inner}]")
            given[name] = build(kind, table, inner)
    try:
        return cls(**given)
    except TypeError as exc:
        raise RequestError(f"{where}: {str(exc).partition('()')[2].strip() or exc}") from exc


_ANY = Any, Parameter.empty
_SAID: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_SAID |= dict.fromkeys(_ANY, "anything")


def _takes(kind: Any, value: Any) -> bool:
    origin = get_origin(kind) or kind
    if origin in _ANY:
        return True
    if origin is Literal:
        return value in get_args(kind)
    if origin in (int, float):
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    try:
        return isinstance(value, origin)
    except TypeError:
        # Nothing can be held against it: a protocol, a type variable, a name that only type checkers import.
        return True


def _said(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return " or ".join(map(str, get_args(kind)))
    return "a function" if origin is Callable else _SAID.get(origin) or f"a {getattr(origin, '__name__', origin)}"


_PLAIN = (bool, int, float, str, tuple)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
