"""How many CPU threads a step gets. What a step computes does not depend on it, only how long it takes.

A second thread makes a step of several rows faster on an idle machine and many times slower on a busy one, where each
operation waits for a thread that is not running. Nobody can know beforehand, so it is measured as the work goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_LOOK_AGAIN = 32
"""Every so many times the choice that was slower is tried again: machines become idle."""
_WEIGHT = 0.3
_GOOD = 0.35
"""A further row that costs no more than this share of a step of one row is computed well: no need to try otherwise."""
_SMALL = 64 * 2**20
"""Bytes of a model whose operations are so short that more than two threads wait more than they work."""


class Pace:
    """Chooses the number of threads that has been fastest lately, for each number of rows.

    Args:
        one: Threads of a step of one row. Fixed: its attention over a long context is split by threads, and sums
            that are split otherwise end in other bits.
        several: What a step of several rows may get; each is tried once in this order, unless the first is good.
    """

    def __init__(self, *, one: int, several: Sequence[int]) -> None:
        self.one, self.several = one, tuple(several)
        self._seconds: dict[tuple[int, int], float] = {}
        self._asked = Counter[int]()

    @classmethod
    def of(cls, threads: int | None, *, model_bytes: int, cores: int) -> Pace:
        """What was asked for; by default what suits the size of the model."""
        if threads is not None:
            return cls(one=threads, several=(threads,))
        if model_bytes > _SMALL:
            return cls(one=cores, several=(cores,))
        return cls(one=1, several=(2, 1) if cores > 1 else (1,))

    def choose(self, rows: int) -> int:
        """Threads for the next steps of so many rows."""
        if rows == 1:
            return self.one
        one, first = self._seconds.get((1, self.one)), self._seconds.get((rows, self.several[0]))
        if one is not None and first is not None and first <= one * (1 + _GOOD * (rows - 1)):
            return self.several[0]
        untried = [n for n in self.several if (rows, n) not in self._seconds]
        if untried:
            return untried[0]
        ranked = sorted(self.several, key=lambda n: self._seconds[rows, n])
        self._asked[rows] += 1
        return ranked[-1] if self._asked[rows] % _LOOK_AGAIN == 0 else ranked[0]

    def record(self, rows: int, threads: int, seconds: float) -> None:
        """A step of so many rows took this long."""
        known = self._seconds.get((rows, threads), seconds)
        self._seconds[rows, threads] = known + _WEIGHT * (seconds - known)
