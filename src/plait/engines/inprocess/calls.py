"""An engine call as a scheduler sees it, and the one form of its context. Knows nothing of weights and caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from plait.engines.inprocess.sampling import uniforms
from plait.errors import EngineError
from plait.types import Context, Merge, SamplingParams, StopReason, context_cells

Part: TypeAlias = "tuple[int, ...] | Merge"


def normalise(context: Context) -> tuple[Part, ...]:
    """The same context in one canonical form: no empty parts, runs joined, merges of one branch written in line."""
    parts: list[Part] = []
    for part in context:
        if isinstance(part, Merge):
            branches = [b for b in map(normalise, part.branches) if b]
            new: Sequence[Part] = branches[0] if len(branches) == 1 else [Merge(tuple(branches))] if branches else []
        else:
            new = [tuple(part)] if part else []
        for item in new:
            last = parts[-1] if parts else None
            if isinstance(item, tuple) and isinstance(last, tuple):
                parts[-1] = last + item
            else:
                parts.append(item)
    return tuple(parts)


def num_common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two lists, or two tuples, have in common from their beginning."""
    low, high = 0, min(len(ids), len(others))
    if (ids if len(ids) == high else ids[:high]) == (others if len(others) == high else others[:high]):
        return high
    while high - low > 1:  # they part between the two: slices are compared at the speed of C
        middle = (low + high) // 2
        if ids[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle
    return low


class Call:
    """One engine call."""

    __slots__ = (
        *("cells", "context", "draws", "ends", "ids", "limit", "logprobs", "number", "params", "salt", "sent", "user"),
    )

    def __init__(self, number: int, context: tuple[Part, ...], params: SamplingParams, limit: int, user: Any) -> None:
        self.number = number
        """Calls count up; the youngest makes way where cells run out."""
        self.context = context
        self.params = params
        self.limit = limit
        """Tokens it may sample: `max_tokens` or what its context leaves."""
        self.user = user
        """Whatever the receiver of its deliveries needs."""
        self.draws: Iterator[float] | None = uniforms(params.seed) if params.temperature > 0 else None
        self.ends = frozenset((*params.stop_ids, *params.eos_ids))
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.salt: str | None = None
        """Calls with another one find nothing of it in a cache."""
        self.sent = 0
        """How many of `ids` were delivered."""
        self.cells = context_cells(context)

    def resumed(self) -> tuple[Part, ...]:
        """Its context and what it sampled so far."""
        return normalise((*self.context, tuple(self.ids))) if self.ids else self.context

    def stop(self) -> StopReason | None:
        """Why it ends after the token sampled last, if it does."""
        last = self.ids[-1]
        if last in self.ends:
            return StopReason.STOP if last in self.params.stop_ids else StopReason.EOS
        return StopReason.LENGTH if len(self.ids) >= self.limit else None

    def delivery(self, stop: StopReason | None = None) -> Delivery:
        """What it sampled since the last delivery."""
        sent, self.sent = self.sent, len(self.ids)
        return self, self.ids[sent:], self.logprobs[sent:], stop, None


Delivery: TypeAlias = "tuple[Call, list[int], list[float], StopReason | None, EngineError | None]"
