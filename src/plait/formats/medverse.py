"""MedVerse's grammar (arXiv:2602.07529): a plan whose steps name the steps they depend on.

    <Plan>
    <Outline>1. plan; Dependency: []</Outline>
    <Outline>2. plan; Dependency: [1]</Outline>
    </Plan>
    <Execution>
    <Step>
    1: what step 1 wrote
    </Step>
    <Step>
    2: what step 2 wrote
    </Step>
    </Execution>
    <Conclusion>
    what follows from all
    </Conclusion>

A step starts when those it depends on have ended, and reads them. The published engine joins keys and values; here a
step and the conclusion read the text again (concat), because a step that two others depend on would stand twice in a
merge of those. So this runs MedVerse's grammar and schedule; weights trained on merged keys and values are another
function.
"""

from __future__ import annotations

import re

from plait.formats.base import Block
from plait.formats.tagged import TaggedFormat
from plait.types import JoinKind

_NUMBERED = re.compile(r"\s*(\d+)\s*[.:]\s*(.*?)\s*(?:;\s*Dependency:\s*\[([^\[\]]*)\])?\s*$", re.DOTALL)


class MedVerse(TaggedFormat):
    """Plan with dependencies, execution, conclusion; concat join in place of the paper's merge."""

    name: str = "medverse"
    paper: str = "arXiv:2602.07529"
    join_kind: JoinKind = "concat"
    block: str = ""
    outlines: str = "Plan"
    wrapper: str = "Execution"
    thread: str = "Step"
    closing: str = "Conclusion"
    dependent: bool = True
    exact: bool = False

    def numbered(self, text: str) -> tuple[str, str, tuple[str, ...]] | None:
        match = _NUMBERED.match(text)
        if match is None:
            return None
        return match[1], match[2], tuple(name.strip() for name in (match[3] or "").split(",") if name.strip())

    def outline_text(self, block: Block, i: int) -> str:
        needs = ", ".join(str(n + 1) for n in block.needs[i]) if block.needs else ""
        return f"<Outline>{i + 1}. {block.outlines[i]}; Dependency: [{needs}]</Outline>"

    def header_text(self, number: str) -> str:
        return f"\n<Execution>{self.glued_text(number)}"

    def glued_text(self, number: str) -> str:
        return f"\n<Step>\n{number}:"

    def closer_text(self) -> str:
        return "\n</Step>"

    def after_text(self) -> str:
        return "\n</Execution>\n<Conclusion>\n"

    def open_text(self, block: Block) -> str:
        lines = "".join(f"{self.outline_text(block, i)}\n" for i in range(len(block.outlines)))
        return f"<Plan>\n{lines}</Plan>"

    def close_text(self, conclusion: str) -> str:
        return f"{conclusion}\n</Conclusion>"

    def _unspaced(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n")
