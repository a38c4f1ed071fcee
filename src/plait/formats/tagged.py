"""What the flat tag formats share: a block lists numbered outlines, one thread runs for each, the parent goes on.

Reads only ids sampled in the present call. Knows nothing of engines. A subclass names its tags, its spacing and its
join; see `threadweaver.py` and `multiverse.py`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from plait.errors import RequestError
from plait.formats.base import Branch, Fork, Join, Malformed, ThreadOutcome, ids
from plait.tokenizer import Tokenizer
from plait.types import JoinKind

_NUMBERED = re.compile(r"\s*(\d+(?:\.\d+)*)\s*:\s*(.*?)\s*$", re.DOTALL)


class TaggedFormat(ABC):
    """A block of numbered outlines and as many threads, one level deep.

    Args:
        tokenizer: Its vocabulary must hold the fork and the closing tag as one control token each.

    Raises:
        RequestError: It does not.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    join_kind: ClassVar[JoinKind]
    block: ClassVar[str] = "Parallel"
    outlines: ClassVar[str]
    outline: ClassVar[str] = "Outline"
    thread: ClassVar[str]

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_ids
        self._outlines_open = self._control(f"<{self.outlines}>")
        self._fork = self._control(f"</{self.outlines}>")
        self._outline_open = self._control(f"<{self.outline}>")
        self._outline_close = self._control(f"</{self.outline}>")
        self._thread_close = self._control(f"</{self.thread}>")
        self.fork_ids = (self._control(f"<{self.block}>"), self._outlines_open, self._fork)

    def _control(self, tag: str) -> int:
        id = self._tokenizer.control_id(tag)
        if id is None:
            raise RequestError(f"the {self.name} format needs {tag} as one control token; this vocabulary has none")
        return id

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        # No nesting: inside a thread a block is plain text, the only stop is the closing tag.
        return (self._thread_close,) if depth else (self._fork,)

    def eos_ids(self) -> tuple[int, ...]:
        return self._eos

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Malformed | None:
        """Threads for the numbers after the last opening tag; repeated numbers count once."""
        if depth or not sampled_ids or sampled_ids[-1] != self._fork:
            return None
        plans, notes = self._plans(sampled_ids)
        if not plans:
            return Malformed(note="a block without a numbered outline")
        branches = tuple(
            Branch(header_ids=self._header(number), label=plan or number) for number, plan in plans.items()
        )
        return Fork(branches=branches, note="; ".join(notes))

    def _plans(self, sampled_ids: Sequence[int]) -> tuple[dict[str, str], list[str]]:
        """Plan by number, in the order written, and what was wrong with the rest."""
        end = len(sampled_ids) - 1
        starts = [i for i in range(end) if sampled_ids[i] == self._outlines_open]
        plans: dict[str, str] = {}
        notes = [] if starts else [f"no <{self.outlines}>"]
        for text in self._outline_texts(sampled_ids[(starts[-1] + 1 if starts else 0) : end]):
            match = _NUMBERED.match(text)
            if match is None:
                notes.append("an outline without a number")
            elif match[1] in plans:
                notes.append(f"outline {match[1]} twice")
            else:
                plans[match[1]] = match[2]
        return plans, notes

    def _outline_texts(self, body: Sequence[int]) -> list[str]:
        texts: list[str] = []
        at: int | None = None
        for i, id in enumerate((*body, self._outline_open)):
            if id in (self._outline_open, self._outline_close):
                if at is not None:
                    texts.append(self._tokenizer.decode(body[at:i]))
                at = i + 1 if id == self._outline_open else None
        return texts

    def _header(self, number: str) -> tuple[int, ...]:
        return ids(self._tokenizer, self.header_text(number))

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        if outcome.token_ids and outcome.token_ids[-1] == self._thread_close:
            return ()
        return ids(self._tokenizer, self.closer_text())

    @abstractmethod
    def join(self, threads: Sequence[ThreadOutcome]) -> Join: ...

    @abstractmethod
    def header_text(self, number: str) -> str:
        """What the runtime writes to open a thread."""

    def closer_text(self) -> str:
        """What the runtime appends to a thread that did not close itself."""
        return f"</{self.thread}>"

    @abstractmethod
    def open_text(self, labels: Sequence[str]) -> str: ...

    @abstractmethod
    def thread_text(self, body: str) -> str: ...

    @abstractmethod
    def close_text(self, conclusion: str) -> str: ...
