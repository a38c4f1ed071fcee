"""Problems by family: procedurally generated, exactly graded, with gold traces and a hashed held-out split."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, Literal

from plait.errors import RequestError, nearest
from plait.formats.base import Block, Return, Trajectory
from plait.registry import Registry
from plait.tasks.base import Budgeted, Family, Problem, Told
from plait.tasks.bundle import Bundle
from plait.tasks.control import Control
from plait.tasks.countdown import Countdown
from plait.tasks.countdown_search import CountdownSearch
from plait.tasks.expression import Expression
from plait.tasks.long_multiplication import LongMultiplication
from plait.tasks.nested import Nested
from plait.tasks.notation import canonical, spelled
from plait.tasks.product import Product

_FAMILIES: tuple[Family, ...] = (LongMultiplication(), Product(), Expression(), Bundle(), Countdown(), Control())
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
"""What the embedded models are trained on."""
RESEARCH: dict[str, Family] = {family.name: family for family in (CountdownSearch(), Nested())}
"""For comparisons of formats and with published systems; no embedded model knows them."""
TASKS: Registry[Callable[..., Family]] = Registry(
    "plait.tasks",
    "family",
    {name: type(family) for name, family in (FAMILIES | RESEARCH).items()},
    of=Family,
    needs=("name", "about", "__dataclass_fields__"),
    check=lambda cls: cls(),
)
"""The classes of all families: these, and those of installed packages."""

Split = Literal["train", "held_out"]
_ANSWER = "Answer: "


def family(name: str, knobs: Mapping[str, Any] | None = None) -> Family:
    """A family by name.

    Args:
        name: One of `TASKS`.
        knobs: What its problems are drawn from, by the names of its fields; by default the range that the embedded
            model was trained on.

    Raises:
        RequestError: No family has this name, it has no such knob or not with such a value, or the package that brings
            it is broken.
    """
    found = TASKS[name]()
    if not knobs:
        return found
    known_knobs = [f.name for f in fields(found)]
    for knob in knobs:
        if knob not in known_knobs:
            raise nearest(knob, known_knobs, f"knob of {name}")
    chosen = replace(found, **{knob: _tuples(value) for knob, value in knobs.items()})
    try:
        for seed in range(8):
            chosen.sample(random.Random(seed))
    except (TypeError, ValueError, IndexError) as exc:
        given = ", ".join(f"{knob}={value}" for knob, value in knobs.items())
        usual = ", ".join(f"{knob}={getattr(found, knob)}" for knob in knobs)
        raise RequestError(f"{name} cannot be drawn with {given} ({exc}); as trained: {usual}") from exc
    return chosen


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the 5.1 % that training never sees; a hash of its canonical text decides."""
    return hashlib.md5(prompt.encode()).digest()[0] < 13


def sample(chosen: str | Family, rng: random.Random, split: Split) -> Problem:
    """Draw a problem of a family, given by name or with its knobs set, from one side of the split."""
    chosen = family(chosen) if isinstance(chosen, str) else chosen
    while True:
        problem = chosen.sample(rng)
        if held_out(problem.prompt) == (split == "held_out"):
            return problem


def problems(chosen: str | Family, *, seed: int, split: Split) -> Iterator[Problem]:
    """An endless stream of draws, the same for the same seed; small families repeat."""
    chosen = family(chosen) if isinstance(chosen, str) else chosen
    rng = random.Random(f"{chosen.name}/{split}/{seed}")
    while True:
        yield sample(chosen, rng, split)


def parse(question: str, families: Iterable[str] = ()) -> Problem:
    """The problem that a question asks, in plain words or canonical notation.

    Args:
        question: What is asked.
        families: Those that the asked model was trained on: of these, what others brought is asked before Plait's own,
            for it may use the same notation.

    Raises:
        RequestError: No family knows it, or it is outside the trained range; the message lists what is known.
    """
    for name in families:
        if name not in TASKS.own and (problem := family(name).parse(question)) is not None:
            return problem
    try:
        text = canonical(question)
        for candidate in _order(text):
            if (problem := candidate.parse(text)) is not None:
                return problem
        reason = f"no family has questions like {text!r}"
    except RequestError as exc:
        reason = str(exc)
    for name, _, found in _others():
        if not isinstance(found, Exception) and (problem := family(name).parse(question)) is not None:
            return problem
    raise RequestError(f"{reason}\n{known()}")


def _order(text: str) -> list[Family]:
    """Families that could read a canonical text: notation tells bundles and Countdown from the rest."""
    if ">" in text:
        return [FAMILIES["countdown"]]
    if ";" in text:
        return [FAMILIES["bundle"]]
    return [FAMILIES[n] for n in ("long_multiplication", "product", "expression", "control")]


def known() -> str:
    """A question of each of Plait's families, which is how its `about` ends, and what families others bring."""
    lines = ["The embedded model was trained on questions like these (`plait tasks` says their ranges):"]
    lines += [f"  {f.about.rpartition(': ')[2]}" for f in _FAMILIES]
    others = [f"  {name}: {getattr(found, 'about', found)} ({source})" for name, source, found in _others()]
    return "\n".join([*lines, *(["Families of other packages:", *others] if others else [])])


def _others() -> list[tuple[str, str, Any]]:
    """What is not Plait's: name, where it comes from, class or what is wrong with it."""
    return [row for row in TASKS.listed() if row[1]]


def gold(
    problem: Problem, *, parallel: bool, max_threads: int | None = None, plait: bool = False, fresh: bool = False
) -> Trajectory:
    """The gold solution: with blocks where forking is right and wanted, else on one line.

    Args:
        problem: What is solved.
        parallel: False: on one line.
        max_threads: Threads that it may fork; None: as many as help. A family that is not `Budgeted` knows one number
            of threads for each problem, and is on one line where there are fewer.
        plait: Whether what only the plait format has may be used.
        fresh: Whether threads do not see their parent: they are told all that they need, and their last line is what
            they return.

    Raises:
        RequestError: `fresh`, and the family cannot tell its threads what they need.
    """
    chosen = family(problem.family)
    if not parallel or not problem.forks:
        return chosen.serial(problem)
    if isinstance(chosen, Budgeted):
        trace = chosen.within(problem, max_threads, plait=plait)
    else:
        trace = chosen.parallel(problem)
        if max_threads is not None and num_threads(trace) > max_threads:
            return chosen.serial(problem)
        if fresh and not isinstance(chosen, Told):
            raise RequestError(f"threads of {chosen.name} need to see their parent; this format lets them start afresh")
    if isinstance(chosen, Told) and (fresh or (plait and not isinstance(chosen, Budgeted))):
        return _returning(trace, chosen.told(problem), fresh=fresh)
    return trace


def _returning(trace: Trajectory, told: tuple[tuple[str, str], ...], *, fresh: bool) -> Trajectory:
    """A solution whose threads return a value: as a conclusion, or, where they start afresh, as their last line."""
    out: Trajectory = ()
    for part in trace:
        if not isinstance(part, Block):
            out += (part,)
            continue
        threads: list[Trajectory] = []
        for thread, (_, value) in zip(part.threads, told, strict=True):
            work = "".join(map(str, thread)).removesuffix(value)
            threads.append((f"{work}\n{value}",) if fresh else (work, Return(value)))
        if not fresh:
            out += (replace(part, threads=tuple(threads)),)
            continue
        out += (Block(outlines=tuple(message for message, _ in told), threads=tuple(threads)),)
        out += (part.conclusion,) if part.conclusion else ()
    return out


def num_threads(trace: Trajectory) -> int:
    """Threads that a trajectory forks, those of threads included."""
    return sum(1 + num_threads(thread) for part in trace if isinstance(part, Block) for thread in part.threads)


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
    "RESEARCH",
    "TASKS",
    "Budgeted",
    "Family",
    "Problem",
    "Split",
    "Told",
    "answer_of",
    "family",
    "gold",
    "grade",
    "held_out",
    "known",
    "num_threads",
    "parse",
    "problems",
    "sample",
    "spelled",
]
