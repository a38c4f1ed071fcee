"""What people are shown: readings of trees, timelines, panes, plain lines, pacing."""

from __future__ import annotations

import io
import itertools
import random
import re
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from plait import tasks
from plait.events import Event
from plait.models import Model, gold_model
from plait.session import open_run
from plait.spelling import describe
from plait.terminal.plain import PlainView, plain_lines
from plait.terminal.reading import Block, Plan, Reader, Said, reader_of
from plait.terminal.screen import Screen, _spread, replay
from plait.terminal.timeline import draw, timeline
from plait.terminal.truth import Cost, comparison, truth, wall
from plait.terminal.view import View, wrap
from plait.testing.clock import run_virtual
from plait.tree import Tree
from plait.types import Budget, StopReason

MULTIPLICATION = "What is 347 * 526?"
PRODUCT = "What is 34 * 27 * 61 * 58?"
GOLD = gold_model()


def events_of(question: str, *, model: Model = GOLD, budget: Budget | None = None, **options: Any) -> list[Event]:
    async def main() -> list[Event]:
        async with model.open_engine(**options) as engine:
            request = model.request(question, budget=budget or Budget())
            meta = {"tokenizer": describe(model.tokenizer)}
            async with open_run(request, engine=engine, format=model.format, meta=meta) as run:
                return [event async for event in run]

    return run_virtual(main)


def tree_of(question: str, **options: Any) -> Tree:
    return Tree.from_events(events_of(question, **options))


def reader(model: Model = GOLD) -> Reader:
    return Reader(model.tokenizer, model.format)


def printed(view: View, tree: Tree, console: Console) -> list[str]:
    with console.capture() as capture:
        console.print(view.finished(tree))
        console.print(view.lanes(tree))
    return capture.get().splitlines()


def console(width: int = 100, height: int = 30) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=height)


# Reading ------------------------------------------------------------------------------------------------------------


def test_a_reading_leaves_out_tags_and_keeps_what_was_said() -> None:
    tree = tree_of(PRODUCT)
    parts = reader().parts(tree)
    assert [type(part) for part in parts] == [Block, Said, Block, Said]
    assert isinstance(parts[1], Said)
    assert parts[1].text == "Sum: a08b11c09>a8b1c9;Sum: a08b13c05d03>a8b3c5d3;918*3538;"
    assert isinstance(parts[0], Block)
    first = reader().columns(tree, parts[0])[0]
    assert (first.number, first.label, first.text) == (1, "7", "34*7: a4*7=28,28+0=28 b3*7=21,21+2=23~a8b3c2")


def test_what_is_read_again_at_a_join_is_shown_once() -> None:
    model = gold_model("threadweaver")
    tree = tree_of(MULTIPLICATION, model=model)
    text = "\n".join(plain_lines(tree, reader(model)))
    assert text.count("18+2=20~a2b8c0d2") == 1


def test_a_block_is_a_plan_while_it_is_written() -> None:
    events = events_of(MULTIPLICATION)
    tree = Tree()
    plans: list[str] = []
    for event in events:
        tree.apply(event)
        plans += [part.text for part in reader().parts(tree) if isinstance(part, Plan)]
    assert "1: 6  2: 20" in plans
    assert not any("<" in plan for plan in plans)


def test_a_log_without_a_tokenizer_is_shown_as_ids() -> None:
    tree = tree_of(MULTIPLICATION)
    parts = reader_of({}).parts(tree)
    assert isinstance(parts[0], Said)
    assert re.fullmatch(r"[\d ]+", parts[0].text)
    assert isinstance(reader_of({"tokenizer": describe(GOLD.tokenizer)}).parts(tree)[1], Block)


# Timeline -----------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(tasks.FAMILIES)), st.integers(0, 1000))
def test_the_timeline_is_as_long_as_the_critical_path(family: str, seed: int) -> None:
    problem = tasks.sample(family, random.Random(seed), "held_out")
    tree = tree_of(problem.question)
    plan = timeline(tree)
    assert plan.length == tree.critical_path()
    critical = [span for bar in plan.bars for span in bar.spans if span.critical]
    assert sum(span.end - span.start for span in critical) == plan.length
    assert {bar.thread for bar in plan.bars} == {thread.name for thread in tree.threads()}
    for one, other in itertools.combinations(plan.bars, 2):
        if one.lane == other.lane:
            assert one.end <= other.start or other.end <= one.start


def test_a_timeline_shows_forks_joins_and_the_critical_path() -> None:
    rows = ["".join(cell.glyph for cell in row) for row in draw(timeline(tree_of(MULTIPLICATION)), width=40)]
    assert rows == [
        "━━━━━━┯╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌┯━━━━━━━━━ ",
        "      ├─────────────────────╌╌┤          ",
        "      ├──────────────────────╌┤          ",
        "      ┕━━━━━━━━━━━━━━━━━━━━━━━┙          ",
    ]


def test_a_run_that_is_not_over_has_a_timeline_too() -> None:
    tree = Tree()
    for event in events_of(PRODUCT):
        tree.apply(event)
        plan = timeline(tree)
        assert plan.length == tree.critical_path()
        draw(plan, width=20)


# Panes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 100, 200])
@pytest.mark.parametrize("question", [MULTIPLICATION, PRODUCT, "Use 3, 7 and 25 to make 54", "What is 12 + 34?"])
def test_no_line_is_wider_than_the_screen(question: str, width: int) -> None:
    tree = tree_of(question)
    screen = console(width)
    for line in printed(View(screen, reader(), question, final=tree), tree, screen):
        assert len(line) <= width


def test_panes_stand_side_by_side_with_their_outlines_as_titles() -> None:
    tree, screen = tree_of(MULTIPLICATION), console()
    lines = printed(View(screen, reader(), MULTIPLICATION, final=tree), tree, screen)
    assert any("1  6 " in line and "2  20 " in line and "3  500 " in line for line in lines)
    assert any("a7*6=42,42+0=42" in line and "b7*2=14,14+0=14" in line for line in lines)


def test_a_replayed_picture_keeps_its_height() -> None:
    events, screen = events_of(MULTIPLICATION), console()
    final = Tree.from_events(events)
    view, tree = View(screen, reader(), MULTIPLICATION, final=final), Tree()
    heights: list[int] = []
    for event in events:
        tree.apply(event)
        if tree.labels:
            heights.append(len(screen.render_lines(view.running(tree))))
    assert heights == sorted(heights)
    assert heights[-1] - heights[0] <= 2  # The lines after the join.


def test_a_low_screen_folds_blocks_that_are_over() -> None:
    tree, screen = tree_of(PRODUCT), console(height=14)
    with screen.capture() as capture:
        screen.print(View(screen, reader(), PRODUCT).running(tree))
    assert "4 threads joined: 7, 20, 8, 50" in capture.get()


def test_a_thread_that_did_not_close_says_why() -> None:
    tree, screen = tree_of(MULTIPLICATION, budget=Budget(max_thread_tokens=40)), console()
    shown = "\n".join(printed(View(screen, reader(), MULTIPLICATION), tree, screen))
    assert shown.count("budget: max_thread") == 3
    assert "max_thread_tokens=40 is used up" in "\n".join(plain_lines(tree, reader()))


@given(st.text(alphabet="0123456789+*=,;: ~", max_size=200), st.integers(4, 60))
def test_wrapping_loses_nothing_but_spaces(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(len(line) <= width for line in lines)


# Plain lines --------------------------------------------------------------------------------------------------------


def plain(events: Sequence[Event]) -> list[str]:
    lines: list[str] = []
    view, tree = PlainView(reader(), lines.append), Tree()
    for event in events:
        tree.apply(event)
        view.on(tree, event)
    view.finish(tree)
    return lines


def test_plain_lines_do_not_depend_on_timing() -> None:
    expected = plain(events_of(PRODUCT))
    for seed in range(3):
        assert plain(events_of(PRODUCT, timing_seed=seed, chunk_size=5, delay_s=0.1)) == expected
    assert expected == list(plain_lines(tree_of(PRODUCT), reader()))


def test_plain_lines_come_as_blocks_are_joined() -> None:
    lines: list[str] = []
    view, tree = PlainView(reader(), lines.append), Tree()
    counts: list[int] = []
    for event in events_of(PRODUCT):
        tree.apply(event)
        view.on(tree, event)
        counts.append(len(lines))
    assert sorted({*counts}) == [0, 5, 6, 11, 13]


def test_plain_lines_hold_no_control_characters() -> None:
    assert all(line.isprintable() for line in plain(events_of(PRODUCT)))


# Pacing -------------------------------------------------------------------------------------------------------------


def test_chunks_are_spread_over_the_time_they_took_and_say_the_same() -> None:
    events = events_of(MULTIPLICATION, chunk_size=16, delay_s=0.01)
    spread = _spread(events)
    times = [t for t, _ in spread]
    assert times == sorted(times)
    assert Tree.from_events(event for _, event in spread) == Tree.from_events(events)
    assert len({t for t, _ in spread}) > 100


def test_a_replay_takes_the_time_it_is_given() -> None:
    events = events_of(MULTIPLICATION, delay_s=0.001)
    final = Tree.from_events(events)
    quiet = console()
    frames: list[int] = []

    class Counting(Screen):
        def show(self, tree: Tree) -> None:
            frames.append(tree.num_sampled)
            super().show(tree)

    async def main() -> float:
        started = anyio.current_time()
        with Counting(quiet, View(quiet, reader(), "", final=final)) as screen:
            await replay(events, screen, seconds=1.5)
        return anyio.current_time() - started

    assert run_virtual(main) == pytest.approx(1.5, abs=0.1)
    assert frames[-1] == final.num_sampled
    assert frames == sorted(frames)


# The line of truth --------------------------------------------------------------------------------------------------


def test_the_line_of_truth() -> None:
    usage = tree_of(MULTIPLICATION).usage()
    line = truth(Cost(name="m", usage=usage, wall_s=0.052))
    assert line == "3 threads in 1 fork, 249 tokens, 120 on the critical path, 52 ms"
    serial = tree_of(MULTIPLICATION, model=gold_model(traces="serial")).usage()
    assert truth(Cost(name="t", usage=serial, wall_s=1.5)) == "no threads, 223 tokens one after the other, 1.50 s"
    lines = comparison(Cost(name="m", usage=usage, wall_s=0.05), Cost(name="t", usage=serial, wall_s=0.1), runs=5)
    assert lines[-1] == "1.86x fewer token steps than in one line, 2.00x faster (median of 5 runs each, in turn)"
    assert wall(0.0052) == "5.2 ms"


def test_a_forced_closing_is_not_a_reason_of_its_own() -> None:
    tree = tree_of(MULTIPLICATION, budget=Budget(max_thread_tokens=40))
    stops = {thread.stop for thread in tree.threads() if thread.name != "0"}
    assert stops == {StopReason.BUDGET}
