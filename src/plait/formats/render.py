"""Turns a trajectory in text into the tree that a run of it would be: who wrote each token, what each call saw.

The gold traces that models are trained on are rendered here, so a packed training row equals the engine calls of a
run to the token. Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Sequence

from plait.events import SegmentEnded, SegmentStarted, ThreadForked, TokensSampled
from plait.formats.base import Block, Fork, ThreadOutcome, Trajectory, TrajectoryFormat, ids
from plait.tokenizer import Tokenizer
from plait.tree import Tree
from plait.types import StopReason


def render(
    trajectory: Trajectory, *, format: TrajectoryFormat, tokenizer: Tokenizer, prompt_ids: Sequence[int]
) -> Tree:
    """The tree of a finished run that wrote this trajectory after this prompt.

    Raises:
        RequestError: A text is not in the vocabulary.
    """
    return _Renderer(format, tokenizer).run(trajectory, tuple(prompt_ids))


class _Renderer:
    def __init__(self, format: TrajectoryFormat, tokenizer: Tokenizer) -> None:
        self.format, self.tokenizer, self.tree = format, tokenizer, Tree()

    def run(self, trajectory: Trajectory, prompt_ids: tuple[int, ...]) -> Tree:
        eos = self.tokenizer.eos_ids[:1]
        self._thread("0", None, prompt_ids, trajectory, closing=eos, stop=StopReason.EOS, depth=0)
        self.tree.stop = StopReason.EOS
        return self.tree

    def _thread(
        self,
        name: str,
        parent: str | None,
        forced: tuple[int, ...],
        trajectory: Trajectory,
        *,
        closing: tuple[int, ...],
        stop: StopReason,
        depth: int,
    ) -> list[str]:
        """Segments of one thread; the ids of those that belong to it, last one last."""
        done: list[str] = []
        text = ""
        joins: tuple[str, ...] = ()
        for part in trajectory:
            if isinstance(part, str):
                text += part
                continue
            id = f"{name}:{len(done)}"
            sampled = ids(self.tokenizer, text + self.format.open_text(part.outlines))
            self._segment(id, parent, joins, forced, sampled, StopReason.STOP)
            done.append(id)
            outcomes, joins = self._block(f"{name}/{len(done) - 1}", id, part, sampled, depth)
            parent, forced, text = id, self.format.join(outcomes).forced_ids, self.format.close_text(part.conclusion)
        id = f"{name}:{len(done)}"
        self._segment(id, parent, joins, forced, (*ids(self.tokenizer, text), *closing), stop)
        return [*done, id]

    def _block(
        self, name: str, segment: str, block: Block, sampled: Sequence[int], depth: int
    ) -> tuple[list[ThreadOutcome], tuple[str, ...]]:
        fork = self.format.parse(sampled, depth)
        assert isinstance(fork, Fork), "the format cannot read its block"
        assert len(fork.branches) == len(block.threads), "an outline is missing or stands twice"
        threads = tuple(f"{name}.{i}" for i in range(len(fork.branches)))
        labels = tuple(branch.label for branch in fork.branches)
        self.tree.apply(ThreadForked(segment=segment, threads=threads, labels=labels))
        outcomes: list[ThreadOutcome] = []
        joins: list[str] = []
        for thread, branch, trajectory in zip(threads, fork.branches, block.threads, strict=True):
            assert all(isinstance(part, str) for part in trajectory), f"{self.format.name} has no nested blocks"
            body = self.format.thread_text("".join(map(str, trajectory)))
            segments = self._thread(
                thread, segment, branch.header_ids, (body,), closing=(), stop=StopReason.STOP, depth=depth + 1
            )
            written = self.tree.segments[segments[-1]]
            outcome = ThreadOutcome(
                header_ids=branch.header_ids, token_ids=tuple(written.sampled_ids), stop=StopReason.STOP
            )
            outcomes.append(outcome)
            joins.append(segments[-1])
        return outcomes, tuple(joins)

    def _segment(
        self,
        id: str,
        parent: str | None,
        joins: tuple[str, ...],
        forced: tuple[int, ...],
        sampled: tuple[int, ...],
        stop: StopReason,
    ) -> None:
        join = self.format.join_kind if joins else "none"
        self.tree.apply(SegmentStarted(id=id, parent=parent, joins=joins, join=join, forced_ids=forced))
        self.tree.apply(TokensSampled(id=id, token_ids=sampled, logprobs=(0.0,) * len(sampled)))
        self.tree.apply(SegmentEnded(id=id, stop=stop))
