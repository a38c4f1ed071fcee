"""The format that never forks: every baseline runs through the same code. Knows nothing of engines."""

from __future__ import annotations

from collections.abc import Sequence

from plait.formats.base import Block, Fork, Join, Malformed, Return, ThreadOutcome, Trajectory, TrajectoryFormat
from plait.formats.text import refuse
from plait.tokenizer import Tokenizer
from plait.types import JoinKind


class Sequential(TrajectoryFormat):
    """One line of reasoning until end-of-sequence; control tokens of other formats are plain text."""

    name = "sequential"
    paper = "-"
    join_kind: JoinKind = "none"
    fork_ids: tuple[int, ...] = ()
    lead = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._eos = tokenizer.eos_ids

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        return ()

    def eos_ids(self) -> tuple[int, ...]:
        return self._eos

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Malformed | None:
        return None

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        return ()

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        raise AssertionError("the sequential format never forks")

    def open_text(self, block: Block) -> str:
        raise refuse(self.name, "a block")

    def end_text(self, returns: str | None, number: int = 1) -> str:
        raise refuse(self.name, "a thread")

    def close_text(self, conclusion: str) -> str:
        raise refuse(self.name, "a block")

    @classmethod
    def tags(cls) -> tuple[str, ...]:
        return ()

    def write(self, trajectory: Trajectory) -> str:
        if any(isinstance(part, (Block, Return)) for part in trajectory):
            raise refuse(self.name, "a block")
        return "".join(map(str, trajectory))

    def read(self, text: str) -> Trajectory:
        return (text,) if text else ()
