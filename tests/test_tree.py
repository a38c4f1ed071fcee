"""The tree: a fold of events, contexts, and everything that is derived from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import TreeError
from plait.events import RunEnded, RunStarted, SegmentEnded, SegmentStarted, ThreadForked, TokensSampled
from plait.formats import Block, open_format, render
from plait.tasks.vocabulary import TOKENIZER
from plait.testing.strategies import programs, trees
from plait.tree import Tree
from plait.types import Merge, StopReason, context_positions


def grow(tree: Tree, id: str, parent: str | None, forced: Sequence[int], sampled: Sequence[int], **more: Any) -> None:
    stop = more.pop("stop", StopReason.STOP)
    tree.apply(SegmentStarted(id=id, parent=parent, forced_ids=tuple(forced), **more))
    tree.apply(TokensSampled(id=id, token_ids=tuple(sampled), logprobs=(-1.0,) * len(sampled)))
    tree.apply(SegmentEnded(id=id, stop=stop))


def fork_and_join(join: str) -> Tree:
    """Prompt 1 2, sampled 3; branches 10 -> 4 and 11 -> 5 6 7; joined, then 8."""
    tree = Tree()
    tree.apply(RunStarted(meta={"question": "?"}))
    grow(tree, "0:0", None, (1, 2), (3,))
    tree.apply(ThreadForked(segment="0:0", threads=("0/0.0", "0/0.1"), labels=("a", "b")))
    grow(tree, "0/0.1:0", "0:0", (11,), (5, 6, 7))
    grow(tree, "0/0.0:0", "0:0", (10,), (4,))
    forced = (99,) if join == "merge" else (10, 4, 11, 5, 6, 7, 99)
    grow(tree, "0:1", "0:0", forced, (8,), joins=("0/0.0:0", "0/0.1:0"), join=join, stop=StopReason.EOS)
    tree.apply(RunEnded(stop=StopReason.EOS))
    return tree


def test_the_context_of_a_branch_is_its_own_path() -> None:
    tree = fork_and_join("concat")
    assert tree.context("0:0") == ((1, 2),)
    assert tree.context("0/0.1:0") == ((1, 2, 3, 11),)
    assert tree.context("0/0.1:0", upto="0:0") == ((11,),)


def test_a_concat_join_is_one_run_of_ids() -> None:
    assert fork_and_join("concat").context("0:1") == ((1, 2, 3, 10, 4, 11, 5, 6, 7, 99),)


def test_a_merge_join_holds_each_branch_as_it_was() -> None:
    assert fork_and_join("merge").context("0:1") == ((1, 2, 3), Merge((((10, 4),), ((11, 5, 6, 7),))), (99,))


def test_the_critical_path_waits_for_the_longest_thread() -> None:
    for join in ("concat", "merge"):
        tree = fork_and_join(join)
        assert (tree.critical_path(), tree.num_sampled) == (1 + 3 + 1, 6)


def test_usage_counts_each_token_once_by_who_wrote_it() -> None:
    concat, merge = fork_and_join("concat").usage(), fork_and_join("merge").usage()
    assert (concat.prompt_tokens, concat.sampled_tokens, concat.forced_tokens, concat.reread_tokens) == (2, 6, 9, 7)
    assert (merge.prompt_tokens, merge.sampled_tokens, merge.forced_tokens, merge.reread_tokens) == (2, 6, 3, 0)
    assert (concat.longest_context_tokens, merge.longest_context_tokens) == (11, 9)
    assert (concat.threads, concat.forks) == (2, 1)


def test_threads_are_told_in_program_order() -> None:
    root, a, b = fork_and_join("concat").threads()
    assert (root.name, root.segments, root.num_sampled, root.stop) == ("0", ("0:0", "0:1"), 2, StopReason.EOS)
    assert (a.name, a.label, a.context_tokens) == ("0/0.0", "a", 5)
    assert (b.name, b.label, b.num_sampled) == ("0/0.1", "b", 3)


def test_threads_are_ordered_by_number_not_by_letters() -> None:
    tree = Tree()
    grow(tree, "0:0", None, (1,), (2,))
    for i in (10, 2, 0):
        grow(tree, f"0/0.{i}:0", "0:0", (9,), (3,))
    assert [t.name for t in tree.threads()] == ["0", "0/0.0", "0/0.2", "0/0.10"]
    assert [s.id for s in tree.walk()] == ["0:0", "0/0.0:0", "0/0.2:0", "0/0.10:0"]


def test_a_forced_closing_does_not_hide_how_the_thread_ended() -> None:
    tree = Tree()
    grow(tree, "0:0", None, (1,), (2,))
    grow(tree, "0/0.0:0", "0:0", (9,), (3,), stop=StopReason.LENGTH)
    grow(tree, "0/0.0:1", "0/0.0:0", (4,), (), stop=StopReason.FORCED)
    assert tree.threads()[1].stop is StopReason.LENGTH


def test_walk_puts_branches_before_the_segment_that_joins_them() -> None:
    assert [s.id for s in fork_and_join("merge").walk()] == ["0:0", "0/0.0:0", "0/0.1:0", "0:1"]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (SegmentStarted(id="0:0", parent=None), "starts twice"),
        (SegmentStarted(id="0:9", parent="0:8"), "refers to 0:8"),
        (SegmentStarted(id="0:9", parent="0:1", joins=("0/7.7:0",)), r"refers to 0/7\.7:0"),
        (TokensSampled(id="0:1", token_ids=(1,), logprobs=(0.0,)), "not open"),
        (SegmentEnded(id="5:0", stop=StopReason.EOS), "not open"),
    ],
)
def test_an_event_that_contradicts_the_tree_is_refused(event: Any, message: str) -> None:
    with pytest.raises(TreeError, match=message):
        fork_and_join("concat").apply(event)


def test_an_empty_tree_has_no_numbers_but_zero() -> None:
    tree = Tree()
    assert set(vars_of(tree.usage())) == {0}
    assert (tree.threads(), tree.token_latency(), tree.acceleration()) == ([], 0, 0.0)


def vars_of(usage: Any) -> list[int]:
    return [getattr(usage, name) for name in usage.__slots__]


@given(trees())
def test_bounds_hold_on_random_trees(tree: Tree) -> None:
    longest = max(len(s.sampled_ids) for s in tree.segments.values())
    assert longest <= tree.critical_path() <= tree.num_sampled
    assert tree.longest_context() == max(
        context_positions(tree.context(s.id)) + len(s.sampled_ids) for s in tree.segments.values()
    )
    assert 0 <= tree.acceleration(wrapper_tokens=0) < 1
    assert sum(t.num_sampled for t in tree.threads()) == tree.num_sampled
    assert sorted(s.id for s in tree.walk()) == sorted(tree.segments)


def stats_of_the_paper(ids: Sequence[int]) -> tuple[int, int]:
    """L and T of flat ids, as the definition reads: states outside, in a block, in a thread."""
    control = {name: TOKENIZER.control_id(name) for name in ("<Parallel>", "</Parallel>", "<Thread>", "</Thread>")}
    latency, inside, lengths = 0, -1, list[int]()
    for id in ids:
        if inside >= 0 and id != control["</Thread>"]:
            inside += 1
            continue
        if id == control["<Thread>"]:
            inside = 0
        elif id == control["</Thread>"]:
            lengths.append(inside)
            inside = -1
        elif id == control["</Parallel>"]:
            latency += max(lengths, default=0)
            lengths = []
        latency += 1
    return latency, len(ids)


texts = st.text("0123456789+*=", min_size=0, max_size=12)
blocks = st.lists(st.tuples(texts, texts), min_size=1, max_size=4).map(
    lambda rows: Block(outlines=tuple(o for o, _ in rows), threads=tuple((t,) for _, t in rows))
)


@given(st.lists(st.tuples(texts, blocks), max_size=3), texts)
def test_token_latency_is_the_papers_on_threadweaver_trees(parts: list[tuple[str, Block]], last: str) -> None:
    trajectory = (*(x for part in parts for x in part), last)
    format = open_format("threadweaver", TOKENIZER)
    tree = render(trajectory, format=format, tokenizer=TOKENIZER, prompt_ids=(1, 2, 3))
    response = [id for s in tree.segments.values() if s.thread == "0" for id in s.token_ids][3:]
    latency, total = stats_of_the_paper(response)
    assert (tree.token_latency(), tree.num_response()) == (latency, total)
    assert tree.acceleration() == pytest.approx(1 - latency / total)


def test_token_latency_leaves_out_what_the_parent_does_not_read_again() -> None:
    tree = Tree()
    grow(tree, "0:0", None, (1,), (2,))
    grow(tree, "0/0.0:0", "0:0", (50, 51, 50, 10, 52), (3, 3, 3, 60), stop=StopReason.EOS)
    grow(tree, "0/0.0:1", "0/0.0:0", (50, 53), (), stop=StopReason.FORCED)
    grow(tree, "0/0.1:0", "0:0", (50, 51, 50, 11, 52), (4, 4, 4, 4, 50, 53))
    first = (50, 51, 50, 10, 52, 3, 3, 3, 50, 53)
    second = (51, 50, 11, 52, 4, 4, 4, 4, 50, 53)
    forced = (*first, *second, 50)
    grow(tree, "0:1", "0:0", forced, (9,), joins=("0/0.0:1", "0/0.1:0"), join="concat")
    # Strictly inside: 7 of the first thread, 8 of the second; the end-of-sequence id 60 is not read again.
    assert (tree.num_response(), tree.token_latency()) == (1 + 21 + 1, 1 + 21 + 1 - 7)


@given(programs(joins=["merge"]))
def test_a_merge_rereads_nothing(program: Any) -> None:
    assert program.run()[0].reread_tokens == 0


def test_nested_threads_count_with_their_own_latency() -> None:
    tree = Tree()
    grow(tree, "0:0", None, (1,), (2,))
    grow(tree, "0/0.0:0", "0:0", (9,), (3,))
    grow(tree, "0/0.0/0.0:0", "0/0.0:0", (9,), (4, 4, 4))
    grow(tree, "0/0.0/0.1:0", "0/0.0:0", (9,), (5,))
    grow(tree, "0/0.0:1", "0/0.0:0", (8,), (6,), joins=("0/0.0/0.0:0", "0/0.0/0.1:0"), join="merge")
    grow(tree, "0/0.1:0", "0:0", (9,), (7,) * 8)
    grow(tree, "0:1", "0:0", (8,), (6,), joins=("0/0.0:1", "0/0.1:0"), join="merge")
    # The first thread has 10 tokens, 8 of them in sequence; the second 9.
    assert (tree.num_response(), tree.token_latency(wrapper_tokens=0)) == (1 + 10 + 9 + 2, 1 + 9 + 2)
    assert tree.critical_path() == 1 + 8 + 1
    assert tree.num_forks == 2


def test_what_was_cut_at_the_end_of_a_race_is_not_on_the_critical_path() -> None:
    tree = Tree()
    grow(tree, "0:0", None, (1,), (2,))
    grow(tree, "0/0.0:0", "0:0", (), (3, 4), stop=StopReason.CANCELLED)
    grow(tree, "0/0.1:0", "0:0", (), (3, 4))
    grow(tree, "0:1", "0:0", (5,), (6,), joins=("0/0.0:0", "0/0.1:0"), join="message")
    assert [id for id, span in tree.spans().items() if span.critical] == ["0:0", "0/0.1:0", "0:1"]
