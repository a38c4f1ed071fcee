"""The trajectory tree: one node per engine call, linked to the call whose context it extends. The truth of a run.

Knows nothing of engines, formats or text. A tree is a fold of events; everything else about a run is derived here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from plait.errors import TreeError
from plait.events import (
    Event,
    RunEnded,
    RunStarted,
    SegmentEnded,
    SegmentStarted,
    ThreadForked,
    ThreadsCut,
    TokensSampled,
)
from plait.types import Context, JoinKind, Merge, StopReason


@dataclass(slots=True, kw_only=True)
class Segment:
    """One engine call: what the runtime wrote, then what the engine sampled. `SegmentStarted` says more of each field.

    Its context is its parent's with the parent's ids, cut to the first `keep` where that is said, then the `joins` as a
    `Merge` where `join` is merge, then `forced_ids`. What a concat or message join reads stands in `forced_ids`.
    """

    id: str
    parent: str | None = None
    joins: tuple[str, ...] = ()
    join: JoinKind = "none"
    keep: int | None = None
    forced_ids: tuple[int, ...] = ()
    sampled_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    stop: StopReason | None = None
    note: str = ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.forced_ids, *self.sampled_ids)

    @property
    def thread(self) -> str:
        """Name of the thread this segment belongs to."""
        return self.id.rpartition(":")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadInfo:
    """What a person wants to know of one thread."""

    name: str
    label: str
    """What it was told; empty for the root."""
    segments: tuple[str, ...]
    """Ids of its segments, in order."""
    num_sampled: int
    """Tokens it sampled itself, the threads it forked not counted."""
    context_tokens: int
    """Positions of the longest context it held."""
    stop: StopReason | None
    """Of its last segment that was not written by the runtime; None while it runs."""
    note: str
    """Of the same segment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a run cost, in tokens."""

    prompt_tokens: int
    sampled_tokens: int
    forced_tokens: int
    """Written by the runtime, the prompt not counted."""
    reread_tokens: int
    """Of these, given at concat and message joins: what is computed again for the parent, or for a thread that
    waited for others."""
    critical_path_tokens: int
    longest_context_tokens: int
    threads: int
    forks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """When a segment sampled, in token steps: one token a step, with room for every thread."""

    start: int
    end: int
    critical: bool
    """On the longest dependent chain."""


@dataclass(slots=True)
class Tree:
    """Segments by id, in the order they started."""

    segments: dict[str, Segment] = field(default_factory=dict[str, Segment])
    labels: dict[str, str] = field(default_factory=dict[str, str])
    """What each forked thread was told, by thread name."""
    meta: dict[str, Any] = field(default_factory=dict[str, Any], compare=False)
    stop: StopReason | None = None
    note: str = ""
    num_dropped: int = field(default=0, compare=False)
    """Tokens that threads sampled after the moment they were cut at; these depend on timing, the tree does not."""

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Tree:
        """The tree that these events say.

        Raises:
            TreeError: An event contradicts what came before.
        """
        tree = cls()
        for event in events:
            tree.apply(event)
        return tree

    def apply(self, event: Event) -> None:
        """Fold one event in.

        Raises:
            TreeError: The event contradicts what came before.
        """
        match event:
            case TokensSampled():
                segment = self._open(event.id)
                segment.sampled_ids += event.token_ids
                segment.logprobs += event.logprobs
            case RunStarted():
                self.meta = event.meta
            case ThreadForked():
                if len(event.threads) != len(event.labels):
                    raise TreeError(f"the fork at {event.segment} has {len(event.threads)} threads and other labels")
                self.labels.update(zip(event.threads, event.labels, strict=True))
            case SegmentStarted():
                if event.id in self.segments:
                    raise TreeError(f"segment {event.id} starts twice")
                for other in (event.parent, *event.joins):
                    if other is not None and other not in self.segments:
                        raise TreeError(f"segment {event.id} refers to {other}, which never started")
                self.segments[event.id] = Segment(
                    id=event.id,
                    parent=event.parent,
                    joins=event.joins,
                    join=event.join,
                    keep=event.keep,
                    forced_ids=event.forced_ids,
                )
            case SegmentEnded():
                segment = self._open(event.id)
                segment.stop, segment.note = event.stop, event.note
            case ThreadsCut():
                self._cut(event)
            case RunEnded():
                self.stop, self.note = event.stop, event.note

    def _open(self, id: str) -> Segment:
        segment = self.segments.get(id)
        if segment is None or segment.stop is not None:
            raise TreeError(f"segment {id} is not open")
        return segment

    def _cut(self, event: ThreadsCut) -> None:
        firsts = {f"{name}:0" for name in event.threads}
        if missing := firsts - self.segments.keys():
            raise TreeError(f"segment {min(missing)} is cut, but it never started")
        spans, num_sampled = self.spans(), self.num_sampled
        for s in [s for s in self.segments.values() if _within(s.thread, event.threads)]:
            kept = event.clock - spans[s.id].start
            if kept <= 0 and s.id not in firsts:
                del self.segments[s.id]
            elif spans[s.id].end >= event.clock:
                del s.sampled_ids[max(kept, 0) :], s.logprobs[max(kept, 0) :]
                s.stop, s.note = StopReason.CANCELLED, event.note
        left = {s.thread for s in self.segments.values()}
        self.labels = {t: text for t, text in self.labels.items() if t in left or not _within(t, event.threads)}
        self.num_dropped += num_sampled - self.num_sampled

    def path(self, id: str) -> list[Segment]:
        """Segments from the root to `id`, inclusive."""
        out: list[Segment] = []
        at: str | None = id
        while at is not None:
            out.append(self.segments[at])
            at = out[-1].parent
        return out[::-1]

    def context(self, id: str, *, upto: str | None = None) -> Context:
        """What the engine was given when it sampled `id`; relative to the end of `upto` if that is an ancestor."""
        return self._context(id, sampled=False, upto=upto)

    def _context(self, id: str, *, sampled: bool, upto: str | None) -> Context:
        parts: list[tuple[int, ...] | Merge] = []
        run: list[int] = []
        path = self.path(id)
        if upto is not None:
            path = path[[s.id for s in path].index(upto) + 1 :]
        for segment in path:
            if segment.keep == 0:
                parts, run = [], []
            elif segment.keep is not None:
                if parts or upto is not None or segment.keep > len(run):
                    raise TreeError(f"segment {segment.id} keeps {segment.keep} ids of a context that it cannot cut")
                del run[segment.keep :]
            if segment.join == "merge" and segment.joins:
                if run:
                    parts.append(tuple(run))
                run = []
                branches = tuple(self._context(j, sampled=True, upto=segment.parent) for j in segment.joins)
                parts.append(Merge(branches))
            run += segment.forced_ids
            if segment.id != id or sampled:
                run += segment.sampled_ids
        if run:
            parts.append(tuple(run))
        return tuple(parts)

    def walk(self) -> Iterator[Segment]:
        """Depth first, parents before children, siblings in program order: independent of timing."""
        children: dict[str | None, list[Segment]] = {}
        for segment in self.segments.values():
            children.setdefault(segment.parent, []).append(segment)
        stack = sorted(children.get(None, []), key=lambda s: _order(s.id), reverse=True)
        while stack:
            segment = stack.pop()
            yield segment
            stack += sorted(children.get(segment.id, []), key=lambda s: _order(s.id), reverse=True)

    def threads(self) -> list[ThreadInfo]:
        """The root, then every forked thread, in program order."""
        segments: dict[str, list[Segment]] = {}
        for segment in self.walk():
            segments.setdefault(segment.thread, []).append(segment)
        ends = self.positions()
        infos: list[ThreadInfo] = []
        for name in sorted(segments, key=_numbers):
            own = sorted(segments[name], key=lambda s: _order(s.id))
            last = next((s for s in reversed(own) if s.stop is not StopReason.FORCED), own[-1])
            infos.append(
                ThreadInfo(
                    name=name,
                    label=self.labels.get(name, ""),
                    segments=tuple(s.id for s in own),
                    num_sampled=sum(len(s.sampled_ids) for s in own),
                    context_tokens=max(ends[s.id] for s in own),
                    stop=last.stop,
                    note=last.note,
                )
            )
        return infos

    @property
    def num_sampled(self) -> int:
        """Tokens that the engine sampled, all threads together."""
        return sum(len(s.sampled_ids) for s in self.segments.values())

    @property
    def num_forced(self) -> int:
        """Tokens that the runtime wrote: headers, closings and what parents read at joins; not the prompt."""
        return sum(len(s.forced_ids) for s in self.segments.values() if s.parent is not None)

    @property
    def num_prompt(self) -> int:
        return sum(len(s.forced_ids) for s in self.segments.values() if s.parent is None)

    @property
    def num_threads(self) -> int:
        """Forked threads; the root is not counted."""
        return len({s.thread for s in self.segments.values()}) - 1 if self.segments else 0

    @property
    def num_forks(self) -> int:
        """Blocks of threads that were opened."""
        return len({s.thread.rpartition(".")[0] for s in self.segments.values() if "." in s.thread})

    @property
    def reread_tokens(self) -> int:
        """Tokens given at concat and message joins: a merge join gives none of its threads' tokens again."""
        return sum(len(s.forced_ids) for s in self.segments.values() if s.joins and s.join != "merge")

    def spans(self) -> dict[str, Span]:
        """When every segment samples: it waits for its parent and for all that it joins, then takes a step a token.

        Of chains that are equally long, the critical one is not that of a thread that was cut there: what was cut at
        the end of a race did not end it.
        """
        starts: dict[str, int] = {}
        ends: dict[str, int] = {}
        because: dict[str, str | None] = {}

        def latest(id: str) -> tuple[int, bool]:
            return ends[id], self.segments[id].stop is not StopReason.CANCELLED

        for s in self.segments.values():
            waits = s.joins if s.parent is None else (s.parent, *s.joins)
            because[s.id] = max(waits, key=latest, default=None)
            starts[s.id] = max((ends[id] for id in waits), default=0)
            ends[s.id] = starts[s.id] + len(s.sampled_ids)
        critical: set[str] = set()
        at = max(ends, key=latest, default=None)
        while at is not None:
            critical.add(at)
            at = because[at]
        return {id: Span(start=starts[id], end=ends[id], critical=id in critical) for id in starts}

    def critical_path(self) -> int:
        """Sampled tokens on the longest dependent chain.

        The seconds that an engine of one token a second with room for every thread would take.
        """
        return max((span.end for span in self.spans().values()), default=0)

    def num_response(self) -> int:
        """T of ThreadWeaver's metrics: tokens of the response, sampled and inserted; each thread counts once."""
        return self._thread_tokens().get("0", (0, 0))[0] - self.num_prompt

    def token_latency(self, *, wrapper_tokens: int | None = None) -> int:
        """L of ThreadWeaver's metrics: tokens outside threads, plus those of the longest thread of every block.

            L = T - sum over blocks of (sum of len_i - max of len_i)

        `len_i` is what is strictly inside thread i. Its opening and closing tag, and everything else of the block, is
        charged to the sequential part. T counts the response only, where the published code also counts the prompt.
        Unlike `critical_path` it counts inserted tokens. Nested blocks, which ThreadWeaver has not, count likewise,
        with each thread's own latency in place of its longest length. Threads that wait for one another, which it has
        not either, count as if they did not: `critical_path` is the measure for those.

        Args:
            wrapper_tokens: Tokens of a thread that are not strictly inside. By default 3 where threads are read again
                (newline, `<Thread>`, `</Thread>`: the reference's spacing) and 2 where they are merged.

        Source: ThreadWeaver (Lian et al. 2025, arXiv:2512.07843), `get_parallel_stats`.
        """
        total, saved = self._thread_tokens(wrapper_tokens).get("0", (0, 0))
        return total - saved - self.num_prompt

    def acceleration(self, *, wrapper_tokens: int | None = None) -> float:
        """ThreadWeaver's acceleration ratio 1 - L/T, from 0 to below 1. Not a speedup."""
        total = self.num_response()
        return 1 - self.token_latency(wrapper_tokens=wrapper_tokens) / total if total else 0.0

    def longest_context(self) -> int:
        """Positions of the longest context that any thread held, its own tokens included."""
        return max(self.positions().values(), default=0)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt,
            sampled_tokens=self.num_sampled,
            forced_tokens=self.num_forced,
            reread_tokens=self.reread_tokens,
            critical_path_tokens=self.critical_path(),
            longest_context_tokens=self.longest_context(),
            threads=self.num_threads,
            forks=self.num_forks,
        )

    def positions(self) -> dict[str, int]:
        """Position after the last token of every segment. In order of starting, so parents and joins come first."""
        ends: dict[str, int] = {}
        for s in self.segments.values():
            merged = s.joins if s.join == "merge" else ()
            start = max((ends[id] for id in (s.parent, *merged) if id is not None), default=0)
            start = start if s.keep is None else s.keep
            ends[s.id] = start + len(s.forced_ids) + len(s.sampled_ids)
        return ends

    def _thread_tokens(self, wrapper_tokens: int | None = None) -> dict[str, tuple[int, int]]:
        """Of every thread: its tokens, and how many of them are beside a longer sibling; deepest threads first."""
        own: dict[str, list[Segment]] = {}
        for s in self.segments.values():
            own.setdefault(s.thread, []).append(s)
        tokens: dict[str, tuple[int, int]] = {}
        for name in sorted(own, key=lambda n: -n.count("/")):
            total = saved = 0
            for s in own[name]:
                total += len(s.forced_ids) + len(s.sampled_ids)
                if not s.joins or s.parent is None or self.segments[s.parent].thread != name:
                    continue
                names = [self.segments[id].thread for id in s.joins]
                usual = {"merge": 2, "concat": 3}.get(s.join, 0)
                wrapper = usual if wrapper_tokens is None else wrapper_tokens
                if s.join != "concat":
                    total += sum(tokens[n][0] for n in names)
                else:
                    # What is read again leaves out the end-of-sequence id of a thread.
                    for n in names:
                        tokens[n] = tokens[n][0] - sum(x.stop is StopReason.EOS for x in own[n]), tokens[n][1]
                inside = [(tokens[n][0] - wrapper, tokens[n][1]) for n in names]
                saved += sum(t for t, _ in inside) - max(t - w for t, w in inside)
            tokens[name] = total, saved
        return tokens


def _within(thread: str, names: Iterable[str]) -> bool:
    """Whether a thread is one of these, or forked by one of them."""
    return any(thread == name or thread.startswith(f"{name}/") for name in names)


def _numbers(thread: str) -> list[tuple[int, ...]]:
    """Sort key of a thread's name: numbers as numbers, a thread before those it forks."""
    return [tuple(map(int, part.split("."))) for part in thread.split("/")]


def _order(id: str) -> tuple[Any, ...]:
    """Sort key: branches of a fork before the segment that joins them, numbers as numbers."""
    thread, _, number = id.rpartition(":")
    parts = _numbers(thread)
    return (-len(parts), parts, int(number))
