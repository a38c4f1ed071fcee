"""The embedded engine: llama.cpp in this process, every live call of every session in one batch per step.

This file is its asynchronous face: it checks what is asked, hands calls to the scheduler's thread, and yields what
comes back. Contexts are values; which of their tokens are cached is the business of `cache`. It knows nothing of
threads, formats or text.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.lowlevel

from plait.engines.base import EngineStats
from plait.engines.llamacpp.binding import MAX_SEQS, Decoder, Model
from plait.engines.llamacpp.cache import Cache, Part, normalise
from plait.engines.llamacpp.pace import Pace
from plait.engines.llamacpp.sampling import Sampler
from plait.engines.llamacpp.scheduler import Call, Delivery, Scheduler
from plait.engines.llamacpp.worker import WORKER
from plait.errors import ContextLengthError, EngineError, EngineUnavailable, RequestError
from plait.types import Chunk, Context, Merge, SamplingParams, StopReason, context_cells, context_positions

_SHORT = 2048
"""Contexts up to this many positions are computed faster with flash attention on the CPUs measured."""


class _Mailbox:
    """What a call sampled, between the scheduler's thread and its reader."""

    __slots__ = ("arrived", "error", "ids", "logprobs", "stop")

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.stop: StopReason | None = None
        self.error: EngineError | None = None
        self.arrived = anyio.Event()


class LlamaCppEngine:
    """Continues contexts with the weights of a GGUF file.

    Args:
        path: The GGUF file. It needs no tokenizer.
        max_context: Positions of one call; by default what the model was trained for, as far as `cells` allow.
        cells: Tokens held in memory for all calls together, shared prefixes counted once. A fork walks over all of
            them (a few microseconds a thousand), so no more than needed.
        max_seqs: Contexts held at once, live and cached; at most 256.
        threads: CPU threads of one step; all engines of a process take turns in them. By default every core for a
            large model; for a small one a second thread where several rows are computed and it has been faster.
        cache: Number format of cached keys and values. F32 is for exact comparisons.
        flash_attention: Skips cells a row does not attend to: on a CPU it pays for short contexts side by side, and
            costs for long ones. By default on for contexts up to 2,048 positions, if the cache is F16.
        keep: Cells of finished calls that are always kept for reuse; every step pays a little for them.
        prefill_rows: Given tokens computed in one step while other calls sample.
        flush_s: How often calls that go on sampling yield a chunk.

    Raises:
        ModelError: The file is missing, damaged, or of a kind that this engine does not run.
        EngineUnavailable: llama.cpp is not installed in the version this was written for; says how to install it.
    """

    name = "llamacpp"
    supports_merge = True

    def __init__(
        self,
        path: str | Path,
        *,
        max_context: int | None = None,
        cells: int = 4096,
        max_seqs: int = 32,
        threads: int | None = None,
        cache: Literal["F16", "F32"] = "F16",
        flash_attention: bool | None = None,
        keep: int = 128,
        prefill_rows: int = 64,
        flush_s: float = 0.01,
    ) -> None:
        if not 2 <= max_seqs <= MAX_SEQS:
            raise RequestError(f"max_seqs is {max_seqs}; it must be from 2 to {MAX_SEQS}")
        if flash_attention and cache == "F32":
            raise RequestError("flash_attention needs cache='F16'")
        self._cells = -(-max(cells, 256) // 256) * 256  # llama.cpp rounds up likewise
        self._model = Model(path)
        self.vocab_size = self._model.vocab_size
        self.max_context = min(max_context or self._model.trained_context, self._cells - 1)
        if flash_attention is None:
            flash_attention = cache == "F16" and self.max_context <= _SHORT
        self._pace = Pace.of(threads, model_bytes=Path(path).stat().st_size, cores=_cores())
        self._options: dict[str, Any] = {"flash": flash_attention, "wide_cache": cache == "F32"}
        self._max_seqs, self._keep, self._prefill_rows, self._flush_s = max_seqs, keep, prefill_rows, flush_s
        self._numbers = count()
        self._scheduler: Scheduler | None = None
        self._stopped = anyio.Event()
        self._closed = False

    def meta(self, key: str) -> str | None:
        """A string of the file's header, such as `plait.config`; None if it has no such key."""
        if self._closed:
            raise EngineUnavailable("the llama.cpp engine is closed")
        return self._model.meta(key)

    async def __aenter__(self) -> LlamaCppEngine:
        if self._closed or self._scheduler is not None:
            raise EngineUnavailable("a llama.cpp engine is opened once; make another one")
        try:
            decoder = Decoder(
                self._model,
                cells=self._cells,
                max_seqs=self._max_seqs,
                max_rows=min(512 + self._max_seqs, self._cells),
                **self._options,
            )
        except BaseException:
            await self.aclose()
            raise
        post = _poster()

        def close() -> None:
            # Freed by the thread that computes, so that no way out of the event loop can free it under a decode.
            decoder.close()
            self._model.close()
            post(self._stopped.set)

        self._scheduler = Scheduler(
            decoder,
            Cache(decoder, max_seqs=self._max_seqs, keep=self._keep),
            Sampler(self._max_seqs, self.vocab_size),
            self._pace,
            wake=WORKER.wake,
            post=lambda deliveries: post(_deliver, deliveries),
            close=close,
            prefill_rows=self._prefill_rows,
            flush_s=self._flush_s,
        )
        WORKER.add(self._scheduler)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End every call and free the memory; again is fine."""
        first, self._closed = not self._closed, True
        if self._scheduler is None:
            self._model.close()
            return
        if first:
            self._scheduler.put(("close", None))
        with anyio.CancelScope(shield=True):
            await self._stopped.wait()

    def stats(self) -> EngineStats:
        """Counters since it was opened."""
        s = self._scheduler
        if s is None:
            return EngineStats()
        return EngineStats(
            active=s.active,
            queued=s.queued,
            cached_tokens=s.cached_tokens,
            prefill_tokens=s.prefill_tokens,
            reused_tokens=s.reused_tokens,
            decode_tokens=s.decode_tokens,
            steps=s.steps,
        )

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        """Continue a context. Chunks carry what was sampled since the last one, some milliseconds' worth.

        Raises:
            ContextLengthError: The context leaves no position or no cell to sample into.
            RequestError: It is empty, ends with a merge, or holds an id that the model does not have.
            EngineUnavailable: The engine is not open, or was closed while the call ran.
        """
        scheduler = self._scheduler
        if scheduler is None or self._closed:
            raise EngineUnavailable("the llama.cpp engine is closed" if self._closed else "open the engine first")
        parts = self._checked(context)
        room = self.max_context - context_positions(parts)
        mailbox = _Mailbox()
        call = Call(next(self._numbers), parts, params, min(params.max_tokens, room), mailbox)
        if call.need > self._max_seqs:
            raise RequestError(f"the context's merges nest {call.need - 1} deep; max_seqs={self._max_seqs} is too few")
        scheduler.put(("submit", call))
        try:
            while True:
                await mailbox.arrived.wait()
                mailbox.arrived = anyio.Event()
                if mailbox.error is not None:
                    raise mailbox.error
                chunk = Chunk(token_ids=tuple(mailbox.ids), logprobs=tuple(mailbox.logprobs), stop=mailbox.stop)
                mailbox.ids, mailbox.logprobs = [], []
                yield chunk
                if chunk.stop is not None:
                    return
        finally:
            if mailbox.stop is None and mailbox.error is None:
                scheduler.put(("cancel", call))

    def _checked(self, context: Context) -> tuple[Part, ...]:
        parts = normalise(context)
        if not parts or isinstance(parts[-1], Merge):
            raise RequestError(
                "a context must end with at least one token id" + (", also after a merge" if parts else "")
            )
        positions, cells = context_positions(parts), context_cells(parts)
        if positions + 1 > self.max_context:
            raise ContextLengthError(
                f"the context has {positions} positions; with one to sample, {self.max_context} fit"
            )
        if cells + 1 > self._cells:
            raise ContextLengthError(f"the context holds {cells} tokens in memory; the engine has {self._cells} cells")
        _check_ids(parts, self.vocab_size)
        return parts


def _check_ids(parts: Context, vocab_size: int) -> None:
    for part in parts:
        if isinstance(part, Merge):
            for branch in part.branches:
                _check_ids(branch, vocab_size)
        elif min(part) < 0 or max(part) >= vocab_size:
            bad = next(i for i in part if not 0 <= i < vocab_size)
            raise RequestError(f"token id {bad} is not in the vocabulary; ids go from 0 to {vocab_size - 1}")


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _poster() -> Callable[..., None]:
    """The running event loop's way to be called from another thread without waiting for it."""
    loop: Any = anyio.lowlevel.current_token().native_token
    call = loop.run_sync_soon if hasattr(loop, "run_sync_soon") else loop.call_soon_threadsafe

    def post(function: Callable[..., object], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is gone, and everybody who waited with it
            call(function, *args)

    return post


def _deliver(deliveries: list[Delivery]) -> None:
    """On the event loop: put what was sampled into the mailboxes."""
    for call, ids, logprobs, stop, error in deliveries:
        mailbox: _Mailbox = call.user
        mailbox.ids += ids
        mailbox.logprobs += logprobs
        mailbox.stop, mailbox.error = stop, error
        mailbox.arrived.set()
