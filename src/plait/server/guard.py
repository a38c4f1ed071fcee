"""The door: before a request reaches any route it has an id, comes to a name of ours, from nobody else's page, with a
key, and with a body that is not too large and arrives in time. After it, one line is logged and counted.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plait.server.keys import ANONYMOUS, Client, Keyring
from plait.server.refusal import Refusal, body_of, status_of
from plait.server.service import Service

log = logging.getLogger("plait.server")
OPEN = ("/health", "/ready")
"""For probes: they name no host of ours, have no key and learn nothing."""
_ID = re.compile(r"[\w.:-]{1,64}")
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """Wraps the application.

    Args:
        app: What answers.
        service: Its limits and counters.
        keyring: Who may ask.
    """

    def __init__(self, app: ASGIApp, service: Service, keyring: Keyring) -> None:
        self._app, self._service, self._keyring = app, service, keyring
        self._config = service.config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        state = scope.setdefault("state", {})
        state.update(request_id=_request_id(headers), client=ANONYMOUS, started=time.perf_counter(), status=None)
        sent: dict[str, Any] = {"status": None}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                own = [(b"x-request-id", state["request_id"].encode()), *_SECURITY]
                own = [(name, value) for name, value in own if name not in given]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        failure: BaseException | None = None
        try:
            state["client"] = self._checked(scope, headers)
            body = await self._body(scope, headers, receive)
            await self._app(scope, _again(body, receive), answer)
        except Exception as exc:
            failure = exc
            if sent["status"] is None:
                await _say(exc, scope, answer)
        finally:
            self._note(scope, sent["status"], failure or state.get("failure"))

    def _checked(self, scope: Scope, headers: dict[str, str]) -> Client:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._config.max_header_bytes:
            text = f"the headers are larger than {self._config.max_header_bytes} bytes"
            raise Refusal(text, status=431, code="headers_too_large")
        if len(scope["headers"]) > self._config.max_headers:
            raise Refusal(f"more than {self._config.max_headers} headers", status=431, code="too_many_headers")
        if scope["path"] in OPEN:
            return ANONYMOUS
        hosts = self._config.hosts
        if "*" not in hosts and _name(f"//{headers.get('host', '')}") not in hosts:
            # A page of another site whose name was made to point here sends its own name.
            raise Refusal(
                f"the Host header is {headers.get('host', '')[:100]!r}; `--allowed-host NAME` allows a name",
                status=421,
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin is not None and "*" not in hosts and _name(origin) not in hosts:
            raise Refusal(f"pages of {origin[:100]!r} may not ask this server", status=403, code="unknown_origin")
        if scope["method"] == "POST" and _has_body(headers) and not _is_json(headers.get("content-type", "")):
            raise Refusal("the body must be sent as content-type application/json", status=415, code="not_json")
        return self._keyring.client(headers.get("authorization"), headers.get("x-api-key"))

    async def _body(self, scope: Scope, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body, as far as it may be."""
        if scope["method"] in ("GET", "HEAD"):
            return b""
        most = self._config.max_body_bytes
        declared = headers.get("content-length", "")
        body = bytearray()
        too_large = Refusal(f"the body is larger than {most} bytes", status=413, code="body_too_large")
        if declared.isdigit() and int(declared[:20]) > most:
            raise too_large
        try:
            with anyio.fail_after(self._config.body_timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal("the client left", status=499, code="cancelled")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            text = f"the body did not arrive within {self._config.body_timeout_s:g} s"
            raise Refusal(text, status=408, code="timeout") from None
        return bytes(body)

    def _note(self, scope: Scope, status: int | None, failure: BaseException | None) -> None:
        state = scope["state"]
        # A route's pattern, never the path: a path holds ids, and anything that a client makes up.
        route = getattr(scope.get("route"), "path", None) or "unknown"
        status = state["status"] or status or 499
        self._service.metrics.requests.labels(route, str(status)).inc()
        fields = {
            "request_id": state["request_id"],
            "client": state["client"].name,
            "method": scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other",
            "route": route,
            "status": status,
            "ms": round(1000 * (time.perf_counter() - state["started"]), 1),
            **state.get("fields", {}),
        }
        if failure is not None:
            fields["error"] = body_of(failure)["error"]["code"]
        unforeseen = failure is not None and status_of(failure) >= 500 and not isinstance(failure, Refusal)
        level = logging.ERROR if unforeseen else logging.INFO
        log.log(level, "request", extra={"fields": fields}, exc_info=failure if unforeseen else None)


async def _say(exc: Exception, scope: Scope, send: Send) -> None:
    status = status_of(exc)
    headers = {"content-type": "application/json", "connection": "close", **getattr(exc, "headers", {})}
    if status == 401:
        # Browsers ask for the key where they are sent to a page, programs know what to do.
        headers["www-authenticate"] = 'Basic realm="plait"' if scope["path"] == "/" else "Bearer"
    body = json.dumps(body_of(exc)).encode()
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _again(body: bytes, receive: Receive) -> Receive:
    """The body that was read, once more, and then whatever comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _request_id(headers: dict[str, str]) -> str:
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _has_body(headers: dict[str, str]) -> bool:
    return headers.get("content-length", "0").strip("0") != "" or "transfer-encoding" in headers


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"
