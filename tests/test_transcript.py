"""Events as text: the finished text whatever the timing, and marks found in a text that comes in parts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plait import tasks
from plait.engines.scripted import ScriptedEngine
from plait.events import Event
from plait.formats import TrajectoryFormat, open_format
from plait.models import gold_model
from plait.models.gold import gold_script
from plait.server.answer import Answer
from plait.server.transcript import ANSWER, Cut, Ordered, Piece, Transcript
from plait.session import open_run
from plait.tasks.vocabulary import TOKENIZER
from plait.testing.clock import run_virtual
from plait.testing.strategies import Program, programs
from plait.tokenizer import Tokenizer
from plait.tree import Tree
from plait.types import Request

QUESTIONS = ("What is 347 * 526?", "What is 347 * 52, 88 + 977 and 612 * 34?", "What is 12 + 5?")
FORMATS = ("multiverse", "threadweaver", "plait", "sequential")


async def events_of(request: Request, format: TrajectoryFormat, engine: ScriptedEngine) -> list[Event]:
    async with open_run(request, engine=engine, format=format) as run:
        return [event async for event in run]


def pieces(events: Sequence[Event], format: TrajectoryFormat, tokenizer: Tokenizer = TOKENIZER) -> list[Piece]:
    transcript = Transcript(tokenizer, format)
    return [piece for event in events for piece in transcript.read(event)]


def ordered(pieces: Sequence[Piece]) -> list[Piece]:
    order = Ordered()
    return [ready for piece in pieces for ready in order.put(piece)]


def text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def root_text(tree: Tree, format: TrajectoryFormat) -> str:
    """What the root's context says after the prompt."""
    root = [s for s in tree.segments.values() if s.thread == "0"]
    ids = [id for s in root for id in ((*s.forced_ids, *s.sampled_ids) if s.parent else s.sampled_ids)]
    return TOKENIZER.decode([id for id in ids if id not in format.eos_ids()])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_finished_text_is_the_same_whatever_the_timing(name: str, question: str) -> None:
    format = open_format(name, TOKENIZER)
    request = gold_model(name).request(question)
    texts: set[str] = set()
    for seed in (None, 1, 2, 3):
        engine = ScriptedEngine(script=gold_script(name, parallel=name != "sequential"), timing_seed=seed)
        events = run_virtual(events_of, request, format, engine)
        all_pieces = pieces(events, format)
        in_order = ordered(all_pieces)
        texts.add(text(in_order))
        assert sorted(map(repr, in_order)) == sorted(map(repr, all_pieces)), "a piece was lost or said twice"
        tree = Tree.from_events(events)
        assert sum(piece.num_sampled for piece in in_order) == tree.num_sampled
        if name in ("threadweaver", "sequential"):
            assert text(in_order) == root_text(tree, format)
    (said,) = texts
    assert tasks.grade(tasks.parse(question), said)


@given(
    text=st.text("Answer: xy", max_size=30),
    marks=st.lists(st.text("Answer: ", min_size=1, max_size=8), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
@example(text="A::", marks=[":", "A::"], cuts=[2])  # one ends before another that began earlier
@example(text="A:", marks=[":", "A::"], cuts=[])
def test_a_mark_is_found_however_the_text_is_cut(text: str, marks: list[str], cuts: list[int]) -> None:
    whole = Cut(marks)
    expected = whole.put(text)
    expected = (expected[0] + whole.rest(), expected[1])
    places = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    cut = Cut(marks)
    parts = [cut.put(text[a:b]) for a, b in itertools.pairwise(places)]
    assert ("".join(p[0] for p in parts) + cut.rest(), "".join(p[1] for p in parts)) == expected
    firsts = [at for mark in marks if (at := text.find(mark)) >= 0]
    assert len(expected[0]) == min(firsts, default=len(text))


def test_the_answer_follows_the_mark_that_the_tasks_read() -> None:
    assert tasks.answer_of(f"Sum: 1\n{ANSWER}42") == "42"
    answer = Answer()
    said = [Piece(thread="0", kind="text", text=part) for part in ("Sum: 1\nAns", "wer:", " 4", "2")]
    said.append(Piece(thread="0", kind="close"))
    reasoning, content = zip(*map(answer.put, said), strict=True)
    assert ("".join(reasoning), "".join(content)) == ("Sum: 1\n", "42")


def test_a_run_without_an_answer_is_all_reasoning() -> None:
    answer = Answer()
    said = [Piece(thread="0", kind="text", text="Sum: 1\nAnsw"), Piece(thread="0", kind="close")]
    assert [answer.put(piece) for piece in said] == [("Sum: 1\n", ""), ("Answ", "")]


class Bytes:
    """A tokenizer of bytes: a character may be several ids."""

    eos_ids, bos_ids = (256,), (257,)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def control_id(self, text: str) -> int | None:
        return None


def test_a_character_is_said_when_it_is_whole() -> None:
    format = open_format("sequential", Bytes())
    engine = ScriptedEngine(script=lambda _: [*"a\u00e9\u6f22\U0001f600".encode(), 0xC3, 256], vocab_size=257)
    events = run_virtual(events_of, Request(prompt_ids=(1,)), format, engine)
    said = [piece.text for piece in pieces(events, format, Bytes()) if piece.text]
    assert said == ["a", "\u00e9", "\u6f22", "\U0001f600", "\ufffd"]


class Numbers:
    """A tokenizer whose text is the ids."""

    eos_ids, bos_ids = (0,), (1,)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [int(part) for part in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{id} " for id in ids)

    def control_id(self, text: str) -> int | None:
        return None


@given(program=programs(), seed=st.integers(0, 99))
def test_nested_blocks_of_any_program_are_in_the_order_of_the_finished_text(program: Program, seed: int) -> None:
    format = program.format
    texts: list[str] = []
    for timing in (None, seed):
        tree, events, _ = program.run(timing_seed=timing)
        told = pieces(events, format, Numbers())
        texts.append(text(ordered(told)))
        assert len(ordered(told)) == len(told)
        closed = [piece.thread for piece in told if piece.kind == "close"]
        assert sorted(closed) == sorted(info.name for info in tree.threads()), "a thread closes once"
    assert texts[0] == texts[1]
    if format.join_kind == "concat":
        root = [s for s in tree.segments.values() if s.thread == "0"]
        ids = [id for s in root for id in ((*s.forced_ids, *s.sampled_ids) if s.parent else s.sampled_ids)]
        assert texts[0] == Numbers().decode([id for id in ids if id not in format.eos_ids()])
