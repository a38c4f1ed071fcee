"""What a run says, from its threads to the one who reads: bounded, so that a slow reader slows the engine down.

Knows nothing of engines and formats. anyio's own memory streams yield to the scheduler once for each item; this one
only where there is nothing to read or no room, and an item that was put is never lost to a cancellation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator

import anyio

from plait.events import Event


class Channel(AsyncIterator[Event]):
    """A queue of events with many writers.

    Args:
        size: A writer that fills it beyond this waits; so it holds at most this and one event a writer.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[Event] = deque()
        self._closed = self._unread = False
        self._arrived: anyio.Event | None = None
        self._drained: anyio.Event | None = None

    async def put(self, event: Event) -> None:
        """Add an event at once, then wait while the channel is over its size."""
        self.put_nowait(event)
        if len(self._items) > self._size:
            if self._drained is None:
                self._drained = anyio.Event()
            await self._drained.wait()

    def put_nowait(self, event: Event) -> None:
        if not self._unread:
            self._items.append(event)
            self._wake()

    def close(self) -> None:
        """Say that nothing more comes; what was put can still be read."""
        self._closed = True
        self._wake()

    async def ended(self) -> None:
        """Wait for the end without reading: events are dropped, and cost their writers nothing."""
        self._unread = True
        self._items.clear()
        if self._drained is not None:
            self._drained.set()
        while not self._closed:
            self._arrived = anyio.Event()
            await self._arrived.wait()

    def pending(self) -> list[Event]:
        """Take out everything that was not read yet."""
        items = list(self._items)
        self._items.clear()
        return items

    async def __anext__(self) -> Event:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            if self._arrived is None:
                self._arrived = anyio.Event()
            await self._arrived.wait()
        event = self._items.popleft()
        # Half empty before writers go on: they wake once for many events.
        if self._drained is not None and len(self._items) <= self._size // 2:
            self._drained.set()
            self._drained = None
        return event

    def _wake(self) -> None:
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None
