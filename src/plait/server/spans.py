"""Runs as OpenTelemetry spans, sent to a collector: run, threads, engine calls, and joins as links between them.

Sent as OTLP over HTTP in JSON, beside the requests and never in their way: what a slow collector cannot take is dropped
and counted. No text of prompts, outlines or answers. Needs httpx2.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from plait.errors import EngineUnavailable, TreeError, needs
from plait.events import Event
from plait.server.metrics import Metrics
from plait.viewer import describe_run, otlp

try:
    import httpx2
except ImportError as exc:
    raise EngineUnavailable(f"{needs('sending spans', 'http')} ({exc})") from exc

log = logging.getLogger("plait.server")
_PARENT = re.compile(r"00-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-[0-9a-f]{2}")
_MOST = 256
"""Runs that may wait for the collector."""
_FLUSH_S = 5.0
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    events: Sequence[Event]
    epoch: float
    parent: str | None


class Spans:
    """Sends what has ended.

    Args:
        endpoint: Of the collector, with its path: `http://localhost:4318/v1/traces`. Redirects are not followed.
        metrics: Counts what was sent, dropped or refused.
    """

    def __init__(self, endpoint: str, metrics: Metrics) -> None:
        self._endpoint, self._metrics = endpoint, metrics
        self._waiting: deque[_Ended] = deque()
        self._arrived = anyio.Event()
        self._ending = False

    def offer(self, events: Sequence[Event], *, epoch: float, parent: str | None = None) -> None:
        """Queue a run that has ended.

        Args:
            events: All of it.
            epoch: When it started, in seconds of Unix time.
            parent: The caller's `traceparent`; the run becomes a child of that span.
        """
        if len(self._waiting) >= _MOST:
            self._metrics.spans.labels("dropped").inc()
            return
        self._waiting.append(_Ended(events=events, epoch=epoch, parent=parent))
        self._arrived.set()

    @asynccontextmanager
    async def sending(self) -> AsyncGenerator[None, None]:
        """Send while the block runs; on leaving, give what still waits some seconds."""
        async with (
            httpx2.AsyncClient(timeout=_TIMEOUT_S, trust_env=False, follow_redirects=False) as http,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._send_all, http)
            try:
                yield
            finally:
                self._ending = True
                self._arrived.set()
                tasks.cancel_scope.deadline = anyio.current_time() + _FLUSH_S

    async def _send_all(self, http: httpx2.AsyncClient) -> None:
        while True:
            while self._waiting:
                await self._send(http, self._waiting.popleft())
            if self._ending:
                return
            self._arrived = anyio.Event()
            await self._arrived.wait()

    async def _send(self, http: httpx2.AsyncClient, ended: _Ended) -> None:
        outcome = "sent"
        try:
            body = otlp([describe_run(ended.events)], epochs=[ended.epoch])
            reply = await http.post(self._endpoint, json=_under(body, ended.parent))
            if not reply.is_success:
                outcome = "refused"
        except (httpx2.HTTPError, TreeError) as exc:
            outcome = "failed"
            log.warning("spans", extra={"fields": {"error": type(exc).__name__}})
        self._metrics.spans.labels(outcome).inc()


def _under(body: dict[str, Any], parent: str | None) -> dict[str, Any]:
    """Make a run's spans part of the caller's trace."""
    match = _PARENT.fullmatch(parent or "")
    if match is None:
        return body
    for resource in body["resourceSpans"]:
        for span in resource["scopeSpans"][0]["spans"]:
            span["traceId"] = match["trace"]
            span.setdefault("parentSpanId", match["span"])
            for link in span.get("links", ()):
                link["traceId"] = match["trace"]
    return body
