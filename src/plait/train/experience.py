"""What a policy is updated on: packed trees, and for every token its behaviour logprob, its advantage and its weight.

A rollout's advantage and weight reach its tokens by the rollout's place in the rows, so padding has none and a rollout
that was split into rows has it in each. Knows nothing of models and torch.

Shapes: R rows, T slots of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from plait.train.packing import IGNORED, Bucket, PackedBatch, Packer, alone
from plait.train.trie import TrieBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A flattened tree, or one row of it, and what its rollout is worth."""

    trie: TrieBatch
    advantage: float
    weight: float
    """Of each of its sampled tokens in the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBatch:
    """Packed rows with what the policy loss needs of every token; all arrays are [R, T], 0 where nothing is trained."""

    packed: PackedBatch
    behaviour: NDArray[np.float32]
    """Natural log of the probability that the engine sampled the token with."""
    advantages: NDArray[np.float64]
    weights: NDArray[np.float64]
    odd: bool = False
    """Of a shape of its own: compiling for it would not pay."""


def pack(
    experiences: Sequence[Experience], buckets: Sequence[Bucket], *, num_spans: int, pad_id: int
) -> list[PolicyBatch]:
    """Place experiences into rows; one that is longer than every row gets a batch of its own length.

    Leaving long ones out would bias the policy towards whatever is short.
    """
    spans = max([num_spans, *(e.trie.hide_lo.shape[1] for e in experiences)])
    packer = Packer(buckets, num_spans=spans, pad_id=pad_id)
    batches: list[PolicyBatch] = []
    for tag, experience in enumerate(experiences):
        if len(experience.trie) > packer.longest:
            full = alone(experience.trie, num_spans=spans, pad_id=pad_id, tag=tag)
            batches.append(_batch(full, experiences, odd=True))
        elif (full := packer.add(experience.trie, tag)) is not None:
            batches.append(_batch(full, experiences))
    return batches + [_batch(full, experiences) for full in packer.flush()]


def idle(batch: PolicyBatch) -> PolicyBatch:
    """A batch of the same shape in which nothing is trained."""
    packed = batch.packed
    nothing = replace(packed, labels=np.full_like(packed.labels, IGNORED), prev=np.zeros_like(packed.prev))
    return PolicyBatch(
        packed=nothing,
        behaviour=np.zeros_like(batch.behaviour),
        advantages=np.zeros_like(batch.advantages),
        weights=np.zeros_like(batch.weights),
        odd=batch.odd,
    )


def _batch(packed: PackedBatch, experiences: Sequence[Experience], *, odd: bool = False) -> PolicyBatch:
    shape = packed.token_ids.shape
    behaviour = np.zeros(shape, np.float32)
    advantages, weights = np.zeros(shape), np.zeros(shape)
    for row, at, tag in packed.places:
        experience = experiences[tag]
        own = slice(at, at + len(experience.trie))
        behaviour[row, own] = experience.trie.logprobs
        advantages[row, own], weights[row, own] = experience.advantage, experience.weight
    trained = packed.labels != IGNORED
    return PolicyBatch(
        packed=packed,
        behaviour=behaviour * trained,
        advantages=advantages * trained,
        weights=weights * trained,
        odd=odd,
    )
