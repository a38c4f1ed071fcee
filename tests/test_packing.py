import random

import numpy as np
import pytest

from plait.errors import RequestError
from plait.train.data import Stream
from plait.train.packing import IGNORED, Bucket, PackedBatch, Packer
from plait.train.trie import TrieBatch, dense_mask, flatten
from plait.tree import Segment, Tree
from random_trees import random_tree

BUCKETS = [Bucket(rows=2, length=24), Bucket(rows=2, length=400)]


def plain(length: int) -> TrieBatch:
    ids = list(range(length))
    return flatten(
        Tree({"0:0": Segment(id="0:0", forced_ids=(0,), sampled_ids=ids[1:], logprobs=[0.0] * (length - 1))})
    )


def pack_all(examples: list[TrieBatch], buckets: list[Bucket]) -> list[PackedBatch]:
    packer = Packer(buckets, num_spans=4, pad_id=99)
    batches = [b for i, e in enumerate(examples) if (b := packer.add(e, i)) is not None]
    return batches + packer.flush()


def test_no_sampled_token_is_dropped_or_doubled_and_no_example_sees_another():
    examples = [e for seed in range(60) if 0 < len(e := flatten(random_tree(seed))) <= 400]
    batches = pack_all(examples, BUCKETS)
    assert sum(b.num_examples for b in batches) == len(examples)
    assert sum(b.num_trained for b in batches) == sum(int(e.loss_mask.sum()) for e in examples)
    left = list(examples)
    for batch in batches:
        assert batch.token_ids.shape in {(b.rows, b.length) for b in BUCKETS}
        for row in range(batch.token_ids.shape[0]):
            mask = dense_mask(batch.end[row], batch.hide_lo[row], batch.hide_hi[row])
            at = 0
            while (found := next((e for e in left if _is_at(batch, row, at, e)), None)) is not None:
                own = slice(at, at + len(found))
                left = [e for e in left if e is not found]
                expected = dense_mask(found.end, found.hide_lo, found.hide_hi)
                assert (mask[own, own] == expected).all()
                assert not mask[own, :at].any()
                assert not mask[own.stop :, own].any()
                trained = found.loss_mask
                assert (batch.prev[row, own][trained] == found.prev[trained] + at).all()
                at += len(found)
            assert (batch.labels[row, at:] == IGNORED).all()
            assert (batch.token_ids[row, at:] == 99).all()
    assert not left


def _is_at(batch: PackedBatch, row: int, at: int, example: TrieBatch) -> bool:
    own = slice(at, at + len(example))
    labels = np.where(example.loss_mask, example.token_ids, IGNORED)
    return np.array_equal(batch.token_ids[row, own], example.token_ids) and np.array_equal(
        batch.labels[row, own], labels
    )


def test_a_short_example_fills_the_gap_of_a_long_one_but_opens_no_long_row():
    batches = pack_all([plain(20), plain(300), plain(24), plain(20)], BUCKETS)
    by_length = {b.token_ids.shape[1]: b for b in batches}
    assert by_length[24].num_tokens == 20
    assert by_length[400].num_tokens == 344


def test_an_example_longer_than_every_row_is_refused():
    with pytest.raises(RequestError, match="401 tokens; the longest rows have 400"):
        Packer(BUCKETS, num_spans=0).add(plain(401))


def test_an_example_with_more_nested_merges_than_planned_is_refused():
    nested = next(e for s in range(99) if (e := flatten(random_tree(s, joins=("merge",)))).hide_lo.shape[1] > 1)
    with pytest.raises(RequestError, match="1 allowed"):
        Packer([Bucket(rows=1, length=999)], num_spans=1).add(nested)


def draw(family: str, rng: random.Random, split: str) -> Tree:
    return random_tree(rng.randrange(1000), depth=2)


def stream(**more) -> Stream:
    packer = Packer([Bucket(rows=2, length=30), Bucket(rows=2, length=60)], num_spans=2)
    return Stream(draw, weights={"a": 1.0, "b": 3.0}, packer=packer, seed=5, **more)


def test_a_stream_goes_on_from_its_state_as_if_never_stopped():
    whole = stream()
    for _ in range(7):
        next(whole)
    again = stream(state=whole.state())
    for _ in range(10):
        ours, theirs = next(whole), next(again)
        assert np.array_equal(ours.token_ids, theirs.token_ids)
        assert np.array_equal(ours.hide_hi, theirs.hide_hi)
    assert again.state() == whole.state()


def test_examples_that_fit_into_no_row_are_left_out_whole_and_counted():
    one = stream()
    for _ in range(20):
        next(one)
    assert one.seen["longer"] > 0
    assert one.seen["b"] > one.seen["a"] > 0
