"""Event loops whose clock is put forward: a limit of many seconds passes at once, and a busy machine uses none of it.

For tests that need sockets, so that `plait.testing.clock` will not do: there time jumps whenever nothing is ready, and
what is on its way through the kernel is not ready yet.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import anyio
import anyio.lowlevel
import trio.lowlevel

_STEP_S, _TURNS = 0.1, 4
_REAL_S = 0.0003
"""A step takes at least so long, for what is on its way through the kernel."""


class _Loop(asyncio.SelectorEventLoop):
    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


class _Clock(trio.abc.Clock):
    ahead_s = 0.0

    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        return time.perf_counter() + self.ahead_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - self.current_time()


ASYNCIO: Any = ("asyncio", {"loop_factory": _Loop})
TRIO: Any = ("trio", {"clock": _Clock()})
"""Values for an `anyio_backend` fixture."""


async def sleep(seconds: float) -> None:
    """Put the clock forward by so much, in steps between which other tasks have their turns; elsewhere, sleep."""
    clock = _running()
    if clock is None:
        await anyio.sleep(seconds)
        return
    until = anyio.current_time() + seconds
    while (left := until - anyio.current_time()) > 0:
        _forward(clock, min(left, _STEP_S))
        for _ in range(_TURNS):
            await anyio.lowlevel.checkpoint()


def _running() -> _Loop | _Clock | None:
    try:
        clock: Any = asyncio.get_running_loop()
    except RuntimeError:
        clock = trio.lowlevel.current_clock()
    return clock if isinstance(clock, (_Loop, _Clock)) else None


def _forward(clock: _Loop | _Clock, seconds: float) -> None:
    time.sleep(_REAL_S)
    clock.ahead_s += seconds
