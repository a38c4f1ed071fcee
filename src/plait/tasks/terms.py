"""The pieces that expressions and bundles are made of: a product, a sum, or a bracketed sum times a number."""

from __future__ import annotations

import random
from dataclasses import dataclass

from plait.tasks.notation import Expression, Product, Sum
from plait.tasks.worked import Products, add, add_cost, addend, answer_cost, found, found_cost


@dataclass(frozen=True, slots=True)
class Term:
    """`addends` in brackets times `factor`; no factor for a plain sum, one addend for a plain product."""

    addends: tuple[int, ...]
    factor: int | None

    @property
    def text(self) -> str:
        inner = "+".join(map(str, self.addends))
        if self.factor is None:
            return inner
        return f"{inner}*{self.factor}" if len(self.addends) == 1 else f"({inner})*{self.factor}"

    @property
    def value(self) -> int:
        return sum(self.addends) * (1 if self.factor is None else self.factor)

    @property
    def label(self) -> str:
        """Its first number: enough to find it in the prompt."""
        return str(self.addends[0])

    def work(self) -> str:
        """On one line; ends in its value."""
        total = sum(self.addends)
        steps: list[str] = []
        if len(self.addends) > 1:
            steps.append(add(self.addends) + (addend(total) if self.factor is None else found(total)))
        if self.factor is not None:
            steps.append(Products(((total, self.factor),), final=False, inner=True).serial())
        return ";".join(steps)

    def cost(self) -> int:
        digits = [len(str(n)) for n in self.addends]
        cost = 0
        if len(self.addends) > 1:
            cost += add_cost(digits) + found_cost(max(digits) + 1)
        if self.factor is not None:
            # The digits of a bracket are not in the prompt; as many as its longest number is the usual case.
            stand_in = 10 ** max(digits) - 1
            cost += Products(((stand_in, self.factor),), final=False).serial_cost() + 1
        return cost

    def answer_cost(self) -> int:
        return answer_cost(max(len(str(n)) for n in self.addends) + len(str(self.factor or "")))


def number(rng: random.Random, digits: int) -> int:
    """A number of so many digits; single digits leave out 0 and 1, which need no work."""
    return rng.randint(2, 9) if digits == 1 else rng.randrange(10 ** (digits - 1), 10**digits)


def as_term(expression: Expression) -> Term | None:
    """The term that an expression is, None where it is something else."""
    match expression:
        case Sum(terms=terms) if all(isinstance(t, int) for t in terms):
            return Term(tuple(t for t in terms if isinstance(t, int)), None)
        case Product(factors=(int(a), int(b))):
            return Term((a,), b)
        case Product(factors=(Sum(terms=terms), int(b))) if all(isinstance(t, int) for t in terms):
            return Term(tuple(t for t in terms if isinstance(t, int)), b)
        case _:
            return None
