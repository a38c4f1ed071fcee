"""What the tag formats share: a block lists numbered outlines, one thread runs for each, the parent goes on.

Reads only ids sampled in the present call. Knows nothing of engines. A subclass names its tags, its spacing and its
join; see `threadweaver.py` and `multiverse.py`. `write` and `read` are the same grammar as plain text, every thread in
its place: what data sets hold and what `plait validate` checks.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from plait.formats.base import (
    Block,
    Branch,
    Fork,
    Join,
    Malformed,
    Part,
    Return,
    Spawn,
    ThreadOutcome,
    Trajectory,
    TrajectoryFormat,
    Wait,
    ended,
    ids,
    order,
)
from plait.formats.text import Scanner, compare, fail, refuse
from plait.tokenizer import Tokenizer
from plait.types import JoinKind

NUMBER = r"\d+(?:\.\d+)*"
_NUMBERED = re.compile(rf"\s*({NUMBER})\s*:\s*(.*?)\s*$", re.DOTALL)


class TaggedFormat(TrajectoryFormat, ABC):
    """A block of numbered outlines and as many threads.

    Args:
        tokenizer: Its vocabulary must hold the tags that are read as one control token each.

    Raises:
        RequestError: It does not.
    """

    name: str
    paper: str
    join_kind: JoinKind
    block: str = "Parallel"
    """Tag around a block; empty where the outlines begin it."""
    outlines: str
    outline: str = "Outline"
    thread: str
    wrapper: str = ""
    """Tag around the threads; empty where there is none."""
    closing: str = ""
    """Tag of what the model writes inside the block after the join; empty where there is none."""
    returns: str = ""
    """Tag of what a thread returns; empty where it returns all that it wrote."""
    nested: bool = False
    """Whether a block inside a thread is one; else it is plain text."""
    dependent: bool = False
    """Whether an outline may name outlines that it needs."""
    racing: bool = False
    """Whether a block may be a race."""
    free: bool = True
    """Whether there may be text between blocks."""
    exact: bool = True
    """Whether blanks beside tags are part of the grammar. Else `read` takes any, and `write` has one way."""
    lead: str = " "
    """What the model writes between a thread's header and its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_ids
        self._outlines_open = self.control_id(tokenizer, f"<{self.outlines}>")
        self._fork = self.control_id(tokenizer, f"</{self.outlines}>")
        self._outline_open = self.control_id(tokenizer, f"<{self.outline}>")
        self._outline_close = self.control_id(tokenizer, f"</{self.outline}>")
        self._thread_close = self.control_id(tokenizer, f"</{self.thread}>")
        self._after = ids(tokenizer, self.after_text())
        self._glued = len(ids(tokenizer, self.header_text("1"))) - len(ids(tokenizer, self.glued_text("1")))
        """Ids that a header has less where a thread is read after another."""
        block = (self.control_id(tokenizer, f"<{self.block}>"),) if self.block else ()
        self.fork_ids = (*block, self._outlines_open, self._fork)

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        # Without nesting a block inside a thread is plain text, the only stop is the closing tag.
        if not depth:
            return (self._fork,)
        return (self._fork, self._thread_close) if self.nested else (self._thread_close,)

    def eos_ids(self) -> tuple[int, ...]:
        return self._eos

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Malformed | None:
        """Threads for the numbers after the last opening tag; repeated numbers count once."""
        if (depth and not self.nested) or not sampled_ids or sampled_ids[-1] != self._fork:
            return None
        end = len(sampled_ids) - 1
        starts = [i for i in range(end) if sampled_ids[i] == self._outlines_open]
        notes = [] if starts else [f"no <{self.outlines}>"]
        body = sampled_ids[(starts[-1] + 1 if starts else 0) : end]
        plans: dict[str, tuple[str, tuple[str, ...]]] = {}
        for text in self._outline_texts(body):
            match = self.numbered(text)
            if match is None:
                notes.append("an outline without a number")
            elif match[0] in plans:
                notes.append(f"outline {match[0]} twice")
            else:
                plans[match[0]] = match[1], match[2]
        return self._forked(plans, notes, self._tokenizer.decode(_before(body, self._outline_open)))

    def _forked(
        self, plans: dict[str, tuple[str, tuple[str, ...]]], notes: list[str], head: str
    ) -> Fork | Malformed | None:
        """The fork for plans and needs by number, and for what stands before the first outline."""
        if not plans:
            return Malformed(note="a block without a numbered outline")
        at = {number: i for i, number in enumerate(plans)}
        branches: list[Branch] = []
        for number, (plan, names) in plans.items():
            known = tuple(dict.fromkeys(at[name] for name in names if name in at))
            if unknown := [name for name in names if name not in at]:
                notes.append(f"outline {number} needs {unknown[0]}, which is not there")
            branches.append(Branch(header_ids=self._header(number), label=plan or number, key=number, needs=known))
        return Fork(branches=tuple(branches), note="; ".join(notes), race=self.is_race(head))

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

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        if self.join_kind == "merge":
            return Join(forced_ids=self._after)
        text, kind = self._read_threads(threads)
        return Join(forced_ids=(*text, *self._after), kind=kind)

    def opening(self, branch: Branch, reads: Sequence[ThreadOutcome]) -> Join:
        """A thread reads those it waited for as its parent will, then its own header."""
        text, kind = self._read_threads(reads)
        return Join(forced_ids=(*text, *branch.header_ids[self._glued :]), kind=kind)

    def _read_threads(self, threads: Sequence[ThreadOutcome]) -> tuple[list[int], JoinKind | None]:
        """What a reader of these threads is given, one glued to the other, and of what kind that is."""
        text: list[int] = []
        kind: JoinKind | None = None
        for i, thread in enumerate(threads):
            told = self.told(thread)
            if told is None:
                told = tuple(id for id in thread.token_ids if id not in self._eos)
            else:
                kind = "message"
            text += (*thread.header_ids[self._glued if i else 0 :], *told)
        return text, kind

    def told(self, thread: ThreadOutcome) -> tuple[int, ...] | None:
        """What is read of a thread in place of all that it wrote; None: all of it."""
        return None

    def numbered(self, text: str) -> tuple[str, str, tuple[str, ...]] | None:
        """Number, plan and the numbers it needs of an outline; None where it has no number."""
        match = _NUMBERED.match(text)
        return match and (match[1], match[2], ())

    def is_race(self, head: str) -> bool:
        """Whether what stands before the first outline asks for a race."""
        return False

    @abstractmethod
    def header_text(self, number: str) -> str:
        """What the runtime writes to open a thread."""

    def glued_text(self, number: str) -> str:
        """The header of a thread as it is read after another thread."""
        return self.header_text(number)

    def closer_text(self) -> str:
        """What the runtime appends to a thread that did not close itself."""
        return f"</{self.thread}>"

    @abstractmethod
    def after_text(self) -> str:
        """What the runtime writes after the threads."""

    def outline_text(self, block: Block, i: int) -> str:
        return f"<{self.outline}>{i + 1}: {block.outlines[i]}</{self.outline}>"

    def end_text(self, returns: str | None, number: int = 1) -> str:
        assert returns is None, f"a thread of the {self.name} format returns all that it wrote"
        return self.closer_text()

    @classmethod
    def tags(cls) -> tuple[str, ...]:
        around = (cls.block, cls.outlines, cls.outline, cls.wrapper, cls.thread, cls.closing, cls.returns)
        names = dict.fromkeys(around)
        return tuple(f"<{slash}{name}>" for name in names if name for slash in ("", "/"))

    def write(self, trajectory: Trajectory) -> str:
        return self._text(trajectory, 0)

    def _text(self, trajectory: Trajectory, depth: int) -> str:
        texts: list[str] = []
        for part in trajectory:
            match part:
                case Return():
                    raise refuse(self.name, "a return that does not end a thread")
                case Spawn():
                    texts.append(self.spawn_text(part))
                case Wait():
                    texts.append(self.wait_text(part))
                case Block():
                    texts.append(self._block_text(part, depth))
                case str():
                    texts.append(part)
        return "".join(texts)

    def _block_text(self, block: Block, depth: int) -> str:
        self.refuse(block, depth)
        texts = [self.open_text(block)]
        for i, thread in enumerate(block.threads):
            body, returns = ended(thread)
            header = self.glued_text(str(i + 1)) if i else self.header_text(str(i + 1))
            texts += [header, self.lead, self._text(body, depth + 1), self.end_text(returns)]
        return "".join([*texts, self.after_text(), self.close_text(block.conclusion)])

    def refuse(self, block: Block, depth: int) -> None:
        if not block.threads or len(block.outlines) != len(block.threads):
            raise refuse(self.name, f"{len(block.outlines)} outlines and {len(block.threads)} threads")
        if depth and not self.nested:
            raise refuse(self.name, "a block inside a thread")
        if any(block.needs) and not self.dependent:
            raise refuse(self.name, "threads that need others")
        if block.race and not self.racing:
            raise refuse(self.name, "a race")
        if not self.returns and any(ended(thread)[1] is not None for thread in block.threads):
            raise refuse(self.name, "a thread that returns a part of what it wrote")

    def read(self, text: str) -> Trajectory:
        scan = Scanner(text, self.tags())
        parts = self._read_parts(scan, 0)
        if scan.at < len(text):
            raise scan.fail(f"{scan.tag} belongs to no block")
        trajectory = tuple(parts)
        if self.exact:
            compare(text, self.write(trajectory))
        return trajectory if self.write(trajectory) == text else _stripped(trajectory)

    def _read_parts(self, scan: Scanner, depth: int) -> list[Part]:
        """Text and blocks, up to a tag that is neither."""
        parts: list[Part] = []
        opener = f"<{self.block or self.outlines}>"
        while True:
            text = scan.plain()
            if text:
                parts.append(text)
            if scan.tag != opener:
                return parts
            if text.strip() and not (self.free or depth):
                raise scan.fail(f"text between blocks: {text.strip()[:40]!r}; the {self.name} format has none there")
            if depth and not self.nested:
                raise scan.fail(f"a block inside a thread: the {self.name} format does not nest")
            parts.append(self._read_block(scan, depth))

    def _read_block(self, scan: Scanner, depth: int) -> Block:
        if self.block:
            scan.take(f"<{self.block}>")
            scan.blank()
        head, plans = self._read_outlines(scan)
        scan.blank()
        if self.wrapper:
            scan.take(f"<{self.wrapper}>")
        threads = [self._read_thread(scan, i, depth) for i in range(len(plans))]
        scan.blank()
        if self.wrapper:
            scan.take(f"</{self.wrapper}>")
            scan.blank()
        conclusion = ""
        if self.closing:
            scan.take(f"<{self.closing}>")
            conclusion = scan.plain()
            scan.take(f"</{self.closing}>")
        if self.block:
            scan.blank()
            scan.take(f"</{self.block}>")
        needs = tuple(tuple(int(name) - 1 for name in names) for _, names in plans)
        return Block(
            outlines=tuple(plan for plan, _ in plans),
            threads=tuple(threads),
            conclusion=self._unspaced(conclusion),
            needs=needs if any(needs) else (),
            race=self.is_race(head),
        )

    def _read_outlines(self, scan: Scanner) -> tuple[str, list[tuple[str, tuple[str, ...]]]]:
        scan.take(f"<{self.outlines}>")
        start, head = scan.at, scan.plain()
        if head.strip() and not self.is_race(head):
            raise fail(scan.text, start, f"text before the first outline: {head.strip()!r}")
        plans: list[tuple[str, tuple[str, ...]]] = []
        places: list[int] = []
        while scan.tag == f"<{self.outline}>":
            scan.take(f"<{self.outline}>")
            places.append(scan.at)
            found = self.numbered(scan.plain())
            if found is None:
                raise fail(scan.text, places[-1], "an outline without a number")
            if found[0] != str(len(plans) + 1):
                raise fail(scan.text, places[-1], f"outline {found[0]} stands where {len(plans) + 1} belongs")
            plans.append(found[1:])
            scan.take(f"</{self.outline}>")
            scan.blank()
        if not plans:
            raise scan.fail("a block without a numbered outline")
        scan.take(f"</{self.outlines}>")
        known = {str(i) for i in range(1, len(plans) + 1)}
        for place, (_, names) in zip(places, plans, strict=True):
            if unknown := [name for name in names if name not in known]:
                raise fail(scan.text, place, f"it needs outline {unknown[0]}, which is not there")
        if order([[int(name) - 1 for name in names] for _, names in plans]) is None:
            raise fail(scan.text, start, "outlines that wait for each other")
        if self.is_race(head) and any(names for _, names in plans):
            raise fail(scan.text, start, "a race whose threads wait for each other")
        return head, plans

    def _read_thread(self, scan: Scanner, i: int, depth: int) -> Trajectory:
        scan.blank()
        scan.take(f"<{self.thread}>")
        match = re.compile(rf"\s*({NUMBER})\s*:").match(scan.text, scan.at)
        if match is None:
            raise scan.fail("a thread without a number")
        if match[1] != str(i + 1):
            raise scan.fail(f"thread {match[1]} stands where {i + 1} belongs")
        scan.at = match.end()
        if scan.text.startswith(self.lead, scan.at):
            scan.at += len(self.lead)
        elif self.exact:
            raise scan.fail(f"expected {self.lead!r} after the number")
        parts = self._read_parts(scan, depth + 1)
        returns: str | None = None
        if self.returns and scan.tag == f"<{self.returns}>":
            scan.take(f"<{self.returns}>")
            returns = scan.plain()
            scan.take(f"</{self.returns}>")
            scan.blank()
        scan.take(f"</{self.thread}>")
        return self._thread_parts(parts, returns)

    def _thread_parts(self, parts: list[Part], returns: str | None) -> Trajectory:
        """A thread's parts without the spacing at its end."""
        spacing = self.end_text(returns).partition("<")[0]
        if parts and isinstance(parts[-1], str) and spacing:
            parts[-1] = parts[-1].removesuffix(spacing)
        kept = [part for part in parts if part]
        return (*kept, Return(self._unspaced(returns))) if returns is not None else tuple(kept)

    def _unspaced(self, text: str) -> str:
        """What stands between the tags of a conclusion, without the spacing that the format puts there."""
        return text


def _stripped(trajectory: Trajectory) -> Trajectory:
    """A trajectory without the blanks at the ends of its texts."""
    parts: list[Part] = []
    for part in trajectory:
        match part:
            case Block():
                threads = tuple(_stripped(thread) for thread in part.threads)
                parts.append(replace(part, threads=threads, conclusion=part.conclusion.strip()))
            case Return():
                parts.append(Return(part.text.strip()))
            case str():
                parts += [part.strip()] if part.strip() else []
            case Spawn() | Wait():
                parts.append(part)
    return tuple(parts)


def _before(ids: Sequence[int], mark: int) -> Sequence[int]:
    ids = list(ids)
    return ids[: ids.index(mark)] if mark in ids else ids
