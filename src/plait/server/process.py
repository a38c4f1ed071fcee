"""The server as a process: it listens, and on SIGTERM lets what runs come to its end.

The first signal refuses new requests and says `not ready`; when the last run has ended, or the time is over, the
process ends. A second signal ends it at once.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from plait.server.connection import Connection
from plait.server.service import Service

log = logging.getLogger("plait.server")


class Process(uvicorn.Server):
    """Runs the application until it is told to stop."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        config = service.config
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                http=Connection.within(config),
                ws="none",
                # Engines are opened below, where a failure is an exception.
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                # Proxies' headers are not read: nothing here depends on the client's address.
                proxy_headers=False,
                h11_max_incomplete_event_size=config.max_header_bytes,
                timeout_keep_alive=30,
                # What was told to stop, stops; this is for what does not hear it.
                timeout_graceful_shutdown=5,
                backlog=1024,
            )
        )
        self._service = service
        self._until: float | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with self._service.opened():
            await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            log.info("listening", extra={"fields": {"address": self.address, "models": list(self._service.served)}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._until is not None:
            super().handle_exit(sig, frame)
            return
        if sig == signal.SIGINT:
            # Raised again at the end, so that Ctrl-C is told from a normal end.
            self._captured_signals.append(sig)
        self.drain()

    def drain(self) -> None:
        """Take no more requests; end when those that run have ended."""
        self._service.admission.draining = True
        self._until = time.monotonic() + self._service.config.drain_s
        running = self._service.admission.num_requests
        log.info("draining", extra={"fields": {"running": running, "seconds": self._service.config.drain_s}})

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        self._service.admission.end_silent(self._service.config.engine_timeout_s)
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check(time.monotonic())
        if self._until is None:
            return False
        if time.monotonic() >= self._until:
            # Each stream says that it was cut, and why.
            self._service.stopping.set()
            return True
        return not self._service.admission.num_requests
