"""A trajectory tree as rows, one for each engine call: its whole context, and loss on what it sampled.

The plain way to train a tree, for trainers that know sequences only, and the slow path that packed trees are held to:
every shared prefix is computed again in every row. After concat joins a row is a causal sequence; after a merge it
needs the positions and visibility that it carries. Knows nothing of torch.
Source: the context-completion pairs of ThreadWeaver (Lian et al. 2025, arXiv:2512.07843).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from plait.train.trie import TrieBatch, flatten
from plait.tree import Segment, Tree


def rows(tree: Tree) -> list[TrieBatch]:
    """One row for each segment that sampled something, in program order.

    Every sampled token is trained in exactly one row: its own call's. Elsewhere it is context.

    Raises:
        TreeError: As `flatten`.
    """
    return [_row(tree, segment) for segment in tree.walk() if segment.sampled_ids]


def _row(tree: Tree, segment: Segment) -> TrieBatch:
    needed = _context(tree, segment.id, upto=None)
    part = Tree({id: tree.segments[id] for id in tree.segments if id in needed})
    row = flatten(part)
    own = np.zeros(len(row), np.bool_)
    at = 0
    for other in part.walk():
        at += len(other.token_ids)
        if other.id == segment.id:
            own[at - len(segment.sampled_ids) : at] = True
    return replace(row, loss_mask=own, logprobs=np.where(own, row.logprobs, 0).astype(np.float32))


def _context(tree: Tree, id: str, *, upto: str | None) -> set[str]:
    """Segments whose tokens the call of `id` was given, and itself, down to `upto`."""
    needed: set[str] = set()
    at: str | None = id
    while at is not None and at != upto:
        needed.add(at)
        segment = tree.segments[at]
        if segment.join == "merge":
            for joined in segment.joins:
                needed |= _context(tree, joined, upto=segment.parent)
        at = segment.parent
    return needed
