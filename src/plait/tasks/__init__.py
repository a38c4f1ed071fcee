"""Problems by family: procedurally generated, exactly graded, with gold traces and a hashed held-out split."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Literal

from plait.errors import RequestError, nearest
from plait.formats.base import Trajectory
from plait.tasks.base import Family, Problem
from plait.tasks.bundle import Bundle
from plait.tasks.control import Control
from plait.tasks.countdown import Countdown
from plait.tasks.expression import Expression
from plait.tasks.long_multiplication import LongMultiplication
from plait.tasks.notation import canonical, spelled
from plait.tasks.product import Product

_FAMILIES: tuple[Family, ...] = (LongMultiplication(), Product(), Expression(), Bundle(), Countdown(), Control())
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}

Split = Literal["train", "held_out"]
_ANSWER = "Answer: "


def family(name: str) -> Family:
    """A family by name.

    Raises:
        RequestError: No family has this name.
    """
    if name not in FAMILIES:
        raise nearest(name, list(FAMILIES), "family")
    return FAMILIES[name]


def held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the 5.1 % that training never sees; a hash of its canonical text decides."""
    return hashlib.md5(prompt.encode()).digest()[0] < 13


def sample(name: str, rng: random.Random, split: Split) -> Problem:
    """Draw a problem of a family from one side of the split."""
    chosen = family(name)
    while True:
        problem = chosen.sample(rng)
        if held_out(problem.prompt) == (split == "held_out"):
            return problem


def problems(name: str, *, seed: int, split: Split) -> Iterator[Problem]:
    """An endless stream of draws, the same for the same seed; small families repeat."""
    rng = random.Random(f"{name}/{split}/{seed}")
    while True:
        yield sample(name, rng, split)


def parse(question: str) -> Problem:
    """The problem that a question asks, in plain words or canonical notation.

    Raises:
        RequestError: No family knows it, or it is outside the trained range; the message lists what is known.
    """
    try:
        text = canonical(question)
        for candidate in _order(text):
            if (problem := candidate.parse(text)) is not None:
                return problem
        reason = f"no family has questions like {text!r}"
    except RequestError as exc:
        reason = str(exc)
    raise RequestError(f"{reason}\n{known()}")


def _order(text: str) -> list[Family]:
    """Families that could read a canonical text: notation tells bundles and Countdown from the rest."""
    if ">" in text:
        return [FAMILIES["countdown"]]
    if ";" in text:
        return [FAMILIES["bundle"]]
    return [FAMILIES[n] for n in ("long_multiplication", "product", "expression", "control")]


def known() -> str:
    """What the families know, a line each."""
    return "What the embedded model was trained on:\n" + "\n".join(f"  {f.name}: {f.about}" for f in _FAMILIES)


def gold(problem: Problem, *, parallel: bool) -> Trajectory:
    """The gold solution: with blocks where forking is right and wanted, else on one line."""
    chosen = family(problem.family)
    return chosen.parallel(problem) if parallel and problem.forks else chosen.serial(problem)


def answer_of(text: str) -> str | None:
    """What a response gives as its answer: the rest of the line after the last `Answer: `; None where there is none."""
    _, found, rest = text.rpartition(_ANSWER)
    return rest.partition("\n")[0].partition("<eos>")[0].strip() if found else None


def grade(problem: Problem, text: str) -> bool:
    """Whether a response is right."""
    given = answer_of(text)
    return given is not None and family(problem.family).grade(problem, given)


__all__ = [
    "FAMILIES",
    "Family",
    "Problem",
    "Split",
    "answer_of",
    "family",
    "gold",
    "grade",
    "held_out",
    "known",
    "parse",
    "problems",
    "sample",
    "spelled",
]
