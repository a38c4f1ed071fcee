"""How the limits of a request are shared among its threads, so that no result depends on timing.

Knows nothing of engines and formats. What is left of a limit is divided equally at a fork: one part for each branch
and one for what the parent says after the join. What a branch did not use flows back at the join. So a thread's
allowance follows from the program alone, never from how fast its siblings are.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import anyio

from plait.tree import Segment, Tree
from plait.types import Budget, StopReason

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


def fits(tree: Tree, budget: Budget) -> bool:
    """Whether a run within these limits could have been this one: no fork of it is declined, no segment is ended.

    Knows the limits that a program is divided by: threads, tokens and depth. The deadline and the engine's context are
    not in a tree.
    """
    own: dict[str, list[Segment]] = {}
    for segment in tree.segments.values():
        own.setdefault(segment.thread, []).append(segment)

    def rest(thread: str, share: Share) -> Share | None:
        """What a thread leaves of its share; None where it is not enough."""
        depth, sampled, lent = thread.count("/"), 0, dict[str, Share]()
        for segment in own[thread]:
            for joined in segment.joins:
                if (back := lent.pop(tree.segments[joined].thread, None)) is not None:
                    share.take_back(back)
            number = segment.id.rpartition(":")[2]
            share.tokens -= len(segment.sampled_ids)
            sampled += len(segment.sampled_ids)
            if share.tokens < 0 or sampled > limit(budget.max_thread_tokens):
                return None
            branches = [f"{thread}/{number}.{i}" for i in range(_count(own, f"{thread}/{number}."))]
            n = len(branches)
            if not n:
                continue
            allowed = min(share.threads, limit(budget.max_threads_per_fork))
            if n > allowed or share.tokens <= n or depth >= limit(budget.max_depth):
                return None
            for branch, part in zip(branches, share.split(n), strict=True):
                left = rest(branch, part)
                if left is None:
                    return None
                # A thread that was cut gives nothing back.
                if all(s.stop is not StopReason.CANCELLED for s in own[branch]):
                    lent[branch] = left
        return share

    return rest("0", Share.whole(budget)) is not None


def _count(threads: Mapping[str, object], prefix: str) -> int:
    count = 0
    while f"{prefix}{count}" in threads:
        count += 1
    return count


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
