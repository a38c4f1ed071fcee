"""Arithmetic expressions with independent subtrees: sums of products and of bracketed sums times a number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from plait.errors import RequestError
from plait.formats.base import Block, Trajectory
from plait.tasks.base import Problem
from plait.tasks.notation import Sum, parse_expression, spelled
from plait.tasks.terms import Term, as_term, number
from plait.tasks.worked import addend, answer, answer_cost, block_cost, columns, columns_cost, worth


@dataclass(frozen=True, kw_only=True)
class Expression:
    name: ClassVar = "expression"
    about: ClassVar = (
        "a sum of 2 to 4 terms, each a number times one of up to 2 digits, where two numbers in brackets may stand for "
        "one; the numbers all have 2 or all have 3 digits, or up to 2 where every factor has one: "
        "What is 34 * 27 + (58 + 61) * 16 + 90 * 41?"
    )

    terms: Sequence[float] = (0, 13, 25, 62)
    """How often there are 1, 2, 3, ... terms; at least 2."""
    digits: Sequence[Sequence[int]] = ((1, 1, 2), (2,), (2,), (3,), (3,), (3,))
    """Kinds of problems: digits that the numbers of one may have."""
    brackets: float = 0.15
    """Share of terms with two numbers in brackets."""

    def sample(self, rng: random.Random) -> Problem:
        (num_terms,) = rng.choices(range(1, len(self.terms) + 1), self.terms)
        digits = rng.choice(self.digits)
        return self._problem(tuple(self._term(rng, digits) for _ in range(num_terms)))

    def _term(self, rng: random.Random, digits: Sequence[int]) -> Term:
        num_addends = 2 if rng.random() < self.brackets else 1
        addends = tuple(number(rng, rng.choice(digits)) for _ in range(num_addends))
        return Term(addends, number(rng, 1 if digits[0] == 1 or rng.random() < 0.05 else 2))

    def _problem(self, terms: tuple[Term, ...]) -> Problem:
        costs = [t.cost() for t in terms]
        width = max(t.answer_cost() - 2 for t in terms) + 1
        tail = columns_cost(width) + answer_cost(width)
        serial = sum(costs) + len(costs) - 1 + tail
        parallel = block_cost([t.label for t in terms], costs) + tail
        return Problem(
            family=self.name,
            prompt="+".join(t.text for t in terms) + "?",
            question=f"What is {' + '.join(t.text.replace('*', ' * ').replace('+', ' + ') for t in terms)}?",
            answer=str(sum(t.value for t in terms)),
            forks=worth(serial, parallel),
            shape={"terms": len(terms), "serial_cost": serial, "parallel_cost": parallel},
        )

    def _terms(self, text: str) -> list[Term | None]:
        match parse_expression(text.rstrip("?")):
            case Sum(terms=parts) if not all(isinstance(p, int) for p in parts):
                return [as_term(p) for p in parts]
            case _:
                return []

    def parse(self, text: str) -> Problem | None:
        terms = self._terms(text)
        known = [t for t in terms if t is not None and t.factor is not None]
        if not terms or len(known) < len(terms):
            return None
        numbers = [n for t in known for n in t.addends]
        factors = [t.factor or 0 for t in known]
        digits = {len(str(n)) for n in numbers}
        inside = (
            2 <= len(known) <= 4
            and all(len(t.addends) <= 2 for t in known)
            and min(*numbers, *factors) >= 2
            and max(factors) <= 99
            and (digits in ({2}, {3}) or (max(digits) <= 2 and max(factors) <= 9))
        )
        if not inside:
            raise RequestError(f"{text} is outside the trained range: {self.about}")
        return self._problem(tuple(known))

    def grade(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer

    def _known_terms(self, problem: Problem) -> list[Term]:
        return [t for t in self._terms(problem.prompt) if t is not None]

    def told(self, problem: Problem) -> tuple[tuple[str, str], ...]:
        return tuple((spelled(f"{t.text}?").rstrip("?"), addend(t.value)) for t in self._known_terms(problem))

    def serial(self, problem: Problem) -> Trajectory:
        terms = self._known_terms(problem)
        total = columns([t.value for t in terms])
        return (";".join([*(t.work() for t in terms), total]), *answer(problem.answer))

    def parallel(self, problem: Problem) -> Trajectory:
        terms = self._known_terms(problem)
        block = Block(
            outlines=tuple(t.label for t in terms),
            threads=tuple((t.work(),) for t in terms),
            conclusion=columns([t.value for t in terms]),
        )
        return (block, *answer(problem.answer))
