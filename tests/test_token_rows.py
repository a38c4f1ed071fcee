from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plait.errors import RequestError, UnsupportedJoin
from plait.train.handoff.token_rows import check_rows, token_rows
from plait.tree import Segment, Tree
from random_trees import random_tree

NO_MERGE = ("concat", "message")


@given(st.integers(0, 10_000))
@example(669)  # a thread with a context of its own begins like the prompt
def test_each_sampled_token_is_trained_in_exactly_one_row_on_the_context_it_was_sampled_in(seed: int) -> None:
    tree = random_tree(seed, joins=NO_MERGE)
    trained: Counter[str] = Counter()
    for row in token_rows(tree):
        whole = (*row.prompt_ids, *row.response_ids)
        mask = (*[0] * len(row.prompt_ids), *row.mask)
        assert len(row.response_ids) == len(row.mask) == len(row.logprobs)
        at = 0
        for id in row.segments:
            segment = tree.segments[id]
            before = [t for part in tree.context(id) for t in part]
            assert list(whole[: len(before)]) == before
            sampled = slice(len(before), len(before) + len(segment.sampled_ids))
            assert list(whole[sampled]) == segment.sampled_ids
            assert set(mask[sampled]) == {1}
            assert not any(mask[at : sampled.start]), "what the runtime wrote is trained"
            at = sampled.stop
            trained[id] += 1
        assert at == len(whole), "a row ends with a trained token"
        assert row.num_trained == sum(len(tree.segments[id].sampled_ids) for id in row.segments)
    assert trained == Counter(s.id for s in tree.segments.values() if s.sampled_ids)


@given(st.integers(0, 10_000))
def test_the_last_row_is_the_roots_where_the_root_sampled_anything(seed: int) -> None:
    tree = random_tree(seed, joins=NO_MERGE)
    rows = token_rows(tree)
    if any(s.thread == "0" and s.sampled_ids for s in tree.segments.values()):
        assert rows[-1].thread == "0"
        assert rows[-1].num_trained


def test_a_thread_that_forks_and_goes_on_is_one_row() -> None:
    tree = Tree(
        {
            s.id: s
            for s in (
                Segment(id="0:0", forced_ids=(1, 2), sampled_ids=[3], logprobs=[-0.1]),
                Segment(id="0/0.0:0", parent="0:0", forced_ids=(10,), sampled_ids=[4], logprobs=[-0.2]),
                Segment(id="0/0.1:0", parent="0:0", forced_ids=(11,), sampled_ids=[5], logprobs=[-0.3]),
                Segment(
                    id="0:1",
                    parent="0:0",
                    forced_ids=(10, 4, 11, 5),
                    sampled_ids=[6],
                    logprobs=[-0.4],
                    joins=("0/0.0:0", "0/0.1:0"),
                    join="concat",
                ),
            )
        }
    )
    rows = token_rows(tree)
    assert [row.thread for row in rows] == ["0/0.0", "0/0.1", "0"]
    assert {row.prompt_ids for row in rows} == {(1, 2)}
    assert rows[-1].response_ids == (3, 10, 4, 11, 5, 6)
    assert rows[-1].mask == (1, 0, 0, 0, 0, 1)
    assert rows[-1].logprobs == (-0.1, 0, 0, 0, 0, -0.4)


def test_merges_are_refused_with_the_formats_that_rows_express() -> None:
    with pytest.raises(UnsupportedJoin, match=r"multiverse format joins by merge.*threadweaver"):
        check_rows("multiverse")
    check_rows("threadweaver")
    tree = random_tree(0, joins=("merge",))
    while not any(s.join == "merge" and s.sampled_ids for s in tree.segments.values()):
        tree = random_tree(len(tree.segments) + 1000, joins=("merge",))
    with pytest.raises(UnsupportedJoin, match="follows a merge"):
        token_rows(tree)


def test_a_run_that_was_sampled_without_logprobs_is_refused() -> None:
    tree = Tree({"0:0": Segment(id="0:0", forced_ids=(1,), sampled_ids=[2, 3], logprobs=[])})
    with pytest.raises(RequestError, match="without log-probabilities"):
        token_rows(tree)
