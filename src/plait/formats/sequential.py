"""The format that never forks: every baseline runs through the same code. Knows nothing of engines."""

from __future__ import annotations

from collections.abc import Sequence

from plait.formats.base import Fork, Join, Malformed, ThreadOutcome
from plait.tokenizer import Tokenizer
from plait.types import JoinKind


class Sequential:
    """One line of reasoning until end-of-sequence; control tokens of other formats are plain text."""

    name = "sequential"
    paper = "-"
    join_kind: JoinKind = "none"
    fork_ids: tuple[int, ...] = ()

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

    def open_text(self, labels: Sequence[str]) -> str:
        raise AssertionError("the sequential format never forks")

    thread_text = close_text = open_text
