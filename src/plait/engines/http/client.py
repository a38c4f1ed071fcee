"""The wire: one pool of connections, a time limit for each phase, server-sent events, and what went wrong in words.

Knows HTTP and nothing of tokens. Closing the stream of an answer closes its connection, which is how every server
here learns that nobody listens any more. Needs httpcore2, the transport of httpx2: a token is an event of its own, and
what httpx2 adds for each is a third of what it costs here.
"""

from __future__ import annotations

import json
import math
import ssl
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

from plait.engines.http.base import Json
from plait.errors import (
    ContextLengthError,
    EngineError,
    EngineProtocolError,
    EngineTimeout,
    EngineUnavailable,
    RequestError,
)

try:
    import httpcore2
except ImportError as exc:
    raise ImportError("it needs httpx2: pip install 'plait[http]'") from exc

_TOO_LONG = (
    *("exceed_context_size", "context length", "context size", "maximum context"),
    *("max_model_len", "maximum model length", "too long"),
)
"""What servers say of a prompt that does not fit; there is no common code for it."""
_MOST_ERROR_BYTES = 1 << 16
_MOST_EVENT_BYTES = 1 << 20
_IDLE_S = 5.0
"""How long a connection is kept for the next call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds each phase of a call may take. None of them bounds the whole call: `Budget.deadline_s` does."""

    connect_s: float = 5.0
    first_token_s: float = 300.0
    """From the request to its first token: queueing and prefill."""
    next_token_s: float = 60.0
    """Between two tokens."""
    probe_s: float = 10.0
    """One look at a server's state."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value > 0:
                raise RequestError(f"timeout {name} is {value}; it must be more than 0 seconds (inf for none)")


class Busy(EngineUnavailable):
    """A server has no room, or is still starting."""

    retry_after_s = 0.0


class Wait:
    """How long an answer may go on saying nothing of interest: bytes alone do not extend it, for they may be pings.

    It is looked at only where a call has to wait for the network, so it costs nothing while tokens queue up.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self.extend(seconds, what)

    def extend(self, seconds: float, what: str) -> None:
        """Start again: so many seconds from now until what is waited for has to be there."""
        # Not the event loop's clock: to ask which loop runs costs several times as much, at each token.
        self._deadline, self._seconds, self._what = monotonic() + seconds, seconds, what

    def left(self) -> float | None:
        """Seconds that are left; None for any number."""
        return None if math.isinf(self._deadline) else self._deadline - monotonic()

    def __str__(self) -> str:
        return f"{self._what} within {self._seconds:g} s"


class Client:
    """HTTP to any number of servers.

    Args:
        api_key: Sent as a bearer token.
        max_connections: Calls at once, to all servers together.
        secure: Whether an address is https.
    """

    def __init__(self, *, timeouts: Timeouts, api_key: str | None, max_connections: int, secure: bool) -> None:
        self.timeouts = timeouts
        self._headers = {"accept-encoding": "identity", "user-agent": "plait"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        # An engine's address is what the user said: no proxy of the environment, no redirect to elsewhere.
        self._http = httpcore2.AsyncConnectionPool(
            # Loading the certificates of the system takes as long as many a call, and plain HTTP needs none.
            ssl_context=ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            max_connections=max_connections,
            keepalive_expiry=_IDLE_S,
            network_backend=_Network(),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def get(self, url: str) -> Any:
        """A page of a server: parsed JSON, else its text; None where it has no such page.

        Raises:
            Busy: It is still starting.
            EngineUnavailable, EngineTimeout, EngineError: It cannot be reached, is too slow, refuses.
        """
        return await self._page("GET", url, None)

    async def post(self, url: str, body: Json) -> Any:
        """Like `get`."""
        return await self._page("POST", url, body)

    async def _page(self, method: str, url: str, body: Json | None) -> Any:
        wait = Wait(self.timeouts.probe_s, f"{url} did not answer")
        with _named(url, wait):
            response = await self._http.request(method, url, **self._asked(body, {}, wait))
        if response.status in (404, 405, 501):
            return None
        if response.status >= 300:
            raise _refusal(url, response, response.content)
        try:
            return json.loads(response.content)
        except ValueError:
            return response.content.decode("utf-8", "replace")

    def _asked(self, body: Json | None, headers: dict[str, str], wait: Wait) -> dict[str, Any]:
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        kind = {} if body is None else {"content-type": "application/json"}
        limits = {"connect": self.timeouts.connect_s, "pool": wait.left(), "read": wait, "write": wait}
        return {
            "headers": {**self._headers, **kind, **headers},
            "content": content,
            "extensions": {"timeout": limits},
        }

    async def events(self, url: str, body: Json, headers: dict[str, str], wait: Wait) -> AsyncGenerator[Json, None]:
        """Post a call and read its events; closing the generator closes the connection.

        Args:
            wait: Until when the next bytes have to come; whoever reads the events extends it.

        Raises:
            ContextLengthError: The server finds the prompt too long.
            EngineTimeout: The wait was over.
            Busy, EngineUnavailable, EngineError, EngineProtocolError: See `_refusal`; and a stream that is cut off, or
                is not made of JSON events.
        """
        with _named(url, wait):
            async with self._http.stream("POST", url, **self._asked(body, headers, wait)) as response:
                if response.status != 200:
                    raise _refusal(url, response, await _beginning(response))
                kind = _header(response, b"content-type")
                if kind.partition(";")[0].strip().lower() != "text/event-stream":
                    said = await _beginning(response)
                    if not said:
                        raise EngineError(f"{url} ended its answer before it began")
                    raise EngineProtocolError(f"{url} did not answer with an event stream but with {said[:80]!r}")
                parser = EventParser()
                async with aclosing(response.aiter_stream()) as parts:
                    async for part in parts:
                        for data in parser.feed(part):
                            if data not in (b"", b"[DONE]"):
                                yield _parsed(url, data)


class EventParser:
    """Server-sent events out of bytes, however they are cut. Of an event only its data counts.

    Source: the event stream format of the HTML standard; a line ends in a newline, with or without a carriage return
    before it, which is what servers send.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, part: bytes) -> list[bytes]:
        """The data of the events that are complete with this part.

        Raises:
            EngineProtocolError: An event has no end.
        """
        *lines, self._rest = (self._rest + part).split(b"\n") if self._rest else part.split(b"\n")
        complete: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                self._size += len(line)
            elif not line and self._data:
                complete.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data, self._size = [], 0
        if self._size + len(self._rest) > _MOST_EVENT_BYTES:
            raise EngineProtocolError(f"the server sent an event of more than {_MOST_EVENT_BYTES} bytes")
        return complete


class _Network(httpcore2.AsyncNetworkBackend):
    """Connections whose limits are `Wait`s: httpcore2 hands on what a request says, whatever it is."""

    def __init__(self) -> None:
        self._network: Any = httpcore2.AnyIOBackend()

    async def connect_tcp(self, *args: Any, **options: Any) -> httpcore2.AsyncNetworkStream:
        return _Stream(await self._network.connect_tcp(*args, **options))


class _Stream(httpcore2.AsyncNetworkStream):
    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self._stream = stream
        self.get_extra_info = stream.get_extra_info
        self.aclose = stream.aclose

    async def read(self, max_bytes: int, timeout: Any = None) -> bytes:  # noqa: ASYNC109 - the contract's name
        return await self._stream.read(max_bytes, timeout.left())

    async def write(self, buffer: bytes, timeout: Any = None) -> None:  # noqa: ASYNC109
        await self._stream.write(buffer, timeout.left())

    async def start_tls(self, *args: Any, **options: Any) -> httpcore2.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(*args, **options))


def _parsed(url: str, data: bytes) -> Json:
    try:
        # Text is what it is, and nobody has to find out the encoding.
        event = json.loads(data.decode())
    except ValueError:
        raise EngineProtocolError(f"{url} sent an event that is not JSON: {data[:80]!r}") from None
    if not isinstance(event, dict):
        raise EngineProtocolError(f"{url} sent an event that is no object: {data[:80]!r}")
    if error := event.get("error"):
        # Some servers send the head of an answer before they look at the call: then its status is in here.
        code = error.get("code") if isinstance(error, dict) else None
        raise _fault(f"{url} failed while it answered", code if isinstance(code, int) else 500, _message(event))
    return event


@contextmanager
def _named(url: str, wait: Wait) -> Iterator[None]:
    """Turn what httpcore2 raises into our errors, with the address on them."""
    try:
        yield
    except httpcore2.ConnectTimeout as exc:
        raise EngineUnavailable(f"{url} does not accept connections: timed out") from exc
    except (httpcore2.ConnectError, httpcore2.UnsupportedProtocol) as exc:
        raise EngineUnavailable(f"{url} cannot be reached: {exc}") from exc
    except httpcore2.TimeoutException as exc:
        raise EngineTimeout(str(wait)) from exc
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as exc:
        raise EngineError(f"{url} broke off: {exc or type(exc).__name__}") from exc


async def _beginning(response: httpcore2.Response) -> bytes:
    """As much of an error page as is worth reading."""
    data = b""
    async with aclosing(response.aiter_stream()) as parts:
        async for part in parts:
            data += part
            if len(data) >= _MOST_ERROR_BYTES:
                break
    return data[:_MOST_ERROR_BYTES]


def _header(response: httpcore2.Response, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in response.headers if key.lower() == name), "")


def _refusal(url: str, response: httpcore2.Response, content: bytes) -> Exception:
    """The error that a status says."""
    status = response.status
    try:
        said = _message(json.loads(content))
    except ValueError:
        said = content.decode("utf-8", "replace").strip()[:200]
    reason: bytes = response.extensions.get("reason_phrase", b"")
    fault = _fault(f"{url} answered {status}", status, said or reason.decode("latin-1"))
    if isinstance(fault, Busy):
        fault.retry_after_s = _seconds(_header(response, b"retry-after"))
    return fault


def _fault(what: str, status: int, said: str) -> Exception:
    """The error that a status means, wherever it was said."""
    text = f"{what}: {said}"
    if status in (429, 503):
        return Busy(text)
    if status in (401, 403):
        return RequestError(f"{text}. Give its API key: api_key=, or PLAIT_ENGINE_KEY in the environment")
    if status in (400, 413, 422) and any(mark in said.lower() for mark in _TOO_LONG):
        return ContextLengthError(text)
    if 300 <= status < 400:
        return RequestError(f"{text}. Redirects are not followed: give the address it leads to")
    return EngineProtocolError(text) if status < 500 else EngineError(text)


def _seconds(header: str) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0


def _message(body: Any) -> str:
    """The message in an error body: OpenAI's shape, or whatever a server makes of it."""
    error = body.get("error", body.get("detail", body.get("message", body))) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)[:300]
    kind = error.get("type")
    return f"{error.get('message', error)!s:.300}" + (f" ({kind})" if kind else "")
