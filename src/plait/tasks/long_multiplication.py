"""Long multiplication: threads are the partial products, one for each non-zero digit of the second number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from plait.errors import RequestError
from plait.formats.base import Trajectory
from plait.tasks.base import Problem
from plait.tasks.notation import Product, parse_expression, spelled
from plait.tasks.terms import number
from plait.tasks.worked import Products, addend, answer


@dataclass(frozen=True, kw_only=True)
class LongMultiplication:
    name: ClassVar = "long_multiplication"
    about: ClassVar = "a product of two numbers, 1 to 5 digits times 2 to 5 digits: What is 347 * 526?"

    first: Sequence[float] = (4, 8, 18, 35, 35)
    """How often the first number has 1, 2, 3, ... digits."""
    second: Sequence[float] = (0, 11, 12, 32, 45)
    """The same of the second number; at least 2."""
    zeros: float = 0.2
    """Share of problems whose second number has zeros inside: rows that disappear."""

    def sample(self, rng: random.Random) -> Problem:
        (la,), (lb,) = (rng.choices(range(1, len(w) + 1), w) for w in (self.first, self.second))
        a, digits = number(rng, la), [int(d) for d in str(number(rng, lb))]
        if rng.random() < self.zeros:
            # Zeros make rows disappear: the boundary is not the number of visible digits.
            for i in rng.sample(range(1, lb), rng.randint(1, lb - 1)):
                digits[i] = 0
        return self._problem(a, int("".join(map(str, digits))))

    def _problem(self, a: int, b: int) -> Problem:
        work = Products(((a, b),), final=True)
        shape = {"digits": [len(str(a)), len(str(b))], "rows": len(work.rows)}
        return Problem(
            family=self.name,
            prompt=f"{a}*{b}?",
            question=f"What is {a} * {b}?",
            answer=str(a * b),
            forks=work.worth(),
            shape={**shape, "serial_cost": work.serial_cost(), "parallel_cost": work.parallel_cost()},
        )

    def parse(self, text: str) -> Problem | None:
        match parse_expression(text.rstrip("?")):
            case Product(factors=(int(a), int(b))) if b >= 10:
                if not (2 <= a < 100_000 and b < 100_000):
                    raise RequestError(f"{a} * {b} is outside the trained range: {self.about}")
                return self._problem(a, b)
            case _:
                return None

    def grade(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer

    def _numbers(self, problem: Problem) -> tuple[int, int]:
        a, b = problem.prompt.rstrip("?").split("*")
        return int(a), int(b)

    def told(self, problem: Problem) -> tuple[tuple[str, str], ...]:
        a, b = self._numbers(problem)
        parts = [(a, int(label)) for label in Products(((a, b),), final=True).labels]
        return tuple((spelled(f"{a}*{n}?").rstrip("?"), addend(a * n)) for a, n in parts)

    def serial(self, problem: Problem) -> Trajectory:
        return (Products((self._numbers(problem),), final=True).serial(), *answer(problem.answer))

    def parallel(self, problem: Problem) -> Trajectory:
        return (Products((self._numbers(problem),), final=True).parallel(), *answer(problem.answer))
