"""A format of one's own: where sampled tokens fork, how threads open, what their parent reads. Held to the contract.

python examples/your_own_format.py

<Do>boil water<Do>grind beans</Do>     the model writes a list; a thread runs for each item
<Part>boil water: ...</Part>           the runtime opens it up to the colon, the thread writes the rest
<Part>grind beans: ...</Part>          at the join the parent reads all parts, and goes on
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from plait.formats import Block, Branch, Fork, Join, Malformed, ThreadOutcome, TrajectoryFormat
from plait.testing import check_format
from plait.tokenizer import Tokenizer


class Todo(TrajectoryFormat):
    """A list of things to do, a thread for each; concat join."""

    name, paper, join_kind = "todo", "-", "concat"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        tags = (self.control_id(tokenizer, tag) for tag in self.tags())
        self.item, self.fork, self.part, self.closer = tags
        self.fork_ids = (self.item, self.fork)

    @classmethod
    def tags(cls) -> tuple[str, ...]:
        return "<Do>", "</Do>", "<Part>", "</Part>"

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        return (self.closer,) if depth else (self.fork,)

    def eos_ids(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Malformed | None:
        if depth or tuple(sampled_ids[-1:]) != (self.fork,):
            return None
        starts = [at for at, id in enumerate(sampled_ids) if id == self.item]
        items = [tuple(sampled_ids[a + 1 : b]) for a, b in pairwise((*starts, len(sampled_ids) - 1))]
        colon = self.tokenizer.encode(":")
        branches = [Branch(header_ids=(self.part, *i, *colon), label=self.tokenizer.decode(i)) for i in items]
        return Fork(branches=tuple(branches)) if branches else Malformed(note="no <Do>")

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        return () if outcome.token_ids[-1:] == (self.closer,) else (self.closer,)

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        read = [id for t in threads for id in (*t.header_ids, *t.token_ids) if id not in self.eos_ids()]
        return Join(forced_ids=tuple(read))

    # The same as text, for gold traces: what the model writes before, in and after a block.
    def open_text(self, block: Block) -> str:
        return f"<Do>{'<Do>'.join(block.outlines)}</Do>"

    def end_text(self, returns: str | None, number: int = 1) -> str:
        return "</Part>"

    def close_text(self, conclusion: str) -> str:
        return conclusion


if __name__ == "__main__":
    print("the contract holds:", *check_format(Todo))
