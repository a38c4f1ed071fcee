"""The runtime: what holds for every run (the numbered properties), cancellation, failures, back-pressure, refusals."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.engines.scripted import ScriptedEngine
from plait.errors import ContextLengthError, EngineError, EngineProtocolError, UnsupportedJoin
from plait.events import Event, RunEnded, SegmentStarted, TokensSampled, decode, encode
from plait.session import CHANNEL_SIZE, open_run, run, segment_seed
from plait.testing.clock import run_virtual
from plait.testing.strategies import CLOSE, EOS, FORK, HEADER, JOIN, TEXT, Program, ToyFormat, programs
from plait.tree import Tree
from plait.types import Budget, Chunk, Context, Request, SamplingParams, StopReason

pytestmark = pytest.mark.anyio
backends = st.sampled_from(["asyncio", "trio"])
timings = st.fixed_dictionaries({"timing_seed": st.integers(0, 2**16), "chunk_size": st.integers(1, 4)})


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def wide(**more: Any) -> Program:
    """Forks four threads at once, each of 21 tokens."""

    def script(context: Context) -> list[int]:
        ids = last_ids(context)
        if ids[-1] == JOIN:
            return [7] * 20 + [EOS]
        return [7] * 20 + [CLOSE] if ids[-2:-1] == (HEADER,) else [TEXT + 4, FORK]

    class Scripted(Program):
        def engine(self, **options: Any) -> ScriptedEngine:
            return ScriptedEngine(script=script, **options)

    return Scripted(request=Request(prompt_ids=(8, 9), **more))


def last_ids(context: Context) -> tuple[int, ...]:
    assert isinstance(context[-1], tuple)
    return context[-1]


# Properties ---------------------------------------------------------------------------------------------------------


@given(programs(), backends, timings, timings)
def test_p1_the_tree_is_independent_of_timing_chunks_and_backend(
    program: Program, backend: str, one: dict[str, Any], two: dict[str, Any]
) -> None:
    first, _, _ = program.run(**one)
    second, _, _ = program.run(backend=backend, **two)
    assert first == second
    assert list(first.walk()) == list(second.walk())


@given(programs(), timings)
def test_p2_the_events_fold_to_the_tree_whatever_the_timing(program: Program, timing: dict[str, Any]) -> None:
    tree, events, _ = program.run(**timing)
    assert Tree.from_events(decode(encode(event)) for event in events) == tree


@given(programs(), backends)
def test_p3_the_virtual_wall_clock_of_one_token_a_second_is_the_critical_path(program: Program, backend: str) -> None:
    unlimited = replace(program.request.budget, max_concurrent_threads=None)
    program = replace(program, request=replace(program.request, budget=unlimited))
    tree, events, _ = program.run(backend=backend, delay_s=1.0)
    assert isinstance(events[-1], RunEnded)
    assert round(events[-1].t, 6) == tree.critical_path()


@given(programs(), timings)
def test_p5_what_was_sampled_is_counted_and_scored_once(program: Program, timing: dict[str, Any]) -> None:
    tree, events, engine = program.run(**timing)
    told = sum(len(event.token_ids) for event in events if isinstance(event, TokensSampled))
    assert tree.num_sampled == engine.stats().decode_tokens == told
    assert all(len(s.logprobs) == len(s.sampled_ids) for s in tree.segments.values())


@given(programs(), backends, timings, st.sampled_from(["break", "raise", "cancel"]), st.integers(1, 40))
def test_p6_leaving_early_leaves_no_engine_call_alive(
    program: Program, backend: str, timing: dict[str, Any], how: str, after: int
) -> None:
    engine = program.engine(**timing)

    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with open_run(program.request, engine=engine, format=program.format) as run:
                try:
                    seen: list[Event] = []
                    async for event in run:
                        seen.append(event)
                        if len(seen) < after:
                            continue
                        if how == "break":
                            break
                        if how == "raise":
                            raise ZeroDivisionError
                        scope.cancel()
                finally:
                    pass
        assert engine.stats().active == 0
        assert all(segment.stop is not None for segment in run.tree.segments.values())
        assert Tree.from_events([*seen, *run.pending()]) == run.tree

    try:
        anyio.run(main, backend=backend)
    except ZeroDivisionError:
        assert how == "raise"
    assert engine.stats().active == 0


def over_budget(tree: Tree, request: Request, events: list[Event], max_context: int) -> list[str]:
    """The limits that a tree passes."""
    budget = request.budget
    forks = [len(s.joins) for s in tree.segments.values() if s.joins]
    depth = max(s.thread.count("/") for s in tree.segments.values())
    running: set[str] = set()
    most = 0
    for event in events:
        if isinstance(event, TokensSampled) and "/" in event.id:
            running.add(event.id)
            most = max(most, len(running))
        elif not isinstance(event, TokensSampled):
            running.discard(getattr(event, "id", ""))
    used = {
        "max_threads": tree.num_threads,
        "max_concurrent_threads": most,
        "max_threads_per_fork": max(forks, default=0),
        "max_depth": depth,
        "max_thread_tokens": max(t.num_sampled for t in tree.threads()),
        "max_tokens": tree.num_sampled,
    }
    passed = [name for name, n in used.items() if (limit := getattr(budget, name)) is not None and n > limit]
    return passed + ["max_context"] * (tree.longest_context() > max_context)


@given(programs(), timings)
def test_p11_no_tree_exceeds_its_budget_and_every_join_is_complete(program: Program, timing: dict[str, Any]) -> None:
    tree, events, _ = program.run(**timing)
    assert over_budget(tree, program.request, events, program.max_context) == []
    assert all(s.stop not in (None, StopReason.CANCELLED) for s in tree.segments.values())
    joined = [id for s in tree.segments.values() for id in s.joins]
    assert len(set(joined)) == len(joined) == tree.num_threads
    for id in joined:
        # Whatever happened inside, a thread is closed when its parent reads it.
        last = tree.segments[id].token_ids
        assert last[-1] == CLOSE


@given(programs(), backends)
def test_limited_concurrency_changes_nothing_but_time(program: Program, backend: str) -> None:
    trees: list[Tree] = []
    for places in (1, 2, None):
        budget = replace(program.request.budget, max_concurrent_threads=places)
        again = replace(program, request=replace(program.request, budget=budget))
        tree, events, _ = again.run(backend=backend, delay_s=1.0)
        trees.append(tree)
        if places == 1 and isinstance(events[-1], RunEnded):
            assert round(events[-1].t, 6) == tree.num_sampled
    assert trees[0] == trees[1] == trees[2]


# Order, gates, pressure ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_waiting_threads_start_in_outline_order(backend: str) -> None:
    program = wide(budget=Budget(max_concurrent_threads=1))
    _, events, _ = program.run(backend=backend)
    first: list[str] = []
    for event in events:
        if isinstance(event, TokensSampled) and "/" in event.id and event.id not in first:
            first.append(event.id)
    assert first == [f"0/0.{i}:0" for i in range(4)]


async def test_a_slow_reader_slows_the_engine_down() -> None:
    program = wide()
    engine = program.engine()
    async with open_run(program.request, engine=engine, format=program.format) as run:
        for _ in range(500):
            await anyio.lowlevel.checkpoint()
        ahead = engine.stats().decode_tokens
        assert 0 < ahead <= CHANNEL_SIZE + 5
        events = [event async for event in run]
    assert engine.stats().decode_tokens == run.tree.num_sampled > ahead
    assert isinstance(events[-1], RunEnded)


async def test_a_run_whose_events_nobody_wants_goes_on_to_its_end() -> None:
    program = wide()
    engine = program.engine()
    async with open_run(program.request, engine=engine, format=program.format) as watched:
        for _ in range(500):  # until its writers wait for a reader
            await anyio.lowlevel.checkpoint()
        with anyio.fail_after(40):
            await watched.ended()
        assert watched.pending() == []
    assert watched.tree.stop is not None
    assert watched.tree == await run(program.request, engine=program.engine(), format=program.format)


async def test_seeds_follow_the_place_in_the_program() -> None:
    seeds: dict[str, int] = {}

    class Spy(ScriptedEngine):
        async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
            seeds[str(context)] = params.seed
            async with aclosing(super().generate(context, params)) as chunks:
                async for chunk in chunks:
                    yield chunk

    tree = await run(Request(prompt_ids=(8,), seed=3), engine=Spy(vocab_size=9), format=ToyFormat())
    assert seeds == {str(tree.context(id)): segment_seed(3, id) for id, s in tree.segments.items() if s.sampled_ids}
    assert segment_seed(3, "0:0") != segment_seed(4, "0:0")
    assert 0 <= segment_seed(3, "0:0") < 2**63


async def test_a_reader_that_comes_back_gets_every_event_once() -> None:
    program = wide()
    async with open_run(program.request, engine=program.engine(), format=program.format) as run:
        events: list[Event] = []
        for size in (3, 50, 10**6):
            async for event in run:
                events.append(event)
                if len(events) >= size:
                    break
        assert [event async for event in run] == []
    assert Tree.from_events(events) == run.tree


async def test_runs_of_one_engine_do_not_meet() -> None:
    program = wide()
    engine = program.engine(timing_seed=1)
    trees: list[Tree] = []

    async def one() -> None:
        trees.append(await run(program.request, engine=engine, format=program.format))

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(one)
    assert all(tree == trees[0] for tree in trees)


# Failures -----------------------------------------------------------------------------------------------------------


def failing(*headers: int, at: int = 3, error: type[Exception] = OSError) -> Any:
    """Fails in the threads with these numbers after so many tokens."""

    def fail(context: Context, said: Any) -> Exception | None:
        ids = last_ids(context)
        number = ids[-1] - TEXT if ids[-2] == HEADER else -1
        return error(f"thread {number} broke") if number in headers and len(said) == at else None

    return fail


async def test_a_failed_branch_fails_the_run_bare_and_frees_the_engine() -> None:
    program = wide()
    engine = program.engine(fail=failing(2))
    with pytest.raises(EngineError, match="the scripted engine failed: OSError: thread 2 broke") as info:
        await run(program.request, engine=engine, format=program.format)
    assert isinstance(info.value.__cause__, OSError)
    assert engine.stats().active == 0


async def test_an_error_of_plaits_own_is_not_wrapped() -> None:
    program = wide()
    engine = program.engine(fail=failing(2, error=ContextLengthError))
    with pytest.raises(ContextLengthError, match=r"^thread 2 broke"):
        await run(program.request, engine=engine, format=program.format)


async def test_later_failures_are_notes_of_the_first() -> None:
    numbers = count()

    class FailsAgain(ScriptedEngine):
        async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
            try:
                async with aclosing(super().generate(context, params)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except anyio.get_cancelled_exc_class():
                raise OSError(f"and number {next(numbers)}") from None

    program = wide()
    engine = FailsAgain(script=program.engine()._script, fail=failing(3))  # pyright: ignore
    with pytest.raises(EngineError, match="thread 3 broke") as info:
        await run(program.request, engine=engine, format=program.format)
    notes = info.value.__notes__
    assert len(notes) == 3
    assert all(any(f"and number {i}" in note for note in notes) for i in range(3))
    assert engine.stats().active == 0


async def test_the_tree_of_a_failed_run_says_what_was_cut_off() -> None:
    program = wide()
    with pytest.raises(EngineError):  # noqa: PT012
        async with open_run(program.request, engine=program.engine(fail=failing(1)), format=program.format) as run:
            async for _ in run:
                pass
    cut = [s for s in run.tree.segments.values() if s.stop is StopReason.CANCELLED]
    assert len(cut) == 4
    assert "the run failed: the scripted engine failed: OSError: thread 1 broke" in cut[0].note
    assert run.tree.stop is None


async def test_a_readers_own_error_comes_out_as_it_is() -> None:
    program = wide()
    with pytest.raises(KeyError) as info:
        async with open_run(program.request, engine=program.engine(), format=program.format):
            raise KeyError("mine")
    assert info.value.__cause__ is None
    group = ExceptionGroup("mine", [KeyError(), OSError()])
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
        async with open_run(program.request, engine=program.engine(), format=program.format) as run:
            async for _ in run:
                raise group
    assert caught.value is group


async def test_cancelling_from_outside_is_a_cancellation_not_an_error() -> None:
    program = wide()
    engine = program.engine(timing_seed=2)
    with anyio.move_on_after(0.005) as scope:
        while True:
            await run(program.request, engine=engine, format=program.format)
    assert scope.cancelled_caught
    assert engine.stats().active == 0


@pytest.mark.parametrize(
    ("chunks", "clause"),
    [
        ([Chunk(token_ids=(7,) * 99, logprobs=(0.0,) * 99)], "C3: more than max_tokens=20"),
        ([Chunk(token_ids=(7,), logprobs=())], "C6: a chunk has not one log-probability"),
        ([Chunk(token_ids=(7,), logprobs=(0.0,))], "C5: .* without a stop reason"),
        ([Chunk(token_ids=(7,), logprobs=(0.0,), stop=StopReason.STOP)], "C4: a call stopped with 'stop'"),
        ([Chunk(token_ids=(), logprobs=(), stop=StopReason.LENGTH)], "C4: a call stopped with 'length'"),
        ([Chunk(token_ids=(7,), logprobs=(0.0,), stop=StopReason.BUDGET)], "C4: a call stopped with 'budget'"),
    ],
)
async def test_an_engine_that_breaks_its_contract_is_named(chunks: list[Chunk], clause: str) -> None:
    class Broken(ScriptedEngine):
        async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
            for chunk in chunks:
                yield chunk

    with pytest.raises(EngineProtocolError, match=clause):
        await run(Request(prompt_ids=(8,), budget=Budget(max_tokens=20)), engine=Broken(), format=ToyFormat())


# Refusals before the first token ------------------------------------------------------------------------------------


async def test_a_merge_format_on_an_engine_without_merge_is_refused_before_sampling() -> None:
    engine = ScriptedEngine(supports_merge=False)
    with pytest.raises(
        UnsupportedJoin, match=r"the toy format .* the scripted engine .* \(llamacpp, torch, scripted\)"
    ):
        async with open_run(Request(prompt_ids=(8,)), engine=engine, format=ToyFormat(join_kind="merge")):
            pytest.fail("the run was opened")
    assert engine.stats().decode_tokens == 0


async def test_a_prompt_that_does_not_fit_is_refused_before_sampling() -> None:
    engine = ScriptedEngine(max_context=4)
    with pytest.raises(ContextLengthError, match=r"the prompt has 4 tokens.* at most 3 leave room"):
        await run(Request(prompt_ids=(8,) * 4), engine=engine, format=ToyFormat())
    assert engine.stats().decode_tokens == 0
    tree = await run(Request(prompt_ids=(8,) * 3), engine=engine, format=ToyFormat())
    assert tree.num_sampled == 1


async def test_meta_names_engine_format_and_budget() -> None:
    program = wide()
    async with open_run(program.request, engine=program.engine(), format=program.format, meta={"question": "?"}) as run:
        pass
    async with open_run(program.request, engine=program.engine(), format=program.format, meta={"question": "?"}) as run:
        await anext(aiter(run))
    assert run.tree.meta["question"] == "?"
    assert (run.tree.meta["engine"], run.tree.meta["format"]) == ("scripted", "toy")
    assert run.tree.meta["budget"]["max_threads"] == 64


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_events_carry_the_time_since_the_start(backend: str) -> None:
    async def main() -> list[Event]:
        await anyio.sleep(50)
        program = wide()
        async with open_run(program.request, engine=program.engine(delay_s=1.0), format=program.format) as run:
            return [event async for event in run]

    events = run_virtual(main, backend=backend)
    started = {event.id: event.t for event in events if isinstance(event, SegmentStarted)}
    assert [round(started[id], 6) for id in ("0:0", "0/0.0:0", "0/0.3:0", "0:1")] == [0, 2, 2, 23]
