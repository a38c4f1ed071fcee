"""The scripted engine obeys the engine contract, and the contract's tests notice an engine that does not."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from plait.engines.base import EngineStats
from plait.engines.scripted import ScriptedEngine
from plait.errors import ContextLengthError, EngineProtocolError, RequestError
from plait.testing.clock import virtual_time
from plait.testing.conformance import check_engine
from plait.testing.pytest import EngineClause
from plait.types import Chunk, Context, Merge, SamplingParams, StopReason, context_positions

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param, virtual_time(request.param)


def make(**options: Any) -> ScriptedEngine:
    return ScriptedEngine(**{"vocab_size": 50, "max_context": 400, **options})


async def test_scripted_obeys(engine_clause: EngineClause) -> None:
    variants = [lambda n=n: make(chunk_size=n, timing_seed=n) for n in (1, 3, 100)]
    await engine_clause.check(make, vocab_size=50, tolerance=0, variants=variants)


async def test_one_call_checks_every_clause() -> None:
    variants = [lambda n=n: make(chunk_size=n, timing_seed=n) for n in (1, 3, 100)]
    checked = await check_engine(make, vocab_size=50, tolerance=0, variants=variants)
    assert checked == [*(f"C{i}" for i in range(1, 10)), "M2", "M3", "C10"]


async def test_scripted_without_merge_refuses_merges() -> None:
    checked = await check_engine(lambda: make(supports_merge=False), vocab_size=50, tolerance=0)
    assert checked[-2:] == ["M0", "C10"]


class Wrong(ScriptedEngine):
    """Breaks the clause it is named for."""

    def __init__(self, clause: str) -> None:
        super().__init__(vocab_size=50, max_context=400, supports_merge=clause != "M0")
        self.clause, self.calls = clause, 0

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        self.calls += 1
        said = 0
        match self.clause:
            case "C1":
                context = (*context, (self.calls,))
            case "C1 seeds":
                params = replace(params, seed=0)
            case "C2":
                context = (*context, (params.max_tokens,))
            case "C2 runs" if len(context) == 2:
                context = (*context, (1,))
            case "C3":
                params = replace(params, max_tokens=params.max_tokens + 1)
            case "C4":
                params = replace(params, stop_ids=())
            case "C4 first":
                params = replace(params, stop_ids=params.stop_ids[:1])
            case "C4 prompt" if {*params.stop_ids} & {id for part in context if isinstance(part, tuple) for id in part}:
                params = replace(params, max_tokens=1)
            case "C4 all banned" if len(params.banned_ids) >= 50:
                params = replace(params, banned_ids=())
            case "C4 banned":
                params = replace(params, banned_ids=())
            case "C4 first banned":
                params = replace(params, banned_ids=params.banned_ids[:1])
            case "C6 silent" if not params.logprobs:
                context = (*context, (1,))
            case "C8":
                self._active += 1
            case "M2" if any(isinstance(part, Merge) for part in context):
                context = (*context, (1,))
            case "M3 inside":
                context = tuple(map(_outermost, context))
            case _:
                pass
        async with aclosing(super().generate(context, params)) as chunks:
            async for chunk in chunks:
                said += len(chunk.token_ids)
                if self.clause == "C4 limit" and said == params.max_tokens:
                    chunk = replace(chunk, stop=StopReason.LENGTH)
                if self.clause == "C7 seeds" and params.temperature and self.stats().active > 1:
                    chunk = replace(chunk, token_ids=tuple(id ^ 1 for id in chunk.token_ids))
                if self.clause == "C10 running" and self._closed:
                    raise ZeroDivisionError
                if self.clause == "C6":
                    chunk = replace(chunk, logprobs=tuple(lp - self.calls for lp in chunk.logprobs))
                if self.clause == "C6 sign":
                    chunk = replace(chunk, logprobs=tuple(-lp for lp in chunk.logprobs))
                yield chunk

    def _check(self, context: Context) -> None:
        match self.clause:
            case "C9":
                return
            case "C9 brim" if context_positions(context) == self.max_context:
                return
            case "C9 last" if context_positions(context) == self.max_context - 1:
                raise ContextLengthError("too long, it thinks")
            case "M2 end" if context and isinstance(context[-1], Merge):
                return
            case "C10":
                self._closed = False
            case "M0" if 0 < context_positions(context) < self.max_context:
                return
            case _:
                pass
        super()._check(context)


def _outermost(part: tuple[int, ...] | Merge) -> tuple[int, ...] | Merge:
    """A merge without those inside of its branches, but for the first branch of each."""
    if not isinstance(part, Merge):
        return part
    return Merge(
        tuple(tuple(p.branches[0][0] if isinstance(p, Merge) else p for p in branch) for branch in part.branches)
    )


WRONG = (
    *("C1", "C1 seeds", "C2", "C2 runs", "C3", "C4", "C4 first", "C4 prompt", "C4 limit", "C4 banned", "C4 all banned"),
    *("C4 first banned", "C6", "C6 sign", "C6 silent", "C7 seeds", "C8", "C9", "C9 brim", "C9 last"),
    *("C10", "C10 running", "M0", "M2", "M2 end", "M3 inside"),
)


@pytest.mark.parametrize("clause", WRONG)
async def test_an_engine_that_breaks_a_clause_is_told_which(clause: str) -> None:
    with pytest.raises(EngineProtocolError) as info:
        await check_engine(lambda: Wrong(clause), vocab_size=50, tolerance=0)
    name = clause.split()[0]
    # a shift of every logprob is already seen as a difference between two calls
    assert str(info.value).startswith((f"{name} ",) if name != "C6" else ("C1 ", "C6 ")), info.value


async def test_a_concurrency_bug_is_found() -> None:
    class Mixed(ScriptedEngine):
        async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
            async with aclosing(super().generate(context, params)) as chunks:
                async for chunk in chunks:
                    others = self.stats().active > 1
                    yield replace(chunk, token_ids=tuple((id + others) % 50 for id in chunk.token_ids))

    with pytest.raises(EngineProtocolError, match=r"^C7 "):
        await check_engine(lambda: Mixed(vocab_size=50, max_context=400), vocab_size=50, tolerance=0)


async def test_a_merge_that_sees_the_order_is_found() -> None:
    class Ordered(ScriptedEngine):
        async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
            self._check(context)
            flat = _flatten(context)
            async with aclosing(super().generate((flat,), params)) as chunks:
                async for chunk in chunks:
                    yield chunk

    def _flatten(context: Context) -> tuple[int, ...]:
        return tuple(
            id
            for part in context
            for id in (part if isinstance(part, tuple) else (i for b in part.branches for i in _flatten(b)))
        )

    with pytest.raises(EngineProtocolError, match=r"^M3 "):
        await check_engine(lambda: Ordered(vocab_size=50, max_context=400), vocab_size=50, tolerance=0)


async def test_merge_is_held_to_a_reference() -> None:
    def wrong(context: Context) -> list[float]:
        return [-1.0] * 50

    with pytest.raises(EngineProtocolError, match=r"^C6 "):
        await check_engine(make, vocab_size=50, reference=wrong)
    with pytest.raises(EngineProtocolError, match=r"^M1 "):
        await check_engine(make, vocab_size=50, reference=wrong, skip=["C6"])


async def test_rounding_within_the_tolerance_is_no_failure() -> None:
    class Rounded(ScriptedEngine):
        async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
            async with aclosing(super().generate(context, params)) as chunks:
                async for chunk in chunks:
                    await anyio.lowlevel.checkpoint()
                    shift = self._decoded % 7 * 1e-6
                    yield replace(chunk, logprobs=tuple(lp - shift for lp in chunk.logprobs))

    await check_engine(lambda: Rounded(vocab_size=50, max_context=400), vocab_size=50, tolerance=1e-4)
    with pytest.raises(EngineProtocolError):
        await check_engine(lambda: Rounded(vocab_size=50, max_context=400), vocab_size=50, tolerance=1e-7)


OTHERS = """
import pytest
from plait.engines.scripted import ScriptedEngine

class Counting(ScriptedEngine):
    def generate(self, context, params):
        return super().generate((*context, (params.max_tokens % 40,)), params)

def make():
    return Counting(vocab_size=50, max_context=400, supports_merge=False)

@pytest.mark.anyio
@pytest.mark.engine_deviates(C2="it counts", C4="it counts", C6="it counts", C9="it counts"{more})
async def test_mine(engine_clause, anyio_backend_name):
    await engine_clause.check(make, vocab_size=50, tolerance=0)
"""


@pytest.mark.parametrize(
    ("more", "outcomes"),
    [("", {"passed": 14, "xfailed": 8, "skipped": 6}), (", C1='wrongly suspected'", {"failed": 2, "passed": 12})],
)
def test_the_plugin_runs_a_test_for_each_clause_of_another_engine(
    pytester: pytest.Pytester, more: str, outcomes: dict[str, int]
) -> None:
    pytester.makeconftest('pytest_plugins = ["plait.testing.pytest"]')
    pytester.makepyfile(OTHERS.format(more=more))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    found = result.parseoutcomes()
    assert {name: found.get(name) for name in outcomes} == outcomes


def test_a_deviation_of_no_clause_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["plait.testing.pytest"]')
    pytester.makepyfile(OTHERS.format(more=", C77='what?'"))
    result = pytester.runpytest_inprocess()
    result.stdout.fnmatch_lines(["*unknown clause*C77*"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"skip": ("C77",)}, "unknown clause 'C77'; did you mean 'C7'"),
        ({"clauses": ("Q1",)}, "unknown clause 'Q1'"),
        ({"prompts": []}, "at least three"),
        ({"prompts": [(1, 2, 3, 4), (2, 3, 4, 5)]}, "at least three"),
        ({"prompts": [(1, 2, 3), (2, 3, 4, 5), (1, 2, 3, 4)]}, "of 4 or more"),
        ({"prompts": [(1, 2, 3, 50)] * 3}, "holds the id 50"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"timeout_s": 0}, "timeout_s is 0; it must be a number above 0"),
        ({"timeout_s": -1}, "timeout_s is -1"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
    ],
)
async def test_questions_without_sense_are_not_blamed_on_the_engine(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        await check_engine(make, **{"vocab_size": 50, **options})


async def test_questions_that_do_not_fit_are_not_blamed_on_the_engine() -> None:
    with pytest.raises(RequestError, match=r"max_context is 32; .* ask for 33 positions"):
        await check_engine(lambda: make(max_context=32), vocab_size=50)
    await check_engine(lambda: make(max_context=33), vocab_size=50)


async def test_an_engine_that_counts_nothing_is_found() -> None:
    class Silent(ScriptedEngine):
        def stats(self) -> EngineStats:
            return EngineStats()

    for clause in ("C8", "C9"):
        with pytest.raises(EngineProtocolError, match=rf"^{clause} .*stats\(\)"):
            await check_engine(
                lambda: Silent(vocab_size=50, max_context=400), vocab_size=50, clauses=(clause,), max_tokens=4
            )


@pytest.mark.parametrize("where", ["opening the engine", "C1 ", "closing the engine"])
async def test_an_engine_that_hangs_does_not_hang_the_check(where: str) -> None:
    class Hanging(ScriptedEngine):
        async def __aenter__(self) -> ScriptedEngine:
            if where.startswith("opening"):
                await anyio.sleep_forever()
            return self

        async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
            async with aclosing(super().generate(context, params)) as chunks:
                async for chunk in chunks:
                    if where == "C1 ":
                        await anyio.sleep_forever()
                    yield chunk

        async def aclose(self) -> None:
            if where.startswith("closing"):
                await anyio.sleep_forever()

    with pytest.raises(EngineProtocolError, match=rf"^{where}.*it hangs; it was not over in 0.3 s"):
        await check_engine(lambda: Hanging(vocab_size=50), vocab_size=50, clauses=("C1",), timeout_s=0.3)
