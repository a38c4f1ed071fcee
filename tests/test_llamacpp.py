"""The llama.cpp engine on tiny random weights: its contract, its joins against plain numpy, cells that balance."""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_llama
from plait.engines.base import EngineStats
from plait.engines.llamacpp import LlamaCppEngine, binding
from plait.engines.llamacpp.binding import Decoder, Model
from plait.engines.llamacpp.pace import Pace
from plait.errors import ContextLengthError, EngineError, EngineUnavailable, ModelError, RequestError
from plait.testing.conformance import check_engine
from plait.testing.pytest import EngineClause
from plait.types import Context, Merge, SamplingParams, StopReason

pytest.importorskip("gguf", reason="writes its own weights: needs the train extra")
pytestmark = pytest.mark.anyio

TOLERANCE = 5e-4
"""float32 kernels against float64, on weights that are larger than real ones."""
PROMPT = (7, 3, 11, 40, 2, 19, 23, 5)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("weights") / "tiny.gguf")


def exact(path: Path, **options: Any) -> LlamaCppEngine:
    """An engine whose cache does not round."""
    return LlamaCppEngine(path, **{"cache": "F32", "cells": 1024, **options})


async def call(
    engine: LlamaCppEngine, context: Context, **params: Any
) -> tuple[tuple[int, ...], tuple[float, ...], Any]:
    ids: list[int] = []
    logprobs: list[float] = []
    stop = None
    async with aclosing(engine.generate(context, SamplingParams(**{"max_tokens": 8, **params}))) as chunks:
        async for chunk in chunks:
            ids += chunk.token_ids
            logprobs += chunk.logprobs
            stop = chunk.stop
    return tuple(ids), tuple(logprobs), stop


def assert_greedy(context: Context, ids: Sequence[int], logprobs: Sequence[float]) -> None:
    """What was sampled is what a plain forward would sample, up to rounding."""
    for k, (id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        tail = context[-1]
        assert isinstance(tail, tuple)
        expected = tiny_llama.forward((*context[:-1], (*tail, *ids[:k])))
        assert abs(expected[id] - logprob) < TOLERANCE, f"token {k}"
        assert expected.max() - expected[id] < TOLERANCE, f"token {k}"


def assert_balanced(engine: LlamaCppEngine, calls: int = 0) -> None:
    scheduler = engine._scheduler
    assert scheduler is not None
    decoder = scheduler._decoder
    scheduler._cache.check()
    assert scheduler.active == calls
    assert len(scheduler._cache.seqs) - len(scheduler._cache.idle) == calls
    for seq in scheduler._cache.idle:
        assert decoder.last_position(seq.id) == seq.tip.end - 1
    for id in scheduler._cache.free:
        assert decoder.last_position(id) == -1


def since(engine: LlamaCppEngine, before: EngineStats) -> tuple[int, int]:
    """Steps and prefilled tokens since `before`."""
    now = engine.stats()
    return now.steps - before.steps, now.prefill_tokens - before.prefill_tokens


async def test_the_engine_keeps_its_contract(gguf: Path, engine_clause: EngineClause) -> None:
    await engine_clause.check(
        lambda: exact(gguf),
        vocab_size=tiny_llama.VOCAB,
        reference=lambda context: tiny_llama.forward(context).tolist(),
        tolerance=TOLERANCE,
        variants=[lambda: exact(gguf, flush_s=0, prefill_rows=1), lambda: exact(gguf, keep=0, max_seqs=2)],
    )


@pytest.mark.parametrize(
    ("options", "tolerance"), [({"flash_attention": False}, 0.02), ({}, 0.02)], ids=["F16 cache", "flash attention"]
)
async def test_a_rounding_cache_keeps_the_contract_too(gguf: Path, options: dict[str, Any], tolerance: float) -> None:
    await check_engine(
        lambda: LlamaCppEngine(gguf, cells=1024, **options),
        vocab_size=tiny_llama.VOCAB,
        reference=lambda context: tiny_llama.forward(context).tolist(),
        tolerance=tolerance,
    )


@pytest.fixture(autouse=True)
def one_thread_at_a_time() -> Iterator[None]:
    """Calls made in one turn of the event loop reach the engine together, however loaded the machine is."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5)
    yield
    sys.setswitchinterval(interval)


async def fork(
    engine: LlamaCppEngine, context: Context, headers: Sequence[tuple[int, ...]], lengths: Sequence[int]
) -> list[tuple[int, ...]]:
    """Threads that run at once from one parent; what each of them wrote, header included."""
    out: list[tuple[int, ...]] = [()] * len(headers)

    async def thread(i: int) -> None:
        own = (*context, headers[i])
        ids, logprobs, _ = await call(engine, own, max_tokens=lengths[i])
        assert_greedy(tuple(_joined(own)), ids, logprobs)
        out[i] = (*headers[i], *ids)

    async with anyio.create_task_group() as tasks:
        for i in range(len(headers)):
            tasks.start_soon(thread, i)
    return out


def _joined(context: Context) -> Context:
    from plait.engines.inprocess.calls import normalise

    return normalise(context)


@pytest.mark.parametrize("lengths", [(3, 6, 9), (9, 6, 3), (5, 5, 5), (1, 1, 1), (1, 8, 8)])
async def test_a_merge_of_threads_that_just_ended_computes_nothing_again(gguf: Path, lengths: tuple[int, ...]) -> None:
    async with exact(gguf) as engine:
        ids, _, _ = await call(engine, (PROMPT,))
        parent = (*PROMPT, *ids)
        for mark in (9, 10):  # with the first merge the engine learns that last tokens are wanted early
            headers = [(30, i, mark) for i in range(3)]
            before = engine.stats()
            threads = await fork(engine, (parent,), headers, lengths)
            assert since(engine, before)[0] == max(lengths)
            forked = engine.stats()
            context: Context = (parent, Merge(tuple((t,) for t in threads)), (31, 8))
            after, logprobs, _ = await call(engine, context)
            assert_greedy(context, after, logprobs)
            # the parent's last token and each thread's once, headers, what follows the merge; nothing twice
            assert since(engine, before)[1] == (mark == 9) + 3 * 3 + 3 + 2, (before, engine.stats())
            if mark == 10:
                assert since(engine, forked)[0] == 8, "one step for each sampled token, none for the join"
            assert_balanced(engine)


async def test_a_fork_costs_no_step_and_feeds_the_pending_token_once(gguf: Path) -> None:
    async with exact(gguf) as engine:
        ids, _, _ = await call(engine, (PROMPT,))
        before = engine.stats()
        await fork(engine, ((*PROMPT, *ids),), [(30, i) for i in range(4)], [6] * 4)
        assert since(engine, before) == (6, 1 + 4 * 2)


async def test_a_concat_join_computes_only_what_is_new(gguf: Path) -> None:
    async with exact(gguf) as engine:
        ids, _, _ = await call(engine, (PROMPT,))
        parent = (*PROMPT, *ids)
        first, second = await fork(engine, (parent,), [(30, 1), (30, 2)], [20, 4])
        before = engine.stats()
        context = ((*parent, *first, *second, 31),)
        after, logprobs, _ = await call(engine, context)
        assert since(engine, before) == (8, 1 + len(second) + 1)
        assert_greedy(context, after, logprobs)


async def test_nested_merges_match_a_plain_forward(gguf: Path) -> None:
    async with exact(gguf) as engine:

        async def go_on(context: Context, max_tokens: int) -> tuple[int, ...]:
            ids, logprobs, _ = await call(engine, context, max_tokens=max_tokens)
            assert_greedy(context, ids, logprobs)
            return ids

        root = (*PROMPT, *await go_on((PROMPT,), 4))
        (left,) = await fork(engine, (root,), [(30, 1)], [5])
        inner = await fork(engine, ((*root, *left),), [(33, 1), (33, 2)], [3, 5])
        pair = Merge(tuple((t,) for t in inner))
        rest = (34, *await go_on(((*root, *left), pair, (34,)), 3))
        (right,) = await fork(engine, (root,), [(30, 2)], [4])
        before = engine.stats()
        await go_on((root, Merge(((left, pair, rest), (right,))), (31, 8)), 5)
        assert since(engine, before)[1] == 2 + 2, "two last tokens, two forced ids"
        assert_balanced(engine)


async def test_branches_that_are_alike_are_all_seen(gguf: Path) -> None:
    twins = ((30, 1, 2, 3), (30, 1, 2, 3))
    async with exact(gguf) as engine:
        for _ in range(2):
            context: Context = (PROMPT, Merge(tuple((t,) for t in twins)), (31,))
            ids, logprobs, _ = await call(engine, context)
            assert_greedy(context, ids, logprobs)
        inner = Merge((((30, 1),), ((8,),)))
        context = (PROMPT, Merge((((30, 1),), (inner, (9,)))), (31,))  # a branch that begins with a merge
        ids, logprobs, _ = await call(engine, context)
        assert_greedy(context, ids, logprobs)
        long = tuple(range(10, 30))
        await call(engine, ((*PROMPT, *long, 1, 2),), max_tokens=1)
        await call(engine, ((*PROMPT, *long, 3, 4),), max_tokens=1)  # shares most cells with the one before
        context = (PROMPT, Merge((((*long, 1, 2),), ((*long, 3, 4),))), (31,))
        ids, logprobs, _ = await call(engine, context)
        assert_greedy(context, ids, logprobs)


async def test_sampling_depends_on_the_seed_only(gguf: Path) -> None:
    hot = {"temperature": 0.9, "max_tokens": 20}
    async with exact(gguf, flush_s=0) as engine:
        alone = [await call(engine, (PROMPT,), seed=s, **hot) for s in range(6)]
        beside: list[Any] = [None] * 6

        async def one(s: int) -> None:
            beside[s] = await call(engine, (PROMPT,), seed=s, **hot)

        async with anyio.create_task_group() as tasks:
            for s in (4, 1, 5, 0, 3, 2):
                tasks.start_soon(one, s)
        assert [ids for ids, _, _ in beside] == [ids for ids, _, _ in alone]
        assert len({ids for ids, _, _ in alone}) == 6


async def test_temperature_top_k_top_p_and_bans_draw_from_the_right_distribution(gguf: Path) -> None:
    weights = sorted(enumerate(tiny_llama.forward((PROMPT,))), key=lambda item: -item[1])
    top = [id for id, _ in weights]
    async with exact(gguf) as engine:

        async def first(**params: Any) -> list[int]:
            out = [await call(engine, (PROMPT,), max_tokens=1, seed=s, **params) for s in range(60)]
            assert all(abs(lp[0] - dict(weights)[ids[0]]) < TOLERANCE for ids, lp, _ in out), "untempered"
            return [ids[0] for ids, _, _ in out]

        assert set(await first(temperature=3.0, top_k=3)) == set(top[:3])
        assert set(await first(temperature=0.01)) == {top[0]}
        assert top[0] not in await first(temperature=1.0, banned_ids=(top[0],))
        assert set(await first(temperature=0.0, banned_ids=(top[0],))) == {top[1]}
        total, nucleus = 0.0, set[int]()
        for id, logprob in weights:
            nucleus.add(id)
            total += math.exp(logprob)
            if total >= 0.7:
                break
        assert set(await first(temperature=1.0, top_p=0.7)) <= nucleus
        drawn = await first(temperature=1.0)
        share, expected = drawn.count(top[0]) / 60, math.exp(weights[0][1])
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 60)


async def test_without_logprobs_the_tokens_are_the_same(gguf: Path) -> None:
    async with exact(gguf) as engine:
        ids, logprobs, _ = await call(engine, (PROMPT,))
        plain, zeros, _ = await call(engine, (PROMPT,), logprobs=False)
        assert (plain, set(zeros)) == (ids, {0.0})
        assert min(logprobs) < 0


async def test_a_stop_beats_eos_and_both_beat_length(gguf: Path) -> None:
    async with exact(gguf) as engine:
        (id, *_), _, _ = await call(engine, (PROMPT,))
        assert (await call(engine, (PROMPT,), stop_ids=(id,), eos_ids=(id,), max_tokens=1))[2] is StopReason.STOP
        assert (await call(engine, (PROMPT,), stop_ids=(999, -1), eos_ids=(id,), max_tokens=1))[2] is StopReason.EOS


async def test_a_call_that_fills_its_context_ends_by_length(gguf: Path) -> None:
    async with exact(gguf, max_context=20) as engine:
        ids, logprobs, stop = await call(engine, (PROMPT,), max_tokens=1000)
        assert (len(ids), stop) == (12, StopReason.LENGTH)
        assert_greedy((PROMPT,), ids, logprobs)
        assert len((await call(engine, ((1,) * 19,), max_tokens=1000))[0]) == 1
        with pytest.raises(ContextLengthError, match=r"20 positions.*20 fit"):
            await call(engine, ((1,) * 20,))


async def test_what_cannot_be_continued_is_refused_before_sampling(gguf: Path) -> None:
    async with exact(gguf, cells=256, max_seqs=4) as engine:
        for context, message in (
            ((), "at least one token id"),
            (((), Merge(())), "at least one token id"),
            ((PROMPT, Merge(((1,), (2,)) and (((1,),), ((2,),)))), "also after a merge"),
            (((1, 48),), "token id 48 .* 0 to 47"),
            ((PROMPT, Merge((((-1,),), ((2,),))), (1,)), "token id -1"),
        ):
            with pytest.raises(RequestError, match=message):
                await call(engine, context)
        wide: Context = (PROMPT, Merge(tuple(((i % 40,) * 30,) for i in range(10))), (1,))
        with pytest.raises(ContextLengthError, match="256 cells"):
            await call(engine, wide)
        deep: Context = ((1,), (2,))
        for _ in range(4):
            deep = ((1,), Merge((deep, ((3,),))), (2,))
        with pytest.raises(RequestError, match="nest 4 deep"):
            await call(engine, deep)
        assert engine.stats().steps == 0


async def test_cells_run_out_and_every_call_still_ends_right(gguf: Path) -> None:
    async with exact(gguf, cells=256, max_seqs=8, flush_s=0) as engine:
        prompts = [tuple((i * 7 + k * k) % 48 for k in range(10 + i)) for i in range(12)]
        results: list[Any] = [None] * 12

        async def one(i: int) -> None:
            results[i] = await call(engine, (prompts[i],), max_tokens=60)

        async with anyio.create_task_group() as tasks:
            for i in range(12):
                tasks.start_soon(one, i)
        for prompt, (ids, logprobs, stop) in zip(prompts, results, strict=True):
            assert (len(ids), stop) == (60, StopReason.LENGTH)
            assert_greedy((prompt,), ids[::9][:1], logprobs[::9][:1])
        alone = [await call(engine, (p,), max_tokens=60) for p in prompts[:3]]
        assert [a[0] for a in alone] == [r[0] for r in results[:3]]
        ids, _, stop = await call(engine, (PROMPT,), max_tokens=2000)
        assert (len(ids), stop) == (256 - 1 - len(PROMPT), StopReason.LENGTH)
        assert_balanced(engine)


async def test_closing_some_calls_frees_them_while_others_go_on(gguf: Path) -> None:
    async with exact(gguf, flush_s=0) as engine:
        kept: list[Any] = []

        async def keep() -> None:
            kept.append(await call(engine, (PROMPT,), max_tokens=300))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keep)
            for i in range(6):
                async with aclosing(engine.generate(((i, 1, 2),), SamplingParams(max_tokens=400))) as chunks:
                    await anext(chunks)
            with anyio.fail_after(40):
                while engine.stats().active > 1:  # noqa: ASYNC110 - nothing tells
                    await anyio.sleep(0.001)
        with anyio.move_on_after(0):
            await call(engine, (PROMPT,), max_tokens=400)
        ids, _, stop = kept[0]
        assert (len(ids), stop) == (300, StopReason.LENGTH)
        assert ids == (await call(engine, (PROMPT,), max_tokens=300))[0]
        assert_balanced(engine)


async def test_leaving_ends_the_calls_that_still_run(gguf: Path) -> None:
    engine = exact(gguf)
    with pytest.raises(EngineUnavailable):
        await call(engine, (PROMPT,))
    async with engine:
        chunks = engine.generate((PROMPT,), SamplingParams(max_tokens=500))
        await anext(chunks)
    with pytest.raises(EngineUnavailable, match="closed"):
        [chunk async for chunk in chunks]
    with pytest.raises(EngineUnavailable, match="closed"):
        engine.meta("plait.config")
    with pytest.raises(EngineUnavailable, match="once"):
        await engine.__aenter__()


async def test_an_error_in_the_block_leaves_it_bare(gguf: Path) -> None:
    async def block() -> None:
        async with (
            exact(gguf) as engine,
            aclosing(engine.generate((PROMPT,), SamplingParams(max_tokens=500))) as chunks,
        ):
            await anext(chunks)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await block()


async def test_a_bug_in_the_scheduler_fails_its_calls_and_does_not_hang(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with exact(gguf) as engine:
        monkeypatch.setattr(engine._scheduler, "_compose", lambda slots: 1 / 0)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="please report: ZeroDivisionError"):
                await call(engine, (PROMPT,))


async def test_an_engine_whose_books_are_broken_fails_alone_and_closes(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, node: object) -> None:
        raise ValueError("x not in list")

    async def one_after_another(engine: LlamaCppEngine) -> None:
        for first in range(8):
            await call(engine, ((first, *PROMPT),))

    async with exact(gguf) as other:
        expected, _, _ = await call(other, (PROMPT,))
        async with exact(gguf, cells=256, max_seqs=3) as engine:
            with monkeypatch.context() as patch:
                patch.setattr("plait.engines.llamacpp.cache.Cache._hide", broken)
                with pytest.raises(EngineError, match="please report: ValueError"):
                    await one_after_another(engine)
            with pytest.raises(EngineError, match="please report: ValueError"):
                await call(engine, (PROMPT,))
            assert (await call(other, (PROMPT,)))[0] == expected
        assert (await call(other, (PROMPT,)))[0] == expected


async def test_a_decode_that_fails_fails_the_calls_and_nothing_else(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with exact(gguf) as engine:
        before, _, _ = await call(engine, (PROMPT,))
        assert engine._scheduler is not None
        monkeypatch.setattr(engine._scheduler._decoder, "decode", lambda rows: -1)
        with pytest.raises(RuntimeError, match="llama_decode"):
            await call(engine, (PROMPT,))
        monkeypatch.undo()
        assert (await call(engine, (PROMPT,)))[0] == before
        assert_balanced(engine)


async def test_all_engines_of_a_process_compute_in_one_thread_and_it_ends_with_them(gguf: Path) -> None:
    def threads() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "plait-engines"]

    with anyio.fail_after(50):
        async with exact(gguf) as one, exact(gguf) as other:
            expected, _, _ = await call(one, (PROMPT,))
            got: list[tuple[int, ...]] = []

            async def ask(engine: LlamaCppEngine) -> None:
                got.append((await call(engine, (PROMPT,)))[0])

            async with anyio.create_task_group() as tasks:
                for engine in (one, other, one, other):
                    tasks.start_soon(ask, engine)
            assert got == [expected] * 4
            (thread,) = threads()
        thread.join(timeout=40)
        assert not thread.is_alive()
        async with exact(gguf) as again:
            assert (await call(again, (PROMPT,)))[0] == expected


class Machine:
    """Steps on two cores: twice as fast with both where nothing else runs, 50 times as slow where something does."""

    def __init__(self, *, load: float = 0.0) -> None:
        self.pace = Pace.of(None, model_bytes=10**6, cores=2, load=load)
        self.busy = load >= 2
        self.seconds = 0.0
        self.wasted = 0.0

    def run(self, rows: Sequence[int]) -> list[int]:
        """How many threads each of these steps got."""
        chosen: list[int] = []
        for r in rows:
            threads = self.pace.choose(r)
            alone = r * 1e-4 * (2 if self.busy else 1)
            took = alone if threads == 1 else alone * (25 if self.busy else 0.5)
            self.pace.record(r, threads, took)
            self.seconds += took
            self.wasted += max(0.0, took - alone)
            chosen.append(threads)
        return chosen


SIZES = [2 + (7 * i) % 31 for i in range(3000)]


def test_a_step_gets_the_threads_that_were_fastest_lately() -> None:
    machine = Machine()
    assert machine.run(SIZES).count(2) > 2700, "an idle machine"
    machine.busy, machine.seconds, machine.wasted = True, 0.0, 0.0
    assert machine.run(SIZES).count(1) > 2950
    assert machine.wasted < 0.06 * machine.seconds, "neither steps of each size nor trials pay for finding out"
    machine.busy = False
    machine.run(SIZES)
    assert machine.run(SIZES).count(2) > 2700, "it became idle again"


def test_on_a_machine_that_is_busy_from_the_start_a_second_thread_is_tried_seldom() -> None:
    machine = Machine()
    machine.busy = True
    machine.run([4, 4])
    machine.seconds = machine.wasted = 0.0
    assert machine.run(SIZES).count(1) > 2950
    assert machine.wasted < 0.06 * machine.seconds


def test_where_others_fill_the_cores_the_first_seconds_are_for_one_thread() -> None:
    machine = Machine(load=2.5)
    assert machine.pace.best(30) == 1
    chosen: list[int] = []
    while machine.seconds < 2.9:
        chosen += machine.run(SIZES[:10])
    assert set(chosen) == {1}
    assert machine.run(SIZES).count(1) > 2950
    machine.busy = False
    machine.run(SIZES)
    assert machine.run(SIZES).count(2) > 2700, "it became idle"
    assert machine.pace.best(30) == 2


async def test_what_was_given_is_computed_with_the_threads_that_were_fastest_too(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    set_threads = Decoder.set_threads

    def noting(self: Decoder, rows: int, threads: int) -> None:
        asked.append((rows, threads))
        set_threads(self, rows, threads)

    monkeypatch.setattr(Decoder, "set_threads", noting)
    engine = exact(gguf)
    engine._pace = Pace(one=1, several=(2, 1))
    engine._pace.record(4, 2, 1.0)
    engine._pace.record(4, 1, 0.1)
    async with engine:
        await call(engine, (PROMPT,), max_tokens=1)
    assert [threads for rows, threads in asked if rows == len(PROMPT)] == [1]


def test_nothing_else_is_tried_where_rows_cost_little() -> None:
    pace = Pace.of(None, model_bytes=10**6, cores=2)
    assert pace.choose(1) == 1
    pace.record(1, 1, 1.0)
    pace.record(3, 2, 1.5)
    pace.record(4, 2, 9.0)
    assert {pace.choose(3) for _ in range(64)} == {2}
    assert pace.choose(4) == 1


@pytest.mark.parametrize(
    ("asked", "model_bytes", "cores", "one", "several"),
    [(3, 10**6, 8, 3, (3,)), (None, 10**9, 8, 8, (8,)), (None, 10**6, 1, 1, (1,))],
)
def test_threads_are_those_asked_for_or_fit_the_model(
    asked: int | None, model_bytes: int, cores: int, one: int, several: tuple[int, ...]
) -> None:
    pace = Pace.of(asked, model_bytes=model_bytes, cores=cores)
    assert (pace.one, pace.several) == (one, several)


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 64])
def test_the_number_of_threads_changes_no_bit(gguf: Path, rows: int) -> None:
    def logits(threads: int) -> bytes:
        model = Model(gguf)
        decoder = Decoder(model, cells=512, max_seqs=8, max_rows=64, flash=True, wide_cache=False)
        decoder.set_threads(rows, threads)
        decoder.tokens[:rows] = np.arange(rows) % 30
        decoder.positions[:rows] = np.arange(rows) if rows > 8 else 0
        decoder.seq_ids[:rows, 0] = 0 if rows > 8 else np.arange(rows)
        decoder.outputs[:rows] = 1
        assert decoder.decode(rows) == 0
        out = decoder.logits(rows).tobytes()
        decoder.close()
        model.close()
        return out

    assert logits(1) == logits(2)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), seqs=st.sampled_from([3, 6, 32]), keep=st.sampled_from([0, 128]))
def test_dropping_the_cache_at_any_point_changes_no_token(gguf: Path, seed: int, seqs: int, keep: int) -> None:
    """P9 and P10: a random program of forks, merges, concats and evictions against a plain forward."""
    rng = random.Random(seed)

    async def program() -> None:
        async with exact(gguf, max_seqs=seqs, keep=keep, flush_s=0, prefill_rows=rng.choice([1, 64])) as engine:
            contexts: list[Context] = [(PROMPT,)]
            for _ in range(4):
                cache = engine._scheduler._cache  # type: ignore[union-attr]
                for seq in [s for s in cache.idle if rng.random() < 0.3]:
                    cache.drop(seq)
                base = rng.choice(contexts)
                count = rng.randint(1, 4)
                threads = await fork(
                    engine, base, [(30, rng.randrange(3))] * count, [rng.randint(1, 7) for _ in range(count)]
                )
                assert_balanced(engine)
                tail = (31, *(rng.randrange(48) for _ in range(rng.randrange(3))))
                if rng.random() < 0.7:
                    contexts.append(_joined((*base, Merge(tuple((t,) for t in threads)), tail)))
                else:
                    contexts.append(_joined((*base, tuple(i for t in threads for i in t) + tail)))
                ids, logprobs, _ = await call(engine, contexts[-1], max_tokens=rng.randint(1, 4))
                assert_greedy(contexts[-1], ids, logprobs)
                contexts.append(_joined((*contexts[-1], ids)))
                assert_balanced(engine)

    anyio.run(program)


def random_context(rng: random.Random, base: Context, depth: int) -> Context:
    """A few tokens and merges after `base`, from so few ids that beginnings coincide."""
    parts = list(base)
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.5:
            parts.append(tuple(rng.randrange(3) for _ in range(rng.randint(1, 20))))
        elif depth:
            branches = tuple(random_context(rng, (), depth - 1) for _ in range(rng.randint(1, 3)))
            parts += [Merge(branches), (5,)]
    return (*parts, (rng.randrange(3),))


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_calls_that_crowd_each_other_out_and_are_cut_off_leave_nothing_behind(gguf: Path, seed: int) -> None:
    """P9 and C7: nested merges, too few sequences and cells, readers that go away; what ends, ends right."""
    rng = random.Random(seed)
    options = {
        "max_seqs": rng.choice([4, 8, 32]),
        "cells": rng.choice([256, 512]),
        "keep": rng.choice([0, 128]),
        "prefill_rows": rng.choice([1, 8, 64]),
        "flush_s": rng.choice([0, 0.01]),
    }

    async def program() -> None:
        pool: list[Context] = [(PROMPT,)]

        async def one(engine: LlamaCppEngine, context: Context, most: int, cut: bool) -> None:
            ids: list[int] = []
            logprobs: list[float] = []
            try:
                async with aclosing(engine.generate(context, SamplingParams(max_tokens=most, stop_ids=(0,)))) as chunks:
                    async for chunk in chunks:
                        ids += chunk.token_ids
                        logprobs += chunk.logprobs
                        if cut and rng.random() < 0.3:
                            break
            except RequestError:
                return  # nested too deep, or too long
            assert_greedy(_joined(context), ids[:1], logprobs[:1])
            pool.append(_joined((*context, tuple(ids))))

        async with exact(gguf, **options) as engine:
            for _ in range(3):
                with anyio.fail_after(40):
                    async with anyio.create_task_group() as tasks:
                        for _ in range(rng.randint(1, 6)):
                            context = random_context(rng, rng.choice(pool), rng.randint(0, 2))
                            tasks.start_soon(one, engine, context, rng.randint(1, 40), rng.random() < 0.3)
                        if rng.random() < 0.2:
                            await anyio.sleep(0.002)
                            tasks.cancel_scope.cancel()
                    while engine.stats().active or engine.stats().queued:  # noqa: ASYNC110 - nothing tells
                        await anyio.sleep(0.001)
                assert_balanced(engine)

    anyio.run(program, backend=rng.choice(["asyncio", "trio"]))


def test_strings_of_the_header_are_read(gguf: Path) -> None:
    engine = LlamaCppEngine(gguf)
    assert engine.meta("plait.config") == '{"format": "multiverse"}'
    assert engine.meta("no.such.key") is None
    assert (engine.vocab_size, engine.max_context) == (48, 512)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_cut_off_file_is_a_model_error(
    gguf: Path, tmp_path: Path, share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    data = gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        LlamaCppEngine(path)
    assert capfd.readouterr() == ("", "")


def write_foreign(path: Path, kind: str, numbers: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file of ones for a model of another kind: 8 wide, one layer, 16 tokens."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), kind)
    common = {"context_length": 64, "embedding_length": 8, "block_count": 1, "vocab_size": 16}
    for key, value in {**common, **numbers}.items():
        writer.add_uint32(f"{kind}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(kind != "bert")
    writer.add_tokenizer_model("no_vocab")
    writer.add_token_type_count(2)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_model_with_recurrent_layers_is_refused_with_a_way_out(tmp_path: Path) -> None:
    numbers = {"feed_forward_length": 0, "attention.head_count": 0, "ssm.conv_kernel": 4, "ssm.inner_size": 16}
    shapes = {"token_embd.weight": (16, 8), "output_norm.weight": (8,)}
    shapes |= {"blk.0.attn_norm.weight": (8,), "blk.0.ssm_in.weight": (32, 8), "blk.0.ssm_out.weight": (8, 16)}
    shapes |= {"blk.0.ssm_conv1d.weight": (16, 4), "blk.0.ssm_conv1d.bias": (16,), "blk.0.ssm_x.weight": (10, 16)}
    shapes |= {"blk.0.ssm_dt.weight": (16, 2), "blk.0.ssm_dt.bias": (16,), "blk.0.ssm_a": (16, 4), "blk.0.ssm_d": (16,)}
    mamba = write_foreign(
        tmp_path / "mamba.gguf", "mamba", {**numbers, "ssm.state_size": 4, "ssm.time_step_rank": 2}, shapes
    )
    with pytest.raises(ModelError, match=r"mamba\.gguf has recurrent layers.*llama-server"):
        LlamaCppEngine(mamba)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_model_that_cannot_continue_a_text_is_refused(kind: str, tmp_path: Path) -> None:
    numbers = {"feed_forward_length": 16, "attention.head_count": 2, "attention.relative_buckets_count": 8}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (16, 8)}
    if kind == "bert":
        shapes |= {"token_types.weight": (2, 8), "position_embd.weight": (64, 8)}
        norms = ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm")
        shapes |= {f"{name}.{part}": (8,) for name in norms for part in ("weight", "bias")}
        shapes |= {f"blk.0.{name}.weight": (8, 8) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.0.{name}.bias": (8,) for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")}
        shapes |= {"blk.0.ffn_up.weight": (16, 8), "blk.0.ffn_up.bias": (16,), "blk.0.ffn_down.weight": (8, 16)}
    else:
        for side in ("enc", "dec"):
            shapes |= {f"{side}.blk.0.{name}.weight": (8, 8) for name in ("attn_q", "attn_k", "attn_v", "attn_o")}
            shapes |= {f"{side}.blk.0.{name}.weight": (8,) for name in ("attn_norm", "ffn_norm")}
            shapes |= {f"{side}.blk.0.ffn_up.weight": (16, 8), f"{side}.blk.0.ffn_down.weight": (8, 16)}
            shapes |= {f"{side}.blk.0.attn_rel_b.weight": (8, 2), f"{side}.output_norm.weight": (8,)}
        shapes |= {f"dec.blk.0.cross_attn_{name}.weight": (8, 8) for name in "qkvo"}
        shapes["dec.blk.0.cross_attn_norm.weight"] = (8,)
    with pytest.raises(ModelError, match="no causal language model"):
        LlamaCppEngine(write_foreign(tmp_path / "foreign.gguf", kind, numbers, shapes))


def test_files_that_are_no_weights_are_model_errors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise = random.Random(0).randbytes(4000)
    for name, data in {"noise": noise, "almost": b"GGUF" + noise, "text": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError, match=name):
            LlamaCppEngine(tmp_path / name)
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(ModelError, match="cannot read"):
            LlamaCppEngine(missing)
    assert capfd.readouterr() == ("", "")


def test_a_missing_or_other_llamacpp_is_named_with_the_cure(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binding.library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(binding.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(EngineUnavailable, match=r"pip install xllamacpp==\d"):
            LlamaCppEngine(gguf)
    with monkeypatch.context() as patch:
        patch.setattr(binding.importlib.metadata, "version", lambda name: "1.0")
        with pytest.raises(EngineUnavailable, match=r"xllamacpp is 1\.0.*pip install"):
            LlamaCppEngine(gguf)
    with monkeypatch.context() as patch:
        patch.setattr(binding, "layout_fits", lambda model, context: False)
        with pytest.raises(EngineUnavailable, match=r"structs.*pip install"):
            LlamaCppEngine(gguf)
    LlamaCppEngine(gguf)


def test_a_shifted_struct_is_noticed() -> None:
    lib = binding.library()
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    assert binding.layout_fits(model, context)
    raw = bytes(context)
    for shift in (4, 8):
        moved = binding._ContextParams.from_buffer_copy(raw[shift:] + bytes(shift))
        assert not binding.layout_fits(model, moved)


def test_stats_of_an_engine_that_was_not_opened_are_zero(gguf: Path) -> None:
    assert exact(gguf).stats() == EngineStats()
    assert replace(EngineStats(), active=1).active == 1
