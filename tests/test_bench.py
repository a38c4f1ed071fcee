"""Evaluation: records of runs, figures from records, and results files that resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plait import tasks
from plait.bench import (
    Record,
    RecordFile,
    compare,
    decision_curve,
    decisions,
    evaluate,
    evaluate_gguf,
    problems,
    read_records,
    result,
    speedup,
    summary,
    wilson,
)
from plait.bench.report import report, seconds, table
from plait.engines.scripted import ScriptedEngine
from plait.errors import EngineError, LogError, RequestError
from plait.models import gold_model
from plait.tasks.vocabulary import TOKENIZER
from tiny_gguf import write_random_weights


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def record(**changes: Any) -> Record:
    base = Record(
        model="m",
        family="product",
        prompt="2*3?",
        question="What is 2 * 3?",
        answer="6",
        right=True,
        forked=True,
        forks=True,
        decision_right=True,
        threads=2,
        num_forks=1,
        total_tokens=100,
        critical_path_tokens=50,
        token_latency=60,
        longest_context_tokens=70,
        reread_tokens=0,
        wall_s=0.1,
        stop="eos",
        serial_cost=100,
        parallel_cost=50,
        concurrency=1,
        seed=0,
    )
    return replace(base, **changes)


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("concurrency", [1, 5])
async def test_records_follow_the_order_of_the_problems(concurrency: int) -> None:
    drawn = problems(list(tasks.FAMILIES), 2)
    model = gold_model()
    async with model.open_engine() as engine:
        records = await evaluate(
            drawn, engine=engine, format=model.format, tokenizer=TOKENIZER, model="gold", concurrency=concurrency
        )
        assert engine.stats().active == 0
    assert [r.prompt for r in records] == [p.prompt for p in drawn]
    assert all(r.right and r.decision_right and r.stop == "eos" for r in records)
    assert [r.answer is None for r in records] == [False] * len(drawn)


@pytest.mark.anyio
async def test_what_gives_no_answer_is_wrong() -> None:
    drawn = problems(["long_multiplication"], 3)
    silent = ScriptedEngine(script=lambda context: TOKENIZER.eos_ids)
    async with silent as engine:
        records = await evaluate(drawn, engine=engine, format=gold_model().format, tokenizer=TOKENIZER)
    assert not any(r.right or r.forked for r in records)
    assert [r.answer for r in records] == [None] * 3
    assert [r.decision_right for r in records] == [not p.forks for p in drawn]


@pytest.mark.anyio
async def test_a_failing_engine_ends_the_evaluation_with_its_own_error() -> None:
    failing = ScriptedEngine(fail=lambda context, said: EngineError("the engine is on fire"))
    async with failing as engine:
        with pytest.raises(EngineError, match="on fire"):
            await evaluate(
                problems(["control"], 4),
                engine=engine,
                format=gold_model().format,
                tokenizer=TOKENIZER,
                concurrency=3,
            )


@pytest.mark.anyio
async def test_a_comparison_takes_turns_and_leaves_out_what_is_there() -> None:
    drawn = problems(["bundle"], 3)
    models = [gold_model(), gold_model(traces="serial")]
    adaptive, twin = models[0].id, models[1].id
    records = await compare(drawn, models=models, engine="scripted")
    assert [r.model for r in records] == [adaptive, twin, twin, adaptive, adaptive, twin]
    assert {r.concurrency for r in records} == {1}
    done = {r.key for r in records[:5]}
    again = await compare(drawn, models=models, engine="scripted", skip=done)
    assert [(r.prompt, r.model) for r in again] == [(records[5].prompt, records[5].model)]


def test_problems_of_families_are_distinct_and_in_turn() -> None:
    drawn = problems(["control", "product"], 4)
    assert [p.family for p in drawn] == ["control", "product"] * 4
    assert len({p.prompt for p in drawn}) == 8
    assert drawn == problems(["control", "product"], 4)
    assert all(tasks.held_out(p.prompt) for p in drawn)


def test_a_gguf_file_is_scored_by_true_decoding(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    scores = evaluate_gguf(write_random_weights(tmp_path / "m.gguf"), n=1, concurrency=2, max_tokens=40)
    assert set(scores) == {"long_multiplication", "control"}
    assert scores["control"]["n"] == 1
    assert 0 < scores["control"]["total_tokens"] <= 40


# Figures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0), (495, 500, 0.97681, 0.99572)],
)
def test_wilsons_interval(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=2e-5)


def test_an_interval_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert summary([]).accuracy == 0.0


def test_a_speedup_is_the_mean_of_ratios_and_beside_it_the_ratio_of_sums() -> None:
    adaptive = [record(prompt="a", critical_path_tokens=50, wall_s=0.1), record(prompt="b", critical_path_tokens=100)]
    twin = [
        record(prompt="b", critical_path_tokens=100, wall_s=0.1, right=False),
        record(prompt="a", critical_path_tokens=150, wall_s=0.2),
        record(prompt="c"),
    ]
    s = speedup(adaptive, twin)
    assert s is not None
    assert s.n == 2
    assert s.tokens.mean == pytest.approx((3 + 1) / 2)
    assert s.tokens.error == pytest.approx(1.0)
    assert s.tokens.of_sums == pytest.approx(250 / 150)
    assert s.wall.mean == pytest.approx(1.5)
    assert s.kept == pytest.approx(0.75)
    assert (s.accuracy, s.twin_accuracy) == (1.0, 0.5)
    assert speedup(adaptive, []) is None


def test_fork_decisions_are_counted_by_what_was_right() -> None:
    records = [record(forks=a, forked=b) for a, b in ((True, True), (True, False), (False, False), (False, False))]
    d = decisions(records)
    assert (d.forked_rightly, d.under_forked, d.over_forked, d.held_rightly) == (1, 1, 0, 2)
    assert d.right == 0.75


def test_the_decision_curve_bins_by_expected_saving() -> None:
    records = [
        record(serial_cost=100, parallel_cost=120, forked=False, forks=False),
        record(serial_cost=100, parallel_cost=76, forked=False, forks=False),
        record(serial_cost=100, parallel_cost=74, forked=True),
        record(serial_cost=100, parallel_cost=30, forked=True),
        record(serial_cost=None, parallel_cost=None),
    ]
    curve = decision_curve(records)
    assert [(p.n, p.forked, p.wanted) for p in curve] == [(1, 0, 0), (1, 0, 0), (1, 1, 1), (1, 1, 1)]
    assert [(p.low, p.high) for p in curve][1:3] == [(0.2, 0.25), (0.25, 0.3)]


def test_the_result_holds_what_a_reader_of_json_asks_for() -> None:
    adaptive = [record(prompt="a"), record(prompt="b", family="control", forks=False, forked=False, total_tokens=102)]
    twin = [
        record(prompt="a", critical_path_tokens=100, wall_s=0.15),
        record(prompt="b", family="control", forks=False, forked=False, critical_path_tokens=50),
    ]
    data = json.loads(json.dumps(result(adaptive, twin)))
    assert {"accuracy", "twin_accuracy", "speedup_tokens", "speedup_wall", "fork_right"} <= set(data)
    # Over the decomposable problems alone.
    assert data["speedup_tokens"] == 2.0
    assert data["speedup_wall"] == pytest.approx(1.5)
    assert data["control_tokens"] == pytest.approx(1.02)
    assert data["families"]["product"]["speedup_tokens"] == 2.0
    assert data["families"]["control"]["speedup_tokens"] is None
    assert "twin_accuracy" not in result(adaptive)


# Reports ------------------------------------------------------------------------------------------------------------


def test_tables_are_markdown() -> None:
    assert table([("name", "n"), ("a", "10")]) == "| name |  n |\n|------|---:|\n| a    | 10 |"


def test_a_report_shows_accuracy_tokens_path_and_wall_together() -> None:
    text = report([record(), record(prompt="x", right=False)], [record(critical_path_tokens=100)])
    assert "| product | 2 | 50.0 % | 9.5-90.5 |" in text
    for word in ("T |", "L |", "wall", "against the twin", "fork decisions", "expected saving"):
        assert word in text
    assert seconds(0.0341) == "34 ms"
    assert seconds(1.24) == "1.2 s"


# Files --------------------------------------------------------------------------------------------------------------


def test_a_results_file_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path) as file:
        file.write(record(prompt="a"))
        file.write(record(prompt="b"))
    path.write_bytes(path.read_bytes()[:-20])
    assert read_records(path) == [record(prompt="a")]
    with RecordFile(path) as file:
        file.write(record(prompt="c"))
    assert read_records(path) == [record(prompt="a"), record(prompt="c")]


def test_another_kind_of_file_is_not_taken_for_results(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"event": "RunStarted"}\n')
    with pytest.raises(RequestError, match="line 1 is not a result"):
        read_records(path)
    assert read_records(tmp_path / "none.jsonl") == []


def test_a_results_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="cannot write"):
        RecordFile(tmp_path / "no" / "r.jsonl")
    full = Path("/dev/full")
    if full.exists():
        with RecordFile(full) as file, pytest.raises(LogError, match="can be resumed"):
            file.write(record())
