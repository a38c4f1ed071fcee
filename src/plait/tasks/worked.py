"""Arithmetic worked on paper, as text: the steps that every family's gold traces are made of, and what they cost.

Every digit that is used again stands after the letter of its place (`a` units, `b` tens, ...): a model finds the digits
of a column by their letter, wherever their rows are. Rows of the sum that ends a block or a problem are written after
`~`, everything else that is used again after `>`: a sum over threads must not take in what was added inside one. Costs
are tokens of the embedded vocabulary, estimated from digit counts alone: from what a model can see when it decides.
Place letters: index hints, Zhou et al. 2023, "What Algorithms can Transformers Learn?" (arXiv:2310.16028).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plait.formats.base import Block, Trajectory

FORK_MARGIN = 0.25
"""Forking is right where it shortens the critical path by at least this share: threads cost total tokens too."""


PLACES = "abcdefghijklmnopqrstuvwx"
"""A letter a place; the embedded vocabulary has the first twelve."""


def placed(value: int) -> str:
    """Digits with their places, units first: 2082 is `a2b8c0d2`."""
    return "".join(f"{PLACES[k]}{digit}" for k, digit in enumerate(reversed(str(value))))


def addend(value: int) -> str:
    """A row of the sum that ends a block or a problem."""
    return f"~{placed(value)}"


def found(value: int) -> str:
    """A value that later steps use."""
    return f">{placed(value)}"


def row(a: int, digit: int, zeros: int) -> str:
    """A number times one digit and a power of ten, its result not yet restated.

    >>> row(347, 2, 1)
    '347*20: b7*2=14,14+0=14 c4*2=08,08+1=09 d3*2=06,06+0=06'
    """
    steps: list[str] = []
    carry = 0
    for k, x in enumerate(reversed(str(a))):
        product = int(x) * digit
        value = product + carry
        steps.append(f"{PLACES[k + zeros]}{x}*{digit}={product:02d},{product:02d}+{carry}={value:02d}")
        carry = value // 10
    return f"{a}*{digit}{'0' * zeros}: {' '.join(steps)}"


def row_cost(digits: int, zeros: int) -> int:
    return 19 * digits + 3 * zeros + 5


def columns(values: Sequence[int]) -> str:
    """A sum, column by column from the right: the place, a carry and a digit each.

    >>> columns([2082, 6940])
    'Sum: a02b12c10d09'
    """
    rows = [str(v)[::-1] for v in values]
    width = max(map(len, rows))
    out: list[str] = []
    carry = k = 0
    while k < width or carry:
        total = carry + sum(int(r[k]) for r in rows if k < len(r))
        carry = total // 10
        out.append(f"{PLACES[k]}{carry}{total % 10}")
        k += 1
    return "Sum: " + "".join(out)


def columns_cost(width: int) -> int:
    return 1 + 3 * width


def found_cost(width: int) -> int:
    return 1 + 2 * width


def answer_cost(width: int) -> int:
    return 2 + width


def add(values: Sequence[int]) -> str:
    """A sum of given numbers on one line, its result not yet restated.

    >>> add([47, 9])
    '>a7b4>a9Sum: a16b05'
    """
    return "".join(map(found, values)) + columns(values)


def add_cost(digits: Sequence[int]) -> int:
    return sum(2 * d + 1 for d in digits) + columns_cost(max(digits) + 1)


def multiplier_parts(b: int) -> list[tuple[int, int]]:
    """The non-zero digits of b from the right, each with its zeros.

    >>> multiplier_parts(506)
    [(6, 0), (5, 2)]
    """
    return [(int(x), i) for i, x in enumerate(reversed(str(b))) if x != "0"]


@dataclass(frozen=True, slots=True)
class Products:
    """Several products worked side by side: every partial product a row, then a column sum for each product."""

    pairs: tuple[tuple[int, int], ...]
    final: bool
    """True where the answer follows: the results are not restated for further use."""
    inner: bool = False
    """True where the results are themselves rows of a later sum."""

    @property
    def rows(self) -> list[str]:
        rows: list[str] = []
        for a, b in self.pairs:
            parts = multiplier_parts(b)
            end = self._result if len(parts) == 1 else found if self.inner else addend
            rows += [row(a, d, z) + end(a * d * 10**z) for d, z in parts]
        return rows

    def _result(self, value: int) -> str:
        return addend(value) if self.inner else found(value)

    @property
    def labels(self) -> list[str]:
        return [f"{d}{'0' * z}" for _, b in self.pairs for d, z in multiplier_parts(b)]

    @property
    def sums(self) -> str:
        """Column sums of the products that have more than one row."""
        out: list[str] = []
        for a, b in self.pairs:
            parts = [a * d * 10**z for d, z in multiplier_parts(b)]
            if len(parts) > 1:
                out.append(columns(parts) + ("" if self.final else self._result(a * b)))
        return ";".join(out)

    def serial(self) -> str:
        return ";".join(filter(None, (*self.rows, self.sums)))

    def parallel(self) -> Block:
        return Block(outlines=tuple(self.labels), threads=tuple((r,) for r in self.rows), conclusion=self.sums)

    def work(self) -> str | Block:
        return self.parallel() if self.worth() else self.serial()

    def _tail_cost(self) -> int:
        cost = 0
        for a, b in self.pairs:
            width = len(str(a)) + len(str(b))
            if len(multiplier_parts(b)) > 1:
                cost += columns_cost(width) + (0 if self.final else found_cost(width))
        return cost + (answer_cost(sum(len(str(x)) for x in self.pairs[0])) if self.final else 0)

    def _row_costs(self) -> list[int]:
        return [row_cost(len(str(a)), z) for a, b in self.pairs for _, z in multiplier_parts(b)]

    def serial_cost(self) -> int:
        rows = self._row_costs()
        return sum(rows) + len(rows) - 1 + self._tail_cost()

    def parallel_cost(self) -> int:
        return block_cost(self.labels, self._row_costs()) + self._tail_cost()

    def worth(self) -> bool:
        return worth(self.serial_cost(), self.parallel_cost())


def block_cost(labels: Sequence[str], threads: Sequence[int]) -> int:
    """Critical path of a block: its tags and outlines, then its longest thread with its space and closing tag."""
    return 5 + sum(4 + len(label) for label in labels) + max(threads) + 2


def worth(serial: int, parallel: int) -> bool:
    """Whether a block is worth opening."""
    return parallel <= (1 - FORK_MARGIN) * serial


def answer(text: str) -> Trajectory:
    return (f"\nAnswer: {text}",)
