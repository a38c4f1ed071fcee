"""ParaThinker's format (Wen et al. 2025, arXiv:2509.04475): two fixed stages, paths and then a summary of them.

    <think1>path 1</think1><think2>path 2</think2><summary>what follows</summary>

The model decides nothing: a run begins with its paths, all at the same position, and the summary sees the keys and
values of all of them and goes on from the longest. A path is known by its own tag. The paper adds an embedding for
each path besides; that is the model's business, and needs no more than the place of a thread in its block.
"""

from __future__ import annotations

from collections.abc import Sequence

from plait.formats.base import Block, Fork
from plait.formats.paths import PathsFormat
from plait.types import JoinKind


class ParaThinker(PathsFormat):
    """Numbered paths from the start, summary; merge join."""

    name: str = "parathinker"
    paper: str = "arXiv:2509.04475"
    join_kind: JoinKind = "merge"
    summary: str = "summary"
    fork_ids: tuple[int, ...] = ()

    @classmethod
    def tags(cls) -> tuple[str, ...]:
        paths = (f"<{slash}think{i}>" for i in range(1, 17) for slash in ("", "/"))
        return (*paths, "<summary>", "</summary>")

    def path_tag(self, number: int) -> str:
        return f"think{number}"

    def after_text(self) -> str:
        return "<summary>"

    def open_text(self, block: Block) -> str:
        return ""

    def begin(self) -> Fork:
        return self._fork

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        return self._closers if depth else ()

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | None:
        return None
