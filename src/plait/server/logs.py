"""The server's log: one line a request, as JSON or for people. Never a prompt, an answer or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

NAME = "plait.server"
LEVELS = {NAME: logging.INFO, "plait": logging.WARNING, "uvicorn.error": logging.WARNING, "asyncio": logging.ERROR}
"""What is logged. Words of others, engines among them, only where something is wrong; asyncio warns of each write to a
client that has just left."""


def configure(kind: str) -> None:
    """Send the server's log to standard error.

    Args:
        kind: json, plain or off; auto: plain where standard error is a terminal, else json.
    """
    if kind == "auto":
        kind = "plain" if sys.stderr.isatty() else "json"
    handler = logging.NullHandler() if kind == "off" else logging.StreamHandler()
    handler.setFormatter(_Json() if kind == "json" else _Plain())
    for name, level in LEVELS.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        data: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower(), "event": record.getMessage()}
        data |= getattr(record, "fields", {})
        if record.exc_info:
            data["exception"] = self.formatException(record.exc_info)
        return json.dumps(data)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in getattr(record, "fields", {}).items())
        text = f"{_time(record)} {record.levelname.lower()} {record.getMessage()} {fields}".rstrip()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
