"""Expressions in brackets in brackets: sums of products whose factors are sums of products, to any depth.

On one line, a bracket is worked where it stands. Flat, there is a thread for each term of the outermost sum, which
works its brackets in line. Nested, every sum is a block of its own, in the thread that needs it, and a thread returns
its value: the critical path is that of the deepest branch alone. Knows nothing of engines, formats or token ids.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from plait.formats.base import Block, Return, Trajectory
from plait.tasks.base import Problem
from plait.tasks.notation import Expression, Product, Sum, parse_expression, spelled
from plait.tasks.terms import number
from plait.tasks.worked import addend, answer, columns, found, row


@dataclass(frozen=True, kw_only=True)
class Nested:
    name: ClassVar = "nested"
    about: ClassVar = (
        "sums of 2 or 3 terms, each a number times a digit, where a sum of the same kind in brackets may stand for the "
        "number, up to three sums deep: What is ((12 * 3 + 45 * 6) * 7 + 81 * 4) * 5 + (78 * 9 + 23 * 4) * 5?"
    )

    depths: Sequence[float] = (0, 50, 50)
    """How often the sums are 1, 2, 3, ... deep."""
    terms: tuple[int, int] = (2, 3)
    """Fewest and most terms of a sum."""
    digits: tuple[int, int] = (1, 2)
    """Fewest and most digits of a number."""
    deep: float = 0.5
    """How often a term is as deep as its sum allows; one of each sum always is."""

    def sample(self, rng: random.Random) -> Problem:
        (depth,) = rng.choices(range(1, len(self.depths) + 1), self.depths)
        return self._problem(_text(self._sum(rng, depth)))

    def _sum(self, rng: random.Random, depth: int) -> Sum:
        count = rng.randint(*self.terms)
        always = rng.randrange(count)
        return Sum(tuple(self._term(rng, depth, i == always) for i in range(count)))

    def _term(self, rng: random.Random, depth: int, always: bool) -> Product:
        deep = depth > 1 and (always or rng.random() < self.deep)
        first = self._sum(rng, depth - 1) if deep else number(rng, rng.randint(*self.digits))
        return Product((first, number(rng, 1)))

    def _problem(self, text: str) -> Problem:
        whole = _parsed(text)
        return Problem(
            family=self.name,
            prompt=f"{text}?",
            question=f"What is {text.replace('*', ' * ').replace('+', ' + ')}?",
            answer=str(whole.value),
            forks=True,
            shape={"depth": whole.depth, "leaves": whole.leaves},
        )

    def parse(self, text: str) -> Problem | None:
        return None

    def grade(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer

    def serial(self, problem: Problem) -> Trajectory:
        whole = _parsed(problem.prompt.rstrip("?"))
        return (whole.in_line(), *answer(problem.answer))

    def parallel(self, problem: Problem) -> Trajectory:
        return self.within(problem, None, plait=False)

    def within(self, problem: Problem, max_threads: int | None, *, plait: bool) -> Trajectory:
        """The gold solution; where threads are limited and there are too few for all sums, on one line."""
        whole = _parsed(problem.prompt.rstrip("?"))
        block = whole.block(nested=plait)
        if max_threads is not None and _count(block) > max_threads:
            return self.serial(problem)
        return (block, *answer(problem.answer))

    def told(self, problem: Problem) -> tuple[tuple[str, str], ...]:
        terms = _parsed(problem.prompt.rstrip("?")).terms
        return tuple((spelled(f"{term.text}?").rstrip("?"), addend(term.value)) for term in terms)


def _count(block: Block) -> int:
    return sum(1 + sum(_count(b) for b in thread if isinstance(b, Block)) for thread in block.threads)


@dataclass(frozen=True, slots=True)
class _Term:
    """A number or a sum in brackets, times a digit."""

    first: int | _Sum
    factor: int

    @property
    def value(self) -> int:
        return (self.first if isinstance(self.first, int) else self.first.value) * self.factor

    @property
    def text(self) -> str:
        return f"{self.first}*{self.factor}" if isinstance(self.first, int) else f"({self.first.text})*{self.factor}"

    @property
    def label(self) -> str:
        """Its first number: enough to find it in the prompt."""
        return str(self.first) if isinstance(self.first, int) else self.first.terms[0].label

    def work(self) -> str:
        """On one line, its value not yet restated."""
        if isinstance(self.first, int):
            return row(self.first, self.factor, 0)
        return f"{self.first.in_line()}{found(self.first.value)};{row(self.first.value, self.factor, 0)}"

    def thread(self) -> Trajectory:
        """With a block for its brackets."""
        told = Return(addend(self.value))
        if isinstance(self.first, int):
            return (self.work(), told)
        rest = f"{found(self.first.value)};{row(self.first.value, self.factor, 0)}"
        return (self.first.block(nested=True), rest, told)


@dataclass(frozen=True, slots=True)
class _Sum:
    terms: tuple[_Term, ...]

    @property
    def value(self) -> int:
        return sum(term.value for term in self.terms)

    @property
    def text(self) -> str:
        return "+".join(term.text for term in self.terms)

    @property
    def depth(self) -> int:
        return 1 + max((term.first.depth for term in self.terms if not isinstance(term.first, int)), default=0)

    @property
    def leaves(self) -> int:
        return sum(1 if isinstance(term.first, int) else term.first.leaves for term in self.terms)

    def columns(self) -> str:
        return columns([term.value for term in self.terms])

    def in_line(self) -> str:
        """Its terms in brackets, then their sum, not yet restated."""
        rows = ";".join(f"{term.work()}{addend(term.value)}" for term in self.terms)
        return f"({rows}){self.columns()}"

    def block(self, *, nested: bool) -> Block:
        """A thread for each term; nested, with blocks inside."""
        threads = tuple(t.thread() if nested else (f"{t.work()}{addend(t.value)}",) for t in self.terms)
        return Block(outlines=tuple(t.label for t in self.terms), threads=threads, conclusion=self.columns())


def _parsed(text: str) -> _Sum:
    found = _of(parse_expression(text))
    assert isinstance(found, _Sum), "not an expression of this family"
    return found


def _of(expression: Expression) -> int | _Sum:
    if isinstance(expression, int):
        return expression
    assert isinstance(expression, Sum), "not an expression of this family"
    terms: list[_Term] = []
    for term in expression.terms:
        assert isinstance(term, Product), "not an expression of this family"
        first, factor = term.factors
        assert isinstance(factor, int), "not an expression of this family"
        terms.append(_Term(_of(first), factor))
    return _Sum(tuple(terms))


def _text(expression: Expression) -> str:
    match expression:
        case int():
            return str(expression)
        case Sum(terms=terms):
            return "+".join(map(_text, terms))
        case Product(factors=factors):
            return "*".join(_text(f) if isinstance(f, int) else f"({_text(f)})" for f in factors)


__all__ = ["Nested"]
