"""Runs that can be looked at while they run and for a while after: their events, as lines, for whoever asked for them.

Holds a bounded number of runs in memory; only those whose request asked to be traced.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import anyio

from plait.events import Event, encode
from plait.server.keys import Client
from plait.server.refusal import Refusal
from plait.spelling import Spelling


@dataclass(slots=True, eq=False, kw_only=True)
class Trace:
    """One run's events so far."""

    id: str
    client: str
    model: str
    question: str
    spelling: Spelling
    created: int = field(default_factory=lambda: int(time.time()))
    lines: list[str] = field(default_factory=list[str])
    closing: list[tuple[str, dict[str, Any]]] = field(default_factory=list[tuple[str, dict[str, Any]]])
    """What follows the events when the run has ended: usage, or an error."""
    done: bool = False
    _changed: anyio.Event = field(default_factory=anyio.Event)

    def write(self, event: Event) -> None:
        self.lines.append(encode(self.spelling.spell(event)))
        self._wake()

    def end(self, closing: list[tuple[str, dict[str, Any]]]) -> None:
        """Say that nothing more comes."""
        if not self.done:
            self.closing, self.done = closing, True
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def follow(self) -> AsyncGenerator[tuple[int, str], None]:
        """Number and text of every line, until the run has ended."""
        at = 0
        while True:
            while at < len(self.lines):
                yield at, self.lines[at]
                at += 1
            if self.done:
                return
            await self._changed.wait()

    def about(self) -> dict[str, Any]:
        """A row of the list of runs."""
        usage = dict(self.closing).get("usage")
        return {
            "id": self.id,
            "model": self.model,
            "question": self.question,
            "created": self.created,
            "done": self.done,
            "stop": None if usage is None else usage["stop"],
            "usage": usage,
        }


class Traces:
    """The last runs.

    Args:
        keep: How many; the oldest is dropped, but what follows it still reads it to its end.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._traces: OrderedDict[str, Trace] = OrderedDict()

    def add(self, trace: Trace) -> None:
        self._traces[trace.id] = trace
        while len(self._traces) > self._keep:
            self._traces.popitem(last=False)

    def of(self, client: Client) -> list[Trace]:
        """A client's runs, newest first."""
        return [trace for trace in reversed(self._traces.values()) if trace.client == client.name]

    def find(self, id: str, client: Client) -> Trace:
        """A client's run.

        Raises:
            Refusal: 404, it has none of this id.
        """
        trace = self._traces.get(id)
        if trace is None or trace.client != client.name:
            raise Refusal(
                f"there is no run {id[:80]!r}; the last {self._keep} are kept", status=404, code="no_such_run"
            )
        return trace
