"""Virtual time: a program that only sleeps finishes at once, and its clock says how long it would have taken.

Knows nothing of engines or sessions. trio brings its own mock clock; for asyncio a loop whose clock jumps.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer whenever nothing is ready."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # None: no timer is set, so only another thread can wake the loop; that takes real time.
        ready = super().select(None if timeout is None else 0)
        if timeout and not ready:
            self._loop.jump(timeout)
        return ready


def virtual_time(backend: str) -> dict[str, Any]:
    """Backend options for `anyio.run`, or an `anyio_backend` fixture, that make time virtual."""
    if backend == "trio":
        from trio.testing import MockClock

        return {"clock": MockClock(autojump_threshold=0)}
    return {"loop_factory": VirtualTimeLoop}


def run_virtual(main: Callable[..., Awaitable[T]], *args: Any, backend: str = "asyncio") -> T:
    """`anyio.run` in virtual time."""
    return anyio.run(main, *args, backend=backend, backend_options=virtual_time(backend))
