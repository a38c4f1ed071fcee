"""The wire: one pool of connections, a time limit for each phase, server-sent events, and what went wrong in words.

Knows HTTP and nothing of tokens. Closing the stream of an answer closes its connection, which is how every server
here learns that nobody listens any more. Needs httpx2.
"""

from __future__ import annotations

import json
import math
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio

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
    import httpx2
except ImportError as exc:
    raise ImportError("it needs httpx2: pip install 'plait[http]'") from exc

_TOO_LONG = ("exceed_context_size", "context length", "context size", "maximum context", "max_model_len", "too long")
"""What servers say of a prompt that does not fit; there is no common code for it."""
_MOST_ERROR_BYTES = 1 << 16


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


class Client:
    """HTTP to any number of servers.

    Args:
        api_key: Sent as a bearer token.
        max_connections: Calls at once, to all servers together.
        secure: Whether an address is https.
    """

    def __init__(self, *, timeouts: Timeouts, api_key: str | None, max_connections: int, secure: bool) -> None:
        self.timeouts = timeouts
        self._http = httpx2.AsyncClient(
            headers={"authorization": f"Bearer {api_key}"} if api_key else None,
            # Limits in seconds are kept here, by phase; httpx2 knows the phases of a connection only.
            timeout=httpx2.Timeout(None, connect=timeouts.connect_s),
            limits=httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            # Loading the certificates of the system takes as long as many a call, and plain HTTP needs none.
            verify=True if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            # An engine's address is what the user said: no proxy of the environment, no redirect to elsewhere.
            trust_env=False,
            follow_redirects=False,
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
        with _named(url), _limit(self.timeouts.probe_s, f"{url} did not answer"):
            response = await self._http.request(method, url, json=body)
        if response.status_code in (404, 405, 501):
            return None
        if response.status_code >= 300:
            raise _refusal(url, response, response.content)
        try:
            return json.loads(response.content)
        except ValueError:
            return response.text

    async def events(self, url: str, body: Json, headers: dict[str, str]) -> AsyncGenerator[Json, None]:
        """Post a call and read its events; closing the generator closes the connection.

        Raises:
            ContextLengthError: The server finds the prompt too long.
            Busy, EngineUnavailable, EngineError, EngineProtocolError: See `_refusal`; and a stream that is cut off, or
                is not made of JSON events.
        """
        with _named(url):
            async with self._http.stream("POST", url, json=body, headers=headers) as response:
                if response.status_code != 200:
                    raise _refusal(url, response, await _beginning(response))
                source = aiter(httpx2.EventSource(response))
                try:
                    async for event in source:
                        if event.data not in ("", "[DONE]"):
                            yield _parsed(url, event.data)
                finally:
                    await _hang_up(response, source)


async def _hang_up(response: httpx2.Response, source: AsyncIterator[httpx2.ServerSentEvent]) -> None:
    """Let go of an answer, and end the generators of httpx2 that were reading it.

    They cannot be closed from outside, only read to their end, which the error of a closed connection brings about.
    """
    with anyio.move_on_after(1, shield=True), suppress(Exception):
        await response.aclose()
        while True:
            await anext(source)


def _parsed(url: str, data: str) -> Json:
    try:
        event = json.loads(data)
    except ValueError:
        raise EngineProtocolError(f"{url} sent an event that is not JSON: {data[:80]!r}") from None
    if not isinstance(event, dict):
        raise EngineProtocolError(f"{url} sent an event that is no object: {data[:80]!r}")
    if event.get("error"):
        raise EngineError(f"{url} failed while it answered: {_message(event)}")
    return event


@contextmanager
def _limit(seconds: float, what: str) -> Iterator[None]:
    try:
        with anyio.fail_after(None if math.isinf(seconds) else seconds):
            yield
    except TimeoutError:
        raise EngineTimeout(f"{what} within {seconds:g} s") from None


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Turn what httpx2 raises into our errors, with the address on them."""
    try:
        yield
    except httpx2.ConnectTimeout as exc:
        raise EngineUnavailable(f"{url} does not accept connections: timed out") from exc
    except (httpx2.ConnectError, httpx2.UnsupportedProtocol) as exc:
        raise EngineUnavailable(f"{url} cannot be reached: {exc}") from exc
    except httpx2.TimeoutException as exc:
        raise EngineTimeout(f"{url}: {type(exc).__name__}") from exc
    except httpx2.SSEError as exc:
        raise EngineProtocolError(f"{url} did not answer with an event stream: {exc}") from exc
    except httpx2.TransportError as exc:
        raise EngineError(f"{url} broke off: {exc or type(exc).__name__}") from exc


async def _beginning(response: httpx2.Response) -> bytes:
    """As much of an error page as is worth reading."""
    data = b""
    async for part in response.aiter_bytes():
        data += part
        if len(data) >= _MOST_ERROR_BYTES:
            break
    return data[:_MOST_ERROR_BYTES]


def _refusal(url: str, response: httpx2.Response, content: bytes) -> Exception:
    """The error that a status says."""
    status = response.status_code
    try:
        said = _message(json.loads(content))
    except ValueError:
        said = content.decode("utf-8", "replace").strip()[:200]
    text = f"{url} answered {status}: {said or response.reason_phrase}"
    if status in (429, 503):
        busy = Busy(text)
        busy.retry_after_s = _seconds(response.headers.get("retry-after"))
        return busy
    if status in (401, 403):
        return RequestError(f"{text}. Give its API key: api_key=, or PLAIT_ENGINE_KEY in the environment")
    if status in (400, 413, 422) and any(mark in said.lower() for mark in _TOO_LONG):
        return ContextLengthError(text)
    if 300 <= status < 400:
        return RequestError(f"{text}. Redirects are not followed: give the address it leads to")
    return EngineProtocolError(text) if status < 500 else EngineError(text)


def _seconds(header: str | None) -> float:
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
