"""Parallel-R1's format (Zheng et al. 2025, arXiv:2509.07980): the model says when, the number of paths is fixed.

    <Parallel><Path>path 1</Path><Path>path 2</Path></Parallel><Summary>what follows</Summary>

The model writes `<Parallel>`; two paths are sampled from the same context, told nothing apart, so they differ by their
seeds alone; their texts are read again and the runtime writes `</Parallel><Summary>`. A thread opens at most four
blocks, as in the published loop; its cap of 4,096 tokens a path is `Budget.max_thread_tokens`. This is the variant
that the paper calls "Seen" (plain causal attention at the join); "Unseen" trains with a mask that its rollouts do not
have.
"""

from __future__ import annotations

from collections.abc import Sequence

from plait.formats.base import Block, Caps, Fork
from plait.formats.paths import PathsFormat
from plait.tokenizer import Tokenizer
from plait.types import JoinKind


class ParallelR1(PathsFormat):
    """Two paths without outlines, summary; concat join."""

    name: str = "parallel_r1"
    paper: str = "arXiv:2509.07980"
    join_kind: JoinKind = "concat"
    summary: str = "Summary"
    caps: Caps = Caps(max_blocks=4)

    def __init__(self, tokenizer: Tokenizer, *, num_paths: int = 2) -> None:
        super().__init__(tokenizer, num_paths=num_paths)
        self.fork_ids = (self.control_id(tokenizer, "<Parallel>"),)

    @classmethod
    def tags(cls) -> tuple[str, ...]:
        return "<Parallel>", "</Parallel>", "<Path>", "</Path>", "<Summary>", "</Summary>"

    def path_tag(self, number: int) -> str:
        return "Path"

    def after_text(self) -> str:
        return "</Parallel><Summary>"

    def open_text(self, block: Block) -> str:
        return "<Parallel>"

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        # Inside a path `<Parallel>` is plain text.
        return self._closers[:1] if depth else self.fork_ids

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | None:
        return self._fork if not depth and tuple(sampled_ids[-1:]) == self.fork_ids else None
