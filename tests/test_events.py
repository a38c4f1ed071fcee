"""Events: one line of JSON each, and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from plait.errors import TreeError
from plait.events import RunEnded, RunStarted, SegmentEnded, SegmentStarted, ThreadForked, TokensSampled, decode, encode
from plait.testing.strategies import Program, programs
from plait.tree import Tree
from plait.types import StopReason


@pytest.mark.parametrize(
    "event",
    [
        RunStarted(seed=7, meta={"question": "2*3?\n", "budget": {"max_threads": None}}),
        ThreadForked(segment="0:0", threads=("0/0.0",), labels=('a "plan"',)),
        SegmentStarted(id="0:1", parent="0:0", forced_ids=(1, 2), joins=("0/0.0:0",), join="merge", t=1.5),
        SegmentStarted(id="0:0", parent=None, keep=3),
        TokensSampled(id="0:0", token_ids=(3,), logprobs=(-0.1,), t=0.1 + 0.2),
        SegmentEnded(id="0:0", stop=StopReason.BUDGET, note="max_threads=0"),
        RunEnded(stop=StopReason.EOS, t=2.0),
    ],
)
def test_an_event_survives_its_line(event: Any) -> None:
    line = encode(event)
    assert "\n" not in line
    assert decode(line) == event
    assert json.loads(line)["event"] == type(event).__name__


@given(programs())
def test_p2_a_log_folds_to_the_same_tree(program: Program) -> None:
    tree, events, _ = program.run(chunk_size=3)
    again = Tree.from_events(decode(encode(event)) for event in events)
    assert again == tree
    assert [s.logprobs for s in again.walk()] == [s.logprobs for s in tree.walk()]
    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunEnded)
    assert again.meta == tree.meta == json.loads(json.dumps(tree.meta))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"event":"Nonsense"}',
        '{"event":"RunEnded","stop":"because"}',
        '{"event":"RunEnded","stop":"eos","more":1}',
        '{"event":"RunEnded"',
    ],
)
def test_a_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(TreeError, match="not an event of schema 1"):
        decode(line)


def test_another_schema_is_refused_by_number() -> None:
    line = encode(RunStarted(meta={})).replace('"schema":1', '"schema":2')
    with pytest.raises(TreeError, match="has schema 2, this Plait reads 1"):
        decode(line)
