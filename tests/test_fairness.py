"""A long prompt beside calls that sample: no step computes more of it than a chunk, and nobody waits for its end.

The engine's thread is held before a step until the calls of the test have come: which step they meet is not chance.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import tiny_llama
from test_llamacpp import call

pytest.importorskip("gguf", reason="writes its own weights: needs the train extra")
pytestmark = pytest.mark.anyio

CHUNK = 8
LONG = tuple(3 + i % 40 for i in range(300))
SHORT = (7, 3, 11, 40)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("weights") / "tiny.gguf")


@pytest.fixture(params=["llamacpp", pytest.param("torch", marks=pytest.mark.torch)])
def engine(request: pytest.FixtureRequest, gguf: Path) -> Any:
    options: dict[str, Any] = {"cells": 2048, "prefill_rows": CHUNK, "flush_s": 0, "threads": 1}
    if request.param == "llamacpp":
        from plait.engines.llamacpp import LlamaCppEngine

        return LlamaCppEngine(gguf, cache="F32", **options)
    pytest.importorskip("torch")
    from test_torch_engine import make

    return make(**options)


class Watched:
    """The steps of an engine; the one with number `hold` waits until it is let go.

    Attributes:
        steps: For each, its rows, and those of them that a call samples from.
    """

    def __init__(self, engine: Any, patch: pytest.MonkeyPatch, *, hold: int) -> None:
        self.steps: list[tuple[int, int]] = []
        self._engine, self._hold, self._go = engine, hold, threading.Event()
        decoder = engine._scheduler._decoder
        name = "decode" if engine.name == "llamacpp" else "forward"
        compute = getattr(decoder, name)

        def seen(rows: Any, *cache: Any) -> Any:
            self.steps.append(
                (len(rows.token_ids), len(rows.outputs)) if cache else (rows, int(decoder.outputs[:rows].sum()))
            )
            if len(self.steps) == hold:
                self._go.wait(50)
            return compute(rows, *cache)

        patch.setattr(decoder, name, seen)

    async def meet(self, number: int, start: Callable[[], None]) -> None:
        """When the step is held, start so many calls; let it go when all are there."""
        while len(self.steps) < self._hold:
            await anyio.lowlevel.checkpoint()
        start()
        while self._engine.stats().queued < number:
            await anyio.lowlevel.checkpoint()
        self._go.set()


async def test_a_long_prompt_delays_each_token_of_others_by_no_more_than_a_chunk(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine:
        alone = [(await call(engine, ((*SHORT, i),), max_tokens=400))[0] for i in range(2)]
        await engine.forget()
        watched = Watched(engine, monkeypatch, hold=20)
        outs: list[Any] = [None] * 3
        async with anyio.create_task_group() as tasks:

            async def ask(i: int, prompt: tuple[int, ...], length: int) -> None:
                outs[i] = (await call(engine, (prompt,), max_tokens=length))[0]

            for i in range(2):
                tasks.start_soon(ask, i, (*SHORT, i), 400)
            await watched.meet(1, lambda: tasks.start_soon(ask, 2, LONG, 5))
        filling = [(rows, sampled) for rows, sampled in watched.steps[20:] if rows > sampled]
    assert len(filling) >= len(LONG) // CHUNK - 1, "it was computed in chunks"
    for rows, sampled in filling:
        assert rows - sampled <= CHUNK
        assert sampled >= 2, "both calls get a token in every step"
    assert outs[:2] == alone


async def test_a_short_prompt_does_not_wait_for_a_long_one_before_it(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    async with engine, anyio.create_task_group() as tasks:

        async def ask(name: str, prompt: tuple[int, ...], length: int) -> None:
            await call(engine, (prompt,), max_tokens=length)
            ended.append(name)

        def start() -> None:
            # Their first token alone: each is told of its end by one message, in the order in which they end.
            tasks.start_soon(ask, "long", LONG, 1)
            tasks.start_soon(ask, "short", SHORT[::-1], 1)

        watched = Watched(engine, monkeypatch, hold=5)
        tasks.start_soon(ask, "busy", SHORT, 480)
        await watched.meet(2, start)
    assert ended == ["short", "long", "busy"]
