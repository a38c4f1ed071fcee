"""Everything a run says while it runs: tree, stream, log file and viewer are folds of one list of these.

Knows nothing of engines and formats. On disk an event is one line of JSON; `SCHEMA_VERSION` is in the first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from plait.errors import TreeError
from plait.types import JoinKind, StopReason

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The first event. `meta` is free-form: question, model, format, budget, tokenizer name."""

    schema: int = SCHEMA_VERSION
    seed: int = 0
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadForked:
    """A block of threads was opened. `threads` are thread names in outline order, `labels` what each was told."""

    segment: str
    """The segment whose sampled text asked for the fork."""
    threads: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentStarted:
    """One engine call begins. Its context is the path to the root, with merges where `join` says so."""

    id: str
    """A position in the program: segment k of thread T is `T:k`; branch i of the fork at `T:k` is thread `T/k.i`."""
    parent: str | None
    forced_ids: tuple[int, ...] = ()
    """Ids the runtime wrote: the prompt, a thread's header, what the parent reads at the join."""
    joins: tuple[str, ...] = ()
    """Last segments of the threads this one waited for, in outline order."""
    join: JoinKind = "none"
    """`merge`: the joined threads are part of this segment's context as a `Merge`."""
    keep: int | None = None
    """How many of the first ids of the path to the parent's end stay in the context; None: all of them. A thread that
    starts from a message alone has 0; where a message join takes a block's place, what was before the block stays."""
    t: float = 0.0
    """Seconds since the run started; not part of the tree's identity."""
    texts: tuple[str | None, ...] = ()
    """What each forced id adds to the segment's text, where the log does not hold the vocabulary; else empty. None
    stands for a part of a character that a later token finishes, or nobody (`plait.spelling`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensSampled:
    """The engine continued a segment."""

    id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    t: float = 0.0
    texts: tuple[str | None, ...] = ()
    """What each id adds to the segment's text; as in `SegmentStarted`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentEnded:
    """The engine call ended, or the runtime ended it."""

    id: str
    stop: StopReason
    note: str = ""
    """Plain words where the outcome needs them: which limit, what was malformed."""
    t: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsCut:
    """Threads that lost a race, or that nobody waited for, are cut at one moment of the run's own clock.

    What they, and all that they forked, sampled later is dropped from the tree, which counts it. The clock is the
    critical path in tokens, so what stays does not depend on how fast the engine was.
    """

    threads: tuple[str, ...]
    clock: int
    """Sampled tokens on the longest dependent chain up to the cut."""
    note: str = ""
    """What the segments that are cut say."""
    t: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """The last event of a run that was not left early."""

    stop: StopReason
    note: str = ""
    t: float = 0.0


Event: TypeAlias = RunStarted | ThreadForked | SegmentStarted | TokensSampled | SegmentEnded | ThreadsCut | RunEnded

_TYPES: dict[str, type[Any]] = {
    c.__name__: c for c in (RunStarted, ThreadForked, SegmentStarted, TokensSampled, SegmentEnded, ThreadsCut, RunEnded)
}


def encode(event: Event) -> str:
    """One line of JSON, without the newline."""
    data = {f.name: getattr(event, f.name) for f in fields(event)}
    if not data.get("texts"):
        data.pop("texts", None)
    return json.dumps({"event": type(event).__name__, **data}, separators=(",", ":"))


def decode(line: str) -> Event:
    """The event that `encode` wrote.

    Raises:
        TreeError: The line is not an event of this schema.
    """
    try:
        data = json.loads(line)
        cls = _TYPES[data.pop("event")]
        for key, value in data.items():
            if isinstance(value, list):
                data[key] = tuple(value)
        if "stop" in data:
            data["stop"] = StopReason(data["stop"])
        event: Event = cls(**data)
        if isinstance(event, SegmentStarted | TokensSampled) and event.texts:
            _check_texts(event)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise TreeError(f"not an event of schema {SCHEMA_VERSION}: {line[:80]!r} ({exc})") from exc
    if isinstance(event, RunStarted) and event.schema != SCHEMA_VERSION:
        raise TreeError(f"the log has schema {event.schema}, this Plait reads {SCHEMA_VERSION}")
    return event


def _check_texts(event: SegmentStarted | TokensSampled) -> None:
    ids = event.forced_ids if isinstance(event, SegmentStarted) else event.token_ids
    pairs = zip(ids, event.texts, strict=True)
    typed = all(isinstance(id, int) and isinstance(text, str | None) for id, text in pairs)
    if not typed or not isinstance(event.texts, tuple):
        raise ValueError("texts must be texts or null, and as many as there are ids")
