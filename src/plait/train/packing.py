"""Packs flattened trees into rows of fixed shape: no token is dropped, cut or doubled, and every batch has one shape.

Knows nothing of models and where examples come from. Rows of one bucket have one length. An example opens rows only in
the bucket with the shortest rows that hold it, so short examples do not pay for the attention of long ones; but it
goes into a gap that a longer example left at the end of its row if there is one, for that costs nothing.

Shapes: R rows, T slots of a row, N nested hidden spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plait.errors import RequestError
from plait.train.trie import TrieBatch

IGNORED = -100
"""Label of a slot that is not trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """One shape of batch."""

    rows: int
    length: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.length < 1:
            raise RequestError(f"a bucket has {self.rows} rows of {self.length}; both must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Rows of examples side by side; no example sees another. All arrays are [R, T] but for the spans, [R, T, N]."""

    token_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    """The token itself where it is trained, else -100: its logits are those at `prev`."""
    prev: NDArray[np.int64]
    """Slot in the same row whose logits predict this token; 0 where the label is -100."""
    end: NDArray[np.int32]
    """First slot of the row that no longer sees the token."""
    hide_lo: NDArray[np.int32]
    hide_hi: NDArray[np.int32]
    places: tuple[tuple[int, int, int], ...]
    """Row, first slot and tag of every example, in the order they were added."""
    num_tokens: int
    """Slots that hold an example's token."""

    @property
    def num_examples(self) -> int:
        return len(self.places)

    @property
    def fill(self) -> float:
        """Share of the slots in use."""
        return self.num_tokens / self.token_ids.size

    @property
    def num_trained(self) -> int:
        return int((self.labels != IGNORED).sum())


class Packer:
    """Places examples into the open batch of each bucket; a batch is closed when an example of its own fits no more.

    Args:
        buckets: Shapes, in any order.
        num_spans: Nested hidden spans a token may have: 0 without merges, 1 for merges that do not nest.
        pad_id: Fills the slots left over.
    """

    def __init__(self, buckets: Sequence[Bucket], *, num_spans: int, pad_id: int = 0) -> None:
        if not buckets:
            raise RequestError("packing needs at least one bucket of rows")
        self.buckets = tuple(sorted(buckets, key=lambda b: b.length))
        self.num_spans = num_spans
        self.pad_id = pad_id
        self._open = [_Open(bucket) for bucket in self.buckets]

    @property
    def longest(self) -> int:
        """Tokens of the longest example that fits."""
        return self.buckets[-1].length

    def add(self, example: TrieBatch, tag: int = 0) -> PackedBatch | None:
        """Place an example; the batch that it closed, if its bucket had no room.

        Raises:
            RequestError: It is longer than the longest row, or nests merges deeper than `num_spans`.
        """
        if len(example) > self.longest:
            raise RequestError(f"an example has {len(example)} tokens; the longest rows have {self.longest}")
        if example.hide_lo.shape[1] > self.num_spans:
            raise RequestError(f"an example hides tokens in {example.hide_lo.shape[1]} spans; {self.num_spans} allowed")
        own = next(i for i, bucket in enumerate(self.buckets) if len(example) <= bucket.length)
        for at in range(len(self.buckets) - 1, own - 1, -1):
            row = self._open[at].tightest(len(example), opened=at != own)
            if row is not None:
                self._open[at].put(row, tag, example)
                return None
        full = self._close(own)
        self._open[own].put(0, tag, example)
        return full

    def flush(self) -> list[PackedBatch]:
        """Close every batch that holds something."""
        return [self._close(i) for i, batch in enumerate(self._open) if batch.placed]

    def waiting(self) -> list[tuple[int, int, int]]:
        """Bucket, row and tag of every example in an open batch, in the order that `put_back` needs."""
        return [(i, row, tag) for i, batch in enumerate(self._open) for row, _, tag, _ in batch.placed]

    def put_back(self, bucket: int, row: int, tag: int, example: TrieBatch) -> None:
        """Place an example where `waiting` said it was."""
        self._open[bucket].put(row, tag, example)

    def _close(self, at: int) -> PackedBatch:
        batch = self._open[at]
        self._open[at] = _Open(self.buckets[at])
        return _pack(batch, self.num_spans, self.pad_id)


def alone(example: TrieBatch, *, num_spans: int, pad_id: int = 0, tag: int = 0) -> PackedBatch:
    """A batch of one example, as long as that is.

    Raises:
        RequestError: It nests merges deeper than `num_spans`.
    """
    packer = Packer([Bucket(rows=1, length=len(example))], num_spans=num_spans, pad_id=pad_id)
    packer.add(example, tag)
    return packer.flush()[0]


class _Open:
    """A batch that still takes examples."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.used = [0] * bucket.rows
        self.placed: list[tuple[int, int, int, TrieBatch]] = []
        """Row, first slot, tag, example."""

    def tightest(self, length: int, *, opened: bool) -> int | None:
        """The row with the least room that still holds so many tokens; with `opened`, empty rows do not count."""
        room = self.bucket.length - length
        fitting = [i for i, used in enumerate(self.used) if used <= room and (used or not opened)]
        return max(fitting, key=lambda i: (self.used[i], -i)) if fitting else None

    def put(self, row: int, tag: int, example: TrieBatch) -> None:
        self.placed.append((row, self.used[row], tag, example))
        self.used[row] += len(example)


def _pack(batch: _Open, num_spans: int, pad_id: int) -> PackedBatch:
    rows, length = batch.bucket.rows, batch.bucket.length
    token_ids = np.full((rows, length), pad_id, np.int64)
    position_ids = np.zeros((rows, length), np.int64)
    labels = np.full((rows, length), IGNORED, np.int64)
    prev = np.zeros((rows, length), np.int64)
    # A slot left over is seen by itself alone.
    end = np.tile(np.arange(1, length + 1, dtype=np.int32), (rows, 1))
    hide_lo = np.full((rows, length, num_spans), length, np.int32)
    hide_hi = np.full((rows, length, num_spans), length, np.int32)
    for row, at, _, example in batch.placed:
        own = slice(at, at + len(example))
        token_ids[row, own] = example.token_ids
        position_ids[row, own] = example.position_ids
        labels[row, own] = np.where(example.loss_mask, example.token_ids, IGNORED)
        prev[row, own] = np.where(example.loss_mask, example.prev + at, 0)
        end[row, own] = example.end + at
        spans = example.hide_lo.shape[1]
        hide_lo[row, own, :spans] = example.hide_lo + at
        hide_hi[row, own, :spans] = example.hide_hi + at
    return PackedBatch(
        token_ids=token_ids,
        position_ids=position_ids,
        labels=labels,
        prev=prev,
        end=end,
        hide_lo=hide_lo,
        hide_hi=hide_hi,
        places=tuple((row, at, tag) for row, at, tag, _ in batch.placed),
        num_tokens=sum(batch.used),
    )
