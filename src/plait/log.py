"""Runs on disk: one event a line, readable at any moment, also after a crash or a full disk.

Usually a log holds one run; where it holds several, each begins with its own `RunStarted`. Knows events and trees only.
A line is written whole or, where the disk refuses, is the last; reading drops it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from plait.errors import LogError, TreeError
from plait.events import Event, RunStarted, decode, encode
from plait.tree import Tree


class RunLog:
    """Appends events to a file, each at once and unbuffered, so that a reader beside it sees them.

    Args:
        path: The file; one that exists is replaced.
        append: Go on with one that exists; a line that was cut off goes.

    Raises:
        LogError: It cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        self.path = Path(path)
        self.num_events = 0
        try:
            if append and self.path.is_file():
                whole = self.path.read_bytes()
                os.truncate(self.path, whole.rfind(b"\n") + 1)
            self._file = open(self.path, "ab" if append else "wb", buffering=0)  # noqa: SIM115
        except OSError as exc:
            raise LogError(f"cannot write {self.path}: {exc.strerror}") from exc

    def write(self, event: Event) -> None:
        """Append an event.

        Raises:
            LogError: The log is closed, or the disk refuses; the log is closed then, what it holds stays readable.
        """
        if self._file.closed:
            raise LogError(f"{self.path} is closed after {self.num_events} events; a run after it needs its own log")
        rest = memoryview((encode(event) + "\n").encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as exc:
            self.close()
            raise LogError(
                f"cannot write {self.path}: {exc.strerror}; the {self.num_events} events before stay readable"
            ) from exc
        self.num_events += 1

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def write_log(events: Iterable[Event], path: str | os.PathLike[str]) -> None:
    """Write a finished run.

    Raises:
        LogError: The file cannot be written.
    """
    with RunLog(path) as log:
        for event in events:
            log.write(event)


def read_log(path: str | os.PathLike[str]) -> list[Event]:
    """Events of a log, up to its last whole line: a run that was cut off is read as far as it came.

    Raises:
        LogError: The file cannot be read.
        TreeError: A line, other than one cut off at the end, is not an event; the message says which.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as exc:
        raise LogError(f"cannot read {path}: {exc.strerror}") from exc
    events: list[Event] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            events.append(decode(line.decode()))
        except (TreeError, UnicodeDecodeError) as exc:
            hint = "; is it a log that `plait solve --trace` wrote?" if number == 1 else ""
            raise TreeError(f"{path}, line {number}: {exc}{hint}") from exc
    return events


def split_runs(events: Iterable[Event]) -> list[list[Event]]:
    """The runs of a log that holds several, one after the other."""
    runs: list[list[Event]] = []
    for event in events:
        if not runs or isinstance(event, RunStarted):
            runs.append([])
        runs[-1].append(event)
    return runs


def read_tree(path: str | os.PathLike[str]) -> Tree:
    """The tree of a log that holds one run.

    Raises:
        LogError: The file cannot be read.
        TreeError: It is not a log, or contradicts itself.
    """
    events = read_log(path)
    if not events:
        raise TreeError(f"{path} holds no whole event")
    return Tree.from_events(events)
