"""What every scheduler does with messages, deliveries and failures, on one that counts instead of computing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import plait
from plait.engines.inprocess.calls import Call, Delivery, num_common
from plait.engines.inprocess.scheduler import Scheduler
from plait.engines.inprocess.worker import Worker
from plait.errors import EngineError, EngineUnavailable
from plait.types import SamplingParams, StopReason


class Counting(Scheduler[Call]):
    """Gives every call 0, 1, 2 ..., one a turn."""

    name = "counting"

    def __init__(self, *, most: int = 8, flush_s: float = 0.0) -> None:
        self.heard: list[Delivery] = []
        self.closed = 0
        self.wake = threading.Event()
        super().__init__(wake=self.wake, post=self.heard.extend, close=self._count, flush_s=flush_s)
        self._most = most
        self.broken = False

    def _count(self) -> None:
        self.closed += 1

    @property
    def active(self) -> int:
        return len(self.slots)

    def _cancel(self, call: Call) -> None:
        if call in self.slots:
            self.slots.remove(call)

    def _forget(self) -> None:
        pass

    def _work(self) -> None:
        if self.broken:
            raise ZeroDivisionError("no")
        while self.queue and len(self.slots) < self._most:
            self.slots.append(self.queue.popleft())
        for call in self.slots:
            call.ids.append(len(call.ids))
            call.logprobs.append(-1.0)
        self._deliver()

    def _end(self, ended: Sequence[tuple[Call, StopReason]]) -> None:
        for call, _ in ended:
            self.slots.remove(call)

    def _drop(self) -> None:
        self.slots = []


def a_call(number: int = 0, tokens: int = 3) -> Call:
    return Call(number, ((1, 2),), SamplingParams(max_tokens=tokens), tokens, None)


def test_calls_are_heard_of_as_they_go_and_once_they_end() -> None:
    scheduler, call = Counting(), a_call()
    scheduler.put(("submit", call))
    assert scheduler.wake.is_set()
    assert scheduler.queued == 1
    while scheduler.ready():
        assert scheduler.turn()
    assert [(ids, stop) for _, ids, _, stop, _ in scheduler.heard] == [
        ([0], None),
        ([1], None),
        ([2], StopReason.LENGTH),
    ]
    assert (scheduler.active, scheduler.queued) == (0, 0)
    assert scheduler.work_s > 0
    heard = len(scheduler.heard)
    scheduler.put(("close", None))
    scheduler.turn()
    assert len(scheduler.heard) == heard, "what has ended is not told again"


def test_between_two_flushes_only_the_end_is_told() -> None:
    scheduler = Counting(flush_s=60)
    scheduler.put(("submit", a_call()))
    scheduler.turn()  # the first tells at once
    scheduler.heard.clear()
    while scheduler.ready():
        scheduler.turn()
    assert [(ids, stop) for _, ids, _, stop, _ in scheduler.heard] == [([1, 2], StopReason.LENGTH)]


def test_a_cancelled_call_is_not_heard_of_again_wherever_it_was() -> None:
    scheduler, live, waiting, ended = Counting(most=1), a_call(0), a_call(1), a_call(2, tokens=1)
    for call in (live, waiting):
        scheduler.put(("submit", call))
    scheduler.turn()
    for call in (live, waiting, ended):
        scheduler.put(("cancel", call))
    scheduler.heard.clear()
    scheduler.turn()
    assert not scheduler.heard
    assert not scheduler.ready()


def test_whatever_is_in_the_inbox_when_it_closes_is_answered() -> None:
    scheduler, forgot = Counting(), []
    running, late = a_call(0), a_call(1)
    scheduler.put(("submit", running))
    scheduler.turn()
    scheduler.heard.clear()
    scheduler.put(("close", None))
    scheduler.put(("submit", late))
    scheduler.put(("forget", lambda: forgot.append(True)))
    assert not scheduler.turn()
    assert {id(call) for call, *_, error in scheduler.heard if isinstance(error, EngineUnavailable)} == {
        id(running),
        id(late),
    }
    assert (forgot, scheduler.closed) == ([True], 1)


def test_after_a_bug_every_call_fails_until_it_is_closed() -> None:
    scheduler = Counting()
    scheduler.put(("submit", a_call(0)))
    scheduler.turn()
    scheduler.broken = True
    scheduler.turn()
    scheduler.broken = False
    scheduler.put(("submit", a_call(1)))
    scheduler.turn()
    errors = [error for *_, error in scheduler.heard if error is not None]
    assert len(errors) == 2
    assert all("please report: ZeroDivisionError: no" in str(error) for error in errors)
    assert isinstance(errors[0], EngineError)
    assert isinstance(errors[0].__cause__, ZeroDivisionError)
    scheduler.put(("close", None))
    assert not scheduler.turn()
    assert scheduler.closed == 1


@pytest.mark.parametrize("kind", [list, tuple])
@given(
    ids=st.lists(st.integers(0, 2), max_size=40), others=st.lists(st.integers(0, 2), max_size=40), same=st.booleans()
)
def test_what_two_runs_have_in_common_is_counted(kind: type, ids: list[int], others: list[int], same: bool) -> None:
    others = [*ids, *others] if same else others
    expected = next(
        (k for k, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others))
    )
    assert num_common(kind(ids), kind(others)) == expected


def test_a_call_that_gets_lost_in_a_bug_is_answered_too() -> None:
    class Losing(Counting):
        def _work(self) -> None:
            self.queue.popleft()
            raise ZeroDivisionError("between two lists")

    scheduler, call = Losing(), a_call()
    scheduler.put(("submit", call))
    scheduler.turn()
    assert [(heard is call, str(error)[-17:]) for heard, *_, error in scheduler.heard] == [(True, "between two lists")]
    assert not scheduler.ready()


def test_whoever_waits_for_a_message_is_told_though_it_fails() -> None:
    class Forgetful(Counting):
        def _forget(self) -> None:
            raise ZeroDivisionError("books")

    scheduler, told = Forgetful(), []
    scheduler.put(("forget", lambda: told.append(True)))
    scheduler.put(("close", None))
    assert scheduler.turn()
    assert told == [True]
    assert not scheduler.turn(), "what came behind is heard all the same"
    assert scheduler.closed == 1


def test_a_job_that_fails_takes_no_other_with_it(caplog: pytest.LogCaptureFixture) -> None:
    class Job:
        def __init__(self, turns: int) -> None:
            self.left, self.done = turns, threading.Event()

        def ready(self) -> bool:
            return True

        def turn(self) -> bool:
            self.left -= 1
            if self.left < 0:
                raise ZeroDivisionError("nobody thought of this")
            if not self.left:
                self.done.set()
            return self.left > 0

    worker, good, bad = Worker(), Job(50), Job(0)
    worker.add(bad)
    worker.add(good)
    assert good.done.wait(40)
    assert "given up" in caplog.text


def test_an_engine_of_another_event_loop_is_refused_and_can_be_closed() -> None:
    engine = plait.load_model().open_engine("llamacpp", threads=1)
    anyio.run(engine.__aenter__)

    async def use_and_close() -> None:
        with anyio.fail_after(10), pytest.raises(EngineUnavailable, match="another event loop"):
            await anext(engine.generate(((1, 2),), SamplingParams(max_tokens=1)))
        with anyio.fail_after(10):
            await engine.aclose()

    anyio.run(use_and_close)


def test_what_many_calls_are_told_of_one_bug_does_not_grow() -> None:
    async def depths() -> list[int]:
        depths: list[int] = []
        async with plait.load_model().open_engine("llamacpp", threads=1) as engine:
            engine._scheduler._work = lambda: 1 / 0  # type: ignore[attr-defined]
            for _ in range(3):
                with pytest.raises(EngineError, match="please report: ZeroDivisionError") as info:
                    await anext(engine.generate(((1, 2),), SamplingParams(max_tokens=1)))
                depths.append(len(info.traceback))
        return depths

    assert len(set(anyio.run(depths))) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_process_that_was_forked_off_has_engines_of_its_own(tmp_path: Path) -> None:
    program = tmp_path / "forks.py"
    program.write_text(
        "import os, anyio, plait\n"
        "from anyio.from_thread import start_blocking_portal\n"
        "model = plait.load_model()\n"
        "async def ask(engine):\n"
        "    return model.answer(await plait.run(model.request('3*4?'), engine=engine, format=model.format))\n"
        "async def alone():\n"
        "    async with model.open_engine(threads=1) as engine:\n"
        "        return await ask(engine)\n"
        "with start_blocking_portal() as portal:\n"
        "    with portal.wrap_async_context_manager(model.open_engine(threads=1)) as engine:\n"
        "        assert portal.call(ask, engine) == '12'\n"
        "        child = os.fork()\n"
        "        if child == 0:\n"
        "            code = anyio.run(alone) != '12'\n"
        "            try:\n"
        "                anyio.run(ask, engine)\n"
        "            except plait.errors.EngineUnavailable as exc:\n"
        "                code += 2 * ('another process' not in str(exc))\n"
        "            anyio.run(engine.aclose)\n"
        "            os._exit(code)\n"
        "        assert os.waitpid(child, 0)[1] == 0\n"
        "        assert portal.call(ask, engine) == '12'\n"
    )
    ended = subprocess.run([sys.executable, program], timeout=50, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
