"""Random workloads on an engine with too little memory for them: no wrong token, no leaked cell, no deadlock.

A workload is several runs at once. Each is a thread that samples, forks threads of its own, joins them by merge or by
reading them again, and goes on. Any of them may be cut off at any point, readers are slow or leave, and now and then
the engine is told to forget what it has cached. What was sampled is held against a reference afterwards, every call
in the context that it really had, so one near-tie does not make all that follows incomparable.

Knows engines by their protocol; `forget` is used where there is one.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeAlias

import anyio
import anyio.lowlevel

from plait.engines.base import Engine
from plait.errors import ContextLengthError, EngineError, EngineProtocolError, Failures
from plait.types import Context, Merge, SamplingParams, StopReason, context_cells, context_positions

Rows: TypeAlias = Callable[[Context, Sequence[int]], Sequence[Sequence[float]]]
"""Log-probabilities over the vocabulary at each of the ids that follow a context, computed by other means."""

_LONG, _HOT, _STOPS, _CUT, _LEFT = 0.25, 0.15, 0.2, 0.2, 0.2
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What one workload came to, or many."""

    workloads: int = 0
    calls: int = 0
    ended: int = 0
    """Calls that ran to their end."""
    cut: int = 0
    """Calls that were cancelled or left."""
    refused: int = 0
    """Calls whose context does not fit into the engine at all."""
    merges: int = 0
    """Calls whose context holds a merge."""
    tokens: int = 0
    """Sampled tokens, all of them compared with the reference."""
    largest_error: float = 0.0
    """Largest difference of a log-probability from the reference, nats."""
    largest_gap: float = 0.0
    """Most that the reference preferred another token to one sampled greedily, nats; what rounding allows."""
    preemptions: int = 0
    evictions: int = 0
    forgets: int = 0
    unpressed: int = 0
    """Workloads in which nothing had to give way: memory was not too small for them."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def __add__(self, other: Findings) -> Findings:
        largest = {name: max(getattr(self, name), getattr(other, name)) for name in ("largest_error", "largest_gap")}
        counts = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__ if name not in largest}
        return Findings(**counts, **largest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampled:
    """A call, as far as it was read."""

    context: Context
    params: SamplingParams
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: StopReason | None


async def run_workload(
    engine: Engine,
    seed: int,
    *,
    vocab_size: int,
    reference: Rows,
    cells: int,
    block_size: int = 1,
    tolerance: float = 5e-4,
    limit_s: float = 60.0,
    check: Callable[[], object] = lambda: None,
) -> Findings:
    """Run one workload on an open engine that runs nothing else, and check what must hold.

    Args:
        seed: What the workload does; not its timing.
        cells: Tokens that the engine holds.
        block_size: Cells that it hands out at once.
        tolerance: Largest difference of log-probabilities, in nats, that is rounding.
        limit_s: An engine that samples nothing for so long is in a deadlock. Not the time of a whole workload: a busy
            machine may take any.
        check: Called when the engine is idle again: an engine's own look at its books.

    Raises:
        EngineProtocolError: Something does not hold; the message says what, and the seed.
    """
    workload = _Workload(engine, seed, vocab_size=vocab_size, cells=cells, block_size=block_size)
    before = engine.stats()
    with Failures().unwrapped():
        await workload.run(limit_s)
    with anyio.move_on_after(_PATIENCE_S):
        while engine.stats().active or engine.stats().queued:  # noqa: ASYNC110 - an engine has no event to wait for
            await anyio.sleep(0.001)
    after = engine.stats()
    if after.active or after.queued:
        raise workload.broken(f"left {after.active} calls running and {after.queued} waiting")
    check()
    await workload.fill_to_the_brim()
    if await workload.forget() and engine.stats().cached_tokens:
        raise workload.broken(f"left {engine.stats().cached_tokens} cells that nobody holds")
    check()
    preemptions, evictions = after.preemptions - before.preemptions, after.evictions - before.evictions
    return replace(
        workload.findings(reference, tolerance),
        preemptions=preemptions,
        evictions=evictions,
        unpressed=int(not preemptions and not evictions),
        drafted_tokens=after.drafted_tokens - before.drafted_tokens,
        accepted_tokens=after.accepted_tokens - before.accepted_tokens,
    )


class _Workload:
    def __init__(self, engine: Engine, seed: int, *, vocab_size: int, cells: int, block_size: int) -> None:
        self.engine, self.seed, self.vocab_size = engine, seed, vocab_size
        self.cells, self.block_size = cells, block_size
        self.sampled: list[_Sampled] = []
        self.calls = self.refused = self.forgets = 0

    def broken(self, what: str) -> EngineProtocolError:
        return EngineProtocolError(f"workload {self.seed} on the {self.engine.name} engine {what}")

    # Running

    async def run(self, limit_s: float) -> None:
        rng = random.Random(self.seed)
        # Few ids and few prompts: beginnings coincide, so that prefixes are shared, and split again.
        prompts = [self._ids(rng, 8, 40) for _ in range(rng.randint(1, 3))]
        async with anyio.create_task_group() as background:
            background.start_soon(self._watch, limit_s)
            if rng.random() < 0.6:
                background.start_soon(self._forgetter, random.Random(f"{self.seed} forget"))
            async with anyio.create_task_group() as runs:
                for number in range(rng.randint(3, 8)):
                    runs.start_soon(self._run, f"{self.seed}/{number}", (rng.choice(prompts),))
            background.cancel_scope.cancel()

    async def _run(self, name: str, context: Context) -> None:
        rng = random.Random(f"{name} cut")
        with anyio.move_on_after(rng.uniform(0, 0.02) if rng.random() < _CUT else None):
            await self._thread(name, context, depth=2)

    async def _thread(self, name: str, context: Context, *, depth: int) -> Context:
        """One thread to its end; the context it ended with."""
        rng = random.Random(name)
        for block in range(rng.randint(1, 2 if depth else 1)):
            context = await self._call(rng, context)
            # One context alone must fit, or it is refused; what does not fit is many of them.
            if not depth or context_cells(context) > self.cells // 3 or rng.random() < 0.2:
                continue
            count = rng.randint(2, 4)
            ends: list[Context | None] = [None] * count

            async def branch(
                i: int, at: str, base: Context, header: tuple[int, ...], out: list[Context | None]
            ) -> None:
                cut = random.Random(f"{at} cut")
                out[i] = (header,) if cut.random() < 0.5 else None  # what a thread leaves that is cut off, if anything
                with anyio.move_on_after(cut.uniform(0, 0.01) if cut.random() < _CUT else None):
                    end = await self._thread(at, (*base, header), depth=depth - 1)
                    out[i] = end[len(base) :]

            async with anyio.create_task_group() as threads:
                for i in range(count):
                    header = self._ids(rng, 1, 4)
                    threads.start_soon(branch, i, f"{name}/{block}.{i}", context, header, ends)
            read = [end for end in ends if end]
            forced = self._ids(rng, 1, 3)
            if read and self.engine.supports_merge and rng.random() < 0.75:
                context = (*context, Merge(tuple(read)), forced)
            else:
                context = (*context, *(part for end in read for part in end), forced)
        return await self._call(rng, context)

    async def _call(self, rng: random.Random, context: Context) -> Context:
        """One call, read to its end or left; the context with what was sampled."""
        params = SamplingParams(
            max_tokens=rng.randint(20, 90) if rng.random() < _LONG else rng.randint(1, 12),
            temperature=1.0 if rng.random() < _HOT else 0.0,
            seed=rng.randrange(1000),
            stop_ids=self._ids(rng, 2, 4) if rng.random() < _STOPS else (),
            eos_ids=self._ids(rng, 1, 1) if rng.random() < _STOPS else (),
        )
        leave = rng.randint(1, 4) if rng.random() < _LEFT else None
        pause = rng.choice((0, 0, 1, 4))
        ids = await self._read(context, params, leave=leave, pause=pause)
        return (*context, ids) if ids else context

    async def _read(
        self, context: Context, params: SamplingParams, *, leave: int | None = None, pause: int = 0
    ) -> tuple[int, ...]:
        """What a call sampled. Put down for the comparison also where it is cancelled."""
        ids: list[int] = []
        logprobs: list[float] = []
        stop, chunks = None, 0
        self.calls += 1
        try:
            async with aclosing(self.engine.generate(context, params)) as stream:
                async for chunk in stream:
                    ids += chunk.token_ids
                    logprobs += chunk.logprobs
                    stop, chunks = chunk.stop, chunks + 1
                    if chunks == leave:
                        break
                    for _ in range(pause):
                        await anyio.lowlevel.checkpoint()
        except ContextLengthError:
            self.refused += 1
            if context_cells(context) + 1 + self._slack(context) <= self.cells and (
                context_positions(context) + 1 <= self.engine.max_context
            ):
                raise self.broken(f"was refused a context of {context_cells(context)} cells") from None
        except EngineError as exc:
            raise self.broken(f"failed: {exc}") from exc
        finally:
            self.sampled.append(
                _Sampled(context=context, params=params, ids=tuple(ids), logprobs=tuple(logprobs), stop=stop)
            )
        return tuple(ids)

    async def fill_to_the_brim(self) -> None:
        """A context as long as the engine takes: it fits only if no cell is lost."""
        ids = tuple((i * i + self.seed) % self.vocab_size for i in range(self.engine.max_context - 1))
        if not await self._read((ids,), SamplingParams(max_tokens=1)):
            raise self.broken(f"left no room for a context of {len(ids)} tokens")

    async def forget(self) -> bool:
        forget: Callable[[], Awaitable[None]] | None = getattr(self.engine, "forget", None)
        if forget is None:
            return False
        await forget()
        self.forgets += 1
        return True

    async def _watch(self, limit_s: float) -> None:
        """Raise when nothing was sampled, and no call begun, for too long."""
        last, since = None, anyio.current_time()
        while True:
            now = (self.engine.stats().decode_tokens, self.calls)
            if now != last:
                last, since = now, anyio.current_time()
            elif anyio.current_time() - since > limit_s:
                raise self.broken(f"sampled nothing for {limit_s:.0f} s; {self.engine.stats()}")
            await anyio.sleep(limit_s / 20)

    async def _forgetter(self, rng: random.Random) -> None:
        while await self.forget():  # noqa: ASYNC110 - nothing to wait for: at any point
            await anyio.sleep(rng.uniform(0, 0.01))

    def _ids(self, rng: random.Random, least: int, most: int) -> tuple[int, ...]:
        few = rng.random() < 0.5
        return tuple(rng.randrange(3 if few else self.vocab_size) for _ in range(rng.randint(least, most)))

    def _slack(self, context: Context) -> int:
        """Cells that a context may take beyond its tokens: each of its runs begins a block."""

        def runs(parts: Context) -> int:
            return sum(sum(map(runs, p.branches)) if isinstance(p, Merge) else 1 for p in parts)

        return (self.block_size - 1) * (runs(context) + 1) + 1

    # Checking

    def findings(self, reference: Rows, tolerance: float) -> Findings:
        """Hold every call against the reference."""
        found = Findings(workloads=1, calls=self.calls, refused=self.refused, forgets=self.forgets)
        for call in self.sampled:
            error, gap = self._compare(call, reference, tolerance)
            found += Findings(
                ended=int(call.stop is not None),
                merges=int(any(isinstance(part, Merge) for part in call.context)),
                tokens=len(call.ids),
                largest_error=error,
                largest_gap=gap,
            )
        return replace(found, cut=found.calls - found.ended - found.refused)

    def _compare(self, call: _Sampled, reference: Rows, tolerance: float) -> tuple[float, float]:
        self._check_end(call)
        if not call.ids:
            return 0.0, 0.0
        largest_error = largest_gap = 0.0
        rows = reference(call.context, call.ids)
        for k, (id, logprob, row) in enumerate(zip(call.ids, call.logprobs, rows, strict=True)):
            error, gap = abs(float(row[id]) - logprob), float(max(row)) - float(row[id])
            if call.params.temperature:
                gap = 0.0
            if not (error <= tolerance and gap <= tolerance):
                raise self.broken(
                    f"sampled {id} as token {k} of {call.ids} with log-probability {logprob:.5f}; the reference gives"
                    f" it {float(row[id]):.5f} and prefers another by {gap:.5f}; context {call.context}"
                )
            largest_error, largest_gap = max(largest_error, error), max(largest_gap, gap)
        return largest_error, largest_gap

    def _check_end(self, call: _Sampled) -> None:
        params, ids = call.params, call.ids
        ends: dict[int, StopReason] = dict.fromkeys(params.eos_ids, StopReason.EOS)
        ends |= dict.fromkeys(params.stop_ids, StopReason.STOP)
        early = [id for id in ids[:-1] if id in ends]
        expected = None if call.stop is None else ends.get(ids[-1], StopReason.LENGTH) if ids else "a token"
        if early or call.stop != expected or len(ids) > params.max_tokens:
            raise self.broken(f"ended {ids} with {call.stop!r}, asked for {params}")
        full = context_cells(call.context) + len(ids) + self._slack(call.context) >= self.cells
        long = context_positions(call.context) + len(ids) >= self.engine.max_context
        if call.stop is StopReason.LENGTH and len(ids) < params.max_tokens and not (full or long):
            raise self.broken(f"ended after {len(ids)} of {params.max_tokens} tokens, asked for {params}")


__all__ = ["Findings", "Rows", "run_workload"]
