"""Measures what a server makes of forks: is a prefix found again, do calls end where they must, does hanging up help.

Sends twenty to forty calls, one of them for a whole context, and changes nothing. Knows what to advise for each kind
of server.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import takewhile

import anyio

from plait.engines.http.engine import HttpEngine
from plait.engines.http.probe import Server
from plait.engines.http.vllm import NATIVE
from plait.errors import EngineError, EngineProtocolError, PlaitError, RequestError
from plait.types import SamplingParams, StopReason

BRANCHES = 4
_PROMPT = 12
"""Tokens of a prompt that is not about length."""
_DRAWS = 3
"""Prompts that are tried where rounding may have hidden what is looked for."""
_SAMPLED = 16
"""Tokens of a parent before it forks."""
_HEADER = 2
_CANCEL_S = 2.0
_SURE, _UNSURE = 0.3, 2.0
"""Nats. Between them lies what a temperature of one half moves by more than `_ROUNDED`, unless all tokens are alike."""
_ROUNDED = 0.1
"""Nats that rounding may make of a log-probability, with weights of eight bits beside other calls."""
_ROOM = {
    "llama-server": "With --kv-unified all slots share one context, and when it is full their calls are killed: start "
    "without it, or with a --ctx-size for all threads together.",
}
_WORTH_SAYING = 64
"""Tokens of a prefix that may be computed again without a word."""
_HITS = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_hits")
_FIRST_ID, _END_ID = 32, 128
"""Ids of ordinary tokens in every large vocabulary: single bytes."""
_SMALL = 64
"""Taken for the size of a vocabulary that is smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing an engine must do."""

    name: str
    holds: bool | None
    """None: it cannot be seen from outside."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkCost:
    """What it costs to fork a context that has just been run."""

    prefix_tokens: int
    """Of the parent, prompt and output."""
    branches: int
    """Started at once."""
    cold_s: float
    """To the first token of the parent, nothing of it cached."""
    first_s: float
    """To the first token of a branch, median."""
    again_s: float
    """The same for a second fork of the same parent."""
    first_reused_tokens: float | None
    """Of each branch's prompt, found in the cache, mean; None where the server does not say."""
    again_reused_tokens: float | None

    @property
    def lost_tokens(self) -> float:
        """Of the prefix, computed again in each branch of the first fork; 0 where it is not known."""
        return 0.0 if self.first_reused_tokens is None else max(0.0, self.prefix_tokens - self.first_reused_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found at one address."""

    server: Server
    max_context: int
    checks: tuple[Check, ...]
    fork: ForkCost | None
    """None: the branches failed."""
    advice: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether nothing that an engine must do is broken."""
        return all(check.holds is not False for check in self.checks)


async def diagnose(engine: HttpEngine, *, prefix_tokens: int = 512) -> Diagnosis:
    """Examine an engine with one address, opened.

    Args:
        prefix_tokens: Length of the prompt that is forked, as far as the context allows.

    Raises:
        EngineError: The server failed.
    """
    if len(engine.urls) != 1:
        raise RequestError(f"{len(engine.urls)} addresses at once; diagnose one at a time")
    ids = _Ids(engine.vocab_size or await _least_vocab_size(engine))
    checks = [
        await _stops(engine, ids),
        await _bans(engine, ids.fresh(_PROMPT)),
        await _repeats(engine, ids.fresh(_PROMPT)),
        await _seeds(engine, ids.fresh(_PROMPT)),
        await _logprobs(engine, ids),
        await _cancels(engine, ids.fresh(_PROMPT)),
    ]
    room = engine.max_context - 2 * _SAMPLED - _HEADER
    fork: ForkCost | None = None
    try:
        fork = await _fork(engine, ids, max(16, min(prefix_tokens, room)))
        checks.append(Check(name="side by side", holds=True))
    except EngineError as exc:
        checks.append(Check(name="side by side", holds=False, note=str(exc)))
    server = engine.servers[0]
    return Diagnosis(
        server=server,
        max_context=engine.max_context,
        checks=tuple(checks),
        fork=fork,
        advice=tuple(advise(server, checks, fork)),
    )


class _Ids:
    """Prompts that nobody has sent before."""

    def __init__(self, vocab_size: int) -> None:
        self._range = (_FIRST_ID, _END_ID) if vocab_size >= _END_ID else (0, max(2, vocab_size // 2))
        self._random = random.SystemRandom()

    def fresh(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(*self._range) for _ in range(count))


@dataclass(slots=True)
class _Output:
    ids: list[int]
    stop: StopReason | None = None
    first_s: float = math.nan
    logprobs: list[float] = field(default_factory=list[float])


async def _call(engine: HttpEngine, ids: Sequence[int], params: SamplingParams) -> _Output:
    output, started = _Output([]), anyio.current_time()
    async with aclosing(engine.generate((tuple(ids),), params)) as chunks:
        async for chunk in chunks:
            if not output.ids:
                output.first_s = anyio.current_time() - started
            output.ids += chunk.token_ids
            output.logprobs += chunk.logprobs
            output.stop = chunk.stop
    return output


async def _least_vocab_size(engine: HttpEngine) -> int:
    """What a server that does not say its vocabulary takes at least."""
    try:
        await _call(engine, (_END_ID - 1,), SamplingParams(max_tokens=1))
    except EngineProtocolError:
        return _SMALL
    return _END_ID


async def _stops(engine: HttpEngine, ids: _Ids) -> Check:
    for _ in range(_DRAWS):
        prompt = ids.fresh(_PROMPT)
        plain = await _call(engine, prompt, SamplingParams(max_tokens=8))
        stop = plain.ids[len(plain.ids) // 2]
        cut = plain.ids[: plain.ids.index(stop) + 1]
        output = await _call(engine, prompt, SamplingParams(max_tokens=64, stop_ids=(stop,)))
        if output.ids[: len(cut)] == cut:
            return Check(name="stop ids", holds=output.stop is StopReason.STOP and len(output.ids) == len(cut))
    # Kernels round differently for a prompt that is cached: the stop was not sampled, so nothing was seen.
    return Check(name="stop ids", holds=None, note=f"greedy text differed between two calls, {_DRAWS} times")


async def _bans(engine: HttpEngine, prompt: Sequence[int]) -> Check:
    plain = await _call(engine, prompt, SamplingParams(max_tokens=1))
    try:
        await _call(engine, prompt, SamplingParams(max_tokens=4, banned_ids=tuple(plain.ids)))
    except PlaitError as exc:
        return Check(name="banned ids", holds=False, note=str(exc))
    return Check(name="banned ids", holds=True)


async def _repeats(engine: HttpEngine, prompt: Sequence[int]) -> Check:
    outputs = [await _call(engine, prompt, SamplingParams(max_tokens=16)) for _ in range(2)]
    same = outputs[0].ids == outputs[1].ids
    # Kernels round differently for other batches, so a difference is no fault by itself.
    return Check(
        name="greedy repeats", holds=same or None, note="" if same else "two calls differed: rounding, or luck"
    )


async def _seeds(engine: HttpEngine, prompt: Sequence[int]) -> Check:
    if engine.servers[0].heeds_seeds is False:
        return Check(name="seeds", holds=False, note="the server was started so that they do not count")
    params = SamplingParams(max_tokens=12, temperature=1.0)
    # Once more than it takes: the first call computes its prompt, the others find it cached, which rounds otherwise.
    same = [tuple((await _call(engine, prompt, replace(params, seed=7))).ids) for _ in range(3)]
    others = [tuple((await _call(engine, prompt, replace(params, seed=seed))).ids) for seed in range(3)]
    if len(set(same)) == len(same):
        return Check(name="seeds", holds=False, note="the same seed gave another output each time")
    if set(others) <= set(same):
        return Check(name="seeds", holds=None, note="all seeds gave the same output: the model is very sure")
    return Check(name="seeds", holds=True)


async def _logprobs(engine: HttpEngine, ids: _Ids) -> Check:
    """Whether they are the model's own: a low temperature changes them where it was applied before."""
    seen = False
    for _ in range(_DRAWS):
        prompt = ids.fresh(_PROMPT)
        plain = await _call(engine, prompt, SamplingParams(max_tokens=_SAMPLED))
        sharp = await _call(engine, prompt, SamplingParams(max_tokens=_SAMPLED, temperature=0.5))
        tokens = zip(plain.ids, sharp.ids, plain.logprobs, sharp.logprobs, strict=False)
        alike = takewhile(lambda token: token[0] == token[1], tokens)
        # Where the model is sure, or knows nothing, a temperature changes little.
        telling = [abs(hot - cold) for _, _, cold, hot in alike if -_UNSURE < cold < -_SURE]
        if max(telling, default=0.0) > _ROUNDED:
            return Check(name="logprobs", holds=False, note="they are those after temperature, not the model's own")
        seen = seen or bool(telling)
    return Check(name="logprobs", holds=seen or None, note="" if seen else "no token showed a difference")


async def _cancels(engine: HttpEngine, prompt: Sequence[int]) -> Check:
    """Hang up on a long call; the server's own gauge tells whether it went on."""
    before = await engine.count_running()
    params = SamplingParams(max_tokens=max(1, engine.max_context - len(prompt) - 1))
    async with aclosing(engine.generate((tuple(prompt),), params)) as chunks:
        await anext(chunks)
        shown = before is not None and await _shows_more(engine, before)
    if before is None:
        return Check(name="cancelling", holds=None, note="the server publishes no count of running calls")
    if not shown:
        return Check(name="cancelling", holds=None, note="the server's count of running calls did not show it")
    started = anyio.current_time()
    while anyio.current_time() - started < _CANCEL_S:
        if (await engine.count_running() or 0.0) <= before:
            return Check(name="cancelling", holds=True, note=f"within {anyio.current_time() - started:.2f} s")
        await anyio.sleep(0.05)
    return Check(name="cancelling", holds=False, note=f"the call still ran {_CANCEL_S:g} s after its client had gone")


async def _shows_more(engine: HttpEngine, before: float) -> bool:
    """Whether a gauge shows a call that runs. Some are set every so many steps only."""
    with anyio.move_on_after(_CANCEL_S):
        while (await engine.count_running() or 0.0) <= before:  # noqa: ASYNC110 - another process
            await anyio.sleep(0.05)
        return True
    return False


async def _fork(engine: HttpEngine, ids: _Ids, prefix_tokens: int) -> ForkCost:
    prompt = ids.fresh(prefix_tokens)
    parent = await _call(engine, prompt, SamplingParams(max_tokens=_SAMPLED))
    context = (*prompt, *parent.ids)
    first_s, first_reused = await _branches(engine, context, ids)
    again_s, again_reused = await _branches(engine, context, ids)
    return ForkCost(
        prefix_tokens=len(context),
        branches=BRANCHES,
        cold_s=parent.first_s,
        first_s=first_s,
        again_s=again_s,
        first_reused_tokens=first_reused,
        again_reused_tokens=again_reused,
    )


async def _branches(engine: HttpEngine, context: Sequence[int], ids: _Ids) -> tuple[float, float | None]:
    """Fork once: median seconds to a first token, mean tokens of a prompt that were cached."""
    outputs: list[_Output] = []
    failures: list[EngineError] = []

    async def branch() -> None:
        try:
            outputs.append(await _call(engine, (*context, *ids.fresh(_HEADER)), SamplingParams(max_tokens=4)))
        except EngineError as exc:
            failures.append(exc)

    hits, reused = await _hits(engine), engine.stats().reused_tokens
    async with anyio.create_task_group() as branches:
        for _ in range(BRANCHES):
            branches.start_soon(branch)
    if failures:
        raise failures[0]
    median = statistics.median(output.first_s for output in outputs)
    if engine.servers[0].tells_cached_tokens:
        return median, (engine.stats().reused_tokens - reused) / BRANCHES
    now = await _hits(engine)
    return median, None if hits is None or now is None else (now - hits) / BRANCHES


async def _hits(engine: HttpEngine) -> float | None:
    if engine.servers[0].tells_cached_tokens:
        return None
    metrics = await engine.metrics()
    return next((metrics[name] for name in _HITS if name in metrics), None)


def advise(server: Server, checks: Sequence[Check], fork: ForkCost | None) -> list[str]:
    """What to change on a server, most useful first."""
    if fork is None:
        return [_ROOM.get(server.kind, f"It cannot run {BRANCHES} branches of a fork at once: give it more memory.")]
    by_kind = {"vllm": _for_vllm, "sglang": _for_sglang, "llama-server": _for_llama_server}
    found = by_kind.get(server.kind, _for_completions)(server, {check.name: check.holds for check in checks}, fork)
    if fork.first_reused_tokens is None and fork.first_s > 0.7 * fork.cold_s:
        found.append("A branch's first token takes about as long as a cold one's: is prefix caching on?")
    if any(check.name == "cancelling" and check.holds is False for check in checks):
        found.append("Cancelled calls go on: is there a proxy that does not pass on closed connections?")
    return found


def _for_vllm(server: Server, holds: Mapping[str, bool | None], fork: ForkCost) -> list[str]:
    found: list[str] = []
    if fork.first_reused_tokens == 0:
        found.append("Nothing of a fork's prefix was cached: start vllm serve with --enable-prefix-caching.")
    elif fork.lost_tokens > _WORTH_SAYING:
        found.append(
            f"{fork.lost_tokens:.0f} of {fork.prefix_tokens} prefix tokens are computed again in each branch, for "
            "cached blocks are large: start with --block-size 16 (32 on a CPU)."
        )
    if not server.tells_cached_tokens:
        found.append("Answers do not say what was cached: start with --enable-prompt-tokens-details.")
    if server.route != NATIVE:
        found.append("The route for token ids is closed; --enable-scale-out opens it. This one works too.")
    return found


def _for_sglang(server: Server, holds: Mapping[str, bool | None], fork: ForkCost) -> list[str]:
    found: list[str] = []
    if server.prefix_caching is False:
        found.append("The prefix cache is off: start without --disable-radix-cache.")
    if holds.get("seeds") is False:
        found.append("Seeds do not count: start with --enable-deterministic-inference.")
    if holds.get("logprobs") is False:
        found.append("Log-probabilities are those after temperature: set SGLANG_RETURN_ORIGINAL_LOGPROB=1 around it.")
    if holds.get("cancelling") is None:
        found.append("Start with --enable-metrics, so that load and cancelling can be seen.")
    return found


def _for_llama_server(server: Server, holds: Mapping[str, bool | None], fork: ForkCost) -> list[str]:
    found: list[str] = []
    if server.num_slots is not None and server.num_slots < fork.branches:
        found.append(
            f"It decodes {server.num_slots} sequences at once; threads beyond that wait. Start with --parallel 8 and "
            "a --ctx-size for all of them together."
        )
    if fork.lost_tokens > _WORTH_SAYING:
        found.append(
            f"Branches that start at once compute {fork.lost_tokens:.0f} of {fork.prefix_tokens} prefix tokens again: "
            "this server caches by slot, and one slot holds the parent. The same GGUF file forks for nothing in "
            "process: --model FILE without --engine."
        )
        if (fork.again_reused_tokens or 0) < fork.prefix_tokens - _WORTH_SAYING:
            found.append("A second fork finds no more. Start with --no-cache-idle-slots.")
    if holds.get("cancelling") is None:
        found.append("Start with --metrics, so that load and cancelling can be seen.")
    return found


def _for_completions(server: Server, holds: Mapping[str, bool | None], fork: ForkCost) -> list[str]:
    found: list[str] = []
    if server.max_context is None:
        found.append("It does not say how long a context may be: pass max_context.")
    found.append(
        "If it is a vLLM, SGLang or llama-server behind a proxy, say so (--kind): they end calls at stop ids "
        "themselves, and say what they found in their cache."
    )
    return found
