"""A trajectory tree as one training sequence with interval visibility.

Knows nothing of torch, models or formats. Visibility is kept as a few intervals a token, never as an N x N array.
Source: trie-based training, ThreadWeaver (Lian et al. 2025, arXiv:2512.07843); merges as in Multiverse
(Yang et al. 2025, arXiv:2506.09991).

Shapes: L tokens of the tree, N nested hidden spans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from plait.errors import TreeError
from plait.tree import Segment, Tree

Ints = NDArray[np.int64]
_Intervals: TypeAlias = tuple[Ints, Ints, Ints]


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
    was given: its ancestors, and after a merge the merged branches; where a message took a block's place, and in a
    thread that starts from a message, only what stays of its ancestors. Positions are those of its own context. One
    forward pass then scores each call on exactly its own context: threads do not see their siblings, a join sees what
    it was fed.

    Args:
        tree: A finished run.

    Returns:
        Arrays over the L tokens of the tree; a shared prefix is counted once.

    Raises:
        TreeError: A segment's parent or a joined segment is missing, a sampled token has no predecessor, or a context
            with a merge is cut.

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
    contexts = _contexts(order)
    tails: dict[str, tuple[int, int]] = {}
    """By segment: the token that predicts what follows it (-1: none), and the position that follows it."""
    for segment in order:
        tail, position = _before(segment, tails, contexts[segment.id], starts)
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

    end, hide_lo, hide_hi = _visibility(order, contexts, starts, length)
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


def pieces(tree: Tree) -> list[TrieBatch]:
    """Flatten a tree into sequences that see nothing of each other: one of the root thread, one of each fresh thread.

    A thread that starts from a message shares no prefix with its parent, so one sequence of both would be longer than
    either for nothing: attention costs the square of the length.

    Returns:
        In program order; one sequence where no thread starts afresh. Together they hold every token of `flatten`.

    Raises:
        TreeError: As `flatten`.
    """
    parts: dict[str, dict[str, Segment]] = {}
    home: dict[str, str] = {}
    for segment in tree.walk():
        first = segment.parent is None or segment.keep == 0
        home[segment.id] = segment.id if first else home[segment.parent or ""]
        part = parts.setdefault(home[segment.id], {})
        part[segment.id] = replace(segment, parent=None, keep=None) if first else segment
    return [flatten(Tree(part)) for part in parts.values()]


def _before(
    segment: Segment, tails: dict[str, tuple[int, int]], seen: _Seen, starts: dict[str, int]
) -> tuple[int, int]:
    """Predicting token and first position of a segment."""
    tail, position = tails[segment.parent] if segment.parent is not None else (-1, 0)
    if segment.keep is not None:
        # The last id that stays predicts what follows; where none stays, nothing does.
        position, tail = segment.keep, -1
        for id, count in seen.items() if segment.keep else ():
            tail = starts[id] + count - 1 if count else tail
    if segment.join == "merge" and segment.joins:
        return -1, max(position, *(tails[j][1] for j in segment.joins))
    return tail, position


_Seen: TypeAlias = dict[str, int]
"""How many of the first tokens of which other segments a segment sees, in the order of its context."""


def _contexts(order: list[Segment]) -> dict[str, _Seen]:
    """What every segment sees: the path to the root, cut where it says so, and what was merged on the way."""
    sizes = {segment.id: len(segment.token_ids) for segment in order}
    out: dict[str, _Seen] = {}
    merged: set[str] = set()
    for segment in order:
        seen: _Seen = {}
        if segment.parent is not None and segment.keep != 0:
            seen = out[segment.parent] | {segment.parent: sizes[segment.parent]}
            if segment.parent in merged:
                merged.add(segment.id)
        if segment.keep:
            if segment.id in merged or sum(seen.values()) < segment.keep:
                raise TreeError(f"segment {segment.id} keeps {segment.keep} ids of a context that it cannot cut")
            seen = _first(seen, segment.keep)
        if segment.join == "merge" and segment.joins:
            merged.add(segment.id)
            path = seen.keys()
            for id in segment.joins:
                if id not in out:
                    raise TreeError(f"segment {segment.id} joins {id}, which does not come before it")
                if not path <= out[id].keys():
                    raise TreeError(f"segment {segment.id} joins {id}, which does not come from its parent")
                seen = seen | out[id] | {id: sizes[id]}
        out[segment.id] = seen
    return out


def _first(seen: _Seen, count: int) -> _Seen:
    """The first `count` tokens of what is seen."""
    out: _Seen = {}
    for id, size in seen.items():
        out[id] = min(size, count)
        count -= out[id]
    return out


def _visibility(order: list[Segment], contexts: dict[str, _Seen], starts: dict[str, int], length: int) -> _Intervals:
    """`end`, `hide_lo`, `hide_hi`: from who sees a token, the stretches after it that do not."""
    stops = {segment.id: starts[segment.id] + len(segment.token_ids) for segment in order}
    readers: dict[str, list[tuple[int, str]]] = {segment.id: [] for segment in order}
    for segment in order:
        if segment.token_ids:
            for id, count in contexts[segment.id].items():
                readers[id].append((count, segment.id))
    gaps: list[tuple[int, int, int, list[tuple[int, int]]]] = []
    for segment in order:
        at = 0
        # Readers that see only the first tokens of a segment divide it.
        for upto in sorted({len(segment.token_ids), *(count for count, _ in readers[segment.id])}):
            if upto > at:
                last, spans = stops[segment.id], list[tuple[int, int]]()
                for count, reader in readers[segment.id]:
                    if count >= upto:
                        if starts[reader] > last:
                            spans.append((last, starts[reader]))
                        last = stops[reader]
                gaps.append((starts[segment.id] + at, starts[segment.id] + upto, last, spans))
                at = upto
    end = np.zeros(length, np.int64)
    width = max((len(spans) for *_, spans in gaps), default=0)
    hide_lo = np.full((length, width), length, np.int64)
    hide_hi = np.full((length, width), length, np.int64)
    for lo, hi, last, spans in gaps:
        end[lo:hi] = last
        for n, (hidden_from, hidden_to) in enumerate(spans):
            hide_lo[lo:hi, n], hide_hi[lo:hi, n] = hidden_from, hidden_to
    return end, hide_lo, hide_hi


def dense_mask(end: Ints, hide_lo: Ints, hide_hi: Ints) -> NDArray[np.bool_]:
    """Visibility as an [L, L] array, row sees column. For tests: its memory is the square of the length."""
    query = np.arange(len(end))[:, None]
    key = np.arange(len(end))[None, :]
    seen = (key <= query) & (query < end[None])
    for n in range(hide_lo.shape[1]):
        seen &= ~((query >= hide_lo[None, :, n]) & (query < hide_hi[None, :, n]))
    return seen
