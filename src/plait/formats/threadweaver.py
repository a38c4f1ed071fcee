"""ThreadWeaver's format on the wire (Lian et al. 2025, arXiv:2512.07843): a flat fork, joined by reading again.

    <Parallel>
    <Outlines>
    <Outline>1: plan</Outline>
    <Outline>2: plan</Outline>
    </Outlines>
    <Thread>
    1: what thread 1 wrote
    </Thread><Thread>
    2: what thread 2 wrote
    </Thread>
    </Parallel>

The runtime writes each header up to the colon, glues the threads, and writes one newline after the last; the model
writes everything else, `</Parallel>` included. A thread is generated after a header with a leading newline; at the
join only the first keeps it. Format and behaviour are described from the published paper and observed behaviour;
no code of the released implementation is used.
"""

from __future__ import annotations

from plait.formats.base import Block
from plait.formats.tagged import TaggedFormat
from plait.tokenizer import Tokenizer
from plait.types import JoinKind


class ThreadWeaver(TaggedFormat):
    """Outlines, glued threads, concat join.

    Args:
        conclusion: True for the older form with a conclusion: the runtime opens `<Conclusion>` after the join and the
            model writes the conclusion, `</Conclusion>` and `</Parallel>`.
    """

    name: str = "threadweaver"
    paper: str = "arXiv:2512.07843"
    join_kind: JoinKind = "concat"
    outlines: str = "Outlines"
    thread: str = "Thread"

    def __init__(self, tokenizer: Tokenizer, *, conclusion: bool = False) -> None:
        self.conclusion = conclusion
        if conclusion:
            self.closing = "Conclusion"
        super().__init__(tokenizer)

    def header_text(self, number: str) -> str:
        return f"\n<Thread>\n{number}:"

    def glued_text(self, number: str) -> str:
        return f"<Thread>\n{number}:"

    def closer_text(self) -> str:
        return "\n</Thread>"

    def after_text(self) -> str:
        return "\n<Conclusion>\n" if self.conclusion else "\n"

    def open_text(self, block: Block) -> str:
        lines = "".join(f"{self.outline_text(block, i)}\n" for i in range(len(block.outlines)))
        return f"<Parallel>\n<Outlines>\n{lines}</Outlines>"

    def close_text(self, conclusion: str) -> str:
        return f"{conclusion}\n</Conclusion>\n</Parallel>" if self.conclusion else f"</Parallel>{conclusion}"

    @classmethod
    def tags(cls) -> tuple[str, ...]:
        # Those of the older form too, so that a conclusion is never taken for text.
        return tuple(dict.fromkeys((*super().tags(), "<Conclusion>", "</Conclusion>")))

    def _unspaced(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n")
