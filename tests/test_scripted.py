"""The scripted engine beyond the contract: scripts, replays, timing, failures, and engines by name."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import aclosing
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.engines import ENGINES, engine_class, open_engine
from plait.engines.scripted import ScriptedEngine
from plait.errors import ContextLengthError, EngineError, RequestError, UnsupportedJoin
from plait.session import run
from plait.testing.clock import run_virtual
from plait.testing.strategies import Program, programs
from plait.types import Chunk, Context, Merge, SamplingParams, StopReason

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


async def call(engine: ScriptedEngine, context: Context = ((1, 2, 3),), **params: Any) -> list[Chunk]:
    async with aclosing(engine.generate(context, SamplingParams(**{"max_tokens": 6, **params}))) as chunks:
        return [chunk async for chunk in chunks]


async def test_a_script_is_said_up_to_the_first_stop_id() -> None:
    engine = ScriptedEngine(script=lambda context: (7, 8, 9, 10), chunk_size=2)
    chunks = await call(engine, stop_ids=(9,))
    assert [c.token_ids for c in chunks] == [(7, 8), (9,)]
    assert [c.stop for c in chunks] == [None, StopReason.STOP]
    assert [c.stop for c in await call(engine, max_tokens=2)] == [StopReason.LENGTH]


async def test_a_script_that_falls_silent_says_where() -> None:
    with pytest.raises(EngineError, match=r"says 2 ids and then nothing.*3 positions, ending in \[1, 2, 3\]"):
        await call(ScriptedEngine(script=lambda context: (7, 8)))


async def test_a_replay_knows_no_other_context() -> None:
    tree = await anyio_tree()
    with pytest.raises(EngineError, match="no call with this context"):
        await call(ScriptedEngine(script=tree), ((9, 9),))


async def anyio_tree() -> Any:
    from plait.testing.strategies import ToyFormat
    from plait.types import Request

    return await run(Request(prompt_ids=(7,)), engine=ScriptedEngine(vocab_size=9), format=ToyFormat())


@given(program=programs())
def test_a_replayed_tree_is_the_tree(program: Program) -> None:
    tree, _, engine = program.run()
    contexts = Counter(tree.context(s.id) for s in tree.segments.values() if s.sampled_ids)
    if max(contexts.values(), default=1) > 1 and program.request.temperature:
        return  # threads told the same that sampled differently

    async def main() -> None:
        replay = ScriptedEngine(script=tree, max_context=engine.max_context, chunk_size=2)
        assert await run(program.request, engine=replay, format=program.format) == tree

    anyio.run(main)


async def test_weights_make_ids_likely_and_bans_make_them_impossible() -> None:
    engine = ScriptedEngine(vocab_size=8, weights={3: 1000.0})
    ids = [id for chunk in await call(engine, max_tokens=50) for id in chunk.token_ids]
    assert ids.count(3) > 40
    ids = [id for chunk in await call(engine, max_tokens=50, banned_ids=(3, 4)) for id in chunk.token_ids]
    assert set(ids) <= {0, 1, 2, 5, 6, 7}
    assert len(set(ids)) > 3
    with pytest.raises(RequestError, match="all 8 ids that can be sampled are banned"):
        await call(engine, max_tokens=1, banned_ids=tuple(range(9)))
    with pytest.raises(RequestError, match="all 2 ids that can be sampled are banned"):
        await call(ScriptedEngine(vocab_size=3, weights={1: 0}), max_tokens=1, banned_ids=(0, 2))
    assert [
        c.token_ids
        for c in await call(ScriptedEngine(vocab_size=3, script=lambda _: (2,)), max_tokens=1, banned_ids=(2,))
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number of at least 1"),
        ({"chunk_size": 1.5}, "chunk_size is 1.5"),
        ({"max_context": None}, "max_context is None"),
        ({"delay_s": -1}, "delay_s is -1"),
        ({"delay_s": math.nan}, "delay_s is nan"),
        ({"weights": {64: 1.0}}, "an id of weights is 64; it must be a whole number from 0 to 63"),
        ({"weights": {3: -1.0}}, "the weight of 3 is -1.0"),
        ({"vocab_size": 2, "weights": {0: 0, 1: 0}}, "weights of all 2 ids are 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        ScriptedEngine(**options)


async def test_a_context_must_end_in_ids_and_fit() -> None:
    engine = ScriptedEngine(max_context=5)
    for context in ((), ((1,), Merge((((2,),), ((3,),))))):
        with pytest.raises(RequestError, match="must end in at least one token id"):
            await call(engine, context)
    with pytest.raises(ContextLengthError, match="has 5 positions, at most 4 fit"):
        await call(engine, ((1,) * 5,))
    assert [c.stop for c in await call(engine, ((1,) * 3,))] == [None, StopReason.LENGTH]
    assert engine.stats().decode_tokens == 2


async def test_a_merge_is_refused_where_it_is_switched_off() -> None:
    with pytest.raises(UnsupportedJoin, match="supports_merge=False"):
        await call(ScriptedEngine(supports_merge=False), ((1,), Merge((((2,),),)), (3,)))


async def test_it_fails_where_it_is_told_to() -> None:
    def fail(context: Context, said: Any) -> Exception | None:
        return OSError("no more") if len(said) == 3 else None

    engine = ScriptedEngine(fail=fail)
    said: list[int] = []
    with pytest.raises(OSError, match="no more"):  # noqa: PT012
        async with aclosing(engine.generate(((1,),), SamplingParams(max_tokens=9))) as chunks:
            async for chunk in chunks:
                said += chunk.token_ids
                assert engine.stats().active == 1
    assert (len(said), engine.stats().active) == (3, 0)


@given(st.integers(0, 99), st.integers(1, 5))
def test_timing_and_chunks_change_nothing_said(timing: int, size: int) -> None:
    async def main() -> None:
        plain, timed = ScriptedEngine(), ScriptedEngine(timing_seed=timing, chunk_size=size)
        a, b = await call(plain), await call(timed)
        assert [id for c in a for id in c.token_ids] == [id for c in b for id in c.token_ids]
        assert a[-1].stop is b[-1].stop

    anyio.run(main)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_delays_pass_in_virtual_time(backend: str) -> None:
    async def main() -> float:
        start = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            for size in (1, 4):
                tasks.start_soon(call, ScriptedEngine(delay_s=1000.0, chunk_size=size))
        return anyio.current_time() - start

    assert run_virtual(main, backend=backend) == pytest.approx(6000)


async def test_virtual_time_leaves_threads_their_real_time() -> None:
    def main() -> int:
        async def work() -> int:
            await anyio.sleep(100)
            return await anyio.to_thread.run_sync(lambda: 5)

        return run_virtual(work)

    assert await anyio.to_thread.run_sync(main) == 5


async def test_engines_are_opened_by_name() -> None:
    assert "scripted" in ENGINES
    async with open_engine("scripted", vocab_size=9) as engine:
        assert isinstance(engine, engine_class("scripted"))
    with pytest.raises(RequestError, match="unknown engine 'scriptd'; did you mean 'scripted'"):
        open_engine("scriptd")
    with pytest.raises(
        RequestError, match="unknown option of the scripted engine 'vocabsize'; did you mean 'vocab_size'"
    ):
        open_engine("scripted", vocabsize=9)
    with pytest.raises(RequestError, match="chunk_size is 0"):
        open_engine("scripted", chunk_size=0)
