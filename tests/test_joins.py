"""Message joins, dependencies, races and threads beside their parent: random programs, any timing, one tree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.events import ThreadsCut, decode, encode
from plait.testing.strategies import Program, formats, programs
from plait.tree import Tree
from plait.types import StopReason, context_positions

some = settings(max_examples=15)
anything = given(program=programs(format=formats()))


@some
@given(program=programs(format=formats()), seed=st.integers(0, 99))
def test_no_tree_depends_on_timing(program: Program, seed: int) -> None:
    slow, _, _ = program.run(delay_s=1.0)
    fast, _, engine = program.run(timing_seed=seed, chunk_size=1 + seed % 7, backend=("asyncio", "trio")[seed % 2])
    assert slow == fast
    assert engine.stats().active == 0


@some
@anything
def test_no_tree_exceeds_its_budget(program: Program) -> None:
    tree, _, engine = program.run(timing_seed=3, chunk_size=4)
    budget = program.request.budget
    assert budget.max_tokens is not None
    assert tree.num_sampled + tree.num_dropped == engine.stats().decode_tokens <= budget.max_tokens
    assert tree.num_threads <= (budget.max_threads or 0)
    assert tree.longest_context() <= program.max_context
    for info in tree.threads():
        assert info.name.count("/") <= (99 if budget.max_depth is None else budget.max_depth)


@some
@anything
def test_the_events_fold_to_the_tree_of_the_run(program: Program) -> None:
    tree, events, _ = program.run(timing_seed=5, chunk_size=3)
    again = Tree.from_events(decode(encode(event)) for event in events)
    assert again == tree
    assert again.num_dropped == tree.num_dropped
    assert all(segment.stop is not None for segment in tree.segments.values())


@some
@anything
def test_what_is_cut_ends_at_the_moment_of_the_cut(program: Program) -> None:
    tree, events, _ = program.run(timing_seed=7, chunk_size=3)
    cuts = [event for event in events if isinstance(event, ThreadsCut)]
    spans = tree.spans()
    for cut in cuts:
        for segment in tree.segments.values():
            if any(segment.thread == name or segment.thread.startswith(f"{name}/") for name in cut.threads):
                assert spans[segment.id].end <= max(cut.clock, spans[segment.id].start)
    if not cuts:
        assert tree.num_dropped == 0
        assert StopReason.CANCELLED not in {segment.stop for segment in tree.segments.values()}


@some
@given(program=programs(format=formats().filter(lambda format: format.waits)))
def test_an_engine_of_one_token_a_second_takes_the_critical_path(program: Program) -> None:
    unlimited = Program(
        request=program.request.__class__(
            prompt_ids=program.request.prompt_ids, seed=program.request.seed, temperature=1.0
        ),
        format=program.format,
        weights=program.weights,
        max_context=200,
    )
    tree, events, _ = unlimited.run(delay_s=1.0)
    assert events[-1].t == pytest.approx(tree.critical_path())  # pyright: ignore[reportAttributeAccessIssue]


@some
@anything
def test_contexts_are_what_they_say(program: Program) -> None:
    tree, _, _ = program.run()
    for segment in tree.segments.values():
        context: Any = tree.context(segment.id)
        if segment.keep == 0:
            assert context == ((segment.forced_ids,) if segment.forced_ids else ())
        elif segment.keep is not None:
            assert context_positions(context) == segment.keep + len(segment.forced_ids)
            assert segment.parent is not None
            (given_ids,) = tree.context(segment.parent)
            assert isinstance(given_ids, tuple)
            before = [*given_ids, *tree.segments[segment.parent].sampled_ids]
            assert list(context[0]) == [*before[: segment.keep], *segment.forced_ids]
