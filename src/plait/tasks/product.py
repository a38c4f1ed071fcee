"""Products of several factors in two stages, after the shape of ThreadWeaver's multiplication task (arXiv:2512.07843).

A stage pairs the factors off and works all their partial products side by side; the next one multiplies its results,
until one is left. A stage is worked in line where a block would not pay.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from plait.errors import RequestError
from plait.formats.base import Block, Trajectory
from plait.tasks.base import Problem
from plait.tasks.notation import Product as ProductOf
from plait.tasks.notation import parse_expression
from plait.tasks.terms import number
from plait.tasks.worked import Products, answer

_SHAPES = {(2, 2, 2): 1, (3, 3, 3): 2, (2, 2, 2, 2): 4, (3, 2, 2, 2): 3, (2, 2, 3, 2): 4}


@dataclass(frozen=True, kw_only=True)
class Product:
    name: ClassVar = "product"
    about: ClassVar = (
        "a product of three 2-digit or three 3-digit numbers, or of four 2-digit ones (the first or third may have 3): "
        "What is 34 * 27 * 61 * 58?"
    )

    shapes: Sequence[Sequence[int]] = tuple(_SHAPES)
    """Digits of the factors, a list for each kind of problem."""
    weights: Sequence[float] = tuple(_SHAPES.values())
    """How often each of the shapes is drawn."""
    factors: tuple[int, int] | None = None
    """Fewest and most factors, each of them any number from 2 to `up_to`; then the shapes do not count."""
    up_to: int = 1000

    def sample(self, rng: random.Random) -> Problem:
        if self.factors is not None:
            return self._problem(tuple(rng.randint(2, self.up_to) for _ in range(rng.randint(*self.factors))))
        (shape,) = rng.choices(self.shapes, self.weights)
        return self._problem(tuple(number(rng, digits) for digits in shape))

    def _problem(self, factors: tuple[int, ...]) -> Problem:
        stages = self._stages(factors)
        return Problem(
            family=self.name,
            prompt="*".join(map(str, factors)) + "?",
            question=f"What is {' * '.join(map(str, factors))}?",
            answer=str(prod(factors)),
            forks=any(stage.worth() for stage, _ in stages),
            shape={
                "digits": [len(str(f)) for f in factors],
                "serial_cost": sum(stage.serial_cost() for stage, _ in stages),
                "parallel_cost": sum(min(stage.serial_cost(), stage.parallel_cost()) for stage, _ in stages),
            },
        )

    def _stages(self, factors: tuple[int, ...]) -> list[tuple[Products, tuple[int, ...]]]:
        """Every stage, with the factors that it leaves to the next."""
        stages: list[tuple[Products, tuple[int, ...]]] = []
        while len(factors) > 1:
            pairs = tuple(zip(factors[::2], factors[1::2], strict=False))
            left = (*(a * b for a, b in pairs), *factors[2 * len(pairs) :])
            stages.append((Products(pairs, final=len(left) == 1), left))
            factors = left
        return stages

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
        steps: list[str | Block] = []
        for stage, left in self._stages(tuple(map(int, problem.prompt.rstrip("?").split("*")))):
            steps.append(stage.work() if parallel else stage.serial())
            if len(left) > 1:
                steps.append(f";{'*'.join(map(str, left))};")
        return (*steps, *answer(problem.answer))

    def serial(self, problem: Problem) -> Trajectory:
        return self._trajectory(problem, parallel=False)

    def parallel(self, problem: Problem) -> Trajectory:
        return self._trajectory(problem, parallel=True)
