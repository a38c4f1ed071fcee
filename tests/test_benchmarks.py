"""What the benchmarks of engines share measures what it says, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_forkjoin
from blocks import block, cells, head, medians, prefix_ids
from raw_llama import RawLlama

from plait.engines import open_engine
from plait.engines.llamacpp import LlamaCppEngine
from plait.models import load_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_merge_computes_nothing_again_and_a_concat_all_threads_but_the_first() -> None:
    path = load_model().path
    assert path is not None
    async with LlamaCppEngine(path, threads=1) as engine:
        measured = [await block(engine, join, 3, 10, prefix_ids(40, i)) for i, join in enumerate(("merge", "concat"))]
    merged, concatenated = measured
    assert merged["prefilled_again"] == 0
    # Header and tokens of two threads, without the last token of each, which was never computed.
    assert concatenated["prefilled_again"] == 2 * (3 + 10 - 1)
    for row in measured:
        assert row["speedup_wall"] == pytest.approx(row["line_ms"] / row["block_ms"])
        assert row["tokens_per_s"] == pytest.approx(3 * row["tokens_per_s_of_one"])
    assert head(("engine",)).count("|") == 2 * (cells(("x",), 3, measured).count("|"))
    assert medians(measured)["prefilled_again"] == 12


@pytest.mark.parametrize("name", ["llamacpp", pytest.param("torch", marks=pytest.mark.torch)])
async def test_eight_threads_and_their_prefix_fit_where_two_copies_of_it_would_not(name: str) -> None:
    if name == "torch":
        pytest.importorskip("torch")
    async with open_engine(name, path=load_model().path, cells=1536, threads=1) as engine:
        measured = await block(engine, "merge", 8, 20, prefix_ids(1000, 0), line=False)
        stats = engine.stats()
    assert measured["prefilled_again"] == 0
    assert stats.preemptions == 0
    # The prefix once; of each thread, its header and its last token; and the parent's separator.
    assert stats.prefill_tokens <= 1000 + (1 + 8 + 8) * 3 + 8 + 1
    assert stats.compute_s > 0
    assert 0 < measured["fork_engine_ms"] < measured["fork_own_ms"]
    assert 0 < measured["join_own_ms"] < measured["join_ms"]


def test_prefixes_of_two_numbers_part_at_once() -> None:
    prefixes = [prefix_ids(64, number) for number in range(1000)]
    assert len({prefix[:4] for prefix in prefixes}) == 1000
    assert all(len(prefix) == 64 for prefix in prefixes)


async def test_the_last_line_of_a_benchmark_is_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--rounds", "1", "--tokens", "3", "--prefix", "16", "--threads", "1", "--json"]
    await bench_forkjoin.main(bench_forkjoin.parsed(options))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(row["engine"], row["join"], row["threads"]) for row in rows} == {
        ("llamacpp", join, threads) for join in ("merge", "concat") for threads in (1, 4, 8)
    }
    assert all({"prefilled_again", "speedup_wall"} <= row.keys() for row in rows)


async def test_llama_cpp_by_hand_measures_the_same_columns() -> None:
    path = load_model().path
    assert path is not None
    raw = RawLlama(path, cells=1024, threads=1)
    try:
        measured = await raw.block("merge", 3, 5, prefix_ids(20, 0))
        async with LlamaCppEngine(path, threads=1) as engine:
            through_plait = await block(engine, "merge", 3, 5, prefix_ids(20, 0))
    finally:
        raw.close()
    assert measured.keys() == through_plait.keys()
    assert measured["prefilled_again"] == 0
    assert min(measured[key] for key in ("tokens_per_s", "join_ms", "block_ms", "line_ms")) > 0


def test_an_interval_of_a_median_is_the_sign_tests() -> None:
    pytest.importorskip("httpx2", reason="needs the http extra")
    from bench_http import median_interval

    # Of 15 values the 4th to the 12th, of 100 the 40th to the 61st: tables of the binomial distribution.
    assert median_interval([float(n) for n in range(15, 0, -1)]) == (8.0, 4.0, 12.0)
    assert median_interval([float(n) for n in range(1, 101)]) == (50.5, 40.0, 61.0)
    assert median_interval([2.0, 1.0]) == (1.5, 1.0, 2.0)
