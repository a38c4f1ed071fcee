"""NPR's format (Wu et al. 2025, arXiv:2512.07461): nested blocks without text between them, joined by keys and values.

    <guideline>
    <plan>1: plan</plan>
    <plan>2: plan</plan>
    </guideline>
    <step>
    1: what step 1 wrote
    </step>
    <step>
    2: what step 2 wrote
    </step><takeaway>
    what follows from both
    </takeaway>

Every step starts right after `</guideline>` and does not see its siblings; the takeaway sees all of them and goes on
from the longest. The runtime writes each header up to the colon, and `<takeaway>` with a newline. The published engine
opens no block with more than five plans, deeper than five, or with fewer than 1,024 tokens left; so does this one.
"""

from __future__ import annotations

from collections.abc import Sequence

from plait.formats.base import Block, Caps, Fork, Malformed
from plait.formats.tagged import TaggedFormat
from plait.formats.text import refuse
from plait.tokenizer import Tokenizer
from plait.types import JoinKind

MAX_PLANS = 5
MAX_DEPTH = 5


class NPR(TaggedFormat):
    """Guideline, steps, takeaway, nested; merge join.

    Args:
        min_tokens: Sampled tokens that must be left to a thread for a block to open.
    """

    name: str = "npr"
    paper: str = "arXiv:2512.07461"
    join_kind: JoinKind = "merge"
    block: str = ""
    outlines: str = "guideline"
    outline: str = "plan"
    thread: str = "step"
    closing: str = "takeaway"
    nested: bool = True
    free: bool = False
    exact: bool = False

    def __init__(self, tokenizer: Tokenizer, *, min_tokens: int = 1024) -> None:
        super().__init__(tokenizer)
        self.caps = Caps(min_tokens=min_tokens)

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Malformed | None:
        fork = super().parse(sampled_ids, depth)
        if isinstance(fork, Fork) and len(fork.branches) > MAX_PLANS:
            return Malformed(note=f"{len(fork.branches)} plans; at most {MAX_PLANS}")
        if isinstance(fork, Fork) and depth >= MAX_DEPTH:
            return Malformed(note=f"a guideline at depth {depth + 1}; at most {MAX_DEPTH}")
        return fork

    def refuse(self, block: Block, depth: int) -> None:
        super().refuse(block, depth)
        if len(block.threads) > MAX_PLANS or depth >= MAX_DEPTH:
            raise refuse(
                self.name, f"{len(block.threads)} plans at depth {depth + 1}; at most {MAX_PLANS} and {MAX_DEPTH}"
            )

    def header_text(self, number: str) -> str:
        return f"\n<step>\n{number}:"

    def closer_text(self) -> str:
        return "\n</step>"

    def after_text(self) -> str:
        return "<takeaway>\n"

    def open_text(self, block: Block) -> str:
        lines = "".join(f"{self.outline_text(block, i)}\n" for i in range(len(block.outlines)))
        return f"<guideline>\n{lines}</guideline>"

    def close_text(self, conclusion: str) -> str:
        return f"{conclusion}\n</takeaway>"

    def _unspaced(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n")
