"""An engine without a model: what it says is a pure function of context and seed, when it says it is up to you.

For docs, tests and measuring the runtime alone. It knows nothing of formats or text. Three ways to say what it says:
a pseudo-random model over a vocabulary (the default), a function from a context to ids, or a tree to be replayed.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, repeat
from typing import TypeAlias
from zlib import crc32

import anyio
import anyio.lowlevel

from plait.engines.base import EngineStats, check_params, no_context
from plait.errors import ContextLengthError, EngineError, EngineUnavailable, RequestError, UnsupportedJoin
from plait.settings import within
from plait.tree import Tree
from plait.types import Chunk, Context, Merge, SamplingParams, StopReason, context_merges, context_positions

Script: TypeAlias = Callable[[Context], Sequence[int]]
Fail: TypeAlias = Callable[[Context, Sequence[int]], Exception | None]
_WORD = 1 << 32
_LONGEST_S, _HEAVIEST = 3600, 1e30


class ScriptedEngine:
    """Continues contexts by rule, with any timing and failures.

    Without a script it is a pseudo-random language model: the next id is drawn by a hash of all ids before it (and of
    the seed, when the temperature is not 0), from fixed weights. So it obeys every clause of the engine contract, a
    merge included: the order of branches does not matter and a merge of one branch is that branch.

    Args:
        vocab_size: Ids are 0 to `vocab_size - 1`.
        weights: Relative frequency of some ids; every other id has 1. Give control ids a high one to see many forks.
        script: What to say: all ids that answer a context (cut at the first stop or eos id, and at `max_tokens`), or
            a tree, whose sampled ids and logprobs are said again where its contexts are asked for again.
        chunk_size: Tokens a chunk.
        delay_s: Seconds a token takes. Under `plait.testing.clock` they cost nothing.
        timing_seed: Makes chunk sizes (up to `chunk_size`) and the scheduling between chunks pseudo-random.
        fail: Called before each token with the context and the ids said so far; what it returns is raised.
        max_context: Positions one call may use.
        supports_merge: False refuses contexts with a `Merge`.
    """

    name = "scripted"

    def __init__(
        self,
        *,
        vocab_size: int = 64,
        weights: Mapping[int, float] | None = None,
        script: Script | Tree | None = None,
        chunk_size: int = 1,
        delay_s: float = 0.0,
        timing_seed: int | None = None,
        fail: Fail | None = None,
        max_context: int = 1 << 20,
        supports_merge: bool = True,
    ) -> None:
        for option, value in (("vocab_size", vocab_size), ("chunk_size", chunk_size), ("max_context", max_context)):
            within(option, value, 1, whole=True, or_none=False)
        within("delay_s", delay_s, 0, _LONGEST_S, or_none=False)
        self.max_context, self.supports_merge = max_context, supports_merge
        self._weights = [1.0] * vocab_size
        for id, weight in (weights or {}).items():
            within("an id of weights", id, 0, vocab_size - 1, whole=True, or_none=False)
            within(f"the weight of {id}", weight, 0, _HEAVIEST, or_none=False)
            self._weights[id] = weight
        self._likely = [id for id, weight in enumerate(self._weights) if weight]
        if not self._likely:
            raise RequestError(f"the weights of all {vocab_size} ids are 0; leave one to sample")
        self._script = _Replay(script) if isinstance(script, Tree) else script
        self._chunk_size, self._delay_s, self._fail = chunk_size, delay_s, fail
        self._timing = None if timing_seed is None else random.Random(timing_seed)
        self._active = self._calls = self._prefill = self._decoded = 0
        self._closed = False

    async def __aenter__(self) -> ScriptedEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        self._closed = True

    def stats(self) -> EngineStats:
        return EngineStats(
            active=self._active, prefill_tokens=self._prefill, decode_tokens=self._decoded, steps=self._decoded
        )

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        check_params(params, self._likely if self._script is None else None)
        try:
            self._check(context)
            state = _fold(context, 0) if self._script is None else 0
        except TypeError as exc:
            raise no_context(context) from exc
        length = context_positions(context)
        room = min(params.max_tokens, self.max_context - length)
        tokens = self._tokens(context, params, state)
        self._active += 1
        self._prefill += length
        said: list[int] = []
        try:
            stop: StopReason | None = None
            while stop is None:
                await self._wait()
                ids: list[int] = []
                logprobs: list[float] = []
                for _ in range(self._size()):
                    if self._fail is not None and (failure := self._fail(context, said)) is not None:
                        raise failure
                    token = next(tokens)
                    if token is None:
                        break
                    id, logprob = token
                    ids.append(id)
                    logprobs.append(logprob if params.logprobs else 0.0)
                    said.append(id)
                    stop = params.stop_at(id, full=len(said) >= room)
                    if stop is not None:
                        break
                if not ids:
                    # A replayed call that was cut: silent until it is cut again.
                    await anyio.sleep_forever()
                if self._delay_s:
                    await anyio.sleep(self._delay_s * len(ids))
                self._decoded += len(ids)
                yield Chunk(token_ids=tuple(ids), logprobs=tuple(logprobs), stop=stop)
        finally:
            self._active -= 1

    def _check(self, context: Context) -> None:
        if self._closed:
            raise EngineUnavailable("the scripted engine is closed")
        if not self.supports_merge and any(True for _ in context_merges(context)):
            raise UnsupportedJoin("this scripted engine was made with supports_merge=False; it takes plain ids only")
        if not context or isinstance(context[-1], Merge):
            raise RequestError("a context must end in at least one token id; no logits follow a merge alone")
        length = context_positions(context)
        if length >= self.max_context:
            raise ContextLengthError(f"the context has {length} positions, at most {self.max_context - 1} fit")

    def _size(self) -> int:
        return self._chunk_size if self._timing is None else self._timing.randint(1, self._chunk_size)

    async def _wait(self) -> None:
        for _ in range(1 if self._timing is None else self._timing.randrange(4)):
            await anyio.lowlevel.checkpoint()

    def _tokens(self, context: Context, params: SamplingParams, state: int) -> Iterator[tuple[int, float] | None]:
        if self._script is None:
            return self._draw(state, params)
        if isinstance(self._script, _Replay):
            return self._script.tokens(context)
        return _until_silent(_flat(self._script(context)), context)

    def _draw(self, state: int, params: SamplingParams) -> Iterator[tuple[int, float]]:
        weights = self._weights
        if params.banned_ids:
            weights = [0.0 if id in params.banned_ids else weight for id, weight in enumerate(weights)]
        upto = list(accumulate(weights))
        logprobs = [math.log(weight / upto[-1]) if weight else -math.inf for weight in weights]
        seed = crc32(repr(params.seed).encode()) if params.temperature else 0
        while True:
            draw = crc32(seed.to_bytes(4, "little"), state) * 2654435761 % _WORD / _WORD
            id = bisect_right(upto, draw * upto[-1])
            yield id, logprobs[id]
            state = _fold_ids((id,), state)


class _Replay:
    """What a tree's calls sampled, by their contexts. Of two calls with the same context the first is kept.

    What a call that was cut would have said is not known: it is silent until it is cut again, and so is every call that
    a thread which was cut would have made.
    """

    def __init__(self, tree: Tree) -> None:
        self._said: dict[Context, list[tuple[int, float]]] = {}
        self._cut: set[Context] = set()
        for segment in tree.segments.values():
            said = list(zip(segment.sampled_ids, segment.logprobs, strict=True))
            if said or segment.stop is StopReason.CANCELLED:
                context = tree.context(segment.id)
                self._said.setdefault(context, said)
                if segment.stop is StopReason.CANCELLED:
                    self._cut.add(context)
        self._dead = _dead_ends(tree) if self._cut else []

    def tokens(self, context: Context) -> Iterator[tuple[int, float] | None]:
        if context not in self._said:
            if any(_begins(context, end) for end in self._dead):
                return repeat(None)
            raise EngineError(f"the replayed tree has no call with this context ({_tail(context)})")
        if context in self._cut:
            return chain(self._said[context], repeat(None))
        return _until_silent(self._said[context], context)


def _dead_ends(tree: Tree) -> list[Context]:
    """What threads that were cut held at last; of one that was cut while it waited, where it forked."""
    last: dict[str, int] = {}
    for segment in tree.segments.values():
        last[segment.thread] = max(last.get(segment.thread, 0), int(segment.id.rpartition(":")[2]))
    dead: list[Context] = []
    for thread, number in last.items():
        segment = tree.segments[f"{thread}:{number}"]
        if segment.stop is StopReason.CANCELLED or any(name.startswith(f"{thread}/{number}.") for name in last):
            dead.append(_with_tail(tree.context(segment.id), tuple(segment.sampled_ids)))
    return dead


def _with_tail(context: Context, ids: tuple[int, ...]) -> Context:
    last = context[-1] if context else ()
    return (*context, ids) if isinstance(last, Merge) else (*context[:-1], (*last, *ids))


def _begins(context: Context, start: Context) -> bool:
    """Whether a context goes on from another."""
    *before, tail = start
    n = len(before)
    at = context[n] if n < len(context) else None
    same = context[:n] == tuple(before)
    return (
        same
        and not isinstance(at, Merge)
        and not isinstance(tail, Merge)
        and at is not None
        and at[: len(tail)] == tail
    )


def _flat(ids: Sequence[int]) -> list[tuple[int, float]]:
    return [(id, 0.0) for id in ids]


def _until_silent(said: Sequence[tuple[int, float]], context: Context) -> Iterator[tuple[int, float]]:
    yield from said
    raise EngineError(f"the script says {len(said)} ids and then nothing, without a stop or eos id ({_tail(context)})")


def _tail(context: Context) -> str:
    last = context[-1] if context else ()
    ids = () if isinstance(last, Merge) else last[-8:]
    return f"{context_positions(context)} positions, ending in {list(ids)}"


def _fold(context: Context, state: int) -> int:
    """A hash of everything attended to. Branches of a merge start alike and are added up: their order is lost."""
    for part in context:
        if isinstance(part, Merge):
            state = sum(_fold(branch, state) for branch in part.branches) % _WORD
        else:
            state = _fold_ids(part, state)
    return state


def _fold_ids(ids: Sequence[int], state: int) -> int:
    return crc32(array("q", ids).tobytes(), state)
