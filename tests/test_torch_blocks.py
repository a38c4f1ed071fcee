"""The block pool of the torch engine: references that balance, cells that nobody else writes, memos that may go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from plait.engines.torch.blocks import Node, Pool  # noqa: E402


class Book:
    """What each cell should hold, written as the pool hands cells out."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = Pool(num_blocks, block_size)
        self.token: dict[int, tuple[int, int]] = {}
        """Token and position, by cell."""

    def extend(self, node: Node, ids: list[int]) -> Node:
        """Compute tokens after a node that is held; the hold passes on."""
        while ids:
            end = node.end
            grown = self.pool.append(node, ids)
            if grown is None:
                break
            node, count = grown, grown.end - end
            for k in range(count):
                self.token[node.cells[k - count]] = (ids[k], end + k)
            ids = ids[count:]
        return node

    def read(self, node: Node) -> list[tuple[int, int]]:
        return [self.token[cell] for cell in self.pool.cells(node).tolist()]


def test_a_fork_and_a_merge_take_no_cell() -> None:
    book = Book(num_blocks=8, block_size=4)
    pool = book.pool
    trunk = book.extend(pool.hold(pool.root), [1, 2, 3, 4, 5])
    branches = [book.extend(pool.hold(trunk), [10 + i]) for i in range(3)]
    assert pool.used == 8
    assert 8 - len(pool.free) == 4, "the first branch goes on in the trunk's block, two begin their own"
    merged = pool.hold(pool.merge(trunk, tuple(branches)))
    assert (pool.used, merged.end) == (8, 6)
    assert sorted(book.read(merged)[5:]) == [(10, 5), (11, 5), (12, 5)]
    pool.check([trunk, *branches, merged])


def test_a_merge_keeps_its_branches_when_memory_runs_out() -> None:
    book = Book(num_blocks=4, block_size=4)
    pool = book.pool
    trunk = book.extend(pool.hold(pool.root), [1, 2, 3, 4])
    branches = [book.extend(pool.hold(trunk), [5 + i, 6]) for i in range(2)]
    tip = book.extend(pool.hold(pool.merge(trunk, tuple(branches))), [9])
    for node in (trunk, *branches):
        pool.let_go(node)
    before = book.read(tip)
    other = book.extend(pool.hold(pool.root), [7] * 9)
    assert other is pool.root, "every block is needed by the merge"
    assert book.read(tip) == before
    pool.let_go(tip)
    other = book.extend(other, [7] * 9)
    assert len(book.read(other)) == 9
    pool.check([other])


def test_what_two_branches_share_is_seen_twice() -> None:
    book = Book(num_blocks=4, block_size=4)
    pool = book.pool
    trunk = book.extend(pool.hold(pool.root), [1])
    branch = book.extend(pool.hold(trunk), [2, 3])
    upper, reach = pool.match(trunk, [2], 1)
    assert reach == 1
    merged = pool.hold(pool.merge(trunk, (branch, upper)))
    assert sorted(book.read(merged)) == [(1, 0), (2, 1), (2, 1), (3, 2)]
    pool.check([trunk, branch, merged])


@given(
    st.lists(
        st.tuples(st.sampled_from(["fork", "extend", "merge", "drop", "find"]), st.integers(0, 99), st.integers(1, 9)),
        max_size=40,
    ),
    st.integers(1, 5),
    st.integers(2, 12),
)
def test_any_program_leaves_the_books_balanced(
    program: list[tuple[str, int, int]], block_size: int, num_blocks: int
) -> None:
    book = Book(num_blocks, block_size)
    pool = book.pool
    held: list[Node] = [pool.hold(pool.root)]
    expected: list[list[tuple[int, int]]] = [[]]
    for verb, pick, length in program:
        at = pick % len(held)
        node = held[at]
        if verb == "fork":
            held.append(pool.hold(node))
            expected.append(list(expected[at]))
        elif verb == "extend":
            start = node.end
            ids = [pick % 3] * length
            held[at] = book.extend(node, ids)
            expected[at] += [(id, start + k) for k, id in enumerate(ids[: held[at].end - start])]
        elif verb == "merge":
            tips = [(n, e) for n, e in zip(held, expected, strict=True) if n is not pool.root][:3]
            if tips:
                merged = pool.merge(pool.root, tuple(n for n, _ in tips))
                held.append(pool.hold(merged))
                expected.append([cell for _, e in tips for cell in e])
        elif verb == "drop" and len(held) > 1:
            pool.let_go(held.pop(at))
            expected.pop(at)
        elif verb == "find":
            run = [token for token, _ in expected[at]]
            found, reach = pool.match(pool.root, run, len(run))
            assert [token for token, _ in book.read(found)] == run[:reach]
        pool.check(held)
        for n, e in zip(held, expected, strict=True):
            assert sorted(book.read(n)) == sorted(e), "nobody wrote into what is held"
    for node in held:
        pool.let_go(node)
    assert book.extend(pool.hold(pool.root), [0] * (num_blocks * block_size)).end == num_blocks * block_size


def test_a_memo_gives_up_its_end_first_and_block_by_block() -> None:
    book = Book(num_blocks=4, block_size=4)
    pool = book.pool
    run = list(range(14))
    tip = book.extend(pool.hold(pool.root), run)
    assert tip.parent is pool.root, "one run, however many blocks"
    pool.let_go(tip)
    other = book.extend(pool.hold(pool.root), [50] * 5)
    assert pool.evictions == 2
    found, reach = pool.match(pool.root, run, len(run))
    assert (reach, [token for token, _ in book.read(found)]) == (8, run[:8])
    pool.check([other])
