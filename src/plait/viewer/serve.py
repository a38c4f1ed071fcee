"""Serves one page to the browser of this machine: loopback only, one path, nothing to write.

A page of another site cannot read it: requests must name this host (DNS rebinding), and only GET and HEAD are known.
"""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from plait.errors import PlaitError, RequestError
from plait.viewer.page import Page

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")


class ViewServer(ThreadingHTTPServer):
    """Serves what `make` returns, made anew for each visit: reloading shows what a log has gained.

    Args:
        make: The page; its errors are shown in place of it.
        port: 0 takes any that is free.

    Raises:
        RequestError: The port cannot be used.
    """

    daemon_threads = True

    def __init__(self, make: Callable[[], Page], *, port: int = 0) -> None:
        self.make = make
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as exc:
            raise RequestError(f"cannot listen on port {port}: {exc}; 0 takes any that is free") from exc

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version = "plait"
    sys_version = ""
    timeout = 10

    def do_GET(self) -> None:
        port = self.server.server_port
        allowed = {f"{name}:{port}" for name in NAMES} | (set(NAMES) if port == 80 else set())
        if self.headers.get_all("Host", []) not in [[host] for host in allowed]:
            return self._plain(421, f"this page is at {self.server.url}\n")
        if self.path.partition("?")[0] != "/":
            return self._plain(404, "there is one page here: /\n")
        try:
            page = self.server.make()
        except PlaitError as exc:
            return self._plain(500, f"{exc}\n")
        self._send(200, page.headers, page.html)

    do_HEAD = do_GET

    def _plain(self, status: int, text: str) -> None:
        self._send(status, {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}, text)

    def _send(self, status: int, headers: dict[str, str], text: str) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to the person who looks."""
