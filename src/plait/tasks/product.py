"""Products of several factors in two stages, after the shape of ThreadWeaver's multiplication task (arXiv:2512.07843).

Stage 1 pairs the factors off and works their partial products side by side; stage 2 multiplies the results, again with
a thread for each partial product. A stage is worked in line where a block would not pay.
"""

from __future__ import annotations

import random

from plait.errors import RequestError
from plait.formats.base import Block, Trajectory
from plait.tasks.base import Problem
from plait.tasks.notation import Product as ProductOf
from plait.tasks.notation import parse_expression
from plait.tasks.terms import number
from plait.tasks.worked import Products, answer

_SHAPES = {(2, 2, 2): 1, (3, 3, 3): 2, (2, 2, 2, 2): 4, (3, 2, 2, 2): 3, (2, 2, 3, 2): 4}


class Product:
    name = "product"
    about = (
        "a product of three 2-digit or three 3-digit numbers, or of four 2-digit ones (the first or third may have 3): "
        "What is 34 * 27 * 61 * 58?"
    )

    def sample(self, rng: random.Random) -> Problem:
        (shape,) = rng.choices(list(_SHAPES), list(_SHAPES.values()))
        return self._problem(tuple(number(rng, digits) for digits in shape))

    def _problem(self, factors: tuple[int, ...]) -> Problem:
        first, second = self._stages(factors)
        value = second.pairs[0][0] * second.pairs[0][1]
        return Problem(
            family=self.name,
            prompt="*".join(map(str, factors)) + "?",
            question=f"What is {' * '.join(map(str, factors))}?",
            answer=str(value),
            forks=first.worth() or second.worth(),
            shape={
                "digits": [len(str(f)) for f in factors],
                "serial_cost": first.serial_cost() + second.serial_cost(),
                "parallel_cost": sum(min(s.serial_cost(), s.parallel_cost()) for s in (first, second)),
            },
        )

    def _stages(self, factors: tuple[int, ...]) -> tuple[Products, Products]:
        if len(factors) == 3:
            a, b, c = factors
            return Products(((a, b),), final=False), Products(((a * b, c),), final=True)
        a, b, c, d = factors
        return Products(((a, b), (c, d)), final=False), Products(((a * b, c * d),), final=True)

    def parse(self, text: str) -> Problem | None:
        match parse_expression(text.rstrip("?")):
            case ProductOf(factors=factors) if len(factors) > 2 and all(isinstance(f, int) for f in factors):
                numbers = tuple(f for f in factors if isinstance(f, int))
                if tuple(len(str(n)) for n in numbers) not in _SHAPES:
                    known = ", ".join(" x ".join(map(str, s)) for s in _SHAPES)
                    raise RequestError(f"{text} is outside the trained range: {self.about} (digits: {known})")
                return self._problem(numbers)
            case _:
                return None

    def grade(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer

    def _trajectory(self, problem: Problem, *, parallel: bool) -> Trajectory:
        first, second = self._stages(tuple(map(int, problem.prompt.rstrip("?").split("*"))))
        (p, q) = second.pairs[0]
        works: list[str | Block] = [stage.work() if parallel else stage.serial() for stage in (first, second)]
        return (works[0], f";{p}*{q};", works[1], *answer(problem.answer))

    def serial(self, problem: Problem) -> Trajectory:
        return self._trajectory(problem, parallel=False)

    def parallel(self, problem: Problem) -> Trajectory:
        return self._trajectory(problem, parallel=True)
