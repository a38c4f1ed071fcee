"""The format seam: a format says where sampled tokens fork, how each branch opens, what the parent reads at the join.

It looks only at ids sampled in the present call, never at the prompt. It knows nothing of engines.
A `Trajectory` is a run before it has tokens: what data generators write and what `render` turns into a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from plait.tokenizer import Tokenizer
from plait.types import JoinKind, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One thread that a fork asks for."""

    header_ids: tuple[int, ...]
    """Ids the runtime writes to open it."""
    label: str
    """What the thread was told, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A block of threads, in outline order."""

    branches: tuple[Branch, ...]
    note: str = ""
    """What had to be repaired, in plain words; empty for a well-formed block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """The model ended a call on a fork token, but what it wrote cannot be read as a block."""

    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadOutcome:
    """What a finished thread of a block holds, for the join."""

    header_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Everything after the header: sampled ids, and what nested joins inserted."""
    stop: StopReason
    """Of its last segment, before any forced closing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """What the parent is given when its threads have ended."""

    forced_ids: tuple[int, ...]
    """concat: the threads' text and what follows. merge: what follows the merged threads (at least one id)."""
    end: bool = False
    """True where the format's rule is that the trajectory ends here."""


class TrajectoryFormat(Protocol):
    """Where a thread forks, how each branch opens, what the parent reads at the join."""

    name: str
    paper: str
    join_kind: JoinKind
    fork_ids: tuple[int, ...]
    """Control ids that begin a block: banned where the budget declines forks."""

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        """Ids that end a call of a thread at this depth (root: 0). End-of-sequence ids are `eos_ids`."""
        ...

    def eos_ids(self) -> tuple[int, ...]: ...

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Malformed | None:
        """Read the end of a call that stopped on a stop id. None: no fork was asked for."""
        ...

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        """What the runtime appends to a thread that did not close itself; empty where it did."""
        ...

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        """What the parent reads. Outcomes are in outline order and closed."""
        ...

    def open_text(self, labels: Sequence[str]) -> str:
        """What the model writes to open a block with these outlines."""
        ...

    def thread_text(self, body: str) -> str:
        """What the model writes as one thread, its closing tag included."""
        ...

    def close_text(self, conclusion: str) -> str:
        """What the model writes after the join to close the block."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """A fork and its join, in text. `outlines[i]` is what thread i was told, `threads[i]` what it wrote."""

    outlines: tuple[str, ...]
    threads: tuple[Trajectory, ...]
    conclusion: str = ""
    """What the model writes inside the block after the join; only in formats that have a place for it."""


Trajectory: TypeAlias = tuple["str | Block", ...]
"""Plain text and blocks, in order."""


def ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a format's own text, control tokens included."""
    return tuple(tokenizer.encode(text, special=True))
