"""HTTP engines against small true servers on loopback: the contract in every dialect, faults, placement, cancelling."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.abc
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("httpx2", reason="needs the http extra")

import clocks
import fake_servers
from fake_servers import (
    CONTROL,
    VOCAB,
    FakeCompletions,
    FakeLlamaServer,
    FakeServer,
    FakeSglang,
    FakeVllm,
    Fault,
)
from plait.engines.http import HttpEngine, Timeouts, affinity, probe
from plait.engines.http.client import EventParser
from plait.engines.http.engine import base_urls, read_metrics
from plait.engines.http.placement import Placement
from plait.errors import (
    ContextLengthError,
    EngineError,
    EngineProtocolError,
    EngineTimeout,
    EngineUnavailable,
    RequestError,
    UnsupportedJoin,
)
from plait.session import open_run, run
from plait.testing.conformance import check_engine
from plait.testing.strategies import CLOSE, EOS, FORK, HEADER, TEXT, ToyFormat
from plait.types import Budget, Request, SamplingParams, StopReason

pytestmark = pytest.mark.anyio

PROMPT = tuple(range(10, 30))
QUICK = Timeouts(connect_s=10, first_token_s=10, next_token_s=10, probe_s=10)


@pytest.fixture(params=[clocks.ASYNCIO, clocks.TRIO], ids=lambda backend: backend[0])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else value[0]


def only_on_asyncio(test: Any) -> Any:
    """What does not touch the event loop is tested on one."""
    return pytest.mark.parametrize("anyio_backend", [clocks.ASYNCIO], ids=["asyncio"])(test)


@asynccontextmanager
async def opened(*servers: FakeServer, **options: Any) -> AsyncIterator[HttpEngine]:
    """An engine over servers; what the probe asked of them is forgotten."""
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(server.serve()) for server in servers]
        engine = await stack.enter_async_context(HttpEngine(urls, **{"timeouts": QUICK, **options}))
        for server in servers:
            server.seen.clear()
        yield engine


async def call(
    engine: HttpEngine, ids: tuple[int, ...] = PROMPT, *, into: list[int] | None = None, **params: Any
) -> tuple[list[int], StopReason | None]:
    sampled: list[int] = [] if into is None else into
    stop = None
    async with aclosing(engine.generate((ids,), SamplingParams(**{"max_tokens": 6, **params}))) as chunks:
        async for chunk in chunks:
            sampled += chunk.token_ids
            stop = chunk.stop
    return sampled, stop


async def said_by_the_model(ids: tuple[int, ...] = PROMPT, max_tokens: int = 6) -> list[int]:
    sampled: list[int] = []
    async with aclosing(FakeVllm().model().generate((ids,), SamplingParams(max_tokens=max_tokens))) as chunks:
        async for chunk in chunks:
            sampled += chunk.token_ids
    return sampled


async def eventually(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(1000):  # of a clock that may be put forward
        while not holds():  # noqa: ASYNC110 - a server of its own has no event to wait for
            await anyio.sleep(0.002)


def once(holds: Callable[[], bool]) -> Callable[[], Awaitable[None]]:
    """Wait until it has held once."""
    held: list[bool] = []

    async def wait() -> None:
        await eventually(lambda: bool(held) or holds())
        held.append(True)

    return wait


@asynccontextmanager
async def hurried() -> AsyncIterator[None]:
    """Time flies here."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(clocks.sleep, 3600)
        yield
        tasks.cancel_scope.cancel()


DIALECTS: dict[str, tuple[Callable[..., FakeServer], str, str]] = {
    "vllm native": (FakeVllm, "vllm", "/inference/v1/generate"),
    "vllm completions": (lambda **o: FakeVllm(native=False, **o), "vllm", "/v1/completions"),
    "sglang": (FakeSglang, "sglang", "/generate"),
    "sglang incremental": (lambda **o: FakeSglang(incremental=True, **o), "sglang", "/generate"),
    "llama-server": (FakeLlamaServer, "llama-server", "/completion"),
    "completions": (FakeCompletions, "completions", "/v1/completions"),
}


# The contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "anyio_backend"),
    [*((d, clocks.ASYNCIO) for d in DIALECTS), ("vllm native", clocks.TRIO), ("llama-server", clocks.TRIO)],
    ids=name_of,
)
async def test_every_dialect_obeys_every_clause(dialect: str) -> None:
    make, kind, route = DIALECTS[dialect]
    # The server's own end-of-sequence is no eos id of these calls: they have to go on behind it.
    server = make(own_eos=None if dialect == "completions" else 7, max_context=200)
    async with server.serve():
        engine = HttpEngine(server.url, timeouts=QUICK, max_context=200, vocab_size=VOCAB)
        # The fake model finds all tokens alike: with any tolerance, whatever comes back would be a tie.
        checked = await check_engine(lambda: engine, vocab_size=VOCAB, tolerance=0)
        assert checked == [*(f"C{i}" for i in range(1, 10)), "M0", "C10"]
        assert (engine.servers[0].kind, engine.servers[0].route, engine.max_context) == (kind, route, 200)


@only_on_asyncio
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_server_ends_a_call_itself_or_its_stream_is_closed(dialect: str) -> None:
    make, *_ = DIALECTS[dialect]
    said = await said_by_the_model(max_tokens=20)
    stop = said[3]
    cut = said[: said.index(stop) + 1]
    server = make(token_s=0.002)
    async with opened(server) as engine:
        assert await call(engine, max_tokens=300, stop_ids=(stop,)) == (cut, StopReason.STOP)
        await eventually(lambda: not server.running)
        assert server.aborted == (1 if dialect == "completions" else 0)


@only_on_asyncio
async def test_several_tokens_in_one_event_are_cut_at_the_stop_and_at_the_limit() -> None:
    said = await said_by_the_model(max_tokens=20)
    stop = said[4]
    async with opened(FakeCompletions(chunk_size=7)) as engine:
        cut = said[: said.index(stop) + 1]
        assert await call(engine, max_tokens=20, stop_ids=(stop,)) == (cut, StopReason.STOP)
        assert await call(engine, max_tokens=10) == (said[:10], StopReason.LENGTH)
    async with opened(FakeSglang(chunk_size=3)) as engine:
        assert (await call(engine, max_tokens=20))[0] == said


@pytest.mark.parametrize(
    ("dialect", "anyio_backend"),
    [*((d, clocks.ASYNCIO) for d in DIALECTS), ("completions", clocks.TRIO), ("sglang", clocks.TRIO)],
    ids=name_of,
)
async def test_tokens_that_arrive_at_once_are_one_chunk_up_to_the_stop(dialect: str) -> None:
    said = await said_by_the_model(max_tokens=20)
    stop = said[3]
    cut = said[: said.index(stop) + 1]
    async with opened(DIALECTS[dialect][0](together=True)) as engine:
        for params, expected in (
            ({"max_tokens": 20, "stop_ids": (stop,)}, (cut, StopReason.STOP)),
            ({"max_tokens": 20, "eos_ids": (stop,)}, (cut, StopReason.EOS)),
            ({"max_tokens": 6}, (said[:6], StopReason.LENGTH)),
        ):
            asked = SamplingParams(**params)
            chunks = [chunk async for chunk in engine.generate((PROMPT,), asked)]
            # A llama-server may stop at the spelling of a stop before, and is asked to go on.
            assert len(chunks) == 1 or dialect == "llama-server"
            assert ([id for chunk in chunks for id in chunk.token_ids], chunks[-1].stop) == expected
        assert engine.stats().decode_tokens == 2 * len(cut) + 6


@only_on_asyncio
async def test_a_control_token_stops_a_llama_server() -> None:
    server = FakeLlamaServer(weights={41: 30.0}, token_s=0.001)
    async with opened(server) as engine:
        sampled, stop = await call(engine, max_tokens=300, stop_ids=(41,))
        assert (sampled[-1], stop, sampled.count(41)) == (41, StopReason.STOP, 1)
        assert server.seen[-1].body["preserved_tokens"] == [CONTROL[41]]
        await eventually(lambda: not server.running)
        assert server.aborted == 0, "the server ended the call itself"


@only_on_asyncio
async def test_a_stop_that_a_llama_server_cannot_spell_is_not_named_to_it() -> None:
    server = FakeLlamaServer(weights={41: 30.0, 42: 30.0}, token_s=0.001, unspelt=frozenset({CONTROL[41]}))
    async with opened(server) as engine:
        sampled, stop = await call(engine, max_tokens=300, stop_ids=(41,))
        assert (sampled[-1], stop, sampled.count(41)) == (41, StopReason.STOP, 1)
        await eventually(lambda: server.aborted == 1)
        await call(engine, max_tokens=3, stop_ids=(41, 42))
    assert [seen.body["preserved_tokens"] for seen in server.seen[-2:]] == [[], [CONTROL[42]]]


@only_on_asyncio
async def test_a_llama_server_that_stops_at_the_spelling_of_a_stop_is_asked_to_go_on() -> None:
    said = await said_by_the_model(max_tokens=60)
    # The text of id 3, "3,", also ends "13,".
    stop = next(d for d in range(1, 10) if any(id > 10 and id % 10 == d for id in said[: (*said, d).index(d)]))
    cut = (*said, stop).index(stop) + 1
    server = FakeLlamaServer()
    async with opened(server) as engine:
        sampled, _ = await call(engine, max_tokens=60, stop_ids=(stop,))
    assert sampled == said[:cut]
    assert len(server.seen) > 1


@only_on_asyncio
async def test_what_is_asked_leaves_nothing_to_the_defaults_of_a_server() -> None:
    async with opened(FakeLlamaServer()) as engine:
        await call(engine, temperature=0.7, top_p=0.9, top_k=5, seed=2**40)
    for native in (True, False):
        server = FakeVllm(native=native)
        async with opened(server) as engine:
            await call(engine, temperature=0.7, top_p=0.9, top_k=5, seed=2**40)
            body = server.seen[0].body
            params = body["sampling_params"] if native else body
            wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 2**40, "repetition_penalty": 1.0}
            assert wanted.items() <= params.items()


@only_on_asyncio
async def test_banned_ids_take_the_route_that_knows_them() -> None:
    server = FakeVllm()
    async with opened(server) as engine:
        sampled, _ = await call(engine, max_tokens=40, banned_ids=(3,))
        assert 3 not in sampled
        assert [seen.path for seen in server.seen] == ["/v1/completions"]


@only_on_asyncio
async def test_without_logprobs_every_token_has_zero() -> None:
    server = FakeVllm()
    async with (
        opened(server) as engine,
        aclosing(engine.generate((PROMPT,), SamplingParams(max_tokens=4, logprobs=False))) as chunks,
    ):
        assert [p async for chunk in chunks for p in chunk.logprobs] == [0.0] * 4
    assert server.seen[0].body["sampling_params"]["logprobs"] is None


# Forks and joins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["vllm native", "sglang", "llama-server"])
async def test_a_run_over_http_is_the_run_in_process(dialect: str) -> None:
    weights = {FORK: 6.0, CLOSE: 3.0, EOS: 0.5}
    server = DIALECTS[dialect][0](weights=weights, max_context=4096)
    request = Request(prompt_ids=PROMPT, budget=Budget(max_threads=12, max_tokens=150, max_depth=2))
    reference = await run(request, engine=server.model(), format=ToyFormat())
    assert reference.usage().threads > 2
    async with opened(server) as engine:
        tree = await run(request, engine=engine, format=ToyFormat())
    assert shape(tree) == shape(reference)
    keys = {seen.headers["x-session-id"] for seen in server.seen}
    assert len(server.seen) > 3
    assert len(keys) == 1, "threads of a run share a key"


def shape(tree: Any) -> dict[str, Any]:
    return {s.id: (s.parent, s.joins, s.forced_ids, tuple(s.sampled_ids), s.stop) for s in tree.segments.values()}


@only_on_asyncio
async def test_a_format_that_merges_is_refused_before_anything_is_sent() -> None:
    server = FakeVllm()
    async with opened(server) as engine:
        with pytest.raises(UnsupportedJoin, match="llamacpp"):
            await run(Request(prompt_ids=PROMPT), engine=engine, format=ToyFormat(join_kind="merge"))
        assert server.seen == []


@only_on_asyncio
async def test_forks_find_their_prefix_on_the_replica_that_ran_it() -> None:
    first, second = FakeVllm(), FakeVllm()
    async with opened(first, second) as engine:
        for start in (0, 20, 1):
            prompt = tuple((start + k) % 40 for k in range(40))
            parent, _ = await call(engine, prompt)
            async with anyio.create_task_group() as forks:
                for k in range(4):
                    forks.start_soon(call, engine, (*prompt, *parent, 41, k))
        by_key = {}
        for server in (first, second):
            for seen in server.seen:
                by_key.setdefault(seen.headers["x-session-id"], []).append((server, seen))
        assert sorted(map(len, by_key.values())) == [5, 5, 5]
        for calls in by_key.values():
            assert len({id(server) for server, _ in calls}) == 1
            assert all(seen.cached >= 32 for _, seen in calls[1:])
            assert {seen.headers["x-smg-routing-key"] for _, seen in calls} == {
                seen.headers["x-session-id"] for _, seen in calls
            }
        stats = engine.stats()
        assert stats.reused_tokens == sum(s.cached for server in (first, second) for s in server.seen)
        assert stats.prefill_tokens + stats.reused_tokens == sum(
            len(s.body["token_ids"]) for server in (first, second) for s in server.seen
        )


async def test_calls_at_once_on_a_cold_prefix_prefill_it_once() -> None:
    prefix = tuple(k % 37 for k in range(160))
    for share, computed in ((True, 1), (False, 4)):
        server = FakeVllm()
        async with opened(server, share_prefill=share) as engine, anyio.create_task_group() as calls:
            # Nobody's prompt is computed before all have come as far as they can.
            server.prefill = once(lambda e=engine, n=computed, s=server: (e.stats().active, s.running) == (4, n))
            for k in range(4):
                calls.start_soon(call, engine, (*prefix, k, k))
        assert sum(seen.cached < 100 for seen in server.seen) == computed


async def test_a_failed_prefill_lets_those_who_waited_go_on() -> None:
    server = FakeVllm()
    prefix = tuple(k % 37 for k in range(160))
    outcomes: list[Any] = []

    async def one(engine: HttpEngine, k: int) -> None:
        try:
            outcomes.append((await call(engine, (*prefix, k)))[1])
        except EngineError as exc:
            outcomes.append(type(exc))

    async with opened(server) as engine:
        server.faults.append(Fault(kind="html"))
        async with anyio.create_task_group() as calls:
            for k in range(3):
                calls.start_soon(one, engine, k)
    assert sorted(map(str, outcomes)) == sorted(map(str, [EngineProtocolError, StopReason.LENGTH, StopReason.LENGTH]))


async def test_calls_that_wait_for_a_prefill_that_stalls_wait_no_longer_than_their_own_limit() -> None:
    server = FakeVllm()
    prefix = tuple(k % 37 for k in range(160))
    took: list[float] = []

    async def one(engine: HttpEngine, k: int) -> None:
        with pytest.raises(EngineTimeout, match="no token came within 60 s"):
            await call(engine, (*prefix, k))
        took.append(anyio.current_time() - started)

    async with opened(server, timeouts=Timeouts(first_token_s=60)) as engine:
        server.trap = lambda body: Fault(kind="slow", seconds=300)
        started = anyio.current_time()
        async with anyio.create_task_group() as calls:
            for k in range(5):
                calls.start_soon(one, engine, k)
    assert max(took) < 110
    assert len(server.seen) == 5, "each asked for itself in the end"


async def test_one_prefill_that_stalls_does_not_fail_those_who_waited_for_it() -> None:
    server = FakeVllm()
    prefix = tuple(k % 37 for k in range(160))
    outcomes: list[Any] = []

    async def one(engine: HttpEngine, k: int) -> None:
        try:
            outcomes.append((await call(engine, (*prefix, k)))[1])
        except EngineTimeout as exc:
            outcomes.append(type(exc))

    async with opened(server) as engine:
        server.faults.append(Fault(kind="slow", seconds=30))
        async with anyio.create_task_group() as calls:
            for k in range(3):
                calls.start_soon(one, engine, k)
    assert outcomes == [StopReason.LENGTH, StopReason.LENGTH, EngineTimeout]


@only_on_asyncio
async def test_a_call_that_never_began_is_no_relative() -> None:
    placement = Placement(2)
    first = placement.enter((1, 2, 3))
    placement.leave(first, (1, 2, 3))
    second = placement.enter((1, 2, 3))
    assert second.key != first.key
    placement.begin(second)
    placement.leave(second, (1, 2, 3, 4))
    assert [placement.enter(ids).key == second.key for ids in ((1, 2, 3, 4, 9), (1, 2, 3), (1, 2, 9))] == [1, 1, 0]
    assert placement.active == [2, 1]


@only_on_asyncio
async def test_a_busy_replica_passes_work_on() -> None:
    first, second = FakeVllm(token_s=0.01), FakeVllm(token_s=0.01)
    async with opened(first, second) as engine:
        engine._placement._spread = 2
        said, _ = await call(engine, PROMPT, max_tokens=1)
        async with anyio.create_task_group() as calls:
            for k in range(6):
                calls.start_soon(call, engine, (*PROMPT, *said, k))
        assert min(len(first.seen), len(second.seen)) >= 2


async def test_what_a_caller_states_reaches_the_server() -> None:
    completions, sglang = FakeVllm(native=False), FakeSglang()
    async with opened(completions) as engine:
        with affinity("run-7", cache_salt="tenant-a"):
            async with anyio.create_task_group() as calls:
                calls.start_soon(call, engine, (1, 2, 3))
                calls.start_soon(call, engine, (4, 5, 6))
        for seen in completions.seen:
            assert (seen.body["session_id"], seen.body["cache_salt"]) == ("run-7", "tenant-a")
            assert seen.headers["x-session-id"] == "run-7"
        await call(engine, (1, 2, 3))
        assert "cache_salt" not in completions.seen[-1].body
        assert completions.seen[-1].body["session_id"] != "run-7"
    async with opened(sglang) as engine:
        with affinity("run-7", cache_salt="tenant-a"):
            await call(engine)
        assert (sglang.seen[0].body["routing_key"], sglang.seen[0].body["extra_key"]) == ("run-7", "tenant-a")


@only_on_asyncio
@pytest.mark.parametrize(
    ("key", "salt"), [("", None), ("a\nb", None), (" k", None), ("k", "a@b"), ("k", "x" * 129), ("k", "")]
)
async def test_keys_and_salts_that_servers_refuse_are_refused_here(key: str, salt: str | None) -> None:
    with pytest.raises(RequestError), affinity(key, cache_salt=salt):
        pass


# Cancellation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_leaving_a_call_ends_it_on_the_server(dialect: str) -> None:
    server = DIALECTS[dialect][0](token_s=0.005, max_context=4096)
    async with opened(server) as engine:
        async with aclosing(engine.generate((PROMPT,), SamplingParams(max_tokens=2000))) as chunks:
            await anext(chunks)
            assert server.running == 1
        await eventually(lambda: not server.running and server.aborted == 1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(call, engine, max_tokens=2000))
            await eventually(lambda: server.running == 1)
            tasks.cancel_scope.cancel()
        await eventually(lambda: not server.running and server.aborted == 2)
        assert engine.stats().active == 0
        assert (await call(engine))[1] is StopReason.LENGTH


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("garbage", EngineProtocolError),
        ("cut", EngineError),
        ("error", EngineError),
        ("abort", EngineError),
        ("stall", EngineTimeout),
    ],
)
async def test_a_fault_in_the_middle_of_a_fork_ends_the_siblings_and_joins_nothing(
    kind: Any, error: type[EngineError]
) -> None:
    server = FakeVllm(token_s=0.002, weights={FORK: 8.0, CLOSE: 0.001, EOS: 0.001}, max_context=4096)
    # After this prompt the model forks four branches at once.
    request = Request(prompt_ids=tuple(range(12, 32)), budget=Budget(max_threads=4, max_tokens=400, max_depth=1))
    async with opened(server) as engine:
        fault = Fault(kind=kind, after=5, seconds=30)
        server.trap = lambda body: fault if body.get("token_ids", [])[-2:] == [HEADER, TEXT + 1] else None
        async with AsyncExitStack() as stack:
            stack.enter_context(pytest.raises(error))
            run = await stack.enter_async_context(open_run(request, engine=engine, format=ToyFormat(nested=False)))
            async for _ in run:
                pass
        tree = run.tree
        branches = [s for s in tree.segments.values() if s.thread != "0"]
        assert len({s.thread for s in branches}) == 4
        # A sibling may end before the fault is noticed: then the runtime wrote its closer, and nothing more.
        assert not any(s.sampled_ids for s in branches if not s.id.endswith(":0"))
        assert not any(s.joins for s in tree.segments.values())
        assert tree.segments["0:0"].stop is StopReason.STOP
        await eventually(lambda: not server.running)
        assert engine.stats().active == 0


def test_an_engine_of_another_event_loop_is_refused_and_can_be_closed() -> None:
    async def made() -> HttpEngine:
        async with FakeVllm().serve() as url:
            engine = await HttpEngine(url).__aenter__()
            assert engine._client is not None
            await engine._client.aclose()  # so that no socket outlives the loop it belongs to
            return engine

    async def use_and_close(engine: HttpEngine) -> None:
        with pytest.raises(EngineUnavailable, match="another event loop"):
            await call(engine)
        await engine.aclose()

    for backend in ("asyncio", "trio"):
        anyio.run(use_and_close, anyio.run(made, backend=backend), backend=backend)


async def test_closing_the_engine_ends_calls_that_run() -> None:
    server = FakeVllm(token_s=0.01)
    async with opened(server, retries=0) as engine, anyio.create_task_group() as tasks:

        async def one() -> None:
            with pytest.raises(EngineError):
                await call(engine, max_tokens=300)

        tasks.start_soon(one)
        await eventually(lambda: server.running == 1)
        await engine.aclose()
    assert server.running == 0


@only_on_asyncio
async def test_connections_are_used_again() -> None:
    server = FakeVllm()
    async with opened(server) as engine:
        before = server.connections
        for _ in range(5):
            await call(engine)
        assert server.connections - before <= 1


async def test_no_more_calls_than_allowed_run_at_once() -> None:
    server = FakeVllm()
    async with opened(server, max_calls=2) as engine, anyio.create_task_group() as calls:
        server.prefill = once(lambda: (server.running, engine.stats().queued) == (2, 4) or server.most > 2)
        for k in range(6):
            calls.start_soon(call, engine, tuple(range(k, k + 20)))
    assert (server.most, len(server.seen)) == (2, 6)


# Faults -------------------------------------------------------------------------------------------------------------


@only_on_asyncio
@pytest.mark.parametrize("kind", ["503", "500", "cut", "error", "silent"])
async def test_what_fails_before_the_first_token_is_sent_again(kind: Any) -> None:
    server = FakeVllm()
    async with opened(server) as engine:
        server.faults.append(Fault(kind=kind))
        assert (await call(engine))[0] == await said_by_the_model()
        assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("cut", EngineError, "broke off"),
        ("error", EngineError, "the engine died"),
        ("silent", EngineError, "without saying why"),
        ("garbage", EngineProtocolError, "not JSON"),
        ("abort", EngineError, "aborted"),
        ("stall", EngineTimeout, "no further token came within 10 s"),
    ],
)
async def test_what_fails_after_a_token_is_an_error_at_once(kind: Any, error: type[EngineError], says: str) -> None:
    server = FakeVllm()
    async with opened(server) as engine:
        server.faults.append(Fault(kind=kind, after=3, seconds=30))
        got: list[int] = []
        with pytest.raises(error, match=says):
            await call(engine, into=got)
        assert got == (await said_by_the_model())[: len(got)]
        assert len(server.seen) == 1
        await eventually(lambda: not server.running)
        assert engine.stats().active == 0


async def test_a_slow_first_token_is_waited_for_and_then_given_up() -> None:
    server = FakeVllm()
    async with opened(server, timeouts=Timeouts(first_token_s=60, next_token_s=20)) as engine:
        server.faults.append(Fault(kind="slow", seconds=30))
        assert (await call(engine))[1] is StopReason.LENGTH
        server.faults.append(Fault(kind="slow", seconds=90))
        with pytest.raises(EngineTimeout, match="no token came within"):
            await call(engine)
        assert len(server.seen) == 2, "a timeout is not tried again"
        await eventually(lambda: not server.running)


async def test_pings_are_no_tokens() -> None:
    server = FakeVllm()
    async with opened(server) as engine:
        server.faults.append(Fault(kind="pings", after=2, seconds=60))
        with pytest.raises(EngineTimeout, match="no further token came within 10 s"):
            await call(engine)
        await eventually(lambda: not server.running)


async def test_a_reader_that_takes_its_time_is_no_slow_server() -> None:
    async with opened(FakeVllm(token_s=0.01)) as engine:
        sampled: list[int] = []
        async with aclosing(engine.generate((PROMPT,), SamplingParams(max_tokens=6))) as chunks:
            async for chunk in chunks:
                sampled += chunk.token_ids
                await clocks.sleep(15 if len(sampled) < 3 else 0)
        assert sampled == await said_by_the_model()


@only_on_asyncio
@pytest.mark.parametrize("native", [True, False])
async def test_what_a_server_refuses_after_it_began_to_answer_is_refused(native: bool) -> None:
    server = FakeVllm(native=native)
    async with opened(server) as engine:
        with pytest.raises(EngineProtocolError, match=f"Token id {VOCAB} is out of vocabulary"):
            await call(engine, (1, VOCAB))
        server.max_context = 10
        with pytest.raises(ContextLengthError):
            await call(engine)
        assert len(server.seen) == 2, "what is refused is not sent again"


@given(st.lists(st.integers(0, 200), max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_events_are_read_alike_however_they_are_cut(cuts: list[int], end: str) -> None:
    lines = [
        ": ping",
        "",
        "event: x",
        'data: {"a": 1}',
        "",
        "data:[2,",
        "data: 3]",
        "id: 7",
        "",
        "data:",
        "",
        "data: cut",
    ]
    stream = end.join(lines).encode()
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parser = EventParser()
    parts = [stream[a:b] for a, b in pairwise(bounds)]
    assert [data for part in parts for data in parser.feed(part)] == [b'{"a": 1}', b"[2,\n3]", b""]


def test_an_event_without_an_end_is_given_up() -> None:
    parser = EventParser()
    parser.feed(b"data: " + b"x" * 1_000_000 + b"\ndata: ")
    with pytest.raises(EngineProtocolError, match="more than 1048576 bytes"):
        parser.feed(b"x" * 100_000)


@only_on_asyncio
async def test_a_server_that_stays_busy_is_given_up_and_its_wish_to_wait_is_heard() -> None:
    server = FakeVllm()
    async with opened(server, retries=2) as engine:
        server.faults += [Fault(kind="503")] * 3
        async with hurried():
            with pytest.raises(EngineUnavailable, match="no room"):
                await call(engine)
            assert len(server.seen) == 3
            server.faults.append(Fault(kind="503", retry_after="4"))
            before = anyio.current_time()
            await call(engine)
            assert anyio.current_time() - before >= 4


@only_on_asyncio
async def test_answers_that_no_server_should_give_name_the_clause() -> None:
    server = FakeVllm()
    said = await said_by_the_model()
    async with opened(server) as engine:
        server.faults.append(Fault(kind="html"))
        with pytest.raises(EngineProtocolError, match="event stream"):
            await call(engine)
        server.heeds_bans = False
        with pytest.raises(EngineProtocolError, match="C4: the server sampled a banned id"):
            await call(engine, banned_ids=(said[2],))


@only_on_asyncio
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("usage", [{"prompt_tokens": "many"}, {"prompt_tokens": math.nan}, {"prompt_tokens": -3}, [1]])
async def test_counts_that_are_none_are_refused(native: bool, usage: Any) -> None:
    server = FakeVllm(native=native)
    async with opened(server) as engine:
        server.spoil = lambda event: event.update(usage=usage)
        with pytest.raises(EngineProtocolError, match=r"the server counts|not the documented shape"):
            await call(engine)


@only_on_asyncio
async def test_json_that_is_nested_too_deeply_is_refused_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "[" * 100_000
    server = FakeVllm()
    async with opened(server) as engine:
        monkeypatch.setattr(fake_servers, "json", SimpleNamespace(dumps=lambda value: deep, loads=json.loads))
        with pytest.raises(EngineProtocolError, match="not JSON"):
            await call(engine)
        # Not so in the page of an error, which may hold anything.
        server.faults.append(Fault(kind="500"))
        with pytest.raises(EngineProtocolError, match="not JSON"):
            await call(engine)
        assert len(server.seen) == 3


@only_on_asyncio
async def test_what_is_said_of_an_error_is_short_however_deep_it_is_nested() -> None:
    error: Any = "end"
    for _ in range(900):
        error = [error]
    server = FakeVllm()
    async with opened(server, retries=0) as engine:
        server.spoil = lambda event: event.update(error={"message": error, "type": error})
        with pytest.raises(EngineError, match=r"failed while it answered: \[\[") as caught:
            await call(engine)
    assert len(str(caught.value)) < 400


def spoiled(*, token_ids: Any = None, logprob: Any = None) -> Callable[[dict[str, Any]], None]:
    """What spoils the first choice of each event of vLLM's two routes."""

    def spoil(event: dict[str, Any]) -> None:
        for choice in event["choices"]:
            if token_ids is not None:
                choice["token_ids"] = token_ids
            if logprob is not None and "content" in choice["logprobs"]:
                choice["logprobs"]["content"][0]["logprob"] = logprob
            elif logprob is not None:
                choice["logprobs"]["token_logprobs"] = [logprob]

    return spoil


@only_on_asyncio
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf, 9.0, 0.002, -(10**400), True, "-1"])
async def test_a_log_probability_that_is_none_is_refused(native: bool, logprob: Any) -> None:
    server = FakeVllm(native=native)
    async with opened(server) as engine:
        server.spoil = spoiled(logprob=logprob)
        with pytest.raises(EngineProtocolError, match="C6: the server gave log-probabilities that are none"):
            await call(engine)
        assert engine.stats().active == 0


@only_on_asyncio
@pytest.mark.parametrize(("said", "kept"), [(1e-4, 0.0), (-9999.0, -9999.0), (-3.4e38, -3.4e38), (-1, -1.0)])
async def test_a_log_probability_that_rounding_left_is_taken(said: float, kept: float) -> None:
    server = FakeVllm()
    async with opened(server) as engine:
        server.spoil = spoiled(logprob=said)
        async with aclosing(engine.generate((PROMPT,), SamplingParams(max_tokens=3))) as chunks:
            assert [p async for chunk in chunks for p in chunk.logprobs] == [kept] * 3


@pytest.mark.parametrize("id", [VOCAB, 2**31, 2**32, 10**12, -1, True, 1.0, "7"])
async def test_ids_that_no_vocabulary_holds_are_refused_and_cost_no_place(id: Any) -> None:
    server = FakeVllm()
    async with opened(server, max_calls=2, vocab_size=VOCAB) as engine:
        server.spoil = spoiled(token_ids=[id])
        for _ in range(3):
            with pytest.raises(EngineProtocolError, match="C4: the server"):
                await call(engine)
        server.spoil = spoiled()
        with anyio.fail_after(40):
            assert (await call(engine))[0] == await said_by_the_model()
        assert (engine.stats().active, engine._placement.active) == (0, [0])


async def test_ids_of_a_caller_that_no_vocabulary_holds_are_refused_and_cost_no_place() -> None:
    server = FakeVllm()
    async with opened(server, max_calls=2) as engine:
        assert engine.vocab_size is None
        for id in (2**31, 2**33, 2**40, -1, True, 1.5):
            with pytest.raises(RequestError, match="token id"):
                await call(engine, (1, id))  # type: ignore[arg-type]
        with anyio.fail_after(40):
            assert (await call(engine))[0] == await said_by_the_model()
    assert len(server.seen) == 1


@only_on_asyncio
async def test_room_is_given_back_whatever_happens_in_placing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(FakeVllm(), max_calls=1) as engine:
        for name in ("enter", "leave"):
            with monkeypatch.context() as patch:
                patch.setattr(engine._placement, name, lambda *args: 1 // 0)
                with pytest.raises(ZeroDivisionError):
                    await call(engine)
            with anyio.fail_after(40):
                assert (await call(engine))[1] is StopReason.LENGTH


async def test_a_server_that_is_killed_is_an_error_and_its_replica_takes_over() -> None:
    first, second = FakeVllm(token_s=0.005), FakeVllm()
    async with anyio.create_task_group() as tasks, second.serve():
        scope = anyio.CancelScope()

        async def mortal(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            with scope:
                async with first.serve():
                    task_status.started()
                    await anyio.sleep_forever()

        await tasks.start(mortal)
        async with HttpEngine([first.url, second.url], timeouts=QUICK) as engine:

            async def cut_short() -> None:
                async with aclosing(engine.generate((PROMPT,), SamplingParams(max_tokens=300))) as chunks:
                    async for _ in chunks:
                        scope.cancel()

            with pytest.raises(EngineError, match="broke off"):
                await cut_short()
            second.seen.clear()
            assert (await call(engine))[0] == await said_by_the_model()
            assert (await call(engine, (1, 2, 3)))[1] is StopReason.LENGTH
            assert len(second.seen) == 2
        tasks.cancel_scope.cancel()


# Opening ------------------------------------------------------------------------------------------------------------


async def test_nobody_there_is_said_at_once() -> None:
    with pytest.raises(EngineUnavailable, match=r"http://127\.0\.0\.1:9/v1/models cannot be reached"):
        async with HttpEngine("http://127.0.0.1:9", timeouts=QUICK):
            pass


@only_on_asyncio
async def test_a_server_that_is_loading_is_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hurried(), opened(FakeLlamaServer(loading=2)) as engine:
        assert engine.servers[0].num_slots == 4
    assert caplog.text.count("answered 503: Loading model") == 1
    assert "waiting for it, at most 120 s" in caplog.text
    monkeypatch.setattr(probe, "_START_S", 30)
    async with hurried():
        with pytest.raises(
            EngineUnavailable, match=r"answered 503: Loading model \(unavailable_error\) \(after 30 s\)"
        ):
            async with opened(FakeLlamaServer(loading=1000)):
                pass


@only_on_asyncio
@pytest.mark.parametrize(
    ("make", "kind", "own"),
    [
        (FakeLlamaServer, "vllm", "llama-server"),
        (FakeLlamaServer, "sglang", "llama-server"),
        (FakeSglang, "vllm", "sglang"),
    ],
)
async def test_a_server_that_says_itself_that_it_is_of_another_kind_is_refused(make: Any, kind: str, own: str) -> None:
    server = make()
    with pytest.raises(RequestError, match=f"is a {own}, by its own pages, and not of the kind {kind}"):
        async with opened(server, kind=kind):
            pass
    assert server.seen == []
    async with opened(make(), kind=own) as engine:
        assert engine.servers[0].kind == own


async def test_a_replica_that_is_down_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    first, second = FakeVllm(), FakeVllm()
    async with first.serve(), second.serve():
        urls = ["http://127.0.0.1:9", first.url, second.url]
        async with HttpEngine(urls, timeouts=QUICK) as engine:
            assert (engine.urls, len(engine.servers)) == ((first.url, second.url), 2)
            assert list(engine.left_out) == ["http://127.0.0.1:9"]
            for start in range(4):
                assert (await call(engine, (start, 1, 2)))[1] is StopReason.LENGTH
            assert [await engine.count_running(base) for base in (0, 1)] == [0, 0]
    assert "http://127.0.0.1:9 is left out until the engine is opened again" in caplog.text
    assert "cannot be reached" in caplog.text


async def test_where_no_replica_answers_the_first_one_is_named() -> None:
    with pytest.raises(EngineUnavailable, match=r"127\.0\.0\.1:9/v1/models cannot be reached"):
        async with HttpEngine("http://127.0.0.1:9,http://127.0.0.1:10", timeouts=QUICK):
            pass


async def test_a_replica_that_is_no_replica_refuses_the_engine_at_once() -> None:
    good, locked, loading = FakeVllm(), FakeVllm(api_key="secret"), FakeVllm(loading=1000)
    async with good.serve(), locked.serve(), loading.serve():
        with anyio.fail_after(40), pytest.raises(RequestError, match=r"401.*PLAIT_ENGINE_KEY"):
            async with HttpEngine([loading.url, good.url, locked.url], timeouts=QUICK):
                pass


async def test_replicas_are_looked_at_side_by_side() -> None:
    asked: list[int] = []
    servers = [FakeLlamaServer(loading=2, on_loading=partial(asked.append, k)) for k in range(4)]
    async with hurried(), opened(*servers) as engine:
        assert sorted(asked[:4]) == sorted(asked[4:]) == [0, 1, 2, 3], "each is asked again after a pause, twice"
        assert engine.max_active == 16


@only_on_asyncio
async def test_keys_are_sent_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="PLAIT_ENGINE_KEY"):
        async with opened(FakeVllm(api_key="secret")):
            pass
    async with opened(FakeVllm(api_key="secret"), api_key="secret") as engine:
        assert (await call(engine))[1] is StopReason.LENGTH
    monkeypatch.setenv("PLAIT_ENGINE_KEY", "secret\n")  # as a file ends
    async with opened(FakeVllm(api_key="secret")) as engine:
        assert engine.servers[0].kind == "vllm"


@only_on_asyncio
@pytest.mark.parametrize("key", ["se\ncret", "secret\x00", "s\u00e9cret"])
async def test_a_key_that_no_header_takes_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(RequestError, match="PLAIT_ENGINE_KEY") as info:
        HttpEngine("http://localhost:1", api_key=key)
    assert "cret" not in str(info.value)


@only_on_asyncio
async def test_a_server_that_returns_text_alone_is_refused() -> None:
    with pytest.raises(EngineProtocolError, match="token ids"):
        async with opened(FakeCompletions(ids=False)):
            pass


@only_on_asyncio
async def test_a_llama_server_without_a_vocabulary_is_not_asked_anything() -> None:
    server = FakeLlamaServer(vocab_type=0)
    with pytest.raises(RequestError, match="write_served"):
        async with opened(server):
            pass
    assert server.seen == [], "the first call would abort it"


@only_on_asyncio
async def test_a_server_with_another_model_is_refused() -> None:
    with pytest.raises(RequestError, match=f"{VOCAB} token ids"):
        async with opened(FakeLlamaServer(), vocab_size=64):
            pass
    with pytest.raises(RequestError, match=f"{VOCAB} token ids"):
        async with opened(FakeSglang(), vocab_size=VOCAB + 1):
            pass
    async with opened(FakeSglang(), vocab_size=VOCAB - 1) as engine:
        assert engine.vocab_size == VOCAB - 1, "weights may have rows for more ids than their vocabulary"


@only_on_asyncio
async def test_an_id_that_would_end_an_sglang_is_not_sent() -> None:
    server = FakeSglang()
    async with opened(server) as engine:
        with pytest.raises(RequestError, match=f"{VOCAB} is not in the vocabulary"):
            await call(engine, (*PROMPT, VOCAB))
        assert engine.servers[0].id_limit == VOCAB
        assert not server.seen


@only_on_asyncio
@pytest.mark.parametrize("ids", [200, 206])
async def test_a_prompt_that_an_sglang_refuses_is_too_long(ids: int) -> None:
    server = FakeSglang(max_context=200)
    async with opened(server) as engine:
        assert engine.max_context == 200, "what a prompt may fill, and not the whole context"
        engine.max_context = 300  # as where the server does not say
        with pytest.raises(ContextLengthError, match=r"maximum allowed length|context length"):
            await call(engine, tuple(n % VOCAB for n in range(ids)))
        assert (engine.stats().decode_tokens, len(server.seen)) == (0, 1)


@pytest.mark.parametrize(
    "urls",
    [
        *("", "localhost:8000", "ftp://x", "http://", "http://a b", [], "http://:80", "http://h\0:80", "http://h,"),
        *(
            "http://h:99999",
            "http://h:-1",
            "http://h:0",
            "http://h:many",
            "http://h:80:90",
            "http://[::1",
            "http://h/?a",
        ),
        *("http://\u00fc..x:80", "http://a..b", f"http://{'a' * 64}"),
    ],
)
def test_addresses_that_are_none_are_refused(urls: Any) -> None:
    with pytest.raises(RequestError, match="http://host:port"):
        HttpEngine(urls)


@pytest.mark.parametrize(
    "urls",
    [
        *("http://user:s3cret@h:80", "http://user:s3/cret@h", "http://user:se,s3cret@h", "user:s3cret@h:80"),
        ["http://a", "ftp://:s3cret@h"],
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(urls: Any) -> None:
    with pytest.raises(RequestError, match=r"PLAIT_ENGINE_KEY.*api_key=") as caught:
        HttpEngine(urls)
    assert "cret" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_addresses_in_other_scripts_are_spelled_as_the_network_does() -> None:
    assert base_urls("http://b\u00fccher.example:8000/\u00fc/v1") == ("http://xn--bcher-kva.example:8000/%C3%BC",)
    assert base_urls("http://[::1]:8000") == ("http://[::1]:8000",)


def test_addresses_may_end_in_v1_and_come_as_a_list() -> None:
    assert base_urls("http://a:1/v1/, https://b/x,http://a:1") == ("http://a:1", "https://b/x")


@only_on_asyncio
async def test_contexts_that_cannot_be_sent_are_refused_here() -> None:
    server = FakeLlamaServer(max_context=100)
    async with opened(server) as engine:
        for ids in ((), (1, -1), (1, VOCAB)):
            with pytest.raises(RequestError):
                await call(engine, ids)
        with pytest.raises(ContextLengthError):
            await call(engine, (1,) * 100)
        sampled, stop = await call(engine, (1,) * 95, max_tokens=50)
        assert (len(sampled), stop) == (5, StopReason.LENGTH)
    assert len(server.seen) == 1


@only_on_asyncio
async def test_a_context_length_that_only_the_server_knows_is_refused_there() -> None:
    async with opened(FakeCompletions(max_context=50)) as engine:
        with pytest.raises(ContextLengthError, match="maximum context"):
            await call(engine, (1,) * 60)


def test_metrics_are_summed_over_labels() -> None:
    page = '# HELP a b\na{x="1"} 2\na{x="2 }"} 3.5\nb 7\nbroken\nc NaN?\n'
    assert read_metrics(page) == {"a": 5.5, "b": 7.0}
