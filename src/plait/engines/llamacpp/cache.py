"""Which sequence holds which context: a prefix tree over the sequences of a decoder, live and finished.

A node is a run of tokens (or a merge) that was computed once, in one context; a sequence is a path from the root.
Sequences that share a node share its cells: a fork copies no data. After a merge the cells of the branches lie side
by side at the same positions in the joined sequence and cannot be told apart there, so a merge is a node of its own,
found again by its value, and its branches stay addressable only as long as sequences of their own hold them.

Knows nothing of calls and sampling. Everything here is a memo: dropping any idle sequence costs time, never a token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

from plait.engines.inprocess.calls import Part, num_common
from plait.types import Merge, context_cells

MIN_SPLIT = 16
"""A match that ends inside a run is used from this many tokens on. Shorter ones are mostly siblings that open alike,
and what siblings share cannot be merged: every branch brings its own keys and values to a merge."""


class Cells(Protocol):
    """What the cache needs of a decoder."""

    def copy(self, source: int, target: int, start: int, end: int) -> None: ...
    def remove(self, seq: int) -> None: ...


class Node:
    """A run of tokens computed after `parent`, or the merge of the branches that end at `tips`."""

    __slots__ = (
        "children",
        "end",
        "holders",
        "key",
        "live",
        "merges",
        "parent",
        "row",
        "start",
        "tips",
        "trunk",
        "waiting",
    )

    def __init__(self, parent: Node | None, key: Part, end: int) -> None:
        self.parent = parent
        self.key = key
        self.start = parent.end if parent else 0
        """Position of the first token."""
        self.end = end
        """Position after the last token; after a merge, after the longest branch."""
        self.tips: tuple[Node, ...] = ()
        self.children: dict[int, list[Node]] = {}
        """By first token. Siblings may begin alike: each has its own cells."""
        self.merges: dict[Merge, list[Node]] = {}
        self.waiting: dict[int, Seq] = {}
        """Idle sequences that end here, by the token they sampled last, which is not computed yet."""
        self.holders: set[Seq] = set()
        """Sequences that hold the cells."""
        self.trunk: set[Seq] = set()
        """Those of them where the cells can be addressed by position: not inside a merge."""
        self.live = 0
        """How many holders are live."""
        self.row: int | None = None
        """Row of the batch that is being put together and will compute this node (one token)."""

    @property
    def num_cells(self) -> int:
        return 0 if isinstance(self.key, Merge) else len(self.key)

    def path(self, stop: Node | None = None) -> Iterator[tuple[Node, bool]]:
        """Every node below `stop` whose cells a sequence that ends here holds; True for those on its trunk."""
        node: Node | None = self
        while node is not None and node is not stop and node.parent is not None:
            yield node, True
            for tip in node.tips:
                for inner, _ in tip.path(node.parent):
                    yield inner, False
            node = node.parent

    def touches(self, seqs: Sequence[Seq]) -> bool:
        """Whether one of these sequences holds a cell of this run or merge."""
        if not seqs:
            return False
        return any(not n.holders.isdisjoint(seqs) for n, _ in self.path(self.parent))


class Seq:
    """One of the decoder's sequences: it holds every node on the path to its tip."""

    __slots__ = ("held", "id", "live", "pending", "tip")

    def __init__(self, id: int, tip: Node) -> None:
        self.id = id
        self.tip = tip
        self.held: set[Node] = set()
        self.live = True
        self.pending: int | None = None
        """The token sampled last, not computed yet; only of a sequence that finished a call."""


class Cache:
    """The sequences of one decoder.

    Args:
        max_seqs: How many sequences the decoder has.
        keep: Idle cells that are always kept. More are kept while live calls hold at least half as many, because
            every row of a batch attends over all cells in use, so stale ones slow every step down.
    """

    def __init__(self, cells: Cells, *, max_seqs: int, keep: int) -> None:
        self._cells, self._keep = cells, keep
        self.max_seqs = max_seqs
        self.evictions = 0
        """Idle sequences that were given up for room."""
        self.clear()

    def clear(self) -> None:
        """Begin anew, whatever the books say. The decoder is cleared by whoever calls this."""
        self.root = Node(None, (), 0)
        self._roots: dict[str, Node] = {}
        """Of contexts with a salt."""
        self.used = 0
        """Cells held by nodes."""
        self.live_cells = 0
        """Those of them that a live sequence holds."""
        self.free = list(range(self.max_seqs - 1, -1, -1))
        self.idle: OrderedDict[Seq, None] = OrderedDict()
        """Finished sequences, least recently used first."""
        self.seqs: set[Seq] = set()
        self._flying: list[tuple[Node, Seq]] = []

    # Finding

    def root_of(self, salt: str | None) -> Node:
        """Where contexts of a salt begin: what was computed under another one is not found from there."""
        if salt is None:
            return self.root
        if salt not in self._roots:
            if len(self._roots) >= 2 * self.max_seqs:
                tips = {seq.tip for seq in self.seqs}
                self._roots = {s: n for s, n in self._roots.items() if n.children or n.merges or n in tips}
            self._roots[salt] = Node(None, (), 0)
        return self._roots[salt]

    def find(
        self, parts: Sequence[Part], *, start: Node | None = None, spare: int = 0, apart: Sequence[Seq] = ()
    ) -> tuple[Node, tuple[Part, ...]]:
        """The deepest node that holds a beginning of `parts`, and the parts that remain.

        Args:
            start: Where `parts` begin; the root if not given.
            spare: Tokens at the very end that must remain (to sample, the last one has to be computed again).
            apart: Sequences whose cells below `start` must not be used: the branches of a merge never share any.
        """
        node, at, offset = self._deepest(start or self.root, parts, 0, 0, spare, apart)
        if at < len(parts) and offset:
            return node, (parts[at][offset:], *parts[at + 1 :])  # type: ignore[index]
        return node, tuple(parts[at:])

    def _deepest(
        self, node: Node, parts: Sequence[Part], at: int, offset: int, spare: int, apart: Sequence[Seq]
    ) -> tuple[Node, int, int]:
        best = (node, at, offset)
        if at == len(parts):
            return best
        part = parts[at]
        if isinstance(part, Merge):
            for merged in node.merges.get(part, ()):
                if not merged.touches(apart):
                    best = max(best, self._deepest(merged, parts, at + 1, 0, spare, apart), key=_reach)
            return best
        limit = len(part) - (spare if at == len(parts) - 1 else 0)
        if offset >= limit:
            return best
        partial: tuple[Node, int] | None = None
        for child in node.children.get(part[offset], ()):
            if not child.holders.isdisjoint(apart):
                continue
            ids = child.key
            assert isinstance(ids, tuple)
            common = num_common(ids, part[offset : min(limit, offset + len(ids))])
            if common == len(ids):
                after = offset + common
                reached = (at + 1, 0) if after == len(part) else (at, after)
                best = max(best, self._deepest(child, parts, *reached, spare, apart), key=_reach)
            elif common >= MIN_SPLIT and (partial is None or common > partial[1]):
                partial = (child, common)
        if partial is not None:
            after = offset + partial[1]
            reached = (at + 1, 0) if after == len(part) else (at, after)
            if reached > _reach(best):
                best = (self._split(*partial), reached[0], reached[1])
        return best

    def _split(self, node: Node, count: int) -> Node:
        """Cut a run after `count` tokens; the upper part is a new node, `node` becomes the lower part."""
        ids, parent = node.key, node.parent
        assert isinstance(ids, tuple)
        assert parent is not None
        assert node.row is None
        upper = Node(parent, ids[:count], node.start + count)
        upper.holders, upper.trunk, upper.live = set(node.holders), set(node.trunk), node.live
        for seq in upper.holders:
            seq.held.add(upper)
        siblings = parent.children[ids[0]]
        siblings[siblings.index(node)] = upper
        upper.children[ids[count]] = [node]
        node.parent, node.key, node.start = upper, ids[count:], upper.end
        return upper

    # Sequences

    @property
    def available(self) -> int:
        """Sequences that a fork can get now."""
        return len(self.free) + len(self.idle)

    def missing(self, parts: Sequence[Part], start: Node) -> int:
        """Cells that a context needs beside those that are cached; what it will use becomes the last to be given up."""
        node, rest = self.find(parts, start=start)
        if not node.live:
            source = next((seq for seq in node.trunk if seq in self.idle), None)
            if source is not None:
                self.idle.move_to_end(source)
        if not rest:
            return 0
        first, *others = rest
        ours = sum(self.missing(b, node) for b in first.branches) if isinstance(first, Merge) else len(first)
        return ours + context_cells(tuple(others))

    def make_free(self) -> None:
        """Make sure that one sequence is free, at the price of the one used longest ago."""
        if not self.free:
            assert self.idle, "admission lets no call in that cannot get a sequence"
            self._evict()

    def fork(self, node: Node) -> Seq:
        """A new live sequence that holds everything up to `node`. Copies no data."""
        seq = Seq(self.free.pop(), node)
        self.seqs.add(seq)
        if node.parent is not None:
            source = next(iter(node.trunk))
            self._cells.copy(source.id, seq.id, 0, node.end)
            if source in self.idle:
                self.idle.move_to_end(source)
        for held, on_trunk in node.path():
            self._hold(seq, held, on_trunk)
        return seq

    def extend(self, seq: Seq, ids: tuple[int, ...]) -> Node:
        """Add computed tokens to a sequence."""
        node = Node(seq.tip, ids, seq.tip.end + len(ids))
        seq.tip.children.setdefault(ids[0], []).append(node)
        self.used += len(ids)
        self._hold(seq, node, True)
        seq.tip = node
        return node

    def absorb(self, seq: Seq, tip: Node) -> None:
        """Give a sequence the cells of a branch that starts at its tip. One step of a merge."""
        start = seq.tip
        if tip is start:
            return
        source = next(iter(tip.trunk))
        self._cells.copy(source.id, seq.id, start.end, tip.end if tip.row is None else tip.start)
        if source in self.idle:
            self.idle.move_to_end(source)
        for node, _ in tip.path(start):
            self._hold(seq, node, False)

    def merge(self, seq: Seq, key: Merge, tips: tuple[Node, ...]) -> None:
        """Complete a merge whose branches were all absorbed: what follows stands after the longest of them."""
        node = Node(seq.tip, key, max(t.end for t in tips))
        node.tips = tips
        seq.tip.merges.setdefault(key, []).append(node)
        self._hold(seq, node, True)
        seq.tip = node

    def finish(self, seq: Seq, pending: int | None) -> None:
        """A sequence's call has ended: keep it for reuse until its place is needed."""
        seq.live = False
        for node in seq.held:
            node.live -= 1
            if not node.live:
                self.live_cells -= node.num_cells
        self.idle[seq] = None
        if pending is not None:
            seq.pending = pending
            seq.tip.waiting[pending] = seq

    def feed_pending(self, seq: Seq, row: int) -> Node:
        """The coming decode computes the last sampled token of a finished sequence in `row`."""
        assert seq.pending is not None
        token, seq.pending = seq.pending, None
        if seq.tip.waiting.get(token) is seq:
            del seq.tip.waiting[token]
        del self.idle[seq]  # until it landed: it must not be dropped before the decode
        node = self.extend(seq, (token,))
        node.row = row
        self._flying.append((node, seq))
        return node

    def land(self) -> None:
        """The decode is done: what was in flight is computed."""
        for node, seq in self._flying:
            node.row = None
            self.idle[seq] = None
        self._flying.clear()

    def drop(self, seq: Seq) -> None:
        """Free a sequence and every cell that only it held."""
        self._cells.remove(seq.id)
        self.idle.pop(seq, None)
        if seq.pending is not None and seq.tip.waiting.get(seq.pending) is seq:
            del seq.tip.waiting[seq.pending]
        for node in seq.held:
            self._release(seq, node)
        seq.held.clear()
        self.seqs.remove(seq)
        self.free.append(seq.id)

    def trim(self) -> None:
        """Drop the oldest idle sequences while more cells idle than are worth their weight in every step."""
        while self.idle and self.used - self.live_cells > max(self._keep, 2 * self.live_cells):
            self._evict()

    def make_room(self, cells: int) -> bool:
        """Drop idle sequences until at most `cells` are used. False if the live ones alone use more."""
        while self.used > cells and self.idle:
            self._evict()
        return self.used <= cells

    def forget(self) -> None:
        """Drop every idle sequence."""
        for seq in tuple(self.idle):
            self.drop(seq)

    def _evict(self) -> None:
        """Give up the idle sequence used longest ago."""
        self.evictions += 1
        self.drop(next(iter(self.idle)))

    def _hold(self, seq: Seq, node: Node, on_trunk: bool) -> None:
        if on_trunk:
            node.trunk.add(seq)
        if node in seq.held:
            return
        seq.held.add(node)
        node.holders.add(seq)
        if seq.live:
            node.live += 1
            if node.live == 1:
                self.live_cells += node.num_cells

    def _release(self, seq: Seq, node: Node) -> None:
        node.holders.discard(seq)
        if seq.live:
            node.live -= 1
            if not node.live:
                self.live_cells -= node.num_cells
        if seq in node.trunk:
            node.trunk.remove(seq)
            if not node.trunk:
                self._hide(node)
        if not node.holders:
            self.used -= node.num_cells

    def _hide(self, node: Node) -> None:
        """Take a node out of the tree: no sequence is left in which its cells can be addressed."""
        parent = node.parent
        assert parent is not None
        if isinstance(node.key, Merge):
            group = parent.merges[node.key]
            group.remove(node)
            if not group:
                del parent.merges[node.key]
        else:
            group = parent.children[node.key[0]]
            group.remove(node)
            if not group:
                del parent.children[node.key[0]]

    def check(self) -> None:
        """Assert that the books balance: holders against paths, counters against nodes (for tests)."""
        nodes: set[Node] = set()
        for seq in self.seqs:
            assert (seq in self.idle) != seq.live
            path = dict(seq.tip.path())
            assert set(path) <= seq.held, "a sequence holds every node on its path"
            for node in seq.held:
                assert seq in node.holders
                assert not path.get(node) or seq in node.trunk
            nodes |= seq.held
        for node in nodes:
            assert node.holders <= self.seqs
            assert node.trunk <= node.holders
            assert node.live == sum(s.live for s in node.holders)
        assert self.used == sum(n.num_cells for n in nodes)
        assert self.live_cells == sum(n.num_cells for n in nodes if n.live)
        assert len(self.free) + len(self.seqs) == self.max_seqs
        todo, seen = [self.root, *self._roots.values()], set[Node]()
        while todo:
            node = todo.pop()
            seen.add(node)
            below = [c for group in node.children.values() for c in group] + [
                m for group in node.merges.values() for m in group
            ]
            assert all(c.parent is node and c.trunk for c in below)
            todo += below
        assert all(n in seen for n in nodes if n.trunk)


def _reach(found: tuple[Node, int, int]) -> tuple[int, int]:
    return found[1], found[2]
