"""Countdown as in the APR paper: searches that are right, in every format, and what an imitator is trained on."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from plait import tasks
from plait.engines.scripted import ScriptedEngine
from plait.formats import Fork, Malformed, ThreadOutcome, open_format, render
from plait.formats.apr import APR
from plait.models import prompt_ids, response_text
from plait.session import run
from plait.tasks.countdown_search import CountdownSearch
from plait.tasks.vocabulary import SEARCH
from plait.testing.clock import run_virtual
from plait.train.data import PIECES, Stream, gold_source, num_problems
from plait.train.packing import Bucket, Packer
from plait.train.trie import flatten, pieces
from plait.tree import Tree
from plait.types import Budget, Request, StopReason

FAMILY = CountdownSearch()
UNLIMITED = Budget(max_tokens=None, max_threads=None)


def problem(seed: int, **shape: object) -> tasks.Problem:
    drawn = FAMILY.sample(random.Random(seed))
    return replace(drawn, shape={**drawn.shape, **shape})


def tree_of(drawn: tasks.Problem, format: str) -> Tree:
    trace = FAMILY.serial(drawn) if format == "sequential" else FAMILY.within(drawn, None, plait=format == "plait")
    ids = prompt_ids(SEARCH, drawn.prompt)
    return render(trace, format=open_format(format, SEARCH), tokenizer=SEARCH, prompt_ids=ids)


def solved(drawn: tasks.Problem, tree: Tree) -> bool:
    return tasks.grade(drawn, response_text(tree, SEARCH))


def test_every_problem_can_be_solved_and_only_exact_solutions_count() -> None:
    for seed in range(20):
        drawn = problem(seed)
        assert FAMILY.grade(drawn, drawn.answer)
        first, *rest = drawn.answer.split(",")
        assert not FAMILY.grade(drawn, ",".join([first, first, *rest])), "a number is used twice"
        assert not FAMILY.grade(drawn, first), "numbers are left over"
        assert not FAMILY.grade(drawn, re.sub(r"=(\d+)$", lambda m: f"={int(m[1]) + 1}", drawn.answer))
        assert not FAMILY.grade(drawn, "")
        assert not FAMILY.grade(drawn, "none")


def test_a_wider_search_solves_more_and_writes_more() -> None:
    drawn = [problem(seed) for seed in range(24)]
    rates: list[float] = []
    lengths: list[float] = []
    for beam in (1, 3, 8):
        trees = [(p, tree_of(replace(p, shape={**p.shape, "serial_beam": beam}), "sequential")) for p in drawn]
        rates.append(sum(solved(p, tree) for p, tree in trees) / len(drawn))
        lengths.append(sum(tree.longest_context() for _, tree in trees) / len(drawn))
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    assert lengths == sorted(lengths)


def test_a_solution_follows_a_goal_and_a_search_without_one_says_so() -> None:
    for seed in range(16):
        for format in ("sequential", "apr", "plait"):
            drawn = problem(seed)
            tree = tree_of(drawn, format)
            text = response_text(tree, SEARCH)
            assert solved(drawn, tree) == ("Answer: " in text) == (" equal: Goal Reached" in text)
            assert ("No solution found." in text) or solved(drawn, tree)


def test_the_answer_of_a_race_is_what_its_winner_returned() -> None:
    for seed in range(24):
        tree = tree_of(problem(seed, beam=6, spawn=1.0), "plait")
        answer = tasks.answer_of(response_text(tree, SEARCH))
        assert answer is None or f" {answer}\n</Thread>" in SEARCH.decode(tree.segments["0:1"].forced_ids)


def test_every_equation_of_a_trace_is_right_and_within_range() -> None:
    for seed in range(8):
        text = response_text(tree_of(problem(seed, serial_beam=5), "sequential"), SEARCH)
        equations = re.findall(r"Exploring Operation: (\d+)([-+*/])(\d+)=(\d+)", text)
        assert equations
        for a, sign, b, value in equations:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}.get(sign, int(value)) == int(
                value
            )
            assert sign != "/" or int(value) * int(b) == int(a)
            assert int(value) <= 99


def test_the_papers_own_range_is_drawn_and_searched() -> None:
    family = CountdownSearch(targets=(10, 100), largest=1_000_000, sub_beams=(1, 15))
    for seed in range(6):
        drawn = family.sample(random.Random(seed))
        assert family.grade(drawn, drawn.answer)
        tree = tree_of(drawn, "sequential")
        assert solved(drawn, tree) == (" equal: Goal Reached" in response_text(tree, SEARCH))


def test_a_child_is_told_its_state_and_nothing_else() -> None:
    tree = tree_of(problem(3, beam=6, spawn=1.0), "apr")
    children = [s for s in tree.segments.values() if s.keep == 0]
    assert len(children) == 6
    for child in children:
        header = SEARCH.decode(child.forced_ids)
        assert re.fullmatch(
            r"<bos>Moving to Node #0,\d+\nCurrent State: \d+:\[\d+, \d+, \d+\], Operations: \['.*'\]", header
        )
        assert tree.context(child.id) == (child.forced_ids,)


def test_a_search_forks_no_more_threads_than_it_may() -> None:
    for most in (0, 1, 2, 5):
        for seed in range(6):
            trace = FAMILY.within(problem(seed, spawn=1.0), most, plait=False)
            assert tasks.num_threads(trace) <= most
    assert tasks.num_threads(FAMILY.within(problem(3, spawn=1.0), 5, plait=False)) == 5


@pytest.mark.parametrize("format", ["sequential", "apr", "plait"])
def test_a_gold_search_is_what_the_runtime_produces(format: str) -> None:
    for seed in (3, 4):
        gold = tree_of(problem(seed, beam=4, sub_beam=(2, 4), spawn=1.0), format)
        request = Request(prompt_ids=gold.segments["0:0"].forced_ids, budget=UNLIMITED)

        async def main(gold: Tree = gold, request: Request = request, seed: int = seed) -> Tree:
            engine = ScriptedEngine(script=gold, timing_seed=seed, chunk_size=7)
            return await run(request, engine=engine, format=open_format(format, SEARCH))

        assert run_virtual(main, backend="asyncio" if seed % 2 else "trio") == gold


class FirstSuccess(APR):
    """Children race: the first that reaches the goal ends the others."""

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Malformed | None:
        fork = super().parse(sampled_ids, depth)
        return replace(fork, race=True) if isinstance(fork, Fork) else fork

    def succeeded(self, outcome: ThreadOutcome) -> bool:
        return " equal: Goal Reached" in SEARCH.decode(outcome.token_ids)


def test_a_thread_that_ends_with_end_of_sequence_can_win_a_race() -> None:
    seeds = (seed for seed in range(99) if " equal: G" in str(FAMILY.within(problem(seed, spawn=1.0), 6, plait=False)))
    drawn = problem(next(s for s in seeds if solved(problem(s), tree_of(problem(s, beam=6, spawn=1.0), "apr"))))
    gold = tree_of(replace(drawn, shape={**drawn.shape, "beam": 6, "spawn": 1.0}), "apr")
    request = Request(prompt_ids=gold.segments["0:0"].forced_ids, budget=UNLIMITED)

    async def main() -> Tree:
        return await run(request, engine=ScriptedEngine(script=gold), format=FirstSuccess(SEARCH))

    raced = run_virtual(main, backend="asyncio")
    stops = Counter(raced.segments[f"{thread.name}:0"].stop for thread in raced.threads() if thread.name != "0")
    assert stops[StopReason.EOS] >= 1
    assert raced.critical_path() <= gold.critical_path()
    assert raced.num_sampled <= gold.num_sampled


def test_pieces_hold_every_token_once_and_a_child_sees_only_itself() -> None:
    tree = tree_of(problem(3, beam=5, spawn=1.0), "apr")
    whole, parts = flatten(tree), pieces(tree)
    assert len(parts) == 6
    assert Counter(np.concatenate([p.token_ids for p in parts]).tolist()) == Counter(whole.token_ids.tolist())
    assert sum(int(p.loss_mask.sum()) for p in parts) == int(whole.loss_mask.sum())
    for part in parts[1:]:
        assert part.hide_lo.shape[1] == 0
        assert part.end.tolist() == [len(part)] * len(part)
        assert part.position_ids.tolist() == list(range(len(part)))
    assert len(pieces(tree_of(problem(3), "plait"))) == 1


def test_a_stream_of_pieces_goes_on_from_its_state_as_if_never_stopped() -> None:
    def stream(**more: object) -> Stream:
        packer = Packer([Bucket(rows=2, length=512), Bucket(rows=1, length=1056)], num_spans=1)
        source = gold_source("apr", traces="parallel", tokenizer=SEARCH)
        return Stream(source, weights={FAMILY.name: 1.0}, packer=packer, seed=5, **more)  # type: ignore[arg-type]

    whole = stream()
    problems = sum(num_problems(next(whole)) for _ in range(5))
    assert 0 < problems <= whole.seen[FAMILY.name]
    assert whole.state()["next"] >= PIECES
    again = stream(state=whole.state())
    for _ in range(4):
        ours, theirs = next(whole), next(again)
        assert np.array_equal(ours.token_ids, theirs.token_ids)
        assert ours.places == theirs.places
    assert again.state() == whole.state()
