"""Shows a run on a terminal in time: live where it is slow, replayed where it was too fast to watch.

Pacing never touches the run: what is replayed has already happened, and its times are the run's own, stretched.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType

import anyio
from rich.console import Console
from rich.live import Live

from plait.events import Event, RunEnded, RunStarted, ThreadForked, ThreadsCut, TokensSampled
from plait.terminal.view import View
from plait.tree import Tree

FRAME_S = 1 / 30
LIVE_FRAME_S = 1 / 12
"""Drawing shares the processor with the model: fewer frames while it works."""
REPLAY_S = 1.5
SLOW_S = 6.0


class Screen:
    """A picture that is drawn over itself until it is left; then it is gone and the final one can be printed."""

    def __init__(self, console: Console, view: View) -> None:
        self._view = view
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._live.stop()

    def show(self, tree: Tree) -> None:
        self._live.update(self._view.running(tree), refresh=True)


async def replay(events: Sequence[Event], screen: Screen, *, seconds: float) -> None:
    """Show a finished run again, stretched or shrunk to so many seconds."""
    timed = _spread(events)
    last = timed[-1][0] if timed else 0.0
    stretch = seconds / last if last else 1.0
    tree = Tree()
    started = anyio.current_time()
    at = 0
    while at < len(timed):
        passed = anyio.current_time() - started
        while at < len(timed) and timed[at][0] * stretch <= passed:
            tree.apply(timed[at][1])
            at += 1
        screen.show(tree)
        await anyio.sleep(FRAME_S)


async def follow(events: AsyncIterator[Event], tree: Tree, screen: Screen, *, on: Callable[[Event], None]) -> None:
    """Show a run while it runs. `tree` is the run's own; each event is handed on at once."""

    async def draw() -> None:
        while True:
            screen.show(tree)
            await anyio.sleep(LIVE_FRAME_S)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(draw)
        async for event in events:
            on(event)
        tasks.cancel_scope.cancel()


def _spread(events: Sequence[Event]) -> list[tuple[float, Event]]:
    """Events with their times, one for each token: engines tell of several at once, sampled since they last told."""
    out: list[tuple[float, Event]] = []
    heard: dict[str, float] = {}
    for event in events:
        if isinstance(event, (RunStarted, ThreadForked)):
            out.append((out[-1][0] if out else 0.0, event))
            continue
        if isinstance(event, TokensSampled):
            since, n = heard[event.id], len(event.token_ids)
            for i, (id, logprob) in enumerate(zip(event.token_ids, event.logprobs, strict=True), 1):
                t = min(event.t, since + (event.t - since) * i / n)
                out.append((t, TokensSampled(id=event.id, token_ids=(id,), logprobs=(logprob,), t=t)))
        else:
            out.append((event.t, event))
        if not isinstance(event, (ThreadsCut, RunEnded)):
            heard[event.id] = event.t
    # Stable: events of one segment keep their order.
    return sorted(out, key=lambda pair: pair[0])
