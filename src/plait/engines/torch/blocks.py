"""Which cells of the KV cache hold which context: blocks with reference counts under a prefix tree.

A cell is the place of one token's keys and values; a block is a few cells in a row, handed out and taken back as one.
A node is a run of tokens computed after its parent, in as many blocks as it takes, or a merge of the branches that end
at its tips. It lives as long as anybody refers to it: a child, a merge that lists it, or a call that samples after it.
A fork is one more reference, to a run whose last block may be partly filled: whoever comes first goes on in it, the
others in blocks of their own, and nobody sees the cells behind his own. So neither a fork nor a merge copies anything.

Nodes without references are a memo of what was computed: they are found again by content, and given up, oldest first
and block by block from their ends, when blocks run out. Knows nothing of calls, sampling and tensors.
Source: PagedAttention (Kwon et al. 2023, arXiv:2309.06180), RadixAttention (Zheng et al. 2023, arXiv:2312.07104).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from plait.engines.inprocess.calls import num_common

Cells = npt.NDArray[np.int64]


class Node:
    """A run of tokens, or a merge (then `ids` is empty)."""

    __slots__ = ("cells", "children", "ids", "merges", "parent", "refs", "start", "tips")

    def __init__(self, parent: Node | None, ids: Sequence[int], cells: Iterable[int], *, start: int) -> None:
        self.parent = parent
        self.ids = list(ids)
        self.cells = array("q", cells)
        """Of each token; inside a block they count up."""
        self.start = start
        """Position of the first token; of a merge, the position after its longest branch."""
        self.tips: tuple[Node, ...] = ()
        self.children: dict[int, list[Node]] = {}
        """By first token. Siblings may begin alike."""
        self.merges: dict[tuple[Node, ...], Node] = {}
        self.refs = 0
        """Children, merges that list it as a tip, and holds."""

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.ids)


class Pool:
    """All blocks of an engine.

    Args:
        num_blocks: How many there are.
        block_size: Cells of each.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.evictions = 0
        """Blocks' worth of nodes that were given up for room."""
        self.clear()

    def clear(self) -> None:
        """Forget everything. Nodes from before must not be used again."""
        self.root = Node(None, (), (), start=0)
        self.root.refs = 1
        self._roots: dict[str, Node] = {}
        """Of contexts with a salt."""
        self.free = list(range(self.num_blocks - 1, -1, -1))
        self.used = 0
        """Cells that hold a token."""
        self.idle: OrderedDict[Node, None] = OrderedDict()
        """Nodes without references, least recently used first."""
        self._filled = [0] * self.num_blocks
        """Cells of each block that were handed out, from its beginning."""
        self._nodes = [0] * self.num_blocks
        """Reference count of each block: the nodes in it."""

    def root_of(self, salt: str | None) -> Node:
        """Where contexts of a salt begin: what was computed under another one is not found from there."""
        if salt is None:
            return self.root
        if salt not in self._roots:
            if len(self._roots) >= self.num_blocks:
                self._roots = {s: n for s, n in self._roots.items() if n.refs > 1}
            self._roots[salt] = Node(None, (), (), start=0)
            self._roots[salt].refs = 1
        return self._roots[salt]

    # Holding

    def hold(self, node: Node) -> Node:
        """Refer to a node: it and all it stands on stay until `let_go`."""
        node.refs += 1
        if node.refs == 1:
            del self.idle[node]
        return node

    def let_go(self, node: Node) -> None:
        """Take a `hold` back."""
        self._release(node, last=True)

    def _release(self, node: Node, *, last: bool) -> None:
        node.refs -= 1
        if not node.refs:
            self.idle[node] = None
            self.idle.move_to_end(node, last=last)

    # Finding

    def match(self, node: Node, ids: Sequence[int], limit: int) -> tuple[Node, int]:
        """The deepest node below `node` that holds a beginning of `ids`, and how many of them it holds.

        Args:
            limit: Match no more than so many ids. A run that goes on behind the last one is split there.
        """
        best, reach = node, 0
        partial: tuple[Node, int] | None = None
        stack = [(node, 0)]
        while stack:
            here, at = stack.pop()
            if at > reach:
                best, reach, partial = here, at, None
            if at >= limit:
                break
            for child in reversed(here.children.get(ids[at], ())):
                common = num_common(child.ids, list(ids[at : min(limit, at + len(child.ids))]))
                if common == len(child.ids):
                    stack.append((child, at + common))
                elif at + common > reach:
                    best, reach, partial = child, at + common, (child, common)
        return (best if partial is None else self._split(*partial)), reach

    def _split(self, node: Node, count: int) -> Node:
        """Cut a run after `count` tokens; the upper part is a new node, `node` becomes the lower part."""
        parent = node.parent
        assert parent is not None
        upper = Node(parent, node.ids[:count], node.cells[:count], start=node.start)
        upper.refs = 1
        siblings = parent.children[node.ids[0]]
        siblings[siblings.index(node)] = upper
        node.ids, node.cells = node.ids[count:], node.cells[count:]
        upper.children[node.ids[0]] = [node]
        node.parent, node.start = upper, upper.end
        block = node.cells[0] // self.block_size
        if upper.cells[-1] // self.block_size == block:
            self._nodes[block] += 1
        return upper

    # Growing

    def append(self, tip: Node, ids: Sequence[int]) -> Node | None:
        """Hand out cells for tokens after a node that the caller holds: as many as one block takes, at least one.

        Returns:
            The node that ends with them, to which the caller's hold has passed; None if there is no room.
        """
        room = self._room_behind(tip)
        block = tip.cells[-1] // self.block_size if room else self._take_block()
        if block is None:
            return None
        first = tip.cells[-1] + 1 if room else block * self.block_size
        taken = ids[: room or self.block_size]
        cells = range(first, first + len(taken))
        if tip.ids and tip.refs == 1:
            node = tip
            node.ids += taken
            node.cells.extend(cells)
        else:
            node = Node(tip, taken, cells, start=tip.end)
            node.refs = 1  # the caller's; the one it had on `tip` is the child's now
            tip.children.setdefault(ids[0], []).append(node)
        if node is not tip or not room:
            self._nodes[block] += 1
        self._filled[block] += len(taken)
        self.used += len(taken)
        return node

    def merge(self, base: Node, tips: tuple[Node, ...]) -> Node:
        """The merge of branches that all start at `base`: what follows it sees the cells of every one of them."""
        node = base.merges.get(tips)
        if node is None:
            node = Node(base, (), (), start=max(tip.end for tip in tips))
            node.tips = tips
            base.merges[tips] = node
            for held in (base, *tips):
                self.hold(held)
            self.idle[node] = None
        return node

    def _room_behind(self, tip: Node) -> int:
        """Cells right behind a node that nobody was given yet."""
        if not tip.ids:
            return 0
        block, at = divmod(tip.cells[-1], self.block_size)
        filled = self._filled[block]
        return self.block_size - filled if at + 1 == filled else 0

    def _take_block(self) -> int | None:
        while not self.free:
            if not self.idle:
                return None
            self.evictions += 1
            self._evict(next(iter(self.idle)))
        return self.free.pop()

    def forget(self) -> None:
        """Give up every node that nobody refers to."""
        while self.idle:
            self._evict(next(iter(self.idle)))

    def _evict(self, node: Node) -> None:
        """Forget the last block of a node that nobody refers to. Its parent comes next, if nobody else needs it."""
        parent = node.parent
        assert parent is not None
        assert not node.refs
        if node.tips:
            del parent.merges[node.tips]
            for tip in node.tips:
                self._release(tip, last=False)
        else:
            first = node.ids[0]
            self._give_back(node)
            if node.ids:
                return
            group = parent.children[first]
            group.remove(node)
            if not group:
                del parent.children[first]
        del self.idle[node]
        self._release(parent, last=False)

    def _give_back(self, node: Node) -> None:
        """Take a run's tokens out of the last block that it has."""
        block, at = divmod(node.cells[-1], self.block_size)
        count = min(at + 1, len(node.cells))
        del node.ids[-count:], node.cells[-count:]
        self.used -= count
        if at + 1 == self._filled[block]:
            self._filled[block] -= count
        self._nodes[block] -= 1
        if not self._nodes[block]:
            self._filled[block] = 0
            self.free.append(block)

    # Reading

    def cells(self, tip: Node) -> Cells:
        """Every cell that a token after `tip` sees. A cell that two branches of a merge share is there twice."""
        spans = [np.frombuffer(node.cells, np.int64) for node in _path(tip, None)]
        return np.concatenate(spans[::-1]) if spans else np.empty(0, np.int64)

    def check(self, holds: Sequence[Node] = ()) -> None:
        """Assert that the books balance (for tests).

        Args:
            holds: Every `hold` that was not let go.
        """
        nodes: list[Node] = []
        roots = [self.root, *self._roots.values()]
        todo = list(roots)
        while todo:
            node = todo.pop()
            nodes.append(node)
            below = [child for group in node.children.values() for child in group]
            assert all(child.parent is node and child.ids for child in below)
            todo += [*below, *node.merges.values()]
        refs = dict.fromkeys(nodes, 0)
        refs |= dict.fromkeys(roots, 1)
        for node in nodes:
            for other in (node.parent, *node.tips):
                if other is not None:
                    refs[other] += 1
        for node in holds:
            refs[node] += 1
        owner: dict[int, Node] = {}
        for node in nodes:
            assert node.refs == refs[node], "references are counted"
            assert (node in self.idle) == (not node.refs)
            assert len(node.cells) == len(node.ids)
            for cell in node.cells:
                assert owner.setdefault(cell, node) is node, "no cell has two owners"
                assert cell % self.block_size < self._filled[cell // self.block_size]
        in_block = [0] * self.num_blocks
        for node in nodes:
            for block in {cell // self.block_size for cell in node.cells}:
                in_block[block] += 1
        assert in_block == self._nodes
        assert sorted(self.free) == [i for i, count in enumerate(in_block) if not count]
        assert self.used == len(owner)


def _path(tip: Node, stop: Node | None) -> Iterator[Node]:
    """Runs that a token after `tip` sees, from there up to `stop`."""
    node: Node | None = tip
    while node is not None and node is not stop:
        if node.ids:
            yield node
        for branch in reversed(node.tips):
            yield from _path(branch, node.parent)
        node = node.parent
