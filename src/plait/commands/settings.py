"""Values set on the command line: `--set section.key=value`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plait import tasks
from plait.errors import RequestError
from plait.settings import assignment


def overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Values by dotted name.

    >>> overrides(["schedule.tokens=1000", "data.format=threadweaver"])
    {'schedule.tokens': 1000, 'data.format': 'threadweaver'}

    Raises:
        RequestError: One is not `name=value`.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        assigned = assignment(setting)
        if assigned is None:
            raise RequestError(f"{setting!r} is not of the form NAME=VALUE")
        values.update([assigned])
    return values


def with_knobs(families: Sequence[str], settings: Sequence[str]) -> list[tasks.Family]:
    """Families with their knobs set.

    Args:
        families: Their names.
        settings: `family.knob=value`.

    Raises:
        RequestError: A setting is not of this form, or is for another family, a knob that is not there, or a value
            that it cannot have.
    """
    knobs: dict[str, dict[str, Any]] = {name: {} for name in families}
    for name, value in overrides(settings).items():
        family, dot, knob = name.partition(".")
        if not dot or family not in knobs:
            raise RequestError(f"{name!r} sets nothing here; use FAMILY.KNOB=VALUE with one of {', '.join(knobs)}")
        knobs[family][knob] = value
    return [tasks.family(name, chosen) for name, chosen in knobs.items()]
