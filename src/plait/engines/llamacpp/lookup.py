"""Speculative decoding by prompt lookup: what followed the last few tokens earlier may follow them again.

A guess costs rows of a step and is checked by the model itself, so it changes when tokens come, never which. Knows the
ids of one call and nothing of engines.
Source: prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding), after speculative decoding
(Leviathan et al. 2022, arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (3, 2)
"""Lengths of the runs that are looked up; a longer one is the better witness."""
WINDOW = 1024
"""Ids of a context that are looked at: each thread indexes its own."""
_LONGEST_PAUSE = 32


class Lookup:
    """The ids of one call, and what came after each short run of them the last time.

    Args:
        context: What the call continues; branches of a merge are read one after another.
        most: Tokens of a guess.
    """

    def __init__(self, context: Sequence[int], most: int) -> None:
        self._most = most
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._pause = self._paused = 0
        self._given = 0
        self.extend(context[-WINDOW:])
        self._given = len(self._ids)

    @property
    def sampled(self) -> int:
        """How many ids of the call's own it knows."""
        return len(self._ids) - self._given

    def extend(self, ids: Sequence[int]) -> None:
        """Add ids that came."""
        known = self._ids
        for id in ids:
            for size in SIZES:
                if len(known) >= size:
                    self._after[tuple(known[-size:])] = len(known)
            known.append(id)

    def guess(self, most: int) -> list[int]:
        """Ids that may come next; none where nothing is known, or guesses have been wrong lately."""
        most = min(most, self._most)
        if self._paused > 0:
            self._paused -= 1
            return []
        known = self._ids
        for size in SIZES:
            at = self._after.get(tuple(known[-size:]))
            if at is not None and most > 0:
                # Where it runs into its own end it goes round: text that repeats has a period.
                period = len(known) - at
                return [known[at + k % period] for k in range(most)]
        return []

    def judge(self, accepted: int) -> None:
        """Hear how many ids of the last guess were right: after a wrong one the next waits, each time longer."""
        self._pause = 0 if accepted else min(2 * self._pause + 1, _LONGEST_PAUSE)
        self._paused = self._pause
