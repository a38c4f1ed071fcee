"""A trajectory tree as one training sequence with interval visibility.

Knows nothing of torch, models or formats. Visibility is kept as a few intervals a token, never as an N x N array.
Source: trie-based training, ThreadWeaver (Lian et al. 2025, arXiv:2512.07843); merges as in Multiverse
(Yang et al. 2025, arXiv:2506.09991).

Shapes: L tokens of the tree, N nested hidden spans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plait.errors import TreeError
from plait.tree import Segment, Tree

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrieBatch:
    """A flattened tree. Token `j` is visible to token `i` iff `j <= i < end[j]` and no hidden span of `j` holds `i`."""

    token_ids: Ints
    position_ids: Ints
    """As at inference: branches of a fork start alike, after a merge positions go on from the longest."""
    prev: Ints
    """Index of the token whose logits predict this one; -1 where none does: the root, and the id forced by a merge."""
    loss_mask: NDArray[np.bool_]
    """True where the engine sampled the token."""
    logprobs: NDArray[np.float32]
    """Natural log, 0 off the mask."""
    end: Ints
    """First index that no longer sees the token."""
    hide_lo: Ints
    """[L, N] first index of each span that does not see the token though later ones do; an unused span is empty."""
    hide_hi: Ints

    def __len__(self) -> int:
        return len(self.token_ids)


def flatten(tree: Tree) -> TrieBatch:
    """Flatten a trajectory tree into one training sequence.

    Every segment becomes a contiguous run of tokens, parents before children, that attends to what its engine call
    was given: its ancestors, and after a merge the merged branches. One forward pass then scores each call on exactly
    its own context: threads do not see their siblings, a join sees what it was fed.

    Args:
        tree: A finished run.

    Returns:
        Arrays over the L tokens of the tree; a shared prefix is counted once.

    Raises:
        TreeError: A segment's parent or a joined segment is missing, or a sampled token has no predecessor.

    Example:
        >>> from plait.tree import Segment
        >>> parts = [
        ...     Segment(id="0:0", forced_ids=(1, 2), sampled_ids=[3], logprobs=[0.0]),
        ...     Segment(id="0/0.1:0", parent="0:0", forced_ids=(10,), sampled_ids=[4], logprobs=[0.0]),
        ...     Segment(id="0/0.2:0", parent="0:0", forced_ids=(11,), sampled_ids=[5], logprobs=[0.0]),
        ... ]
        >>> batch = flatten(Tree({s.id: s for s in parts}))
        >>> batch.token_ids.tolist(), batch.position_ids.tolist(), batch.prev.tolist()
        ([1, 2, 3, 10, 4, 11, 5], [0, 1, 2, 3, 4, 3, 4], [-1, 0, 1, 2, 3, 2, 5])
    """
    order = list(tree.walk())
    if len(order) != len(tree.segments):
        raise TreeError("a segment's parent is missing from the tree")
    starts: dict[str, int] = {}
    length = 0
    for segment in order:
        starts[segment.id] = length
        length += len(segment.token_ids)

    ids: list[int] = []
    positions: list[int] = []
    prev: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []
    tails: dict[str, tuple[int, int]] = {}
    """By segment: the token that predicts what follows it (-1: none), and the position that follows it."""
    for segment in order:
        tail, position = _before(segment, tails)
        own = segment.token_ids
        at, num_forced, count = starts[segment.id], len(segment.forced_ids), len(own)
        if len(segment.logprobs) != len(segment.sampled_ids):
            raise TreeError(f"segment {segment.id} has {len(segment.logprobs)} logprobs for {count - num_forced} ids")
        if count > num_forced and num_forced == 0 and tail < 0:
            raise TreeError(f"segment {segment.id} samples its first token after nothing that could predict it")
        ids += own
        positions += range(position, position + count)
        if count:
            prev.append(tail)
            prev += range(at, at + count - 1)
            tail = at + count - 1
        mask += [False] * num_forced + [True] * (count - num_forced)
        logprobs += [0.0] * num_forced
        logprobs += segment.logprobs
        tails[segment.id] = (tail, position + count)

    end, hide_lo, hide_hi = _visibility(tree, order, starts, length)
    return TrieBatch(
        token_ids=np.array(ids, np.int64),
        position_ids=np.array(positions, np.int64),
        prev=np.array(prev, np.int64),
        loss_mask=np.array(mask, np.bool_),
        logprobs=np.array(logprobs, np.float32),
        end=end,
        hide_lo=hide_lo,
        hide_hi=hide_hi,
    )


def _before(segment: Segment, tails: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Predicting token and first position of a segment."""
    if segment.keep is not None:
        raise TreeError(f"segment {segment.id} drops ids of its parent: joins that do are not trained yet")
    tail, position = tails[segment.parent] if segment.parent is not None else (-1, 0)
    if segment.join == "merge" and segment.joins:
        if missing := [j for j in segment.joins if j not in tails]:
            raise TreeError(f"segment {segment.id} joins {missing[0]}, which does not come before it")
        return -1, max(position, *(tails[j][1] for j in segment.joins))
    return tail, position


def _visibility(tree: Tree, order: list[Segment], starts: dict[str, int], length: int) -> tuple[Ints, Ints, Ints]:
    """`end`, `hide_lo`, `hide_hi`: a token is seen in its segment's subtree and in those of merges it went into."""
    stops = {segment.id: starts[segment.id] + len(segment.token_ids) for segment in order}
    for segment in reversed(order):
        if segment.parent is not None:
            stops[segment.parent] = max(stops[segment.parent], stops[segment.id])
    merged_by: dict[str, Segment] = {}
    for segment in order:
        if segment.join != "merge":
            continue
        for at in segment.joins:
            while at != segment.parent:
                merged_by[at] = segment
                parent = tree.segments[at].parent
                if parent is None:
                    raise TreeError(f"segment {segment.id} joins {at}, which does not come from its parent")
                at = parent

    gaps: dict[str, list[tuple[int, int]]] = {}
    last: dict[str, int] = {}
    for segment in order:
        spans: list[tuple[int, int]] = []
        at, hidden_from = segment, stops[segment.id]
        while (at := merged_by.get(at.id)) is not None:
            if starts[at.id] > hidden_from:
                spans.append((hidden_from, starts[at.id]))
            hidden_from = stops[at.id]
        gaps[segment.id], last[segment.id] = spans, hidden_from

    end = np.zeros(length, np.int64)
    width = max((len(spans) for spans in gaps.values()), default=0)
    hide_lo = np.full((length, width), length, np.int64)
    hide_hi = np.full((length, width), length, np.int64)
    for segment in order:
        own = slice(starts[segment.id], starts[segment.id] + len(segment.token_ids))
        end[own] = last[segment.id]
        for n, (lo, hi) in enumerate(gaps[segment.id]):
            hide_lo[own, n], hide_hi[own, n] = lo, hi
    return end, hide_lo, hide_hi


def dense_mask(end: Ints, hide_lo: Ints, hide_hi: Ints) -> NDArray[np.bool_]:
    """Visibility as an [L, L] array, row sees column. For tests: its memory is the square of the length."""
    query = np.arange(len(end))[:, None]
    key = np.arange(len(end))[None, :]
    seen = (key <= query) & (query < end[None])
    for n in range(hide_lo.shape[1]):
        seen &= ~((query >= hide_lo[None, :, n]) & (query < hide_hi[None, :, n]))
    return seen
