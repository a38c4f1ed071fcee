"""Cache salts: what one tenant's requests leave in an engine is not found by another's, and one request has one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

import plait
import tiny_llama
from plait.engines.affinity import Affinity, affinity, stated_affinity
from plait.engines.base import Engine
from plait.engines.llamacpp.cache import Cache
from plait.engines.scripted import ScriptedEngine
from plait.server import ServeConfig, as_toml, new_key
from plait.server.keys import Client, cache_salt
from plait.types import Chunk, Context, Merge, SamplingParams

PROMPT = tuple(range(40)) * 2


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


async def prefilled(engine: Engine, context: Context, salt: str | None) -> int:
    """Tokens that were computed because they were given."""
    before = engine.stats().prefill_tokens
    with affinity("one", cache_salt=salt):
        async with aclosing(engine.generate(context, SamplingParams(max_tokens=2))) as chunks:
            async for _ in chunks:
                pass
    return engine.stats().prefill_tokens - before


async def check_tenants_apart(engine: Engine) -> None:
    """Nothing is found across salts, everything within one; a merge and what it stands on included."""
    joined: Context = (PROMPT[::-1], Merge((((1, 2, 3),), ((4, 5),))), (6,))
    for context in ((PROMPT,), joined):
        first = await prefilled(engine, context, "a")
        again = await prefilled(engine, context, "a")
        other = await prefilled(engine, context, "b")
        none = await prefilled(engine, context, None)
        assert again < 10, "the salt's own prefix is found"
        assert min(first, other, none) >= len(PROMPT), "no other's is"
        await prefilled(engine, context, None)
        assert await prefilled(engine, context, "b") < 10


@pytest.mark.anyio
async def test_the_embedded_engine_shares_no_prefix_across_salts() -> None:
    async with plait.load_model().open_engine(cells=2048, keep=1024) as engine:
        await check_tenants_apart(engine)


@pytest.mark.anyio
@pytest.mark.torch
async def test_the_torch_engine_shares_no_prefix_across_salts() -> None:
    pytest.importorskip("torch", reason="needs the torch extra")
    from plait.engines.torch import TorchEngine

    config = {**tiny_llama.CONFIG, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    async with TorchEngine.from_weights(tiny_llama.weights(0), config, cells=2048, device="cpu") as engine:
        await check_tenants_apart(engine)
        engine._scheduler.pool.check()  # type: ignore[union-attr]


class _Cells:
    def copy(self, source: int, target: int, start: int, end: int) -> None:
        pass

    def remove(self, seq: int) -> None:
        pass


def test_salts_that_hold_nothing_are_forgotten() -> None:
    cache = Cache(_Cells(), max_seqs=2, keep=0)
    for number in range(100):
        seq = cache.fork(cache.root_of(f"tenant {number}"))
        cache.extend(seq, (1, 2, 3))
        cache.finish(seq, None)
        cache.check()
        cache.make_room(0)
    assert len(cache._roots) <= 4


def test_a_salt_is_of_the_client_and_of_the_server() -> None:
    alice, bob = Client(name="alice"), Client(name="bob")
    salts = {cache_salt(client, secret) for client in (alice, bob) for secret in ("x", "y")}
    assert len(salts) == 4
    assert cache_salt(alice, "x") == cache_salt(Client(name="alice", weight=2), "x")
    assert all(len(salt) == 64 and "alice" not in salt for salt in salts)
    assert "hush" not in as_toml(ServeConfig(cache_secret="hush"))


def test_a_request_has_one_salt_in_all_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    server_tests = pytest.importorskip("test_server", reason="needs the serve extra")
    said: list[Affinity | None] = []
    generate = ScriptedEngine.generate

    async def listening(self: ScriptedEngine, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        said.append(stated_affinity())
        async with aclosing(generate(self, context, params)) as chunks:
            async for chunk in chunks:
                yield chunk

    monkeypatch.setattr(ScriptedEngine, "generate", listening)
    (alice, entry), (bob, other) = new_key("alice"), new_key("bob")

    def ask(server: Any, key: str) -> list[Affinity | None]:
        said.clear()
        reply = server.client(key).chat.completions.create(model="gold-multiverse", **server_tests.ask())
        assert reply.usage.model_extra["plait"]["threads"] == 3
        return list(said)

    with server_tests.serving(server_tests.gold(), api_keys=(entry, other), cache_secret="x") as server:
        calls = ask(server, alice)
        assert len(calls) > 4
        assert len(set(calls)) == 1
        (mine,), (again,), (theirs,) = set(calls), set(ask(server, alice)), set(ask(server, bob))
    assert mine is not None
    assert again is not None
    assert theirs is not None
    assert mine.cache_salt == again.cache_salt == cache_salt(Client(name="alice"), "x")
    assert mine.key != again.key, "requests may go to different replicas"
    assert theirs.cache_salt == cache_salt(Client(name="bob"), "x")
    assert alice not in str(mine)
    assert entry.split(":")[2] not in str(mine)
