"""Limits in threads: places are shared by weight, forks give way before requests do, and nothing is ever lost."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import ExitStack

import anyio
import anyio.lowlevel
import pytest

from plait.engines.scripted import ScriptedEngine
from plait.server.admission import Admission, Lane, Lease
from plait.server.keys import Client
from plait.server.refusal import Refusal
from plait.types import SamplingParams

pytestmark = pytest.mark.anyio
ALICE, BOB = Client(name="alice"), Client(name="bob")


def admission(**limits: int) -> Admission:
    return Admission(**{"max_threads": 4, "max_requests": 1000, **limits})


async def hold(limits: Admission, lease: Lease, served: list[Lease], seconds: float = 0.001) -> None:
    async with limits.place(lease):
        served.append(lease)
        assert limits.num_held <= limits.max_threads
        await anyio.sleep(seconds)


async def test_one_request_of_64_threads_does_not_starve_64_others() -> None:
    limits, served = admission(), list[Lease]()
    with ExitStack() as stack:
        wide = stack.enter_context(limits.admitted(ALICE))
        narrow = [stack.enter_context(limits.admitted(ALICE)) for _ in range(64)]
        async with anyio.create_task_group() as tasks:
            for _ in range(64):
                tasks.start_soon(hold, limits, wide, served)
            await anyio.lowlevel.checkpoint()
            for lease in narrow:
                tasks.start_soon(hold, limits, lease, served)
    last = max(served.index(lease) for lease in narrow)
    before = served[:last].count(wide)
    # It fills the places before the others come, and is then one of them: never more than its turn.
    assert before <= 4 + 64 / 2
    assert len(served) == 128
    assert (limits.num_held, limits.num_waiting, limits.num_requests) == (0, 0, 0)


async def test_places_are_shared_by_weight() -> None:
    limits, served = admission(max_threads=8), list[Lease]()
    heavy = Client(name="heavy", weight=3.0)
    with limits.admitted(heavy) as own, limits.admitted(BOB) as other:
        async with anyio.create_task_group() as tasks:
            for _ in range(60):
                tasks.start_soon(hold, limits, own, served)
                tasks.start_soon(hold, limits, other, served)
    # The first places went to who came; both wait from then until the heavier has been served.
    turns = Counter("heavy" if lease is own else "bob" for lease in served[16:64])
    assert turns["heavy"] / turns["bob"] == pytest.approx(3.0, rel=0.2)


async def test_a_key_never_holds_more_than_its_limit() -> None:
    limits, served = admission(max_threads=8, max_threads_per_key=2), list[Lease]()
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while len(served) < 20:
            peak = max(peak, limits.num_held)
            await anyio.lowlevel.checkpoint()

    with limits.admitted(ALICE) as first, limits.admitted(ALICE) as second:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            for lease in (first, second) * 10:
                tasks.start_soon(hold, limits, lease, served)
    assert peak == 2


async def test_who_leaves_the_queue_or_a_place_leaves_nothing_behind() -> None:
    limits, rng = admission(max_threads=3), random.Random(0)

    async def impatient(lease: Lease) -> None:
        with anyio.move_on_after(rng.random() * 0.01):
            async with limits.place(lease):
                await anyio.sleep(rng.random() * 0.01)

    async with anyio.create_task_group() as tasks:
        with limits.admitted(ALICE) as first, limits.admitted(BOB) as second:
            async with anyio.create_task_group() as tasks:
                for _ in range(100):
                    tasks.start_soon(impatient, rng.choice([first, second]))
    assert (limits.num_held, limits.num_waiting, limits.num_requests) == (0, 0, 0)
    with limits.admitted(ALICE) as lease:
        async with limits.place(lease), limits.place(lease), limits.place(lease):
            assert limits.num_held == 3


async def test_forks_are_declined_then_requests_are_refused() -> None:
    limits = admission(max_threads=2, max_requests=4, max_requests_per_key=3)
    with ExitStack() as stack:
        may_fork = [stack.enter_context(limits.admitted(ALICE)).may_fork for _ in range(3)]
        assert may_fork == [True, True, False]
        with pytest.raises(Refusal) as one_key:
            stack.enter_context(limits.admitted(ALICE))
        stack.enter_context(limits.admitted(BOB))
        with pytest.raises(Refusal) as full:
            stack.enter_context(limits.admitted(BOB))
    assert [(e.value.status, e.value.code) for e in (one_key, full)] == [
        (429, "rate_limit_exceeded"),
        (503, "overloaded"),
    ]
    assert all((e.value.retry_after_s or 0) >= 1 for e in (one_key, full))
    with limits.admitted(ALICE) as lease:
        assert lease.may_fork, "what has ended presses no more"


async def test_a_lane_waits_for_a_place_and_gives_it_back() -> None:
    limits = admission(max_threads=1)
    engine = ScriptedEngine()
    params = SamplingParams(max_tokens=5)
    with limits.admitted(ALICE) as first, limits.admitted(BOB) as second:
        lanes = [Lane(engine, limits, lease) for lease in (first, second)]
        chunks = lanes[0].generate(((1, 2),), params)
        await anext(chunks)
        with anyio.move_on_after(0.01) as waited:
            await anext(lanes[1].generate(((1, 2),), params))
        assert waited.cancelled_caught
        await chunks.aclose()
        assert len([chunk async for chunk in lanes[1].generate(((1, 2),), params)]) == 5
    assert engine.stats().active == limits.num_held == limits.num_waiting == 0
