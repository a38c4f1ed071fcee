"""Turns a trajectory into the tree that a run of it would be: who wrote each token, what each call saw.

The gold traces that models are trained on are rendered here, so a packed training row equals the engine calls of a
run to the token. Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from plait.events import SegmentEnded, SegmentStarted, ThreadForked, ThreadsCut, TokensSampled
from plait.formats.base import Block, Fork, Join, ThreadOutcome, Trajectory, TrajectoryFormat, ids, order
from plait.formats.tagged import ended
from plait.tokenizer import Tokenizer
from plait.tree import Tree
from plait.types import StopReason, context_positions


def render(
    trajectory: Trajectory, *, format: TrajectoryFormat, tokenizer: Tokenizer, prompt_ids: Sequence[int]
) -> Tree:
    """The tree of a finished run that wrote this trajectory after this prompt.

    In a race the threads after the winner's end are cut where a run would cut them.

    Raises:
        RequestError: A text is not in the vocabulary, or the format has no form for a part of the trajectory.
    """
    return _Renderer(format, tokenizer).run(trajectory, tuple(prompt_ids))


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
        for part in body:
            if isinstance(part, str):
                text += part
                continue
            assert isinstance(part, Block)
            id = f"{name}:{number}"
            self.format.refuse(part, depth)
            open_text = self.format.open_text(part)
            assert begin is None or not text + open_text, "the format begins with a block"
            sampled = ids(self.tokenizer, text + open_text)
            self._segment(id, parent, opening, joins, keep, sampled, StopReason.STOP if sampled else StopReason.FORCED)
            written += (*(opening.forced_ids if number else ()), *sampled)
            fork = begin or self.format.parse(sampled, depth)
            begin = None
            assert isinstance(fork, Fork), "the format cannot read its block"
            opening, joins = self._block(f"{name}/{number}", id, part, fork, depth)
            keep = None if fork.keep is None else self._length(id) - len(sampled) + fork.keep
            parent, text, number = id, self.format.close_text(part.conclusion), number + 1
        end = self.format.end_text(returns, place) if depth else ""
        closing = () if end else self.tokenizer.eos_ids[:1]
        sampled = (*ids(self.tokenizer, text + end), *closing)
        stop = StopReason.EOS if closing else StopReason.STOP
        self._segment(f"{name}:{number}", parent, opening, joins, keep, sampled, stop)
        written += (*(opening.forced_ids if number else ()), *sampled)
        return tuple(written), stop

    def _block(self, name: str, segment: str, block: Block, fork: Fork, depth: int) -> tuple[Join, tuple[str, ...]]:
        assert len(fork.branches) == len(block.threads), "an outline is missing or stands twice"
        threads = tuple(f"{name}.{i}" for i in range(len(fork.branches)))
        labels = tuple(branch.label for branch in fork.branches)
        self.tree.apply(ThreadForked(segment=segment, threads=threads, labels=labels))
        outcomes: dict[int, ThreadOutcome] = {}
        for i in order([branch.needs for branch in fork.branches]) or ():
            branch = fork.branches[i]
            reads = [outcomes[n] for n in branch.needs]
            written, stop = self._thread(
                threads[i],
                segment,
                self.format.opening(branch, reads) if reads else Join(forced_ids=branch.header_ids),
                block.threads[i],
                depth=depth + 1,
                place=i + 1,
                joins=tuple(self._last(threads[n]) for n in branch.needs),
                keep=0 if fork.fresh else None,
            )
            outcomes[i] = ThreadOutcome(header_ids=branch.header_ids, token_ids=written, stop=stop)
        read = [outcomes[i] for i in range(len(threads))]
        if fork.race:
            read = self._decide(threads, read)
        return self.format.join(read), tuple(self._last(thread) for thread in threads)

    def _decide(self, threads: tuple[str, ...], outcomes: list[ThreadOutcome]) -> list[ThreadOutcome]:
        """Who won a race, by the rule of `plait.session`; the others are cut there."""
        spans = self.tree.spans()
        clocks = [spans[self._last(thread)].end for thread in threads]
        found = [i for i, outcome in enumerate(outcomes) if self.format.succeeded(outcome)]
        winner = min(found, key=lambda i: clocks[i], default=None)
        if winner is not None:
            losers = tuple(thread for i, thread in enumerate(threads) if i != winner)
            note = f"cut: {threads[winner]} ended the race"
            self.tree.apply(ThreadsCut(threads=losers, clock=clocks[winner], note=note))
            # Nothing was sampled in vain: the rest of the losers' traces is only not said.
            self.tree.num_dropped = 0
            self.note = f"{threads[winner]} ended the race of {len(threads)} threads"
        return [replace(outcome, won=i == winner) for i, outcome in enumerate(outcomes)]

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
