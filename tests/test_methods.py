"""Methods that are compared: votes, what several runs cost together, forced and declined forks, and their names."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from dataclasses import replace

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait import tasks
from plait.bench import GREEDY, Record, combined, compare, difference, evaluate, method, problems, vote
from plait.bench.methods import best, forced_ids, majority, passed, refuse_misfits, verified, verifies
from plait.bench.report import methods_table
from plait.engines.scripted import ScriptedEngine
from plait.errors import EngineError, RequestError
from plait.formats import open_format
from plait.models import gold_model, load_model
from plait.tasks.vocabulary import TOKENIZER
from plait.types import Budget, Chunk, Context, SamplingParams

ANSWERS = st.lists(st.none() | st.sampled_from(["1", "2", "3", "none"]), max_size=9)
PROBLEM = next(tasks.problems("countdown", seed=1, split="held_out"))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


# Votes --------------------------------------------------------------------------------------------------------------


@given(answers=ANSWERS, order=st.randoms(use_true_random=False))
def test_a_vote_takes_an_answer_that_nobody_beats_and_is_the_same_in_any_order(
    answers: list[str | None], order: random.Random
) -> None:
    taken = vote(answers)
    given_ones = [answer for answer in answers if answer is not None]
    if given_ones:
        assert given_ones.count(str(taken)) == max(map(given_ones.count, given_ones))
    else:
        assert taken is None
    shuffled = answers.copy()
    order.shuffle(shuffled)
    assert vote(shuffled) == taken


@given(answers=ANSWERS, silent=st.integers(0, 5), lot=st.text(max_size=3))
def test_who_gives_no_answer_does_not_vote(answers: list[str | None], silent: int, lot: str) -> None:
    assert vote([*answers, *[None] * silent], lot=lot) == vote(answers, lot=lot)


@given(answers=ANSWERS)
def test_one_more_vote_for_the_winner_changes_nothing(answers: list[str | None]) -> None:
    winner = vote(answers)
    assert vote([*answers, winner]) == winner


def test_a_tie_is_drawn_by_lot_and_prefers_neither_answer() -> None:
    first = sum(vote(["1", "2"], lot=f"problem {n}") == "1" for n in range(200))
    assert 70 < first < 130


# Checkers -----------------------------------------------------------------------------------------------------------


def test_only_families_of_equations_can_be_verified_without_the_answer() -> None:
    assert [name for name in tasks.FAMILIES | tasks.RESEARCH if verifies(name)] == ["countdown", "countdown_search"]


@given(seed=st.integers(0, 2**20))
@settings(max_examples=15)
def test_what_is_verified_is_right_whatever_the_expected_answer(seed: int) -> None:
    for name in ("countdown", "countdown_search"):
        problem = tasks.sample(name, random.Random(seed), "held_out")
        solvable = problem.answer != "none"
        assert verified(problem, problem.answer) == solvable
        assert not verified(replace(problem, answer="1+1=3"), "1+1=3")
        assert not verified(problem, "none")


def test_best_takes_the_verified_answer_that_majority_outvotes() -> None:
    problem = next(p for p in tasks.problems("countdown", seed=3, split="held_out") if p.answer != "none")
    answers = ["none", "none", problem.answer, None]
    assert majority(problem, answers) == "none"
    assert best(problem, answers) == passed(problem, answers) == problem.answer
    assert best(problem, ["none", "none", None]) == "none"


def test_the_oracle_knows_what_the_checker_cannot_see() -> None:
    problem = next(p for p in tasks.problems("countdown", seed=3, split="held_out") if p.answer == "none")
    answers = ["1+1=2", "1+1=2", "none"]
    assert best(problem, answers) == "1+1=2"
    assert passed(problem, answers) == "none"


# What several runs cost ---------------------------------------------------------------------------------------------


def run_of(problem: tasks.Problem, **changes: object) -> Record:
    base = Record(
        model="m",
        family=problem.family,
        prompt=problem.prompt,
        question=problem.question,
        answer="1",
        right=False,
        forked=False,
        forks=problem.forks,
        decision_right=not problem.forks,
        threads=0,
        num_forks=0,
        total_tokens=100,
        critical_path_tokens=100,
        token_latency=100,
        longest_context_tokens=110,
        reread_tokens=0,
        wall_s=0.1,
        stop="eos",
        serial_cost=None,
        parallel_cost=None,
        concurrency=1,
        seed=0,
    )
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


RUNS = st.lists(
    st.builds(
        lambda total, critical, answer, stop: run_of(
            PROBLEM,
            total_tokens=total + critical,
            critical_path_tokens=critical,
            longest_context_tokens=critical + 10,
            answer=answer,
            stop=stop,
        ),
        st.integers(0, 999),
        st.integers(1, 999),
        st.none() | st.sampled_from(["1", "none", PROBLEM.answer]),
        st.sampled_from(["eos", "budget", "length"]),
    ),
    min_size=1,
    max_size=8,
)


@given(runs=RUNS, order=st.randoms(use_true_random=False), name=st.sampled_from(["majority@8", "best@8", "pass@8"]))
def test_runs_together_cost_the_sum_of_their_tokens_and_the_longest_of_their_paths(
    runs: list[Record], order: random.Random, name: str
) -> None:
    one = combined(runs, method(name), PROBLEM, wall_s=0.25)
    assert one.total_tokens == sum(r.total_tokens for r in runs)
    assert one.critical_path_tokens == max(r.critical_path_tokens for r in runs)
    assert one.longest_context_tokens == max(r.longest_context_tokens for r in runs)
    assert (one.method, one.samples, one.wall_s) == (name, len(runs), 0.25)
    shuffled = runs.copy()
    order.shuffle(shuffled)
    again = combined(shuffled, method(name), PROBLEM, wall_s=0.25)
    assert (again.answer, again.right, again.total_tokens) == (one.answer, one.right, one.total_tokens)


@given(runs=RUNS)
def test_a_run_that_did_not_end_by_itself_gives_no_answer(runs: list[Record]) -> None:
    finished = {r.answer for r in runs if r.stop == "eos"}
    for name in ("majority@8", "best@8", "pass@8"):
        one = combined(runs, method(name), PROBLEM)
        assert one.answer in finished | {None}
        assert one.right == (one.answer == PROBLEM.answer)
    assert combined(runs, method("pass@8"), PROBLEM).right == (PROBLEM.answer in finished)


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_methods_that_run_the_same_are_run_once() -> None:
    drawn = problems(["product"], 2)
    twin = gold_model(traces="serial")
    calls = 0

    def counted(context: Context) -> list[int]:
        nonlocal calls
        calls += 1
        assert twin.script is not None
        return list(twin.script(context))

    counting = replace(twin, script=counted)
    names = ("majority@3", "pass@3")
    records = await compare(drawn, models=[counting] * 2, methods=[method(name) for name in names], engine="scripted")
    assert [(r.prompt, r.method) for r in records] == [(p.prompt, name) for p in drawn for name in names]
    # Each problem three times, and the first once more to warm up.
    assert calls == 3 * 3
    alone = await compare(drawn, models=[twin], engine="scripted")
    for record, name in zip(records, names * 2, strict=True):
        single = next(r for r in alone if r.prompt == record.prompt)
        assert record.total_tokens == 3 * single.total_tokens
        assert record.critical_path_tokens == single.critical_path_tokens
        assert (record.samples, record.temperature, record.right) == (3, 0.7, True), name


@pytest.mark.anyio
async def test_samples_of_a_problem_have_seeds_of_their_own() -> None:
    seeds: list[int] = []
    drawn = problems(["control"], 2)

    class Watched(ScriptedEngine):
        def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
            seeds.append(params.seed)
            return super().generate(context, params)

    twin = gold_model(traces="serial")
    async with Watched(script=twin.script) as engine:
        for seed in (0, 1):
            await evaluate(
                drawn, engine=engine, format=twin.format, tokenizer=TOKENIZER, seed=seed, method=method("majority@4")
            )
    assert len(set(seeds)) == 2 * 2 * 4


@pytest.mark.anyio
async def test_a_sample_that_fails_ends_the_evaluation_with_its_own_error() -> None:
    failing = ScriptedEngine(fail=lambda context, said: EngineError("the engine is on fire"))
    async with failing as engine:
        with pytest.raises(EngineError, match="on fire"):
            await evaluate(
                problems(["control"], 1),
                engine=engine,
                format=gold_model().format,
                tokenizer=TOKENIZER,
                method=method("majority@4"),
            )
        assert engine.stats().active == 0


def test_forks_are_declined_or_forced_as_a_method_says() -> None:
    drawn = [*problems(["long_multiplication"], 1), *problems(["control"], 1)]
    assert [p.forks for p in drawn] == [True, False]
    wanted = [method("forced-sequential"), method("always-fork"), GREEDY]
    records = anyio.run(
        lambda: compare(
            drawn,
            models=[load_model()] * 3,
            methods=wanted,
            options={"threads": 1},
            budget=Budget(max_tokens=1500),
        )
    )
    declined, forced, own = ([r for r in records if r.method == m.name] for m in wanted)
    assert not any(r.forked for r in declined)
    assert {r.max_threads for r in declined} == {0}
    assert (own[0].forked, forced[0].forked) == (True, True)
    # The id that forces the fork is given, not sampled.
    assert (forced[0].answer, forced[0].total_tokens + 1) == (own[0].answer, own[0].total_tokens)


def test_a_fork_is_forced_only_where_a_block_is_read_without_its_first_token() -> None:
    for name in ("multiverse", "threadweaver", "plait"):
        ids = forced_ids(open_format(name, TOKENIZER), TOKENIZER)
        assert [TOKENIZER.tokens[id] for id in ids] == ["<Parallel>"]
    with pytest.raises(RequestError, match="no fork can be forced in the sequential format"):
        forced_ids(open_format("sequential", TOKENIZER), TOKENIZER)


# Names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sequental", "did you mean 'sequential'"),
        ("majorty@8", "did you mean 'majority@N'"),
        ("majority", "did you mean 'majority@N'"),
        ("majority@", "takes no samples; a number from 2 to 64"),
        ("pass@1", "takes 1 samples"),
        ("best@65", "takes 65 samples"),
        ("majority@eight", "takes eight samples"),
    ],
)
def test_a_method_that_there_is_not_names_what_there_is(name: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        method(name)


def test_samples_must_differ() -> None:
    with pytest.raises(RequestError, match="temperature is 0; majority@8 needs samples that differ"):
        method("majority@8", temperature=0)


def test_a_method_is_refused_where_it_cannot_be_run() -> None:
    with pytest.raises(RequestError, match="those of product cannot"):
        refuse_misfits(method("best@4"), gold_model(), ["countdown", "product"])
    refuse_misfits(method("best@4"), gold_model(), ["countdown"])
    with pytest.raises(RequestError, match="does not"):
        refuse_misfits(method("forced-sequential"), gold_model(traces="serial"), ["product"])


# Figures ------------------------------------------------------------------------------------------------------------


def test_a_difference_is_paired() -> None:
    drawn = problems(["product"], 4)
    a = [run_of(p, right=right) for p, right in zip(drawn, (True, True, True, False), strict=True)]
    b = [run_of(p, right=right) for p, right in zip(drawn[::-1], (False, True, False, True), strict=True)]
    d = difference(a, b)
    assert d is not None
    assert (d.n, d.mean) == (4, 0.25)
    assert d.half == pytest.approx(1.959964 * 0.5 / 2, rel=1e-4)
    assert difference(a, []) is None


def test_the_table_has_a_row_for_each_method_and_a_share_for_each_family() -> None:
    drawn = problems(["product", "control"], 2)
    greedy = [run_of(p, right=True) for p in drawn]
    voted = [run_of(p, right=p.family == "control", method="majority@4", model="twin@1", samples=4) for p in drawn]
    lines = [
        [cell.strip() for cell in line.split("|")] for line in methods_table([*greedy, *voted], greedy).split("\n")
    ]
    assert lines[3][1:5] == ["majority@4", "twin", "4", "50.0 %"]
    assert lines[3][6].startswith("+50.0 ±")
    assert lines[2][6] == ""
    assert lines[-1][1:5] == ["majority@4", "twin", "0.0", "100.0"]
