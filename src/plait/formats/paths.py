"""What formats share whose paths have no outline: a path is known by its place, and all see the same before it.

Knows no runtime. See `parallel_r1.py` and `parathinker.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from plait.errors import RequestError
from plait.formats.base import (
    Block,
    Branch,
    Fork,
    Join,
    Return,
    ThreadOutcome,
    Trajectory,
    TrajectoryFormat,
    ids,
)
from plait.formats.text import Scanner, compare, refuse
from plait.tokenizer import Tokenizer


class PathsFormat(TrajectoryFormat):
    """A fixed number of paths and a summary.

    Args:
        tokenizer: Its vocabulary must hold the tags that are read as one control token each.
        num_paths: Paths of a block.

    Raises:
        RequestError: It does not, or there are no paths.
    """

    summary: str
    """Tag of what the model writes after the paths."""

    def __init__(self, tokenizer: Tokenizer, *, num_paths: int = 2) -> None:
        if num_paths < 1:
            raise RequestError(f"num_paths is {num_paths}; it must be at least 1")
        self.num_paths = num_paths
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_ids
        self._closers = tuple(self.control_id(tokenizer, f"</{self.path_tag(i)}>") for i in range(1, num_paths + 1))
        self.control_id(tokenizer, f"<{self.summary}>")
        self._after = ids(tokenizer, self.after_text())
        self._fork = Fork(
            branches=tuple(
                Branch(header_ids=ids(tokenizer, f"<{self.path_tag(i)}>"), label=str(i))
                for i in range(1, num_paths + 1)
            )
        )

    @abstractmethod
    def path_tag(self, number: int) -> str:
        """Tag of a path, from 1."""

    @abstractmethod
    def after_text(self) -> str:
        """What the runtime writes after the paths."""

    def eos_ids(self) -> tuple[int, ...]:
        return self._eos

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        if outcome.token_ids[-1:] and outcome.token_ids[-1] in self._closers:
            return ()
        header = [branch.header_ids for branch in self._fork.branches].index(outcome.header_ids)
        return (self._closers[header],)

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        if self.join_kind == "merge":
            return Join(forced_ids=self._after)
        read = [id for t in threads for id in (*t.header_ids, *t.token_ids) if id not in self._eos]
        return Join(forced_ids=(*read, *self._after))

    def end_text(self, returns: str | None, number: int = 1) -> str:
        return f"</{self.path_tag(number)}>"

    def close_text(self, conclusion: str) -> str:
        return f"{conclusion}</{self.summary}>"

    def refuse(self, block: Block, depth: int) -> None:
        if depth or any(isinstance(part, (Block, Return)) for thread in block.threads for part in thread):
            raise refuse(self.name, "a path that is more than text")
        if len(block.threads) != self.num_paths or any(block.needs) or block.race:
            raise refuse(self.name, f"{len(block.threads)} paths, or paths that wait; it has {self.num_paths} alike")
        if any(text != str(i) for i, text in enumerate(block.outlines, 1)):
            raise refuse(self.name, "outlines: its paths are told nothing but their number")

    def write(self, trajectory: Trajectory) -> str:
        if any(not isinstance(part, (str, Block)) for part in trajectory):
            raise refuse(self.name, "more than text and paths")
        return "".join(self._block_text(part) if isinstance(part, Block) else str(part) for part in trajectory)

    def _block_text(self, block: Block) -> str:
        self.refuse(block, 0)
        paths = (
            f"<{self.path_tag(i)}>{''.join(map(str, thread))}{self.end_text(None, i)}"
            for i, thread in enumerate(block.threads, 1)
        )
        return "".join([self.open_text(block), *paths, self.after_text(), self.close_text(block.conclusion)])

    def read(self, text: str) -> Trajectory:
        scan = Scanner(text, (*self.tags(), *(f"<{s}{self.path_tag(i)}>" for i in range(1, 65) for s in ("", "/"))))
        parts: list[str | Block] = []
        while True:
            said = scan.plain()
            parts += [said] if said else []
            if not scan.tag:
                break
            parts.append(self._read_block(scan))
        trajectory = tuple(parts)
        compare(text, self.write(trajectory))
        return trajectory

    def _read_block(self, scan: Scanner) -> Block:
        for tag in self._tags_in(self.open_text(Block(outlines=(), threads=()))):
            scan.take(tag)
        threads: list[Trajectory] = []
        for i in range(1, self.num_paths + 1):
            scan.blank()
            scan.take(f"<{self.path_tag(i)}>")
            body = scan.plain()
            threads.append((body,) if body else ())
            scan.take(f"</{self.path_tag(i)}>")
        for tag in self._tags_in(self.after_text()):
            scan.blank()
            scan.take(tag)
        conclusion = scan.plain()
        scan.take(f"</{self.summary}>")
        outlines = tuple(str(i) for i in range(1, self.num_paths + 1))
        return Block(outlines=outlines, threads=tuple(threads), conclusion=conclusion)

    @staticmethod
    def _tags_in(text: str) -> list[str]:
        return [f"<{piece}" for piece in text.replace("\n", "").split("<") if piece]
