"""How many CPU threads a step gets. What a step computes does not depend on it, only how long it takes.

A second thread makes a step of several rows faster on an idle machine and many times slower on a busy one, where each
operation waits for a thread that is not running. Nobody can know beforehand, so it is measured as the work goes on.
Trials of what was slower may only take a small share of the time; and a step that takes several times as long as it
did, or as short, says that the machine changed, which then counts for steps of all sizes. Where as much runs as there
are cores when the engine opens, it begins with one thread, and tries another when it has worked for some seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

_TRIALS = 1 / 30
"""Share of the time that may go into trials: one that takes long, as on a busy machine, is not repeated soon."""
_CHANGED = 3.0
"""Times as long as before, or as short, from which on what other steps took is not to be relied on."""
_SETTLED_S = 3.0
"""Work after which more threads may be tried than ever were: on a busy machine one such step can take a second."""
_WEIGHT = 0.3
_FADES = 0.999
_GOOD = 0.35
"""A further row that costs no more than this share of a step of one row is computed well: no need to try otherwise."""
_SMALL = 64 * 2**20
"""Bytes of a model whose operations are so short that more than two threads wait more than they work."""


class Pace:
    """Chooses the number of threads that has been fastest lately.

    Args:
        one: Threads of a step of one row. Fixed: its attention over a long context is split by threads, and sums
            that are split otherwise end in other bits.
        several: What a step of several rows may get, the one to begin with first.
    """

    def __init__(self, *, one: int, several: Sequence[int]) -> None:
        self.one, self.several = one, tuple(several)
        self.tries = False
        """Whether the last choice is a trial, which should not last long."""
        self._seconds: dict[tuple[int, int], float] = {}
        """Of a step, by rows and threads."""
        self._all_s = self._trials_s = 0.0
        """Lately."""

    @classmethod
    def of(cls, threads: int | None, *, model_bytes: int, cores: int, load: float = 0.0) -> Pace:
        """What was asked for; by default what suits the size of the model.

        Args:
            load: How many threads of others want to run.
        """
        if threads is not None:
            return cls(one=threads, several=(threads,))
        if model_bytes > _SMALL:
            return cls(one=cores, several=(cores,))
        return cls(one=1, several=(1,) if cores == 1 else (2, 1) if load < cores else (1, 2))

    def choose(self, rows: int) -> int:
        """Threads for the next steps of so many rows."""
        self.tries = False
        if rows == 1:
            return self.one
        first = self.several[0]
        one, here = self._seconds.get((1, self.one)), self._seconds.get((rows, first))
        if one is not None and here is not None and here <= one * (1 + _GOOD * (rows - 1)):
            return first
        ranked = self._ranked(rows)
        if self._trials_s > _TRIALS * self._all_s:
            return ranked[0]
        untried = [n for n in ranked if (rows, n) not in self._seconds]
        threads = untried[0] if untried else ranked[-1]
        if threads > ranked[0] and self._all_s < _SETTLED_S and all(n != threads for _, n in self._seconds):
            return ranked[0]
        self.tries = threads != ranked[0]
        return threads

    def best(self, rows: int) -> int:
        """Threads for a step of so many rows that is not to try anything."""
        return self.one if rows == 1 else self._ranked(rows)[0]

    def record(self, rows: int, threads: int, seconds: float, *, steps: int = 1) -> None:
        """Steps of so many rows took these seconds together."""
        self._all_s = _FADES * self._all_s + seconds
        self._trials_s = _FADES * self._trials_s + (seconds if self.tries else 0.0)
        each, key = seconds / steps, (rows, threads)
        known = self._seconds.get(key, each)
        if known / _CHANGED < each < known * _CHANGED:
            self._seconds[key] = known + _WEIGHT * (each - known)
        else:
            self._seconds = {k: s for k, s in self._seconds.items() if k[1] != threads} | {key: each}

    def _ranked(self, rows: int) -> list[int]:
        """Numbers of threads, the fastest first, as known of the nearest number of rows for which all were tried."""
        tried = {r for r, _ in self._seconds if all((r, n) in self._seconds for n in self.several)}
        nearest = min(tried, key=lambda r: (abs(r - rows), r), default=None)
        return sorted(self.several, key=lambda n: 0.0 if nearest is None else self._seconds[nearest, n])
