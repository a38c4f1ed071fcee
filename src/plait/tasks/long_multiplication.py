"""Long multiplication: threads are the partial products, one for each non-zero digit of the second number."""

from __future__ import annotations

import random

from plait.errors import RequestError
from plait.formats.base import Trajectory
from plait.tasks.base import Problem
from plait.tasks.notation import Product, parse_expression
from plait.tasks.terms import number
from plait.tasks.worked import Products, answer

_DIGITS_A = {1: 4, 2: 8, 3: 18, 4: 35, 5: 35}
_DIGITS_B = {2: 11, 3: 12, 4: 32, 5: 45}


class LongMultiplication:
    name = "long_multiplication"
    about = "a product of two numbers, 1 to 5 digits times 2 to 5 digits: What is 347 * 526?"

    def sample(self, rng: random.Random) -> Problem:
        (la,), (lb,) = (rng.choices(list(d), list(d.values())) for d in (_DIGITS_A, _DIGITS_B))
        a, digits = number(rng, la), [int(d) for d in str(number(rng, lb))]
        if rng.random() < 0.2:
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

    def serial(self, problem: Problem) -> Trajectory:
        return (Products((self._numbers(problem),), final=True).serial(), *answer(problem.answer))

    def parallel(self, problem: Problem) -> Trajectory:
        return (Products((self._numbers(problem),), final=True).parallel(), *answer(problem.answer))
