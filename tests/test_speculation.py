"""Speculative decoding by prompt lookup: the same tokens with and without, whatever happens beside them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_llama
from plait.engines.base import EngineStats
from plait.engines.inprocess.calls import normalise
from plait.engines.llamacpp import LlamaCppEngine
from plait.engines.llamacpp.lookup import WINDOW, Lookup
from plait.engines.llamacpp.scheduler import _in_line
from plait.errors import RequestError
from plait.testing.pytest import EngineClause
from plait.types import Context, Merge, SamplingParams, StopReason
from test_llamacpp import PROMPT, TOLERANCE, assert_balanced, call

pytest.importorskip("gguf", reason="writes its own weights: needs the train extra")


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("weights") / "tiny.gguf")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def exact(path: Path, **options: Any) -> LlamaCppEngine:
    return LlamaCppEngine(path, **{"cache": "F32", "cells": 1024, "flush_s": 0, "threads": 1, **options})


def test_what_followed_the_same_ids_earlier_is_guessed() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 9, 2, 3], most=4)
    assert lookup.guess(10) == [4, 5, 9, 2]
    assert lookup.guess(2) == [4, 5]
    assert lookup.guess(0) == []
    lookup.extend([4])
    assert lookup.sampled == 1
    assert lookup.guess(10) == [5, 9, 2, 3]
    lookup.extend([7, 7])
    assert lookup.guess(10) == []
    lookup.extend([7])
    assert lookup.guess(10) == [7, 7, 7, 7], "a run that repeats goes on"


def test_a_longer_run_is_the_better_witness_and_the_latest_counts() -> None:
    assert Lookup([1, 2, 3, 40, 5, 2, 3, 50, 1, 2, 3], most=1).guess(1) == [40]
    assert Lookup([9, 2, 3, 40, 8, 2, 3, 50, 7, 2, 3], most=1).guess(1) == [50]


def test_wrong_guesses_are_made_less_and_less_often() -> None:
    lookup = Lookup([1, 2] * 8, most=2)
    asked = 0
    for _ in range(200):
        if lookup.guess(2):
            asked += 1
            lookup.judge(0)
    assert asked < 14
    while not lookup.guess(2):
        pass
    lookup.judge(1)
    assert lookup.guess(2), "one that was right makes up for it"


def test_a_long_context_is_looked_at_from_its_end() -> None:
    lookup = Lookup([3, 4, 5, *([1] * WINDOW), 3, 4], most=1)
    assert lookup.guess(1) == []
    assert lookup.sampled == 0


@pytest.mark.anyio
async def test_the_engine_keeps_its_contract(gguf: Path, engine_clause: EngineClause) -> None:
    await engine_clause.check(
        lambda: exact(gguf, speculate=4),
        vocab_size=tiny_llama.VOCAB,
        reference=lambda context: tiny_llama.forward(context).tolist(),
        tolerance=TOLERANCE,
        max_tokens=24,
    )


def oracle(known: Sequence[Sequence[int]], seed: int) -> Any:
    """In place of what random weights seldom repeat: guesses that are right, up to a wrong one now and then."""
    rng = random.Random(seed)

    def guess(self: Lookup, most: int) -> list[int]:
        most, before = min(most, self._most), self._ids
        for ids in known:
            if list(ids[: len(before)]) == before:
                guessed = list(ids[len(before) : len(before) + most])
                if guessed and rng.random() < 0.4:
                    guessed[rng.randrange(len(guessed))] = rng.randrange(tiny_llama.VOCAB)
                return guessed
        return []

    return guess


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32), most=st.sampled_from([1, 3, 8, 64]), cells=st.sampled_from([256, 1024]))
def test_the_tokens_are_the_same_with_and_without(gguf: Path, seed: int, most: int, cells: int) -> None:
    """Forks, merges, cancelled siblings, stop ids, and sampling at a temperature beside greedy calls."""
    said: list[list[int]] = []

    async def program(speculate: int) -> tuple[list[Any], EngineStats]:
        rng = random.Random(seed)
        outs: list[Any] = []
        async with exact(gguf, speculate=speculate, cells=cells) as engine:
            context: Context = ((*PROMPT, *(rng.randrange(5) for _ in range(20))),)
            for block in range(3):
                lengths = [rng.randint(1, 40) for _ in range(4)]
                ends: list[Any] = [None] * 4

                async def one(i: int, context: Context, length: int, ends: list[Any], most: dict[str, Any]) -> None:
                    ends[i] = await call(engine, (*context, (30, i)), max_tokens=length, **most)
                    said.append([*_in_line(normalise((*context, (30, i)))), *ends[i][0]])

                async def cancelled(context: Context) -> None:
                    stream = engine.generate((*context, (31,)), SamplingParams(max_tokens=40))
                    async with aclosing(stream) as chunks:
                        await anext(chunks)

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(cancelled, context)
                    for i, length in enumerate(lengths):
                        more = {"temperature": 1.0, "seed": block} if i == 3 else {"stop_ids": (rng.randrange(48),)}
                        tasks.start_soon(one, i, context, length, ends, more)
                outs.append([(ids, stop) for ids, _, stop in ends])
                threads = tuple(((30, i, *ids),) for i, (ids, _, _) in enumerate(ends[:3]))
                context = (*context, Merge(threads[:2]), (32, 33)) if block != 1 else (*context, *threads[2], (32,))
                ids, logprobs, stop = await call(engine, context, max_tokens=rng.randint(1, 30))
                said.append([*_in_line(normalise(context)), *ids])
                for k, row in enumerate(tiny_llama.scores(context, ids)):
                    assert abs(row[ids[k]] - logprobs[k]) < TOLERANCE
                outs.append((ids, stop))
                context = (*context, ids)
            while engine.stats().active:  # noqa: ASYNC110 - nothing tells
                await anyio.sleep(0.001)
            assert_balanced(engine)
            return outs, engine.stats()

    expected, stats = anyio.run(program, 0)
    assert stats.drafted_tokens == 0
    assert anyio.run(program, most)[0] == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lookup, "guess", oracle(said[:], seed))
        outs, stats = anyio.run(program, most)
    assert outs == expected
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


@pytest.mark.anyio
async def test_right_guesses_take_fewer_steps_and_are_accounted(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with exact(gguf) as engine:
        ids, logprobs, _ = await call(engine, (PROMPT,), max_tokens=100)
    right = [*PROMPT, *ids]
    monkeypatch.setattr(
        Lookup, "guess", lambda self, most: right[len(self._ids) : len(self._ids) + min(most, self._most)]
    )
    async with exact(gguf, speculate=9) as engine:
        same, again, stop = await call(engine, (PROMPT,), max_tokens=100)
        stats = engine.stats()
        assert (same, stop) == (ids, StopReason.LENGTH)
        assert again == pytest.approx(logprobs, abs=TOLERANCE)
        assert stats.decode_tokens == 100
        assert stats.steps == 11, "one that reads the prompt, then ten tokens each"
        assert stats.accepted_tokens == stats.drafted_tokens == 100 - 11


@pytest.mark.anyio
async def test_a_stop_among_guesses_ends_the_call_there(gguf: Path) -> None:
    async with exact(gguf) as engine:
        plain, _, _ = await call(engine, (PROMPT,), max_tokens=60)
    # The call's own continuation stands in its context, so that it is guessed as a whole.
    context = ((*PROMPT, *plain, 47, *PROMPT[-3:]),)
    async with exact(gguf) as engine:
        whole, _, _ = await call(engine, context, max_tokens=40)
        expected = [await call(engine, context, max_tokens=40, stop_ids=(id,)) for id in dict.fromkeys(whole)]
    async with exact(gguf, speculate=16) as engine:
        for id, (ids, _, stop) in zip(dict.fromkeys(whole), expected, strict=True):
            assert (await call(engine, context, max_tokens=40, stop_ids=(id,)))[::2] == (ids, stop)
            follow = ((*context[0], *ids, 1, 2),)
            assert (await call(engine, follow, max_tokens=3))[0], "the next call goes on from its cells"
        assert_balanced(engine)


def test_a_number_out_of_range_is_refused(gguf: Path) -> None:
    for speculate in (-1, 65):
        with pytest.raises(RequestError, match=r"speculate is (-1|65); it must be a number from 0 to 64"):
            exact(gguf, speculate=speculate)
