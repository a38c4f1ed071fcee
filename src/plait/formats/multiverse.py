"""Multiverse's format (Yang et al. 2025, arXiv:2506.09991): a flat fork, joined by keys and values.

    <Parallel><Goal><Outline>1: plan</Outline><Outline>2: plan</Outline></Goal>
    <Path>1: what path 1 wrote</Path><Path>2: what path 2 wrote</Path>
    <Conclusion>what follows from both</Conclusion></Parallel>

(one line; broken here to be read). Every path starts right after `</Goal>`, at the same position, and does not see
its siblings; the conclusion sees all of them and its positions go on from the longest. The runtime writes each path's
header up to the colon, and `<Conclusion>`; the model writes the rest. The published engine also nests blocks; here a
block inside a path is plain text.
"""

from __future__ import annotations

from plait.formats.base import Block
from plait.formats.tagged import TaggedFormat
from plait.types import JoinKind


class Multiverse(TaggedFormat):
    """Goal, paths, conclusion; merge join."""

    name: str = "multiverse"
    paper: str = "arXiv:2506.09991"
    join_kind: JoinKind = "merge"
    outlines: str = "Goal"
    thread: str = "Path"
    closing: str = "Conclusion"
    exact: bool = False

    def header_text(self, number: str) -> str:
        return f"<Path>{number}:"

    def after_text(self) -> str:
        return "<Conclusion>"

    def open_text(self, block: Block) -> str:
        outlines = "".join(self.outline_text(block, i) for i in range(len(block.outlines)))
        return f"<Parallel><Goal>{outlines}</Goal>"

    def close_text(self, conclusion: str) -> str:
        return f"{conclusion}</Conclusion></Parallel>"
