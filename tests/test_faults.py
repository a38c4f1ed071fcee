"""An engine that fails, at every phase of a run and in every way: each endpoint says so in its own well-formed form."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from plait.engines.base import Engine
from plait.errors import EngineError, EngineTimeout, RequestError
from plait.models import Model, gold_model
from plait.server import Served
from plait.types import Chunk, Context, SamplingParams, StopReason, context_merges
from test_server import Running, frames, serving, until

QUESTION = "What is 347 * 526?"
PHASES = (
    "before the first token",
    "at the fork",
    "prefill of a thread",
    "in a thread",
    "at the join",
    "after the join",
)
LAST = -1


@dataclass(slots=True)
class Plan:
    """What an engine does wrong in the next run, and where."""

    phase: str = ""
    fault: Callable[[SamplingParams], Any] | None = None
    threads: int = 0
    struck: bool = False
    stalled: int = 0
    """How often a call fell silent."""

    def arm(self, phase: str, fault: Callable[[SamplingParams], Any]) -> None:
        self.phase, self.fault, self.threads, self.struck = phase, fault, 0, False

    def place(self, context: Context) -> int | None:
        """Tokens of a call before its fault; None where the call has none."""
        if any(True for _ in context_merges(context)):
            return {"at the join": 0, "after the join": 2}.get(self.phase)
        if "?" in _text(context)[-3:]:
            return {"before the first token": 0, "at the fork": LAST}.get(self.phase)
        self.threads += 1
        # The second thread: the first one runs.
        return {"prefill of a thread": 0, "in a thread": 3}.get(self.phase) if self.threads == 2 else None


class Faulty:
    """An engine that does what a plan says."""

    def __init__(self, engine: Any, plan: Plan) -> None:
        self._engine, self._plan = engine, plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def __aenter__(self) -> Faulty:
        await self._engine.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._engine.__aexit__(*exc)

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Any, None]:
        place, said = self._plan.place(context), 0
        async with aclosing(self._engine.generate(context, params)) as chunks:
            async for chunk in chunks:
                if place is not None and (said == place or (place == LAST and chunk.stop is not None)):
                    assert self._plan.fault is not None
                    self._plan.struck = True
                    wrong = self._plan.fault(params)
                    if wrong is STALL:
                        self._plan.stalled += 1
                        await anyio.sleep_forever()
                    if wrong is END:
                        return
                    yield wrong
                said += len(chunk.token_ids)
                yield chunk


@dataclass(frozen=True, kw_only=True)
class FaultyModel(Model):
    """A model whose engine fails."""

    plan: Plan = field(default_factory=Plan)

    def open_engine(self, name: str | None = None, **options: Any) -> Engine:
        return Faulty(super().open_engine(name, **options), self.plan)  # type: ignore[return-value]


def _text(context: Context) -> str:
    return gold_model().tokenizer.decode([id for part in context if isinstance(part, tuple) for id in part])


STALL, END = object(), object()


def crash(params: SamplingParams) -> Any:
    raise RuntimeError("out of memory")


def late(params: SamplingParams) -> Any:
    raise EngineTimeout("no token in 5 s")


ADDRESS = "http://10.1.2.3:8001/v1"


def refused(params: SamplingParams) -> Any:
    raise RequestError(f"{ADDRESS} answered 307: Moved. Redirects are not followed: give the address it leads to")


def broken(params: SamplingParams) -> Any:
    raise EngineError(f"{ADDRESS}, the only one, failed ({ADDRESS}): out of memory")


def chunk(ids: tuple[int, ...] = (1,), logprobs: tuple[float, ...] = (0.0,), stop: StopReason | None = None) -> Chunk:
    return Chunk(token_ids=ids, logprobs=logprobs, stop=stop)


GARBAGE: dict[str, Callable[[SamplingParams], Any]] = {
    "an id that is none": lambda _: chunk((10**9,)),
    "a negative id": lambda _: chunk((-1,)),
    "more tokens than asked for": lambda params: chunk(
        (1,) * (params.max_tokens + 1), (0.0,) * (1 + params.max_tokens)
    ),
    "no log-probability": lambda _: chunk((1,), ()),
    "a log-probability that is no number": lambda _: chunk((1,), (math.nan,)),
    "a stop without its id": lambda _: chunk((1,), (0.0,), StopReason.EOS),
    "no chunk": lambda _: "garbage",
    "an early end": lambda _: END,
}
FAULTS: dict[str, tuple[Callable[[SamplingParams], Any], int, set[str]]] = {
    "crash": (crash, 502, {"engine_error"}),
    "timeout": (late, 504, {"engine_timeout"}),
    "stall": (lambda _: STALL, 504, {"engine_timeout"}),
    **{name: (fault, 502, {"engine_error", "engine_protocol_error"}) for name, fault in GARBAGE.items()},
}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Running, Plan]]:
    gold, plan = gold_model(), Plan()
    model = FaultyModel(**{f.name: getattr(gold, f.name) for f in fields(gold)}, plan=plan)
    # An hour of silence passes at once, so that a busy machine is not taken for a silent engine.
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * plan.stalled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plait.server.admission.time", clock)
        with serving(Served(model=model, engine_name="scripted"), engine_timeout_s=1800) as running:
            yield running, plan


ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": QUESTION}]},
    "/v1/completions": {"prompt": QUESTION},
    "/v1/responses": {"input": QUESTION},
}


def check(server: Running, path: str, *, stream: bool, status: int, codes: set[str]) -> None:
    """Ask, and hold the answer to the shape that an error has there."""
    reply = server.post(path, {**ENDPOINTS[path], "stream": stream})
    if reply.status_code != 200:
        # Before the first event of a stream, an error is one of HTTP.
        assert reply.status_code == status
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"] in codes) == ("server_error", True)
        return
    assert stream, "a fault was taken for an answer"
    told = frames(reply.text)
    assert "[DONE]" not in reply.text
    assert "NaN" not in reply.text
    if path == "/v1/responses":
        assert [frame["sequence_number"] for frame in told] == list(range(len(told)))
        assert told[-1]["type"] == "response.failed"
        assert told[-1]["response"]["status"] == "failed"
        assert set(told[-1]["response"]["error"]) == {"code", "message"}
    else:
        assert set(told[-1]) == {"error"}
        assert told[-1]["error"]["code"] in codes
        assert all("choices" in frame for frame in told[:-1])


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["crash", "timeout"])
def test_an_engine_that_fails_is_a_well_formed_error_everywhere(
    server: tuple[Running, Plan], phase: str, name: str
) -> None:
    running, plan = server
    fault, status, codes = FAULTS[name]
    for path in ENDPOINTS:
        for stream in (True, False):
            plan.arm(phase, fault)
            check(running, path, stream=stream, status=status, codes=codes)
            assert plan.struck, "the fault was not reached"
            until(running.idle)


@pytest.mark.parametrize("name", ["stall", *sorted(GARBAGE)])
def test_silence_and_garbage_from_an_engine_are_never_an_answer(server: tuple[Running, Plan], name: str) -> None:
    running, plan = server
    fault, status, codes = FAULTS[name]
    for number, phase in enumerate(PHASES):
        plan.arm(phase, fault)
        path = list(ENDPOINTS)[number % 3]
        check(running, path, stream=number % 2 == 0, status=status, codes=codes)
        assert plan.struck, "the fault was not reached"
    until(running.idle)


def test_a_run_that_is_watched_says_how_it_failed(server: tuple[Running, Plan]) -> None:
    running, plan = server
    for name in ("crash", "a log-probability that is no number"):
        plan.arm("in a thread", FAULTS[name][0])
        text = running.post("/plait/runs", {"question": QUESTION}).text
        assert "error" in frames(text)[-1]
        (row, *_) = running.get("/plait/runs").json()["data"]
        followed = running.get(f"/plait/runs/{row['id']}/events").text
        assert "event: error" in followed
        assert "NaN" not in followed
        for line in running.get(f"/plait/runs/{row['id']}/log").text.splitlines():
            json.loads(line)


@pytest.mark.parametrize("fault", [refused, broken])
def test_no_client_is_told_where_an_engine_is(
    server: tuple[Running, Plan], fault: Callable[[SamplingParams], Any]
) -> None:
    running, plan = server
    for phase in ("before the first token", "in a thread"):
        for path, body in {**ENDPOINTS, "/plait/runs": {"question": QUESTION}}.items():
            for stream in (True, False):
                plan.arm(phase, fault)
                said = running.post(path, body | {"stream": stream}).text
                assert plan.struck
                assert "its server" in said
                assert "10.1.2.3" not in said
    runs = running.get("/plait/runs").json()["data"]
    followed = running.get(f"/plait/runs/{runs[0]['id']}/events").text
    assert "its server" in followed
    assert "10.1.2.3" not in followed


def test_after_all_that_the_server_answers(server: tuple[Running, Plan]) -> None:
    running, plan = server
    plan.arm("nowhere", crash)
    reply = running.post("/v1/chat/completions", ENDPOINTS["/v1/chat/completions"]).json()
    assert reply["choices"][0]["message"]["content"] == str(347 * 526)
    assert reply["usage"]["plait"]["threads"] > 0
