"""A family of problems: generate, ask, solve in gold traces, grade. Knows nothing of engines, formats or token ids.

Every problem has one canonical prompt, an exact grader, and two gold solutions of the same work: `serial` on one
line, and `parallel` with blocks of threads. Forking is right where the parallel one has the shorter critical path
by a stated margin (`worked.FORK_MARGIN`), counted on what is written when it is decided (digit counts); Countdown forks
whenever there are more than two numbers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from plait.formats.base import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question with its exact answer."""

    family: str
    prompt: str
    """Canonical text, as a model reads it: `347*526?`."""
    question: str
    """The same in plain words: `What is 347 * 526?`."""
    answer: str
    """As a model should write it after `Answer: `; where several are right, one of them."""
    forks: bool
    """Whether forking is the right decision."""
    shape: dict[str, Any] = field(default_factory=dict[str, Any])
    """The difficulty knobs this problem was drawn with, and its costs in tokens."""


class Family(Protocol):
    """One family of problems: a frozen dataclass whose fields are its difficulty knobs, by default as trained."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    about: ClassVar[str]
    """One line: the range that is trained, a colon, and a question."""

    def sample(self, rng: random.Random) -> Problem:
        """Draw a problem from the range that the knobs say, train and held-out alike."""
        ...

    def parse(self, text: str) -> Problem | None:
        """The problem that a canonical or natural question asks; None where it is not of this family.

        Raises:
            RequestError: It is of this family but outside the trained range; the message says what the range is.
        """
        ...

    def grade(self, problem: Problem, answer: str) -> bool:
        """Whether an answer is right; any valid one where several are."""
        ...

    def serial(self, problem: Problem) -> Trajectory:
        """The gold solution on one line."""
        ...

    def parallel(self, problem: Problem) -> Trajectory:
        """The gold solution with blocks of threads."""
        ...


@runtime_checkable
class Told(Protocol):
    """A family whose flat solutions have one block, of threads that can be told all they need and return a value."""

    def told(self, problem: Problem) -> tuple[tuple[str, str], ...]:
        """For each thread what it is told where it does not see its parent, and what it returns.

        Whoever is told the same writes and returns the same, in whatever family: a term alone asks for a row of its
        parent's sum, `347*52=` for an answer. A text that ends in what it returns is written without that end before
        it.
        """
        ...


@runtime_checkable
class Budgeted(Protocol):
    """A family whose gold solutions use the threads that they are given, and what only the plait format has."""

    def within(self, problem: Problem, max_threads: int | None, *, plait: bool) -> Trajectory:
        """The gold solution that forks at most so many threads.

        Args:
            problem: One of this family.
            max_threads: In the whole run; None: as many as help. 0: one line.
            plait: True: with dependencies, nesting, races and conclusions; False: flat blocks, for every other format.
        """
        ...
