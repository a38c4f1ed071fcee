"""An OpenAI-compatible server in front of Plait: requests in, threads watched. Needs the `serve` extra.

`create_app` is the ASGI application, `Process` runs it. The event stream that the viewer reads is described in
`docs/serving.md`.
"""

from __future__ import annotations

from plait.errors import EngineUnavailable, needs

try:
    import fastapi as _fastapi  # noqa: F401
    import prometheus_client as _prometheus_client  # noqa: F401
    import uvicorn as _uvicorn  # noqa: F401
except ImportError as exc:
    raise EngineUnavailable(f"{needs('the server', 'serve')} ({exc})") from exc

from plait.server.app import create_app
from plait.server.config import ServeConfig, as_toml, resolve
from plait.server.keys import new_key
from plait.server.process import Process
from plait.server.service import Served, Service

__all__ = ["Process", "ServeConfig", "Served", "Service", "as_toml", "create_app", "new_key", "resolve"]
