"""Errors as HTTP says them: one status, one body in the shape that OpenAI's clients read.

Knows statuses and wording only. Everything that Plait raises on purpose has its status already; what is added here is
what only a server can refuse for.
"""

from __future__ import annotations

import re
from typing import Any

from plait.errors import PlaitError

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= {408: "timeout_error", 429: "rate_limit_error", 503: "overloaded_error"}
_ADDRESS = re.compile(r"[a-z][a-z+.-]*://[^\s,;'\")\]]+", re.IGNORECASE)


class Refusal(PlaitError):
    """A request that the server does not take.

    Args:
        message: What was wrong and what is allowed.
        status: HTTP status.
        code: A word that a program can test.
        param: The field of the request that it is about.
        retry_after_s: Seconds after which it is worth to ask again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s
        self.retryable = retry_after_s is not None

    def __reduce__(self) -> Any:
        return str, (str(self),)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def status_of(exc: BaseException) -> int:
    """The HTTP status of an error."""
    return exc.status if isinstance(exc, PlaitError) else 500


def body_of(exc: BaseException) -> dict[str, Any]:
    """An error in OpenAI's shape. What was not raised on purpose says nothing of the server's inside."""
    status = status_of(exc)
    message = "the server failed; its log says why, under this request's id"
    if isinstance(exc, PlaitError):
        message = str(exc) if isinstance(exc, Refusal) else without_addresses(str(exc))
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = getattr(exc, "code", None) or _code(exc)
    return {"error": {"message": message, "type": kind, "param": getattr(exc, "param", None), "code": code}}


def without_addresses(text: str) -> str:
    """What an engine's error says, for a client: where the engine is stands in the log only."""
    return _ADDRESS.sub("its server", text)


def _code(exc: BaseException) -> str:
    """`ContextLengthError` is `context_length_exceeded`, as OpenAI calls it; the others by their own names."""
    name = type(exc).__name__ if isinstance(exc, PlaitError) else "InternalError"
    words = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")
    return {"context_length_error": "context_length_exceeded", "request_error": "invalid_request"}.get(words, words)
