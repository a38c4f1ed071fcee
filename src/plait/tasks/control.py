"""Sequential controls: problems on which forking is wrong, because they are one step or each step needs the last."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from plait.errors import RequestError
from plait.formats.base import Trajectory
from plait.tasks.base import Problem
from plait.tasks.notation import Expression, Product, Sum, parse_expression
from plait.tasks.terms import number
from plait.tasks.worked import Products, add, answer, found

_MAX_VALUE = 99_999


@dataclass(frozen=True, kw_only=True)
class Control:
    name: ClassVar = "control"
    about: ClassVar = (
        "sums of 2 to 4 numbers of up to 4 digits (0 and 1 left out everywhere), a number of up to 4 digits times one "
        "digit, and chains of 2 to 5 such steps where each needs the last: What is ((47 + 36) * 3 + 58) * 2?"
    )

    steps: tuple[int, int] = (2, 5)
    """Fewest and most steps of a chain."""

    def sample(self, rng: random.Random) -> Problem:
        kind = rng.choice(("sum", "product", "chain", "chain"))
        if kind == "sum":
            numbers = [number(rng, rng.randint(1, 4)) for _ in range(rng.choice((2, 2, 3, 4)))]
            return self._problem("+".join(map(str, numbers)))
        if kind == "product":
            return self._problem(f"{number(rng, rng.randint(1, 4))}*{number(rng, 1)}")
        return self._problem(self._chain(rng))

    def _chain(self, rng: random.Random) -> str:
        value = number(rng, rng.choice((1, 2, 2, 3)))
        text, last = str(value), "*"
        steps = rng.randint(*self.steps)
        signs = self._signs(rng, steps)
        for sign in signs:
            operand = number(rng, 1 if sign == "*" else rng.choice((1, 2, 3)))
            text = f"({text})*{operand}" if sign == "*" and last == "+" else f"{text}{sign}{operand}"
            last = sign
        if parsed := self._parsed(parse_expression(text)):
            return text if max(parsed[1]) <= _MAX_VALUE else self._chain(rng)
        raise AssertionError(f"not a chain: {text}")

    def _signs(self, rng: random.Random, steps: int) -> list[str]:
        # Two products side by side would be one product of three factors; sums side by side one sum of three.
        first = rng.choice("+*")
        return [first if i % 2 == 0 else "*+"[first == "*"] for i in range(steps)]

    def _parsed(self, expression: Expression) -> tuple[list[tuple[str, tuple[int, ...]]], list[int]] | None:
        """The steps of a chain, innermost first, and the value after each; None where it is no chain."""
        match expression:
            case int(value):
                return [], [value]
            case Sum(terms=(first, *rest)) if all(isinstance(t, int) for t in rest):
                inner, operands, sign = first, tuple(t for t in rest if isinstance(t, int)), "+"
            case Product(factors=(first, int(digit))):
                inner, operands, sign = first, (digit,), "*"
            case _:
                return None
        done = self._parsed(inner)
        if done is None:
            return None
        steps, values = done
        value = values[-1] + sum(operands) if sign == "+" else values[-1] * operands[0]
        return [*steps, (sign, operands)], [*values, value]

    def _problem(self, text: str) -> Problem:
        parsed = self._parsed(parse_expression(text))
        assert parsed is not None, f"not a chain: {text}"
        return Problem(
            family=self.name,
            prompt=f"{text}?",
            question=f"What is {text.replace('*', ' * ').replace('+', ' + ')}?",
            answer=str(parsed[1][-1]),
            forks=False,
            shape={"steps": len(parsed[0])},
        )

    def parse(self, text: str) -> Problem | None:
        parsed = self._parsed(parse_expression(text.rstrip("?"))) if ";" not in text else None
        if parsed is None or not parsed[0]:
            return None
        steps, values = parsed
        numbers = [values[0], *(n for _, operands in steps for n in operands)]
        single = len(steps) == 1
        inside = (
            len(steps) <= 5
            and max(values) <= _MAX_VALUE
            and all(2 <= n <= (9999 if single else 999) for n in numbers)
            and all(len(o) <= (3 if single else 1) for _, o in steps)
            and all(o[0] <= 9 for sign, o in steps if sign == "*")
            and all(one[0] != other[0] for one, other in pairwise(steps))
        )
        if not inside:
            raise RequestError(f"{text} is outside the trained range: {self.about}")
        return self._problem(_written(values[0], steps))

    def grade(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer

    def serial(self, problem: Problem) -> Trajectory:
        parsed = self._parsed(parse_expression(problem.prompt.rstrip("?")))
        assert parsed is not None
        steps, values = parsed
        lines: list[str] = []
        for i, (sign, operands) in enumerate(steps):
            if sign == "+":
                restated = "" if i == len(steps) - 1 else found(values[i + 1])
                lines.append(add((values[i], *operands)) + restated)
            else:
                lines.append(Products(((values[i], operands[0]),), final=False).serial())
        return (";".join(lines), *answer(problem.answer))

    def parallel(self, problem: Problem) -> Trajectory:
        """There is none: a chain has nothing to split."""
        return self.serial(problem)


def _written(first: int, steps: list[tuple[str, tuple[int, ...]]]) -> str:
    """A chain with no more brackets than it needs."""
    text, last = str(first), "*"
    for sign, operands in steps:
        text = f"({text})" if sign == "*" and last == "+" else text
        text += "".join(f"{sign}{n}" for n in operands)
        last = sign
    return text
