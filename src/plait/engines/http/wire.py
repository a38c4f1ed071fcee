"""Connections to servers: HTTP/1.1 over anyio, kept for the next call, every wait of a call under one limit.

h11 knows the protocol; this file adds sockets, reuse and limits, and knows nothing of JSON, events and tokens. It is
here because of how an answer is handed on: all that has arrived of it as one part, where general clients hand on each
chunk that was sent. Servers send a chunk for each token; a client that lags behind catches up in one step.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from selectors import EVENT_READ, DefaultSelector
from typing import NoReturn
from urllib.parse import urlsplit

import anyio
import h11
from anyio.abc import ByteStream, SocketAttribute

from plait.engines.http.chunked import Chunked
from plait.errors import EngineError, EngineTimeout, EngineUnavailable

_MOST_HEAD_BYTES = 100 * 1024
_READ_BYTES = 1 << 16
_IDLE_S = 5.0
"""How long a connection is kept for the next call."""


class Wait:
    """How long an answer may go on saying nothing of interest: bytes alone do not extend it, for they may be pings.

    It runs from the first time that a call waits for the network, so neither a reader that takes its time nor tokens
    that queue up use any of it.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self.extend(seconds, what)

    def extend(self, seconds: float, what: str) -> None:
        """Start again: so many seconds from the next wait until what is waited for has to be there."""
        self._seconds, self._what = seconds, what
        self._deadline: float | None = None

    def begin(self) -> float:
        """Let it run from now, unless it runs already; when it is over."""
        if self._deadline is None:
            self._deadline = anyio.current_time() + self._seconds
        return self._deadline

    def scope(self) -> anyio.CancelScope:
        """One wait, which ends at the limit."""
        return anyio.CancelScope(deadline=self.begin())

    def over(self) -> NoReturn:
        raise EngineTimeout(f"{self._what} within {self._seconds:g} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """Where connections lead to."""

    secure: bool
    host: str
    port: int


class _Unanswered(h11.RemoteProtocolError):
    """A connection ended before anything of an answer came."""


class Pool:
    """Connections to any number of servers, as many as there are calls at once.

    Args:
        connect_s: Seconds that opening one may take.
        secure: Whether any server's address is https.
    """

    def __init__(self, *, connect_s: float, secure: bool) -> None:
        self._connect_s = connect_s
        # Loading the certificates of the system takes as long as many a call, and plain HTTP needs none.
        self._tls = ssl.create_default_context() if secure else None
        self._open: set[_Connection] = set()
        self._idle: dict[_Origin, list[_Connection]] = {}
        self._closed = False

    @asynccontextmanager
    async def answer(
        self, method: str, url: str, headers: dict[str, str], content: bytes | None, wait: Wait
    ) -> AsyncGenerator[Answer, None]:
        """Send a request. An answer that was not read to its end costs its connection, which the server notices.

        Raises:
            EngineUnavailable: There is no connection to be had.
            EngineTimeout: The wait was over.
            EngineError: The connection broke, or what came is no HTTP.
        """
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        origin = _Origin(secure=secure, host=parts.hostname or "", port=parts.port or (443 if secure else 80))
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        with _named(url):
            # Not what stands before an @: it is for nobody's log.
            fields = {"host": parts.netloc.rpartition("@")[2], **headers}
            if content is not None:
                fields["content-length"] = str(len(content))
            request = h11.Request(method=method, target=target, headers=list(fields.items()))
            connection, head = await self._asked(origin, url, request, content or b"", wait)
            try:
                yield Answer(head, connection, wait)
            finally:
                if connection.may_go_on() and not self._closed:
                    self._idle.setdefault(origin, []).append(connection)
                else:
                    await self._drop(connection)

    async def aclose(self) -> None:
        """Close every connection, which ends the calls that still run."""
        self._closed = True
        self._idle.clear()
        while self._open:
            await self._open.pop().aclose()

    async def _asked(
        self, origin: _Origin, url: str, request: h11.Request, content: bytes, wait: Wait
    ) -> tuple[_Connection, h11.Response]:
        """Send a request; the connection and the head of the answer."""
        while True:
            kept = await self._kept(origin)
            connection = kept or await self._connected(origin, url)
            try:
                return connection, await connection.ask(request, content, wait)
            except BaseException as exc:
                await self._drop(connection)
                # A server may close a connection just when it is used again: then it has not seen this call.
                if kept is None or not isinstance(exc, _Unanswered):
                    raise

    async def _drop(self, connection: _Connection) -> None:
        self._open.discard(connection)
        await connection.aclose()

    async def _kept(self, origin: _Origin) -> _Connection | None:
        """A connection that is still good, the one used last; those that are not are closed."""
        now = anyio.current_time()
        # All are taken out before the first is closed, which gives way to other calls.
        expired = [connection for kept in self._idle.values() for connection in kept if connection.idle_until < now]
        for kept in self._idle.values():
            kept[:] = [connection for connection in kept if connection.idle_until >= now]
        for connection in expired:
            with anyio.CancelScope(shield=True):
                await self._drop(connection)
        kept = self._idle.get(origin, [])
        while kept:
            connection = kept.pop()
            if not connection.was_closed():
                return connection
            await self._drop(connection)
        return None

    async def _connected(self, origin: _Origin, url: str) -> _Connection:
        stream: ByteStream | None = None
        how = " over TLS" if origin.secure else ""
        try:
            with anyio.move_on_after(self._connect_s):
                if origin.secure and self._tls is not None:
                    stream = await anyio.connect_tcp(
                        origin.host, origin.port, ssl_context=self._tls, tls_standard_compatible=False
                    )
                else:
                    stream = await anyio.connect_tcp(origin.host, origin.port)
        except (OSError, UnicodeError, anyio.BrokenResourceError, anyio.EndOfStream) as exc:
            raise EngineUnavailable(f"{url} cannot be reached{how}: {_why(exc)}") from exc
        if stream is None:
            raise EngineUnavailable(f"{url} does not accept connections{how}: timed out")
        connection = _Connection(stream)
        if self._closed:
            await connection.aclose()
            raise EngineUnavailable(f"{url}: the connections were closed")
        self._open.add(connection)
        return connection


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer, and its body as it arrives."""

    head: h11.Response
    _connection: _Connection
    _wait: Wait

    async def part(self) -> bytes:
        """All of the body that has arrived and was not read yet, at least something; nothing at its end.

        Raises:
            EngineTimeout, EngineError: See `Pool.answer`; what came before it was read.
        """
        return await self._connection.part(self._wait)

    def header(self, name: bytes) -> str:
        return next((value.decode("latin-1") for key, value in self.head.headers if key == name), "")


class _Connection:
    """One connection, one call at a time."""

    def __init__(self, stream: ByteStream) -> None:
        self.idle_until = 0.0
        self._stream = stream
        self._http = _h11()
        self._chunked: Chunked | None = None
        self._ahead = b""
        """What came with the head."""

    async def ask(self, request: h11.Request, content: bytes, wait: Wait) -> h11.Response:
        """Send a request, and read the head of its answer."""
        events = (request, h11.Data(data=content), h11.EndOfMessage())
        data = b"".join(self._http.send(event) or b"" for event in events)
        await self._send(data, wait)
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                nothing_heard = not self._http.trailing_data[0]
                data = await self._received(wait, closed_is_broken=not nothing_heard)
                if nothing_heard and not data:
                    raise _Unanswered("the server closed the connection before it answered")
                self._http.receive_data(data)
            elif isinstance(event, h11.Response):
                self._chunked = None
                if any(name == b"transfer-encoding" for name, _ in event.headers):
                    self._chunked, self._ahead = Chunked(), self._http.trailing_data[0]
                return event

    async def part(self, wait: Wait) -> bytes:
        return await (
            self._part_of_other(wait) if self._chunked is None else self._part_of_chunked(self._chunked, wait)
        )

    async def _part_of_chunked(self, body: Chunked, wait: Wait) -> bytes:
        while not body.ended:
            if body.failure is not None:
                raise body.failure
            data, self._ahead = self._ahead or await self._received(wait), b""
            if not data:
                raise h11.RemoteProtocolError("peer closed connection without sending all of its answer")
            if part := body.feed(data):
                return part
        return b""

    async def _part_of_other(self, wait: Wait) -> bytes:
        while self._http.their_state is h11.SEND_BODY:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self._received(wait))
            elif isinstance(event, h11.Data):
                return bytes(event.data)
        return b""

    async def _send(self, data: bytes, wait: Wait) -> None:
        with wait.scope() as scope:
            try:
                await self._stream.send(data)
            except anyio.BrokenResourceError:
                # It may have refused before it had read all of it: then the answer says why.
                return
        if scope.cancelled_caught:
            wait.over()

    async def _received(self, wait: Wait, *, closed_is_broken: bool = True) -> bytes:
        """What comes next; nothing at the end of the connection."""
        data = b""
        with wait.scope() as scope:
            try:
                data = await self._stream.receive(_READ_BYTES)
            except anyio.EndOfStream:
                pass
            except anyio.BrokenResourceError:
                if closed_is_broken:
                    raise
        if scope.cancelled_caught:
            wait.over()
        return data

    def may_go_on(self) -> bool:
        """Whether another call may follow; then it is ready for it."""
        # h11 knows whether both sides want to go on, and where the body ended that it was asked for.
        whole, behind = self._http.their_state is h11.DONE, self._http.trailing_data[0]
        if self._chunked is not None:
            whole, behind = self._chunked.ended, self._chunked.rest
        if self._http.our_state is not h11.DONE or not whole or behind:
            return False
        self._http, self._chunked = _h11(), None
        self.idle_until = anyio.current_time() + _IDLE_S
        return True

    def was_closed(self) -> bool:
        """Whether there is anything to read, which between two calls is the end."""
        with DefaultSelector() as selector:
            selector.register(self._stream.extra(SocketAttribute.raw_socket), EVENT_READ)
            return bool(selector.select(0))

    async def aclose(self) -> None:
        await anyio.aclose_forcefully(self._stream)


def _h11() -> h11.Connection:
    return h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEAD_BYTES)


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Turn what anyio and h11 raise into our errors, with the address on them."""
    try:
        yield
    except (anyio.BrokenResourceError, anyio.ClosedResourceError, h11.ProtocolError) as exc:
        raise EngineError(f"{url} broke off: {_why(exc)}") from exc


def _why(exc: BaseException) -> str:
    """What an error says; those of anyio say nothing, but what they come from does."""
    if isinstance(exc, anyio.EndOfStream):
        return "the server closed the connection"
    return str(exc) or str(exc.__cause__ or "") or type(exc).__name__
