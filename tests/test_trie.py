import pytest
from hypothesis import given, settings

from plait.errors import TreeError
from plait.testing.strategies import formats, programs
from plait.train.trie import dense_mask, flatten
from plait.tree import Segment, Tree
from random_trees import expand, random_tree

SEEDS = [(seed, ("concat", "merge")) for seed in range(150)] + [(seed, ("concat", "message")) for seed in range(60)]


def tree_of(*segments: Segment) -> Tree:
    return Tree({s.id: s for s in segments})


def sampled(id: str, parent: str | None = None, *, forced: tuple[int, ...] = (), ids: tuple[int, ...] = (), **more):
    return Segment(id=id, parent=parent, forced_ids=forced, sampled_ids=list(ids), logprobs=[-1.0] * len(ids), **more)


@pytest.mark.parametrize(("seed", "joins"), SEEDS)
def test_every_token_sees_what_its_engine_call_was_given(seed, joins):
    sees_what_it_was_given(random_tree(seed, joins=joins))


@settings(max_examples=15)
@given(program=programs(format=formats()))
def test_so_it_is_in_the_trees_of_runs(program):
    sees_what_it_was_given(program.run()[0])


def sees_what_it_was_given(tree):
    batch = flatten(tree)
    mask = dense_mask(batch.end, batch.hide_lo, batch.hide_hi)
    at = 0
    for segment in tree.walk():
        ids, positions, sees = expand((*tree.context(segment.id), tuple(segment.sampled_ids)))
        for own in range(at, at + len(segment.token_ids)):
            there = len(ids) - (at + len(segment.token_ids) - own)
            assert batch.token_ids[own] == ids[there]
            assert batch.position_ids[own] == positions[there]
            seen = sorted((int(batch.token_ids[j]), int(batch.position_ids[j])) for j in mask[own].nonzero()[0])
            assert seen == sorted((ids[j], positions[j]) for j in sees[there])
        at += len(segment.token_ids)
    assert at == len(batch)


@pytest.mark.parametrize(("seed", "joins"), SEEDS)
def test_the_loss_mask_counts_what_was_sampled(seed, joins):
    tree = random_tree(seed, joins=joins)
    batch = flatten(tree)
    assert batch.loss_mask.sum() == sum(len(s.sampled_ids) for s in tree.segments.values())
    assert (batch.prev[batch.loss_mask] >= 0).all()
    assert (batch.logprobs[~batch.loss_mask] == 0).all()
    assert (batch.logprobs[batch.loss_mask] == -0.5).all()


@pytest.mark.parametrize(("seed", "joins"), SEEDS)
def test_a_predecessor_is_one_position_before_and_visible(seed, joins):
    batch = flatten(random_tree(seed, joins=joins))
    mask = dense_mask(batch.end, batch.hide_lo, batch.hide_hi)
    for i, j in enumerate(batch.prev):
        if j >= 0:
            assert batch.position_ids[j] == batch.position_ids[i] - 1
            assert mask[i, j]


def test_one_token_at_a_fork_predicts_the_first_token_of_every_branch():
    batch = flatten(
        tree_of(
            sampled("0:0", forced=(1, 2), ids=(3,)),
            sampled("0/0.1:0", "0:0", forced=(10,), ids=(4,)),
            sampled("0/0.2:0", "0:0", forced=(11,), ids=(5,)),
        )
    )
    assert batch.prev.tolist() == [-1, 0, 1, 2, 3, 2, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert batch.hide_lo.shape == (7, 0)


def test_after_a_merge_positions_go_on_from_the_longest_branch_and_nothing_predicts_the_forced_id():
    batch = flatten(
        tree_of(
            sampled("0:0", forced=(1,), ids=(2,)),
            sampled("0/0.1:0", "0:0", forced=(10,), ids=(4, 5, 6)),
            sampled("0/0.2:0", "0:0", forced=(11,), ids=(7,)),
            sampled("0:1", "0:0", forced=(8,), ids=(9,), joins=("0/0.1:0", "0/0.2:0"), join="merge"),
        )
    )
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 6, 7]
    assert batch.prev.tolist() == [-1, 0, 1, 2, 3, 4, 1, 6, -1, 8]
    assert (batch.hide_lo[2:6, 0] == 6).all()
    assert (batch.hide_hi[2:6, 0] == 8).all()
    mask = dense_mask(batch.end, batch.hide_lo, batch.hide_hi)
    assert mask[6].tolist() == [True] * 2 + [False] * 4 + [True] + [False] * 3
    assert mask[9].all()


def test_a_thread_that_a_merge_was_not_given_stays_hidden():
    batch = flatten(
        tree_of(
            sampled("0:0", forced=(1,), ids=(2,)),
            sampled("0/0.1:0", "0:0", forced=(10,)),
            sampled("0/0.2:0", "0:0", forced=(11,)),
            sampled("0:1", "0:0", forced=(8,), joins=("0/0.2:0",), join="merge"),
        )
    )
    assert dense_mask(batch.end, batch.hide_lo, batch.hide_hi)[4].tolist() == [True, True, False, True, True]


def test_a_sampled_token_that_nothing_predicts_is_refused():
    with pytest.raises(TreeError, match="nothing that could predict"):
        flatten(tree_of(sampled("0:0", ids=(1,))))
    with pytest.raises(TreeError, match="nothing that could predict"):
        flatten(
            tree_of(
                sampled("0:0", forced=(1,)),
                sampled("0/0.1:0", "0:0", forced=(2,)),
                sampled("0:1", "0:0", ids=(3,), joins=("0/0.1:0",), join="merge"),
            )
        )


def test_a_tree_with_a_missing_parent_is_refused():
    with pytest.raises(TreeError, match="parent is missing"):
        flatten(tree_of(sampled("0:0", forced=(1,)), sampled("0/0.1:0", "0:7", forced=(2,))))


def test_a_message_takes_the_place_of_the_block_and_a_fresh_thread_sees_nothing():
    batch = flatten(
        tree_of(
            sampled("0:0", forced=(1, 2), ids=(3, 4, 5)),
            sampled("0/0.0:0", "0:0", forced=(10,), ids=(11,), keep=0),
            sampled("0:1", "0:0", forced=(20, 21), ids=(6,), keep=3, joins=("0/0.0:0",), join="message"),
        )
    )
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 3, 4, 5]
    assert batch.prev.tolist() == [-1, 0, 1, 2, 3, -1, 5, 2, 7, 8]
    mask = dense_mask(batch.end, batch.hide_lo, batch.hide_hi)
    assert mask[6].nonzero()[0].tolist() == [5, 6]
    assert mask[9].nonzero()[0].tolist() == [0, 1, 2, 7, 8, 9]


def test_a_context_that_cannot_be_cut_is_refused():
    with pytest.raises(TreeError, match="cannot cut"):
        flatten(tree_of(sampled("0:0", forced=(1,)), sampled("0:1", "0:0", forced=(2,), keep=2)))
    merged = (
        sampled("0:0", forced=(1,)),
        sampled("0/0.0:0", "0:0", forced=(10,)),
        sampled("0:1", "0:0", forced=(2,), joins=("0/0.0:0",), join="merge"),
    )
    with pytest.raises(TreeError, match="cannot cut"):
        flatten(tree_of(*merged, sampled("0:2", "0:1", forced=(3,), keep=1)))
