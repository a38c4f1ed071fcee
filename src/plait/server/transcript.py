"""A run as text while it runs: what each thread wrote, in order of arrival or in the order of the finished text.

The finished (canonical) text is what the root thread's tokens say with every thread in its place, tags included and
end-of-sequence left out: for a concat join, byte for byte the text that the parent reads. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from plait.events import Event, RunEnded, SegmentEnded, SegmentStarted, ThreadForked, ThreadsCut, TokensSampled
from plait.formats.base import ThreadOutcome, TrajectoryFormat
from plait.tokenizer import Tokenizer
from plait.types import StopReason

ROOT = "0"
ANSWER = "Answer: "
"""What the models that Plait trains write before their answer; what is before it is reasoning."""
_BROKEN = "\ufffd"
_MAX_HELD = 8
"""Ids that may wait for the rest of a character; more of them are no character."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Something that a thread wrote, or that happened to it."""

    thread: str
    kind: Literal["open", "text", "fork", "join", "close"]
    text: str = ""
    num_sampled: int = 0
    """Tokens that the model sampled to write it; the rest was written by the runtime."""
    outline: str = ""
    """open: what the thread was told."""
    threads: tuple[str, ...] = ()
    """fork: the threads of the block, in outline order; join: the same."""

    @property
    def parent(self) -> str | None:
        """The thread that forked this one."""
        return self.thread.rpartition("/")[0] or None


@dataclass(slots=True)
class _Thread:
    header_ids: tuple[int, ...] = ()
    ids: list[int] = field(default_factory=list[int])
    held: list[int] = field(default_factory=list[int])
    closed: bool = False


class Transcript:
    """Turns events into pieces, as they arrive.

    Args:
        tokenizer, format: The ones that the run uses.
    """

    def __init__(self, tokenizer: Tokenizer, format: TrajectoryFormat) -> None:
        self._tokenizer, self._format = tokenizer, format
        self._eos = frozenset(format.eos_ids())
        self._threads: dict[str, _Thread] = {}
        self._labels: dict[str, str] = {}

    def read(self, event: Event) -> Iterator[Piece]:
        """The pieces that an event adds."""
        match event:
            case TokensSampled():
                name = _thread(event.id)
                self._threads[name].ids += event.token_ids
                yield self._text(name, event.token_ids, num_sampled=len(event.token_ids))
            case SegmentStarted():
                yield from self._started(event)
            case ThreadForked():
                self._labels.update(zip(event.threads, event.labels, strict=True))
                yield Piece(thread=_thread(event.segment), kind="fork", threads=event.threads)
            case SegmentEnded():
                name = _thread(event.id)
                if name != ROOT and not self._format.closer_ids(self._outcome(name)):
                    yield from self._close(name)
            case ThreadsCut():
                for name in self._threads:
                    if any(name == cut or name.startswith(f"{cut}/") for cut in event.threads):
                        yield from self._close(name)
            case RunEnded():
                for name in sorted(self._threads, key=lambda name: -name.count("/")):
                    yield from self._close(name)
            case _:
                pass

    def _started(self, event: SegmentStarted) -> Iterator[Piece]:
        name = _thread(event.id)
        if event.parent is None:
            self._threads[name] = _Thread(header_ids=event.forced_ids)
            yield Piece(thread=name, kind="open")
        elif name not in self._threads:
            self._threads[name] = _Thread(header_ids=event.forced_ids)
            yield Piece(thread=name, kind="open", outline=self._labels.get(name, ""))
            yield self._text(name, self._header(event.forced_ids, first=name.endswith(".0")))
        else:
            joined = tuple(_thread(id) for id in event.joins)
            for other in joined:
                yield from self._close(other)
            self._threads[name].ids += event.forced_ids
            if joined:
                yield Piece(thread=name, kind="join", threads=joined)
            concat = event.join == "concat" and joined
            yield self._text(name, self._format.join([]).forced_ids if concat else event.forced_ids)

    def _header(self, ids: tuple[int, ...], *, first: bool) -> tuple[int, ...]:
        """A thread's header as its parent will read it, which is not always as the thread was given it."""
        if self._format.join_kind != "concat":
            return ids
        empty = ThreadOutcome(header_ids=ids, token_ids=(), stop=StopReason.LENGTH)
        after = len(self._format.join([]).forced_ids)
        before = len(self._format.join([] if first else [empty]).forced_ids)
        read = self._format.join([empty] if first else [empty, empty]).forced_ids
        return read[before - after : len(read) - after]

    def _close(self, name: str) -> Iterator[Piece]:
        thread = self._threads[name]
        if not thread.closed:
            thread.closed = True
            text = self._tokenizer.decode(thread.held)
            thread.held.clear()
            yield Piece(thread=name, kind="close", text=text)

    def _outcome(self, name: str) -> ThreadOutcome:
        thread = self._threads[name]
        return ThreadOutcome(header_ids=thread.header_ids, token_ids=tuple(thread.ids), stop=StopReason.STOP)

    def _text(self, name: str, ids: Sequence[int], *, num_sampled: int = 0) -> Piece:
        """What ids say; the ids of a character that is not whole yet are held back."""
        held = self._threads[name].held
        held += (id for id in ids if id not in self._eos)
        text = self._tokenizer.decode(held) if held else ""
        if text.endswith(_BROKEN) and len(held) < _MAX_HELD:
            text = ""
        else:
            held.clear()
        return Piece(thread=name, kind="text", text=text, num_sampled=num_sampled)


class Ordered:
    """Puts pieces into the order of the finished text: a thread is passed on when all before it have closed."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, deque[Piece]] = defaultdict(deque)
        self._at = [ROOT]

    def put(self, piece: Piece) -> Iterator[Piece]:
        """Take a piece; give those whose turn has come."""
        self._waiting[piece.thread].append(piece)
        while self._at and (queue := self._waiting[self._at[-1]]):
            next_piece = queue.popleft()
            if next_piece.kind == "close":
                self._at.pop()
            yield next_piece
            if next_piece.kind == "fork":
                self._at += reversed(next_piece.threads)


class Cut:
    """Finds the first of some strings in a text that comes in parts; holds back what may be its beginning.

    Args:
        marks: What to look for; none finds nothing.
    """

    def __init__(self, marks: Sequence[str]) -> None:
        self._marks = [mark for mark in marks if mark]
        self._held = ""
        self.found: str | None = None

    def put(self, text: str) -> tuple[str, str]:
        """What is surely before the mark, and what follows it; after the mark everything follows."""
        if self.found is not None:
            return "", text
        text = self._held + text
        at, mark = self._first(text)
        begun = len(text) - max((_overlap(text, mark) for mark in self._marks), default=0)
        # One that began earlier, and has not ended yet, would be the first.
        if mark is not None and at <= begun:
            self.found, self._held = mark, ""
            return text[:at], text[at + len(mark) :]
        self._held = text[begun:]
        return text[:begun], ""

    def rest(self) -> str:
        """What was held back, up to a mark in it, when nothing more comes."""
        text, self._held = self._held, ""
        at, self.found = (len(text), self.found) if self.found is not None else self._first(text)
        return text[:at]

    def _first(self, text: str) -> tuple[int, str | None]:
        """Where the first mark begins, and which it is; the end of the text, and None, where there is none."""
        return min(((at, mark) for mark in self._marks if (at := text.find(mark)) >= 0), default=(len(text), None))


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that begins the mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def _thread(segment: str) -> str:
    return segment.rpartition(":")[0]
