"""What a person sees of a run: a bar on a terminal, a line every ten seconds elsewhere. Knows nothing of training."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias

Say: TypeAlias = Callable[[str], None]


class Display(Protocol):
    def say(self, line: str) -> None:
        """Show a line that stays."""
        ...

    def progress(self, done: float, line: Callable[[], str]) -> None:
        """Show how far a run is; called at every step, `line` only when it is shown."""
        ...


class Lines:
    """Plain lines, for logs and pipes.

    Args:
        write: Takes a line.
        every_s: Seconds between two lines of progress.
    """

    def __init__(self, write: Say, every_s: float = 10.0) -> None:
        self._write, self._every_s, self._last = write, every_s, time.monotonic()

    def say(self, line: str) -> None:
        self._write(line)

    def progress(self, done: float, line: Callable[[], str]) -> None:
        if time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self._write(f"{done:6.1%}  {line()}")


class _Bar:
    def __init__(self, bar: object) -> None:
        from rich.progress import Progress

        assert isinstance(bar, Progress)
        self._bar, self._task, self._last = bar, bar.add_task("", total=1.0), 0.0

    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False)

    def progress(self, done: float, line: Callable[[], str]) -> None:
        if time.monotonic() - self._last >= 1:
            self._last = time.monotonic()
            self._bar.update(self._task, completed=done, description=line())


@contextmanager
def open_display(say: Say | None = None) -> Iterator[Display]:
    """The display for where standard error goes; with `say`, plain lines to it."""
    if say is not None or not sys.stderr.isatty():
        yield Lines(say or _to_stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (BarColumn(20), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
