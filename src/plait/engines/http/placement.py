"""Where a call goes: to the replica that holds its prefix, with the key under which its relatives went.

Works on token ids alone. A call belongs with the earlier call whose context and output it starts with, which is how a
branch starts, and a parent after a join. So forks land where their prefix is without the engine knowing of forks.
Where a caller stated an affinity, that counts.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from secrets import token_hex

import anyio

from plait.engines.affinity import stated_affinity

_ID_BYTES = array("I").itemsize
_BYTES_KEPT = 64 << 20
_LATELY = 64
"""Calls that are looked at when two prefixes only overlap."""


@dataclass(slots=True, eq=False)
class Place:
    """Where one call went."""

    base: int
    """Index of the base URL."""
    key: str
    cache_salt: str | None
    prompt: bytes
    begun: anyio.Event = field(default_factory=anyio.Event)
    """Set when the prompt is computed, or the call is over."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Ids whose keys and values a replica computed."""

    ids: bytes
    base: int
    key: str
    cache_salt: str | None


class Placement:
    """Remembers recent calls, and places new ones.

    Args:
        num_bases: Base URLs to choose from.
        remembered: Contexts that are looked at for one that a new call goes on from.
        spread: A replica with so many calls more than the idlest one gets no more of its own kind.
        worth_waiting_tokens: A call waits for another one's prefill if they share at least so many tokens that nobody
            has computed yet.
    """

    def __init__(
        self, num_bases: int, *, remembered: int = 2048, spread: int = 32, worth_waiting_tokens: int = 64
    ) -> None:
        self._spread, self._remembered = spread, remembered
        self._worth_waiting = worth_waiting_tokens * _ID_BYTES
        self.active = [0] * num_bases
        self._down_until = [0.0] * num_bases
        self._held: deque[_Held] = deque()
        self._bytes = 0
        self._pending: list[Place] = []
        # Routers serve many processes: their keys must not meet.
        self._prefix, self._numbers = f"plait-{token_hex(4)}", count()
        self._stated: OrderedDict[str, int] = OrderedDict()

    def enter(self, token_ids: Sequence[int]) -> Place:
        """Place a call and count it as active there. Every `enter` is followed by one `leave`."""
        ids = array("I", token_ids).tobytes()
        stated = stated_affinity()
        salt = stated.cache_salt if stated else None
        relative = self._relative(ids, salt)
        if stated is not None:
            base = relative.base if relative else self._stated.get(stated.key)
            place = Place(self._fit(base), stated.key, salt, ids)
            self._stated[stated.key] = place.base
            self._stated.move_to_end(stated.key)
            if len(self._stated) > self._remembered:
                self._stated.popitem(last=False)
        else:
            key = relative.key if relative else f"{self._prefix}-{next(self._numbers)}"
            place = Place(self._fit(relative.base if relative else None), key, salt, ids)
        self.active[place.base] += 1
        self._pending.append(place)
        return place

    def begin(self, place: Place) -> None:
        """A call's prompt is computed: those who wait for it may go."""
        if not place.begun.is_set():
            self._remember(place, place.prompt)
            self._settle(place)

    def leave(self, place: Place, token_ids: Sequence[int]) -> None:
        """A call is over; what it computed stays cached for a while.

        Args:
            token_ids: Its context and output.
        """
        self.active[place.base] -= 1
        if place.begun.is_set():
            self._remember(place, array("I", token_ids).tobytes())
        self._settle(place)

    def _settle(self, place: Place) -> None:
        place.begun.set()
        if place in self._pending:
            self._pending.remove(place)

    def _remember(self, place: Place, ids: bytes) -> None:
        self._held.append(_Held(ids, place.base, place.key, place.cache_salt))
        self._bytes += len(ids)
        while len(self._held) > self._remembered or self._bytes > _BYTES_KEPT:
            self._bytes -= len(self._held.popleft().ids)

    def move(self, place: Place) -> None:
        """Place a call again, elsewhere if there is anywhere."""
        self.active[place.base] -= 1
        place.base = self._fit(None)
        self.active[place.base] += 1

    def mark_down(self, base: int, seconds: float) -> None:
        """Avoid a replica for a while."""
        self._down_until[base] = anyio.current_time() + seconds

    async def wait_until_worth_it(self, place: Place) -> None:
        """Wait while a call that began earlier computes a prefix that this one needs too.

        Several calls on a prefix that nobody has computed would all compute it: a block is shared only once it is full.
        """
        while (other := self._ahead(place)) is not None:
            await other.begun.wait()

    def _ahead(self, place: Place) -> Place | None:
        earlier = self._pending[: self._pending.index(place)] if place in self._pending else []
        alike = [p for p in earlier if p.base == place.base and p.cache_salt == place.cache_salt]
        if not alike:
            return None
        best = max(alike, key=lambda p: common_prefix(p.prompt, place.prompt))
        shared = common_prefix(best.prompt, place.prompt)
        if shared < self._worth_waiting:
            return None
        lately = [h for h in islice(reversed(self._held), _LATELY) if h.base == place.base]
        known = max((common_prefix(h.ids, place.prompt) for h in lately if h.cache_salt == place.cache_salt), default=0)
        return best if shared - known >= self._worth_waiting else None

    def _relative(self, ids: bytes, salt: str | None) -> _Held | None:
        """The longest earlier call that `ids` go on from; of equals the latest."""
        found: _Held | None = None
        for held in reversed(self._held):
            longer = found is None or len(held.ids) > len(found.ids)
            if longer and held.cache_salt == salt and ids.startswith(held.ids):
                found = held
        return found

    def _fit(self, wanted: int | None) -> int:
        """The wanted replica unless it is down or much busier than the idlest one, else that one."""
        now = anyio.current_time()
        idlest = min(range(len(self.active)), key=lambda base: (self._down_until[base] > now, self.active[base], base))
        if wanted is None or self._down_until[wanted] > now:
            return idlest
        return idlest if self.active[wanted] - self.active[idlest] >= self._spread else wanted


def common_prefix(a: bytes, b: bytes) -> int:
    """Length of the common prefix in bytes, whole ids only."""
    low, high = 0, min(len(a), len(b)) // _ID_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if a[: middle * _ID_BYTES] == b[: middle * _ID_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low * _ID_BYTES
