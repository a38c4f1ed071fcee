"""One connection, before and around its requests: what uvicorn leaves to a proxy in front of it.

A request's headers must arrive in time (a client that sends a byte now and then holds nothing), a response must be
read, connections have a number, and a client that leaves is noticed even where it had sent more than its request.
Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from plait.server.config import ServeConfig
from plait.server.refusal import Refusal, body_of

_PHRASES = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Overloaded"}
_OTHER_FILES = 64
"""That a server opens beside its connections."""


class Connection(H11Protocol):
    """uvicorn's connection with limits.

    Args:
        limits: Of headers and connections.
        options: What uvicorn gives.
    """

    def __init__(self, *, limits: ServeConfig, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._waiting: asyncio.TimerHandle | None = None
        self._unread, self._since = 0, 0.0

    @classmethod
    def within(cls, limits: ServeConfig) -> Any:
        """The class as uvicorn calls it."""
        most = min(limits.max_connections, max(16, _open_files() - _OTHER_FILES))
        return partial(cls, limits=replace(limits, max_connections=most))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            text = f"the server is full: {self._limits.max_connections} connections at once"
            self._refuse(Refusal(text, status=503, code="overloaded", retry_after_s=1))
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        more, _ = self.conn.trailing_data
        if self.conn.their_state is not h11.IDLE:
            self._arrived()
        elif more and self._waiting is None:
            self._wait()
        if self.flow.read_paused and self.conn.their_state is h11.DONE and len(more) <= self._limits.max_header_bytes:
            # Paused, it would not hear that the client has left.
            self.flow.resume_reading()

    def check(self, now: float) -> None:
        """Drop a client that reads nothing of what is sent; closing would wait for it.

        Args:
            now: Seconds, of any clock.
        """
        unread = self.transport.get_write_buffer_size()
        if not unread or unread != self._unread:
            self._unread, self._since = unread, now
        elif now - self._since > self._limits.send_timeout_s:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        if len(self.conn.trailing_data[0]) > self._limits.max_header_bytes:
            text = f"the headers are larger than {self._limits.max_header_bytes} bytes"
            self._refuse(Refusal(text, status=431, code="headers_too_large"))
        else:
            self._refuse(Refusal("this is no HTTP/1.1 request", code="invalid_request"))

    def _wait(self) -> None:
        """Give the headers of a request their time."""
        self._waiting = self.loop.call_later(self._limits.header_timeout_s, self._too_slow)

    def _arrived(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _too_slow(self) -> None:
        text = f"the headers did not arrive within {self._limits.header_timeout_s:g} s"
        self._refuse(Refusal(text, status=408, code="timeout"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer outside of any request, and close."""
        self._arrived()
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            # Its words would be read as part of the response that is under way.
            self.transport.close()
        if self.transport.is_closing():
            return
        body = json.dumps(body_of(refusal))
        headers = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
        lines = [f"HTTP/1.1 {refusal.status} {_PHRASES[refusal.status]}"]
        lines += [f"{name}: {value}" for name, value in (headers | refusal.headers).items()]
        self.transport.write("\r\n".join([*lines, "", body]).encode())
        self.transport.close()


def _open_files() -> int:
    """How many files the process may have open; beyond that, accepting a connection fails."""
    try:
        import resource
    except ImportError:
        return 1 << 16
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 16 if soft == resource.RLIM_INFINITY else soft
