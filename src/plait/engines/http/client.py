"""What is said to a server and what comes back: pages, server-sent events, and what went wrong in words.

Knows JSON over HTTP and nothing of tokens. Closing the stream of an answer closes its connection, which is how every
server here learns that nobody listens any more.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import anyio

from plait.engines.http.base import Json
from plait.engines.http.wire import Answer, Pool, Wait
from plait.errors import (
    ContextLengthError,
    EngineError,
    EngineProtocolError,
    EngineUnavailable,
    PlaitError,
    RequestError,
)
from plait.settings import within

_TOO_LONG = (
    *("exceed_context_size", "context length", "context size", "maximum context"),
    *("max_model_len", "maximum model length", "maximum allowed length", "too long"),
)
"""What servers say of a prompt that does not fit; there is no common code for it."""
_MOST_ERROR_BYTES = 1 << 16
_ERROR_S = 2.0
"""How long the page is waited for that says why; the status has said that it is an error."""
_MOST_EVENT_BYTES = 1 << 20
_MOST_PAGE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds each phase of a call may take; infinity: any. None bounds the whole call: `Budget.deadline_s` does."""

    connect_s: float = 5.0
    first_token_s: float = 300.0
    """From the request to its first token: queueing and prefill."""
    next_token_s: float = 60.0
    """Between two tokens."""
    probe_s: float = 10.0
    """One look at a server's state."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            within(f"timeout {name}", getattr(self, name), 0, above=True, or_none=False)


class Busy(EngineUnavailable):
    """A server has no room, or is still starting."""

    retry_after_s = 0.0


class Client:
    """HTTP to any number of servers.

    Args:
        api_key: Sent as a bearer token.
        secure: Whether an address is https.
    """

    def __init__(self, *, timeouts: Timeouts, api_key: str | None, secure: bool) -> None:
        self.timeouts = timeouts
        self._headers = {"accept-encoding": "identity", "user-agent": "plait"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        # An engine's address is what the user said: no proxy of the environment, no redirect to elsewhere.
        self._pool = Pool(connect_s=timeouts.connect_s, secure=secure)

    async def aclose(self) -> None:
        await self._pool.aclose()

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
        parts: list[bytes] = []
        async with self._asked(method, url, body, {}, wait) as answer:
            _check_plain(url, answer)
            while sum(map(len, parts)) <= _MOST_PAGE_BYTES and (part := await answer.part()):
                parts.append(part)
        content, status = b"".join(parts), answer.head.status_code
        if len(content) > _MOST_PAGE_BYTES:
            raise EngineProtocolError(f"{url} sent a page of more than {_MOST_PAGE_BYTES} bytes")
        if status in (404, 405, 501):
            return None
        if status >= 300:
            raise _refusal(url, answer, content)
        try:
            return _json(content)
        except ValueError:
            return content.decode("utf-8", "replace")

    def _asked(
        self, method: str, url: str, body: Json | None, headers: dict[str, str], wait: Wait
    ) -> AbstractAsyncContextManager[Answer]:
        if body is None:
            return self._pool.answer(method, url, {**self._headers, **headers}, None, wait)
        content = json.dumps(body, separators=(",", ":")).encode()
        kind = {"content-type": "application/json"}
        return self._pool.answer(method, url, {**self._headers, **kind, **headers}, content, wait)

    async def events(
        self, url: str, body: Json, headers: dict[str, str], wait: Wait
    ) -> AsyncGenerator[list[Json], None]:
        """Post a call and read its events, those together that arrived together; closing the generator closes the
        connection.

        Args:
            wait: Until when the next bytes have to come; whoever reads the events extends it.

        Raises:
            ContextLengthError: The server finds the prompt too long.
            EngineTimeout: The wait was over.
            Busy, EngineUnavailable, EngineError, EngineProtocolError: See `_refusal`; and a stream that is cut off, or
                is not made of JSON events. What came before it comes first.
        """
        async with self._asked("POST", url, body, headers, wait) as answer:
            _check_plain(url, answer)
            if answer.head.status_code != 200:
                raise _refusal(url, answer, await _beginning(answer))
            if answer.header(b"content-type").partition(";")[0].strip().lower() != "text/event-stream":
                said = await _beginning(answer)
                if not said:
                    raise EngineError(f"{url} ended its answer before it began")
                raise EngineProtocolError(f"{url} did not answer with an event stream but with {said[:80]!r}")
            parser = EventParser()
            while part := await answer.part():
                events: list[Json] = []
                failure: PlaitError | None = None
                for data in parser.feed(part):
                    if data in (b"", b"[DONE]"):
                        continue
                    try:
                        events.append(_parsed(url, data))
                    except PlaitError as exc:
                        failure = exc
                        break
                if events:
                    yield events
                if failure is not None:
                    raise failure


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
        # What is complete is read first.
        if not complete and self._size + len(self._rest) > _MOST_EVENT_BYTES:
            raise EngineProtocolError(f"the server sent an event of more than {_MOST_EVENT_BYTES} bytes")
        return complete


def _json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is none, or nested deeper than anybody means.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parsed(url: str, data: bytes) -> Json:
    try:
        # Text is what it is, and nobody has to find out the encoding.
        event = _json(data.decode())
    except ValueError:
        raise EngineProtocolError(f"{url} sent an event that is not JSON: {data[:80]!r}") from None
    if not isinstance(event, dict):
        raise EngineProtocolError(f"{url} sent an event that is no object: {data[:80]!r}")
    if error := event.get("error"):
        # Some servers send the head of an answer before they look at the call: then its status is in here.
        code = error.get("code") if isinstance(error, dict) else None
        raise fault(f"{url} failed while it answered", code if isinstance(code, int) else 500, _message(event))
    return event


def _check_plain(url: str, answer: Answer) -> None:
    coding = answer.header(b"content-encoding").strip().lower()
    if coding not in ("", "identity"):
        raise EngineProtocolError(f"{url} sent its answer as {coding:.20}, though it was asked not to compress it")


async def _beginning(answer: Answer) -> bytes:
    """As much of an error page as is worth reading."""
    data = b""
    with anyio.move_on_after(_ERROR_S):
        while len(data) < _MOST_ERROR_BYTES and (part := await answer.part()):
            data += part
    return data[:_MOST_ERROR_BYTES]


def _refusal(url: str, answer: Answer, content: bytes) -> Exception:
    """The error that a status says."""
    status = answer.head.status_code
    try:
        said = _message(_json(content))
    except ValueError:
        said = content.decode("utf-8", "replace").strip()[:200]
    failure = fault(f"{url} answered {status}", status, said or answer.head.reason.decode("latin-1"))
    if isinstance(failure, Busy):
        failure.retry_after_s = _seconds(answer.header(b"retry-after"))
    return failure


def fault(what: str, status: int, said: str) -> Exception:
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
    kind = error.get("type") if isinstance(error, dict) else None
    said = error.get("message", error) if isinstance(error, dict) else error
    # Of what is no text a part, however deep it is nested.
    text = said if isinstance(said, str) else reprlib.repr(said)
    return text[:300] + (f" ({kind:.40})" if isinstance(kind, str) and kind else "")
