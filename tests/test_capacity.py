"""How much a server takes on: what its engines hold, shared between users, forks given up before anybody is refused."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, fields
from typing import Any

import anyio
import pytest

from plait.engines import Engine
from plait.engines.base import EngineStats
from plait.engines.http import HttpEngine
from plait.engines.llamacpp import LlamaCppEngine
from plait.formats import Block, open_format, render
from plait.models import Model, gold_model, load_model
from plait.models.model import prompt_ids
from plait.server import Served, new_key
from plait.server.admission import Admission, Lease
from plait.server.keys import ANONYMOUS, Client
from plait.tasks.vocabulary import TOKENIZER
from plait.types import Chunk, Context, Merge, SamplingParams
from server_process import Answered, Ask, answered
from test_server import ANSWER, QUESTION, ask, gold, held, serving, until

WIDE, NARROW = "What is 3 + 4?", "What is 12 + 5?"
THREADS, TOKENS = 64, 48


@dataclass(slots=True)
class Heard:
    """Tokens that an engine has said, in order, by whose they were; its threads wait until they may speak."""

    order: list[str] = field(default_factory=list[str])
    go: threading.Event = field(default_factory=threading.Event)


class Hearing:
    """A scripted engine that is listened to, and that says how many calls it holds."""

    def __init__(self, engine: Any, heard: Heard, max_active: int | None) -> None:
        self._engine, self._heard, self.max_active = engine, heard, max_active

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def __aenter__(self) -> Hearing:
        await self._engine.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._engine.__aexit__(*exc)

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        first = context[0]
        assert not isinstance(first, Merge)
        who = "wide" if first[: len(WIDE_PROMPT)] == WIDE_PROMPT else "narrow"
        while len(first) > len(WIDE_PROMPT) and who == "wide" and not self._heard.go.is_set():  # noqa: ASYNC110
            await anyio.sleep(0.001)
        async with aclosing(self._engine.generate(context, params)) as chunks:
            async for chunk in chunks:
                self._heard.order += [who] * len(chunk.token_ids)
                yield chunk


@dataclass(frozen=True, kw_only=True)
class HeardModel(Model):
    """A model over such an engine."""

    heard: Heard = field(default_factory=Heard)
    max_active: int | None = None

    def open_engine(self, name: str | None = None, **options: Any) -> Engine:
        engine = super().open_engine(name, **options)
        return Hearing(engine, self.heard, self.max_active)  # type: ignore[return-value]


WIDE_PROMPT = prompt_ids(TOKENIZER, "3+4?")


def wide_model(max_active: int | None = None) -> HeardModel:
    """Answers every question as the gold model does, but one, for which it forks 64 threads at once."""
    gold = gold_model("threadweaver")
    outlines = tuple(str(i) for i in range(THREADS))
    block = Block(outlines=outlines, threads=(("1" * TOKENS,),) * THREADS)
    tree = render(
        ("1", block, "2"),
        format=open_format("threadweaver", TOKENIZER),
        tokenizer=TOKENIZER,
        prompt_ids=WIDE_PROMPT,
    )
    wide = {tree.context(segment.id): segment.sampled_ids for segment in tree.segments.values()}
    plain = gold.script
    assert plain is not None

    def script(context: Context) -> Any:
        return wide.get(context) or plain(context)

    values = {f.name: getattr(gold, f.name) for f in fields(gold)}
    return HeardModel(**values | {"script": script}, max_active=max_active)


def chat(question: str, key: str) -> Ask:
    body = {"messages": [{"role": "user", "content": question}], "stream": True}
    wide = {"plait": {"max_threads_per_fork": THREADS}} if question == WIDE else {}
    return Ask(path="/v1/chat/completions", body=body | wide | {"stream_options": {"include_usage": True}}, key=key)


@pytest.mark.parametrize("whose", ["somebody else's", "its own client's"])
def test_one_request_of_64_threads_does_not_starve_64_others(whose: str) -> None:
    (alice, first), (bob, second) = new_key("alice"), new_key("bob")
    key = alice if whose == "its own client's" else bob
    model = wide_model()
    served = Served(model=model, engine_name="scripted")
    with serving(served, max_threads=4, max_requests=1000, max_tokens=10_000, api_keys=(first, second)) as server:
        replies = [Answered() for _ in range(65)]

        async def main() -> None:
            async with anyio.create_task_group() as clients:
                clients.start_soon(answered, server.port, chat(WIDE, alice), replies[0])
                admission = server.service.admission
                await until_true(lambda: admission.num_held + admission.num_waiting >= THREADS)
                for reply in replies[1:]:
                    clients.start_soon(answered, server.port, chat(NARROW, key), reply)
                # Before all have come, there is nobody to be starved.
                await until_true(lambda: admission.num_held + admission.num_waiting >= THREADS + 64)
                model.heard.go.set()

        anyio.run(main)
    assert all(reply.complete and reply.status == 200 for reply in replies)
    assert not replies[0].declined
    order = model.heard.order
    at = [number for number, who in enumerate(order) if who == "narrow"]
    between = Counter(order[at[0] : at[-1] + 1])
    assert order.count("wide") > THREADS * TOKENS > 2 * between["narrow"], "there is enough to starve them with"
    # Two users, one half each; of one user's requests it is one of 65. It has more to do, and ends last.
    most = 1.3 if key == bob else 0.5
    assert between["wide"] < most * between["narrow"]
    assert order[-1] == "wide"


@pytest.mark.parametrize("told", [6, None])
def test_places_are_as_many_as_the_engine_says_it_holds(told: int | None) -> None:
    served = Served(model=wide_model(told), engine_name="scripted")
    with serving(served, gold()) as server:
        assert server.service.admission.max_threads == (told or 32)
        assert server.metric("plait:threads_limit") == (told or 32)
    with serving(served, max_threads=3) as server:
        assert server.service.admission.max_threads == 3


def test_the_engines_know_how_many_calls_they_hold() -> None:
    path = load_model().path
    assert path is not None
    for options, most in (({"max_seqs": 64, "cells": 8192}, 32), ({"max_seqs": 8}, 4), ({"cells": 1024}, 4)):
        engine = LlamaCppEngine(path, **options)
        assert engine.max_active == most
        engine._model.close()
    http = HttpEngine("http://a:1,http://b:1")
    assert http.max_active is None

    @dataclass
    class Told:
        num_slots: int | None

    for slots, known in (((4, 8), 12), ((4, None), None), ((200, 200), 256)):
        http.servers = tuple(Told(number) for number in slots)  # type: ignore[assignment]
        assert http.max_active == known


def test_the_embedded_model_is_given_what_the_config_says(tmp_path: Any) -> None:
    served = Served(model=load_model(), engine_name="llamacpp")
    with serving(served, engine_options=("max_seqs=12", "cells=4096")) as server:
        assert server.service.admission.max_threads == 6


class Queueing:
    """An engine in which calls wait."""

    def __init__(self) -> None:
        self.queued = 0

    def stats(self) -> EngineStats:
        return EngineStats(queued=self.queued)


@pytest.mark.anyio
async def test_an_engine_with_a_queue_gets_no_more_and_others_do() -> None:
    limits = Admission(max_threads=10, max_requests=100)
    full, other = Queueing(), Queueing()
    held: list[Lease] = []

    async def hold(lease: Lease, leave: anyio.Event) -> None:
        async with limits.place(lease):
            held.append(lease)
            await leave.wait()

    with ExitStack() as stack:
        first, second = (stack.enter_context(limits.admitted(ANONYMOUS)) for _ in range(2))
        first.engine, second.engine = full, other  # type: ignore[assignment]
        async with anyio.create_task_group() as tasks:
            leave = [anyio.Event() for _ in range(4)]
            tasks.start_soon(hold, first, leave[0])
            await until_held(held, 1)
            full.queued = 1
            tasks.start_soon(hold, first, leave[1])
            tasks.start_soon(hold, second, leave[2])
            tasks.start_soon(hold, second, leave[3])
            await until_held(held, 3)
            assert held.count(first) == 1
            # The engine's queue is still long, but it holds none of ours: one of them asks again.
            leave[0].set()
            await until_held(held, 4)
            assert held.count(first) == 2
            for event in leave[1:]:
                event.set()
    assert (limits.num_held, limits.num_waiting) == (0, 0)


async def until_true(true: Callable[[], bool]) -> None:
    with anyio.fail_after(40):
        while not true():  # noqa: ASYNC110
            await anyio.sleep(0.001)


async def until_held(held: list[Lease], number: int) -> None:
    """Wait for so many places, and whether there is one more."""
    await until_true(lambda: len(held) >= number)
    await anyio.sleep(0.005)


def decided(limits: Admission, clients: list[Client]) -> list[bool]:
    """Whether each of these, who come one after the other and stay, may fork."""
    with ExitStack() as stack:
        return [stack.enter_context(limits.admitted(client)).may_fork for client in clients]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "make",
    [
        lambda most: Admission(max_threads=1000, max_requests=most),
        lambda most: Admission(max_threads=1000, max_requests=1000, max_requests_per_key=most),
        lambda most: Admission(max_threads=2, max_requests=most),
    ],
)
@pytest.mark.parametrize("most", [2, 3, 8, 100])
async def test_whoever_is_refused_was_preceded_by_one_whose_forks_were_declined(
    make: Callable[[int], Admission], most: int
) -> None:
    may_fork = decided(make(most), [ANONYMOUS] * most)
    assert may_fork[0], "an idle server declines nothing"
    assert not may_fork[-1]


@pytest.mark.anyio
async def test_the_pressure_of_one_key_is_not_that_of_another() -> None:
    limits = Admission(max_threads=1000, max_requests=1000, max_requests_per_key=4)
    alice, bob = Client(name="alice"), Client(name="bob")
    assert decided(limits, [alice] * 4 + [bob]) == [True, True, False, False, True]


def test_under_pressure_replies_are_whole_and_say_what_was_declined() -> None:
    go = threading.Event()
    with serving(held(go, threads_only=False), max_threads=1, max_requests=50) as server:
        replies = [Answered() for _ in range(4)]

        async def main() -> None:
            async with anyio.create_task_group() as clients:
                for reply in replies:
                    clients.start_soon(answered, server.port, chat("What is 347 * 526?", ""), reply)
                await until_true(lambda: server.service.admission.num_requests == 4)
                go.set()

        anyio.run(main)
        assert [reply.status for reply in replies] == [200] * 4
        assert sum(reply.declined for reply in replies) == 3
        until(server.idle)


def test_where_forks_are_declined_the_twin_answers_and_the_reply_says_so() -> None:
    twin = Served(model=gold_model(traces="serial"), engine_name="scripted")
    go = threading.Event()
    with (
        serving(held(go, threads_only=False), twin, max_threads=1, max_requests=50) as server,
        ThreadPoolExecutor(4) as clients,
    ):
        body = ask(QUESTION, model="gold-multiverse")
        coming = clients.map(lambda _: server.post("/v1/chat/completions", body).json(), range(4))
        until(lambda: server.service.admission.num_requests == 4)
        go.set()
        replies = list(coming)
        assert [reply["choices"][0]["message"]["content"] for reply in replies] == [ANSWER] * 4
        assert {reply["model"] for reply in replies} == {"gold-multiverse"}
        declined = [reply for reply in replies if "forks_declined" in reply["plait"]]
        assert [reply["plait"]["answered_by"] for reply in declined] == ["gold-sequential"] * 3
        assert [reply["usage"]["plait"]["threads"] for reply in declined] == [0] * 3
        until(server.idle)
