"""Trajectory formats by name: Plait's own, each one file, and those of installed packages (`plait.formats`)."""

from __future__ import annotations

from typing import Any, get_args

from plait.errors import RequestError
from plait.formats.base import (
    Await,
    Block,
    Branch,
    BudgetLevels,
    Caps,
    Fork,
    Join,
    Malformed,
    Part,
    Return,
    Spawn,
    ThreadOutcome,
    Trajectory,
    TrajectoryFormat,
    Wait,
)
from plait.formats.render import render, trajectory_of
from plait.formats.text import CharTokenizer
from plait.registry import Registry
from plait.settings import of_type, one_of, parameters
from plait.tokenizer import Tokenizer
from plait.types import JoinKind


def _check(cls: type[Any]) -> None:
    """What is asked of a class before there is a vocabulary to open it over."""
    one_of(cls.join_kind, get_args(JoinKind), "join_kind")
    if not all(isinstance(tag, str) for tag in cls.tags()):
        raise TypeError(f"tags() gives {cls.tags()!r}; it must be texts")


FORMATS: Registry[type[Any]] = Registry(
    "plait.formats",
    "format",
    {
        "sequential": "plait.formats.sequential:Sequential",
        "threadweaver": "plait.formats.threadweaver:ThreadWeaver",
        "multiverse": "plait.formats.multiverse:Multiverse",
        "plait": "plait.formats.plait:Plait",
        "npr": "plait.formats.npr:NPR",
        "medverse": "plait.formats.medverse:MedVerse",
        "parallel_r1": "plait.formats.parallel_r1:ParallelR1",
        "parathinker": "plait.formats.parathinker:ParaThinker",
        "apr": "plait.formats.apr:APR",
        "asyncthink": "plait.formats.asyncthink:AsyncThink",
    },
    of=TrajectoryFormat,
    needs=("name", "paper", "join_kind"),
    check=_check,
)


def format_class(name: str) -> type[Any]:
    """The class of a format.

    Raises:
        RequestError: No format has this name, or the package that brings it is broken.
    """
    return FORMATS[name]


def open_format(name: str, tokenizer: Tokenizer, **options: Any) -> TrajectoryFormat:
    """A format over a vocabulary.

    Raises:
        RequestError: No format has this name, it has no such option, or the vocabulary lacks a control token it needs.
    """
    of_type(str, name, name="the name of a format")
    if not hasattr(tokenizer, "control_id"):
        raise RequestError(f"the tokenizer is {tokenizer!r:.60}; it must be one with control ids: `model.tokenizer`")
    made = format_class(name)
    if options:
        _, *known = parameters(made).values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
            for option in options:
                one_of(option, [parameter.name for parameter in known], f"option of the {name} format")
    return made(tokenizer, **options)


def text_format(name: str, **options: Any) -> TrajectoryFormat:
    """A format over a vocabulary that can say anything: to read and write text, without a model.

    Raises:
        RequestError: No format has this name.
    """
    return open_format(name, CharTokenizer(format_class(name).tags()), **options)


__all__ = [
    "FORMATS",
    "Await",
    "Block",
    "Branch",
    "BudgetLevels",
    "Caps",
    "CharTokenizer",
    "Fork",
    "Join",
    "Malformed",
    "Part",
    "Return",
    "Spawn",
    "ThreadOutcome",
    "Trajectory",
    "TrajectoryFormat",
    "Wait",
    "format_class",
    "open_format",
    "render",
    "text_format",
    "trajectory_of",
]
