"""Turns a trajectory into the tree that a run of it would be, and such a tree back into its trajectory.

The gold traces that models are trained on are rendered here, so a packed training row equals the engine calls of a
run to the token; runs of a model become gold traces the other way. Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from plait.errors import RequestError
from plait.events import SegmentEnded, SegmentStarted, ThreadForked, ThreadsCut, TokensSampled
from plait.formats.base import (
    Await,
    Block,
    Branch,
    Fork,
    Join,
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
from plait.tokenizer import Tokenizer
from plait.tree import Segment, Tree
from plait.types import StopReason, context_positions

_MARK = "\0"
"""Stands for a text that is looked for between what a format writes around it."""


def render(
    trajectory: Trajectory, *, format: TrajectoryFormat, tokenizer: Tokenizer, prompt_ids: Sequence[int]
) -> Tree:
    """The tree of a finished run that wrote this trajectory after this prompt.

    In a race the threads after the winner's end are cut where a run would cut them, and so are threads that nobody
    waited for when their parent ends.

    Raises:
        RequestError: A text is not in the vocabulary, or the format has no form for a part of the trajectory.
    """
    return _Renderer(format, tokenizer).run(trajectory, tuple(prompt_ids))


def trajectory_of(tree: Tree, *, format: TrajectoryFormat, tokenizer: Tokenizer) -> Trajectory:
    """The trajectory of a finished run: the inverse of `render`.

    A thread that was cut is given with what it said until then; rendered again it is cut there again.

    Raises:
        RequestError: The run is none that a trajectory of this format renders to: a limit ended a thread, a block was
            declined or repaired, or something is spelled otherwise. It says where.
    """
    trajectory = _Reader(tree, format, tokenizer).thread("0", "", 0, 1)
    prompt = next((s.forced_ids for s in tree.segments.values() if s.parent is None), ())
    again = render(trajectory, format=format, tokenizer=tokenizer, prompt_ids=prompt)
    for id in [*tree.segments, *again.segments]:
        if _said(tree.segments.get(id)) != _said(again.segments.get(id)):
            raise RequestError(
                f"segment {id} of the run is not what a trajectory of the {format.name} format renders to"
            )
    return trajectory


def _said(segment: Segment | None) -> object:
    """All of a segment but how likely it was, and what was noted of it."""
    if segment is None:
        return None
    place = segment.parent, segment.joins, segment.join, segment.keep
    return *place, segment.forced_ids, tuple(segment.sampled_ids), segment.stop


class _Running:
    """Threads that a thread spawned and has not waited for, by key."""

    def __init__(self) -> None:
        self.threads: dict[str, tuple[str, ThreadOutcome]] = {}


class _Renderer:
    def __init__(self, format: TrajectoryFormat, tokenizer: Tokenizer) -> None:
        self.format, self.tokenizer, self.tree = format, tokenizer, Tree()
        self.note = ""
        """For the next segment: how the race before it ended."""

    def run(self, trajectory: Trajectory, prompt_ids: tuple[int, ...]) -> Tree:
        self._thread("0", None, Join(forced_ids=prompt_ids), trajectory, depth=0)
        self.tree.stop, self.tree.note = StopReason.EOS, self.tree.segments[self._last("0")].note
        return self.tree

    def _thread(
        self,
        name: str,
        parent: str | None,
        opening: Join,
        trajectory: Trajectory,
        *,
        depth: int,
        place: int = 1,
        joins: tuple[str, ...] = (),
        keep: int | None = None,
    ) -> tuple[tuple[int, ...], StopReason]:
        """Write the segments of one thread; its ids after the opening, and how it ended."""
        body, returns = ended(trajectory)
        text = self.format.lead if depth else ""
        begin = None if depth else self.format.begin()
        written: list[int] = []
        number = 0
        running = _Running()
        for part in body:
            if isinstance(part, str):
                text += part
                continue
            id = f"{name}:{number}"
            asks = self._asks(part, depth)
            assert begin is None or not text + asks, "the format begins with a block"
            sampled = ids(self.tokenizer, text + asks)
            self._segment(id, parent, opening, joins, keep, sampled, StopReason.STOP if sampled else StopReason.FORCED)
            written += (*(opening.forced_ids if number else ()), *sampled)
            asked = begin or self.format.parse(sampled, depth)
            begin, keep, text = None, None, ""
            if isinstance(part, Block):
                assert isinstance(asked, Fork), "the format cannot read its block"
                opening, joins = self._block(f"{name}/{number}", id, part, asked, depth)
                keep = None if asked.keep is None else self._length(id) - len(sampled) + asked.keep
                text = self.format.close_text(part.conclusion)
            elif isinstance(part, Spawn):
                assert isinstance(asked, Fork), "the format cannot read its fork"
                running.threads[asked.branches[0].key] = self._spawn(f"{name}/{number}.0", id, part, asked, depth)
                opening, joins = Join(forced_ids=()), ()
            else:
                assert isinstance(asked, Await), "the format cannot read its wait"
                if missing := [key for key in asked.keys if key not in running.threads]:
                    raise RequestError(f"the trajectory waits for thread {missing[0]}, which does not run")
                read = [running.threads.pop(key) for key in asked.keys]
                opening, joins = self.format.join([outcome for _, outcome in read]), tuple(last for last, _ in read)
            parent, number = id, number + 1
        end = self.format.end_text(returns, place) if depth else ""
        closing = () if end else self.tokenizer.eos_ids[:1]
        sampled = (*ids(self.tokenizer, text + end), *closing)
        stop = StopReason.EOS if closing else StopReason.STOP
        self._segment(f"{name}:{number}", parent, opening, joins, keep, sampled, stop)
        written += (*(opening.forced_ids if number else ()), *sampled)
        self._leave(f"{name}:{number}", running)
        return tuple(written), stop

    def _asks(self, part: Part, depth: int) -> str:
        """What the model writes to open a block, start a thread or wait for one."""
        match part:
            case Block():
                self.format.refuse(part, depth)
                return self.format.open_text(part)
            case Spawn():
                return self.format.spawn_text(part)
            case Wait():
                return self.format.wait_text(part)
            case _:
                raise RequestError("a trajectory has a return that does not end a thread")

    def _leave(self, id: str, running: _Running) -> None:
        """Cut what nobody waited for where its parent ends."""
        names = tuple(last.rpartition(":")[0] for last, _ in running.threads.values())
        if names:
            clock = self.tree.spans()[id].end
            self._cut(names, clock, "its parent ended without waiting for it")

    def _spawn(self, name: str, segment: str, part: Spawn, fork: Fork, depth: int) -> tuple[str, ThreadOutcome]:
        self.tree.apply(ThreadForked(segment=segment, threads=(name,), labels=(fork.branches[0].label,)))
        outcome = self._branch(name, segment, fork, 0, part.thread, {}, depth)
        return self._last(name), outcome

    def _block(self, name: str, segment: str, block: Block, fork: Fork, depth: int) -> tuple[Join, tuple[str, ...]]:
        assert len(fork.branches) == len(block.threads), "an outline is missing or stands twice"
        threads = tuple(f"{name}.{i}" for i in range(len(fork.branches)))
        labels = tuple(branch.label for branch in fork.branches)
        self.tree.apply(ThreadForked(segment=segment, threads=threads, labels=labels))
        outcomes: dict[int, ThreadOutcome] = {}
        for i in order([branch.needs for branch in fork.branches]) or ():
            outcomes[i] = self._branch(threads[i], segment, fork, i, block.threads[i], outcomes, depth)
        read = [outcomes[i] for i in range(len(threads))]
        if fork.race:
            read = self._decide(threads, read)
        return self.format.join(read), tuple(self._last(thread) for thread in threads)

    def _branch(
        self,
        name: str,
        segment: str,
        fork: Fork,
        i: int,
        thread: Trajectory,
        outcomes: dict[int, ThreadOutcome],
        depth: int,
    ) -> ThreadOutcome:
        """Write a thread of a block; it reads those that it needs."""
        branch: Branch = fork.branches[i]
        reads = [outcomes[n] for n in branch.needs]
        block = name.rpartition(".")[0]
        written, stop = self._thread(
            name,
            segment,
            self.format.opening(branch, reads) if reads else Join(forced_ids=branch.header_ids),
            thread,
            depth=depth + 1,
            place=i + 1,
            joins=tuple(self._last(f"{block}.{n}") for n in branch.needs),
            keep=0 if fork.fresh else None,
        )
        return ThreadOutcome(header_ids=branch.header_ids, token_ids=written, stop=stop)

    def _decide(self, threads: tuple[str, ...], outcomes: list[ThreadOutcome]) -> list[ThreadOutcome]:
        """Who won a race, by the rule of `plait.session`; the others are cut there."""
        spans = self.tree.spans()
        clocks = [spans[self._last(thread)].end for thread in threads]
        found = [i for i, outcome in enumerate(outcomes) if self.format.succeeded(outcome)]
        winner = min(found, key=lambda i: clocks[i], default=None)
        if winner is not None:
            losers = tuple(thread for i, thread in enumerate(threads) if i != winner)
            if losers:
                self._cut(losers, clocks[winner], f"cut: {threads[winner]} ended the race")
            self.note = f"{threads[winner]} ended the race of {len(threads)} threads"
        return [replace(outcome, won=i == winner) for i, outcome in enumerate(outcomes)]

    def _cut(self, threads: tuple[str, ...], clock: int, note: str) -> None:
        self.tree.apply(ThreadsCut(threads=threads, clock=clock, note=note))
        # Nothing was sampled in vain: the rest of these traces is only not said.
        self.tree.num_dropped = 0

    def _last(self, thread: str) -> str:
        """Last segment of a thread."""
        own = (s.id for s in self.tree.segments.values() if s.thread == thread)
        return max(own, key=lambda id: int(id.rpartition(":")[2]))

    def _length(self, id: str) -> int:
        """Positions at the end of a segment."""
        return context_positions(self.tree.context(id)) + len(self.tree.segments[id].sampled_ids)

    def _segment(
        self,
        id: str,
        parent: str | None,
        opening: Join,
        joins: tuple[str, ...],
        keep: int | None,
        sampled: tuple[int, ...],
        stop: StopReason,
    ) -> None:
        join = (opening.kind or self.format.join_kind) if joins else "none"
        self.tree.apply(
            SegmentStarted(id=id, parent=parent, joins=joins, join=join, keep=keep, forced_ids=opening.forced_ids)
        )
        if sampled:
            self.tree.apply(TokensSampled(id=id, token_ids=sampled, logprobs=(0.0,) * len(sampled)))
        self.tree.apply(SegmentEnded(id=id, stop=stop, note=self.note))
        self.note = ""


class _Reader:
    """Reads threads of a tree as a renderer would have written them; where one did not, some text is not found."""

    def __init__(self, tree: Tree, format: TrajectoryFormat, tokenizer: Tokenizer) -> None:
        self.tree, self.format, self.tokenizer = tree, format, tokenizer
        self.segments: dict[str, list[Segment]] = {}
        for segment in tree.segments.values():
            self.segments.setdefault(segment.thread, []).append(segment)

    def thread(self, name: str, lead: str, depth: int, place: int) -> Trajectory:
        """The parts of a thread; `lead` is what stands before its text."""
        parts: list[Part] = []
        own = sorted(self.segments[name], key=lambda s: int(s.id.rpartition(":")[2]))
        begin = None if depth else self.format.begin()
        returns: str | None = None
        block: Block | None = None
        for segment in own:
            text = self._text(segment)
            if block is not None:
                conclusion, text = self._after_block(text)
                parts.append(replace(block, conclusion=conclusion))
                block = None
            text, lead = text.removeprefix(lead), ""
            asked = begin or (self.format.parse(segment.sampled_ids, depth) if segment.sampled_ids else None)
            begin = None
            if isinstance(asked, Fork) and (names := self._threads(segment, asked)):
                text, forked = self._forked(names, text, asked, depth)
                parts += [text] if text else []
                if isinstance(forked, Block):
                    block = forked
                else:
                    parts.append(forked)
                continue
            if isinstance(asked, Await):
                wait = Wait(int(asked.keys[0]))
                text = text.removesuffix(self.format.wait_text(wait))
                parts += [text, wait] if text else [wait]
                continue
            if segment is own[-1] and depth and segment.stop is not StopReason.CANCELLED:
                text, returns = self._ended(text, place)
            parts += [text] if text else []
        if block is not None:
            parts.append(block)
        return (*parts, Return(returns)) if returns is not None else tuple(parts)

    def _text(self, segment: Segment) -> str:
        eos = self.tokenizer.eos_ids
        return self.tokenizer.decode([id for id in segment.sampled_ids if id not in eos])

    def _after_block(self, text: str) -> tuple[str, str]:
        """What the model writes to close a block, and what follows it."""
        before, _, after = self.format.close_text(_MARK).partition(_MARK)
        text = text.removeprefix(before)
        if not after:
            return "", text
        conclusion, _, rest = text.partition(after)
        return conclusion, rest

    def _threads(self, segment: Segment, fork: Fork) -> list[str]:
        """Names of the threads that a segment forked; empty where it was cut before."""
        number = segment.id.rpartition(":")[2]
        names = [f"{segment.thread}/{number}.{i}" for i in range(len(fork.branches))]
        return names if any(name in self.segments for name in names) else []

    def _forked(self, names: list[str], text: str, fork: Fork, depth: int) -> tuple[str, Block | Spawn]:
        """The text before a fork, and what it is. A thread that was cut before it began says nothing."""
        threads = tuple(
            self.thread(thread, self.format.lead, depth + 1, i + 1) if thread in self.segments else ()
            for i, thread in enumerate(names)
        )
        if not fork.waits:
            key = int(fork.branches[0].key)
            before, _, after = self.format.spawn_text(Spawn(key, _MARK, ())).partition(_MARK)
            said, _, asked = text.removesuffix(after).rpartition(before)
            return said, Spawn(key, asked, threads[0])
        needs = tuple(branch.needs for branch in fork.branches)
        block = Block(
            outlines=tuple(branch.label for branch in fork.branches),
            threads=threads,
            needs=needs if any(needs) else (),
            race=fork.race,
        )
        block = self._with_outlines(block, text)
        return text.removesuffix(self.format.open_text(block)), block

    def _with_outlines(self, block: Block, text: str) -> Block:
        """The block with the outlines as they are spelled: a thread that was told nothing is labelled by its number."""
        for i in reversed(range(len(block.outlines))):
            marked = self._told(block, i, _MARK)
            before, found, after = self.format.open_text(marked).rpartition(_MARK)
            nothing = text.endswith(before[-1:] + after)
            if found and nothing and not text.endswith(before[-1:] + block.outlines[i] + after):
                block = self._told(block, i, "")
        return block

    def _told(self, block: Block, i: int, outline: str) -> Block:
        return replace(block, outlines=(*block.outlines[:i], outline, *block.outlines[i + 1 :]))

    def _ended(self, text: str, place: int) -> tuple[str, str | None]:
        """A thread's text without what ends it, and what it returns."""
        if getattr(self.format, "returns", ""):
            before, _, after = self.format.end_text(_MARK, place).partition(_MARK)
            if text.endswith(after) and before in text:
                said, _, returns = text.removesuffix(after).rpartition(before)
                return said, returns
        return text.removesuffix(self.format.end_text(None, place)), None
