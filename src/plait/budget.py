"""How the limits of a request are shared among its threads, so that no result depends on timing.

Knows nothing of engines and formats. What is left of a limit is divided equally at a fork: one part for each branch
and one for what the parent says after the join. What a branch did not use flows back at the join. So a thread's
allowance follows from the program alone, never from how fast its siblings are.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass

import anyio

from plait.types import Budget

UNLIMITED = sys.maxsize


def limit(value: int | None) -> int:
    """A limit as a number; None is more than any run uses."""
    return UNLIMITED if value is None else value


@dataclass(slots=True)
class Share:
    """What a thread, with all that it forks, may still use."""

    tokens: int
    """Sampled tokens."""
    threads: int
    """Threads it may fork."""

    @classmethod
    def whole(cls, budget: Budget) -> Share:
        return cls(limit(budget.max_tokens), limit(budget.max_threads))

    def split(self, branches: int) -> list[Share]:
        """Take out the threads of a block, and a part of the rest for each; what stays is the parent's part."""
        self.threads -= branches
        part = Share(self.tokens // (branches + 1), self.threads // (branches + 1))
        self.tokens -= branches * part.tokens
        self.threads -= branches * part.threads
        return [Share(part.tokens, part.threads) for _ in range(branches)]

    def take_back(self, rest: Share) -> None:
        self.tokens += rest.tokens
        self.threads += rest.threads


class Gate:
    """Places for threads that sample at once. Tickets are served in the order in which they were drawn."""

    def __init__(self, places: int | None) -> None:
        self._free = limit(places)
        self._queue: deque[anyio.Event] = deque()

    def ticket(self) -> anyio.Event:
        """Queue for a place; the event is set when it is there."""
        ticket = anyio.Event()
        if self._free:
            self._free -= 1
            ticket.set()
        else:
            self._queue.append(ticket)
        return ticket

    def give_back(self, ticket: anyio.Event) -> None:
        """Leave the place, or the queue."""
        if not ticket.is_set():
            self._queue.remove(ticket)
        elif self._queue:
            self._queue.popleft().set()
        else:
            self._free += 1
