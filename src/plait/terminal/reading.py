"""A tree as people read it: what each thread said without its tags, and the blocks it opened, in order.

The one place where the views get their text from; knows nothing of screens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plait.errors import PlaitError
from plait.events import Event, RunStarted, ThreadForked
from plait.formats import open_format
from plait.formats.base import TrajectoryFormat
from plait.spelling import LogVocabulary
from plait.tokenizer import FixedTokenizer, Tokenizer
from plait.tree import Segment, ThreadInfo, Tree
from plait.types import StopReason


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of a thread's own text."""

    text: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A block that is being written: its outlines so far."""

    text: str


@dataclass(frozen=True, slots=True)
class Block:
    """A fork and its threads, by name."""

    threads: tuple[str, ...]
    joined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One thread of a block, as far as it is."""

    name: str
    number: int
    """From 1, within its block."""
    label: str
    text: str
    num_sampled: int
    ended: bool
    stop: StopReason | None
    note: str

    @property
    def unusual(self) -> str:
        """Why it ended, where it did not close itself; else nothing."""
        if self.stop in (None, StopReason.STOP):
            return ""
        return f"{self.stop}: {self.note}" if self.note else str(self.stop)


class Reader:
    """Reads trees of one tokenizer and format.

    Args:
        tokenizer: The one the run used; None shows token ids.
        format: The one the run used; None shows blocks as text.
    """

    def __init__(self, tokenizer: Tokenizer | None, format: TrajectoryFormat | None) -> None:
        self._tokenizer, self._format = tokenizer, format
        self._pieces: dict[int, str] = {}

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where ids are all there is to show."""
        return self._tokenizer

    def text(self, ids: Sequence[int]) -> str:
        """Text of ids without control tokens."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        if not isinstance(self._tokenizer, FixedTokenizer):
            # A character may be written with several tokens.
            return self._tokenizer.decode([id for id in ids if not self._is_control(id)])
        pieces = self._pieces
        for id in ids:
            if id not in pieces:
                piece = self._tokenizer.decode((id,))
                pieces[id] = "" if self._tokenizer.control_id(piece) is not None else piece
        return "".join(pieces[id] for id in ids)

    def _is_control(self, id: int) -> bool:
        assert self._tokenizer is not None
        if id not in self._pieces:
            self._pieces[id] = self._tokenizer.decode((id,))
        return self._tokenizer.control_id(self._pieces[id]) == id

    def wire(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens and all."""
        return " ".join(map(str, ids)) if self._tokenizer is None else self._tokenizer.decode(ids)

    def parts(self, tree: Tree, thread: str = "0") -> list[Said | Plan | Block]:
        """What a thread said and forked, in order."""
        out: list[Said | Plan | Block] = []
        for segment in self._segments(tree, thread):
            said, plan = self._split(segment)
            text = self.text(said)
            if text or segment.note:
                out.append(Said(text, segment.note))
            threads = tuple(t for t in tree.labels if t.rpartition(".")[0] == segment.id.replace(":", "/"))
            if threads:
                joined = any(s.parent == segment.id and s.joins for s in tree.segments.values())
                out.append(Block(threads, joined))
            elif plan:
                out.append(Plan(self._outlines(plan)))
        return out

    def columns(self, tree: Tree, block: Block) -> list[Column]:
        """The threads of a block. One that has not started yet is empty."""
        infos = {info.name: info for info in tree.threads()}
        return [self._column(tree, name, number, infos.get(name)) for number, name in enumerate(block.threads, 1)]

    def _column(self, tree: Tree, name: str, number: int, info: ThreadInfo | None) -> Column:
        segments = self._segments(tree, name)
        text = "".join(self.text(self._split(s)[0]) for s in segments)
        return Column(
            name=name,
            number=number,
            label=tree.labels.get(name, ""),
            text=text.strip(),
            num_sampled=info.num_sampled if info else 0,
            ended=bool(segments) and segments[-1].stop is not None,
            stop=info.stop if info else None,
            note=info.note if info else "",
        )

    def _segments(self, tree: Tree, thread: str) -> list[Segment]:
        own = [s for s in tree.segments.values() if s.thread == thread]
        return sorted(own, key=lambda s: int(s.id.rpartition(":")[2]))

    def _split(self, segment: Segment) -> tuple[Sequence[int], Sequence[int]]:
        """What a segment said, and the block that it opens at its end, if it does."""
        ids = segment.sampled_ids
        opener = self._format.fork_ids[:1] if self._format else ()
        if not opener or opener[0] not in ids or segment.stop is StopReason.EOS:
            return ids, ()
        at = len(ids) - 1 - ids[::-1].index(opener[0])
        # A block that was declined is plain text; one that another tag follows was closed.
        if segment.stop not in (None, StopReason.STOP):
            return ids, ()
        return ids[:at], ids[at:]

    def _outlines(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return self.text(ids)
        texts = [""]
        for id in ids:
            piece = self.text((id,))
            if piece:
                texts[-1] += piece
            elif texts[-1]:
                texts.append("")
        return "  ".join(t.strip() for t in texts if t.strip())


def seconds(events: Sequence[Event]) -> float:
    """Seconds from the start of a run to its last event."""
    return max((event.t for event in events if not isinstance(event, (RunStarted, ThreadForked))), default=0.0)


def reader_of(meta: dict[str, Any]) -> Reader:
    """The reader for a run's meta; what the meta does not say is shown as ids and plain text.

    Args:
        meta: Of a run as `plait.spelling.readable` gives it.
    """
    try:
        about = meta["tokenizer"]
        tokenizer = about if isinstance(about, LogVocabulary) else FixedTokenizer.from_dict(about)
    except (KeyError, TypeError, AssertionError):
        return Reader(None, None)
    try:
        return Reader(tokenizer, open_format(str(meta.get("format")), tokenizer))
    except PlaitError:
        return Reader(tokenizer, None)
