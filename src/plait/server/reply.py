"""A response that is made while its client listens: a client that leaves cancels the work behind it, at once.

Streams are server-sent events. A failure before the first of them is an HTTP error; after it, an event of its own, and
the stream ends without its usual last word.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from plait.errors import PlaitError
from plait.server.refusal import Refusal, body_of
from plait.server.service import Asked, Service

log = logging.getLogger("plait.server")
DONE = "[DONE]"
_SLACK_S = 10.0
"""A run ends by its deadline; a client that does not read it to its end gets so much longer."""


def documented(model: type[BaseModel] | None = None) -> Any:
    """What the schema says of a route whose answer is a `Reply`.

    Args:
        model: The whole answer, where it may be asked for without a stream.
    """
    reply: dict[str, Any] = {"description": "The whole answer, or its events", "content": {"text/event-stream": {}}}
    if model is not None:
        reply["model"] = model
    kind = Response if model is None else JSONResponse
    return {"status_code": 200, "response_class": kind, "responses": {200: reply}}


async def asked(request: HttpRequest) -> Asked:
    """Who asks: the guard has found it out."""
    # Asynchronous, so that it is not sent to another thread.
    state = request.scope["state"]
    return Asked(
        service=request.app.state.service,
        client=state["client"],
        request_id=state["request_id"],
        started=state["started"],
        traceparent=request.headers.get("traceparent"),
    )


class Out:
    """A stream of server-sent events; its headers go out with the first."""

    def __init__(self, send: Send, headers: dict[str, str], most: int) -> None:
        self._send, self._headers, self._left = send, headers, most
        self.started = False
        self._quiet = True

    async def data(self, data: Any, *, event: str | None = None, id: int | None = None) -> None:
        """Send an event; `data` is text without line breaks, or anything that JSON holds."""
        text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
        lines = f"event: {event}\n" if event else ""
        lines += f"id: {id}\n" if id is not None else ""
        await self._write(f"{lines}data: {text}\n\n".encode())

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        self._left -= len(body)
        if self._left < 0:
            # What says so may still be sent.
            self._left = sys.maxsize
            raise Refusal("the stream is longer than the server allows", status=413, code="stream_too_long")
        if not self.started:
            self.started = True
            headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **self._headers}
            # Proxies that gather responses would make a stream one block.
            headers["x-accel-buffering"] = "no"
            await self._send(_start(200, headers))
        self._quiet = False
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def keep_alive(self, every_s: float) -> None:
        """Say a comment whenever nothing was said for a while, so that nobody between takes the stream for dead."""
        while True:
            await anyio.sleep(every_s)
            if self._quiet and self.started:
                await self._send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
            self._quiet = True

    async def fail(self, failure: Exception) -> None:
        """Say what went wrong, as the stream's last event."""
        text = json.dumps(body_of(failure), separators=(",", ":"))
        await self._send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


Work = Callable[[Out | None], Awaitable[dict[str, Any] | None]]
"""Sends to a stream where there is one, else returns the whole body."""


class Reply(Response):
    """Runs its work when the response is sent.

    Args:
        work: What makes the body.
        stream: Whether as events.
        last: What a stream ends with; None nothing.
        headers: Of the response, beside the usual.
        fail: Says on a stream that has begun what went wrong.
    """

    def __init__(
        self,
        service: Service,
        work: Work,
        *,
        stream: bool,
        last: str | None = DONE,
        headers: dict[str, str] | None = None,
        fail: Callable[[Out, Exception], Awaitable[None]] = Out.fail,
    ) -> None:
        super().__init__()
        self._service, self._work, self._stream, self._last, self._fail = service, work, stream, last, fail
        self._extra = headers or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        out = Out(send, self._extra, self._service.config.max_stream_bytes)
        left = False
        failure: Exception | None = None
        body: dict[str, Any] | None = None

        async def watch(scope: anyio.CancelScope) -> None:
            nonlocal left
            while (await receive())["type"] != "http.disconnect":
                pass
            left = True
            scope.cancel()

        async def stop(scope: anyio.CancelScope) -> None:
            nonlocal failure
            await self._service.stopping.wait()
            failure = Refusal("the server is shutting down", status=503, code="shutting_down", retry_after_s=1)
            scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, tasks.cancel_scope)
            tasks.start_soon(stop, tasks.cancel_scope)
            if self._stream:
                tasks.start_soon(out.keep_alive, self._service.config.keep_alive_s)
            try:
                with anyio.fail_after(self._service.config.request_timeout_s + _SLACK_S):
                    body = await self._work(out if self._stream else None)
                    if self._stream and self._last is not None:
                        await out.data(self._last)
            except PlaitError as exc:
                # First: an engine's timeout is a TimeoutError too.
                failure = exc
            except TimeoutError:
                failure = Refusal("the client did not read the response in time", status=408, code="timeout")
            except OSError:
                left = True
            except Exception as exc:
                failure = exc
            tasks.cancel_scope.cancel()
        if left:
            self._service.metrics.disconnects.inc()
            scope["state"]["status"] = 499
        elif failure is not None:
            if not out.started:
                raise failure
            scope["state"]["failure"] = failure
            await self._fail(out, failure)
            await out.end()
        elif self._stream:
            await out.end()
        else:
            await JSONResponse(body, headers=self._extra)(scope, receive, send)


def _start(status: int, headers: dict[str, str]) -> Message:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}
