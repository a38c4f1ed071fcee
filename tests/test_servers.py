"""HTTP engines against real servers with the embedded model: `pytest -m servers`.

llama-server comes with the embedded engine and always runs. vLLM, on both of its routes, where PLAIT_VLLM_PYTHON names
the interpreter of an environment that has it; SGLang, without its kernels, where PLAIT_SGLANG_PYTHON does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import anyio
import pytest

pytest.importorskip("httpx2", reason="needs the http extra")

import plait
from plait.engines.affinity import affinity
from plait.engines.http import HttpEngine, Timeouts
from plait.engines.http.diagnosis import diagnose
from plait.errors import ContextLengthError, EngineError, EngineTimeout, EngineUnavailable, RequestError
from plait.events import TokensSampled
from plait.formats import open_format
from plait.formats.base import Branch, Fork, Join, ThreadOutcome
from plait.session import open_run, run
from plait.tasks.vocabulary import TOKENIZER
from plait.testing.conformance import check_engine
from plait.testing.strategies import ToyFormat
from plait.types import Budget, Request, SamplingParams, StopReason
from real_servers import SGLANG_PYTHON, VLLM_PYTHON, llama_server, served_gguf, sglang_server, vllm_server

# A vLLM takes a minute to start, several on a busy machine.
pytestmark = [pytest.mark.anyio, pytest.mark.servers, pytest.mark.timeout(900)]

MODEL = "plait-tiny-sequential"
TEXT_IDS = 43
"""Ids below this are text in the vocabulary of the embedded model."""
TOLERANCE = 0.05
"""Eight-bit weights and a cache of sixteen: other batches round otherwise."""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Iterator[str]:
    with llama_server(served_gguf(folder, MODEL)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def vllm_weights(folder: Path) -> Path:
    if VLLM_PYTHON is None:
        pytest.skip("PLAIT_VLLM_PYTHON does not name the interpreter of an environment with vLLM")
    return written(folder / "vllm")


@pytest.fixture(scope="module")
def sglang_weights(folder: Path) -> Path:
    if SGLANG_PYTHON is None:
        pytest.skip("PLAIT_SGLANG_PYTHON does not name the interpreter of an environment with SGLang")
    return written(folder / "sglang")


def written(folder: Path) -> Path:
    hf_weights = pytest.importorskip("hf_weights", reason="writes transformers weights: needs the train extra")
    return hf_weights.write(plait.load_model(MODEL), folder)


@pytest.fixture(scope="module", params=["llama-server", "vllm native", "vllm completions", "sglang"])
def url(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "llama-server":
        yield request.getfixturevalue("llama")
        return
    if request.param == "sglang":
        with sglang_server(request.getfixturevalue("sglang_weights")) as (address, _):
            yield address
        return
    weights = request.getfixturevalue("vllm_weights")
    with vllm_server(weights, native=request.param == "vllm native") as (address, _):
        yield address


async def test_a_real_server_obeys_every_clause(url: str) -> None:
    checked = await check_engine(lambda: HttpEngine(url), vocab_size=TEXT_IDS, tolerance=TOLERANCE)
    assert checked == [*(f"C{i}" for i in range(1, 10)), "M0", "C10"]


async def test_an_answer_is_the_one_of_the_embedded_engine(url: str) -> None:
    model = plait.load_model(MODEL)
    request = model.request("What is 347 * 526?", budget=Budget(max_tokens=400))
    async with model.open_engine(url) as engine:
        over_http = await run(request, engine=engine, format=model.format)
    async with model.open_engine() as engine:
        in_process = await run(request, engine=engine, format=model.format)
    assert model.answer(over_http) == model.answer(in_process) == "182522"
    assert over_http.stop is StopReason.EOS


class AtEveryRow(ToyFormat):
    """Forks after each row of a product: mechanics alone, for the model knows nothing of it."""

    fork_ids = tuple(TOKENIZER.encode(";"))
    closers = tuple(TOKENIZER.encode("~"))

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        return self.closers if depth else self.fork_ids

    def eos_ids(self) -> tuple[int, ...]:
        return TOKENIZER.eos_ids

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | None:
        if sampled_ids[-1] not in self.fork_ids:
            return None
        return Fork(branches=tuple(Branch(header_ids=(digit,), label=str(digit)) for digit in (3, 4, 5)))

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        return () if outcome.token_ids[-1:] == self.closers else self.closers

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        return Join(forced_ids=tuple(id for t in threads for id in (*t.header_ids, *t.token_ids)))


async def test_threads_fork_and_join_over_http(url: str) -> None:
    prompt = plait.load_model(MODEL).request("What is 347 * 526?").prompt_ids
    request = Request(prompt_ids=prompt, budget=Budget(max_threads=8, max_tokens=200, max_depth=2))
    async with HttpEngine(url) as engine:
        tree = await run(request, engine=engine, format=AtEveryRow())
        usage, stats = tree.usage(), engine.stats()
        assert usage.forks >= 1
        assert usage.threads == 3 * usage.forks
        assert usage.reread_tokens > 0
        assert stats.active == 0
        assert stats.decode_tokens == usage.sampled_tokens
        assert stats.reused_tokens > 0, "a thread finds some of its parent's prefix"


async def test_a_control_token_ends_a_call_on_the_server(llama: str) -> None:
    format = open_format("sequential", plait.load_model(MODEL).tokenizer)
    prompt = plait.load_model(MODEL).request("What is 347 * 526?").prompt_ids
    async with HttpEngine(llama) as engine:
        params = SamplingParams(max_tokens=1500, eos_ids=(), stop_ids=format.eos_ids())
        stop, count = None, 0
        async with aclosing(engine.generate((prompt,), params)) as chunks:
            async for chunk in chunks:
                stop, count = chunk.stop, count + len(chunk.token_ids)
        assert (stop, count) == (StopReason.STOP, 223)


async def test_leaving_a_call_ends_it_on_a_real_server(url: str) -> None:
    async with HttpEngine(url) as engine:
        async with aclosing(engine.generate(((1, 2, 3),), SamplingParams(max_tokens=1900))) as chunks:
            await anext(chunks)
            with anyio.fail_after(40):  # some set their gauge every so many steps only
                while await engine.count_running() != 1:  # noqa: ASYNC110 - another process
                    await anyio.sleep(0.02)
        with anyio.fail_after(40):
            while await engine.count_running():  # noqa: ASYNC110 - another process
                await anyio.sleep(0.02)


async def test_doctor_finds_a_real_server_usable(url: str) -> None:
    async with HttpEngine(url) as engine:
        found = await diagnose(engine, prefix_tokens=256)
    assert found.usable, found.checks
    assert found.fork is not None
    assert found.fork.again_reused_tokens is not None
    assert found.fork.again_reused_tokens > 200


async def joins_nothing(url: str, error: type[EngineError], break_it: Callable[[], object]) -> None:
    """A server breaks in the middle of a fork: the run ends with this error, in time, and nothing half-joined."""
    prompt = plait.load_model(MODEL).request("What is 347 * 526?").prompt_ids
    request = Request(prompt_ids=prompt, budget=Budget(max_threads=8, max_tokens=None, max_depth=2))
    async with HttpEngine(url, timeouts=Timeouts(first_token_s=20, next_token_s=5), retries=1) as engine:
        async with AsyncExitStack() as stack:
            stack.enter_context(anyio.fail_after(120))
            stack.enter_context(pytest.raises(error))
            started = await stack.enter_async_context(open_run(request, engine=engine, format=AtEveryRow()))
            async for event in started:
                if isinstance(event, TokensSampled) and event.id == "0/0.1:0":
                    break_it()
        tree = started.tree
        assert {s.thread for s in tree.segments.values()} >= {"0", "0/0.0", "0/0.1", "0/0.2"}
        assert not any(s.joins for s in tree.segments.values())
        assert engine.stats().active == 0


async def is_gone(url: str) -> None:
    """Some seconds from now at the latest nobody listens there, and callers are told so; until then they get errors."""
    with anyio.fail_after(90):
        while True:
            with pytest.raises(EngineError) as caught:
                await ask_again(url)
            if isinstance(caught.value, EngineUnavailable) and "cannot be reached" in str(caught.value):
                return
            await anyio.sleep(0.2)


async def ask_again(url: str) -> None:
    async with HttpEngine(url, timeouts=Timeouts(first_token_s=20), retries=0) as engine:
        await sampled(engine, (1, 2, 3), 2)


async def test_a_server_that_is_killed_or_stalls_in_the_middle_of_a_fork_ends_the_run_and_joins_nothing(
    folder: Path,
) -> None:
    with llama_server(served_gguf(folder, MODEL)) as (url, process):
        await joins_nothing(url, EngineTimeout, lambda: process.send_signal(signal.SIGSTOP))
        process.send_signal(signal.SIGCONT)
        async with HttpEngine(url) as engine:
            assert len(await sampled(engine, (1, 2, 3), 2)) == 2
        await joins_nothing(url, EngineError, process.kill)
        await is_gone(url)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # two starts are enough; what differs is the server
@pytest.mark.parametrize("victim", ["server", "engine core"])
async def test_a_vllm_that_is_killed_or_stalls_in_the_middle_of_a_fork_ends_the_run_and_joins_nothing(
    victim: str, vllm_weights: Path
) -> None:
    with vllm_server(vllm_weights, native=True) as (url, process):
        await joins_nothing(url, EngineTimeout, lambda: os.killpg(process.pid, signal.SIGSTOP))
        os.killpg(process.pid, signal.SIGCONT)
        async with HttpEngine(url) as engine:
            assert len(await sampled(engine, (1, 2, 3), 2)) == 2
        dies = process.pid if victim == "server" else child(process.pid, "EngineCore")
        await joins_nothing(url, EngineError, lambda: os.kill(dies, signal.SIGKILL))
        await is_gone(url)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("victim", ["server", "scheduler"])
async def test_an_sglang_that_is_killed_or_stalls_in_the_middle_of_a_fork_ends_the_run_and_joins_nothing(
    victim: str, sglang_weights: Path
) -> None:
    with sglang_server(sglang_weights) as (url, process):
        await joins_nothing(url, EngineTimeout, lambda: os.killpg(process.pid, signal.SIGSTOP))
        os.killpg(process.pid, signal.SIGCONT)
        async with HttpEngine(url) as engine:
            assert len(await sampled(engine, (1, 2, 3), 2)) == 2
        dies = process.pid if victim == "server" else child(process.pid, "sglang::scheduler")
        await joins_nothing(url, EngineError, lambda: os.kill(dies, signal.SIGKILL))
        await is_gone(url)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_real_sglang_keeps_what_the_small_one_says_of_it(sglang_weights: Path) -> None:
    """Limits, salts, and log-probabilities and seeds at a temperature."""
    with sglang_server(sglang_weights, context=256) as (url, _):
        async with HttpEngine(url) as engine:
            assert (engine.max_context, engine.vocab_size) == (250, len(TOKENIZER.tokens))
            with pytest.raises(RequestError, match="not in the vocabulary"):
                await sampled(engine, (1, len(TOKENIZER.tokens)), 1)
            prompt = tuple(n % TEXT_IDS for n in range(200))
            reused: list[int] = []
            for salt in ("a", "a", "b"):
                before = engine.stats().reused_tokens
                with affinity("key", cache_salt=salt):
                    await sampled(engine, prompt, 2)
                reused.append(engine.stats().reused_tokens - before)
            assert reused == [0, len(prompt) - 1, 0]
            assert len(await sampled(engine, (1,) * 249, 9)) == 1
            engine.max_context = 10**6
            for size in (250, 260):
                with pytest.raises(ContextLengthError):
                    await sampled(engine, (1,) * size, 1)
        async with HttpEngine(url) as engine:
            found = {check.name: check.holds for check in (await diagnose(engine, prefix_tokens=64)).checks}
        assert False not in found.values()


def child(server: int, title: str) -> int:
    """The process that a server started and that computes."""
    for children in Path(f"/proc/{server}/task").glob("*/children"):
        for process in children.read_text().split():
            if title in Path(f"/proc/{process}/cmdline").read_text():
                return int(process)
    raise AssertionError(f"{title} is no process of its own here")


async def sampled(engine: HttpEngine, ids: tuple[int, ...], tokens: int) -> list[int]:
    found: list[int] = []
    async with aclosing(engine.generate((ids,), SamplingParams(max_tokens=tokens))) as chunks:
        async for chunk in chunks:
            found += chunk.token_ids
    return found
