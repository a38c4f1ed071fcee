"""What engines that compute in this process have in common: their asynchronous face.

It checks what is asked, hands calls to a scheduler in the worker's thread, and yields what comes back. Knows nothing
of weights, caches and steps.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np

from plait.engines.affinity import stated_affinity
from plait.engines.base import EngineStats, check_params, no_context
from plait.engines.inprocess.calls import Call, Delivery, Part, normalise
from plait.engines.inprocess.scheduler import Scheduler
from plait.errors import ContextLengthError, EngineError, EngineUnavailable, RequestError
from plait.settings import within
from plait.types import Chunk, Context, Merge, SamplingParams, StopReason, context_cells, context_positions

_RANGES: dict[str, tuple[float, float | None]] = {
    "max_context": (2, None),
    "cells": (1, 2**26),
    "threads": (1, 256),
    "prefill_rows": (1, None),
    "flush_s": (0, 60),
    "lora_scale": (-1000, 1000),
}


def check_options(**options: float | None) -> None:
    """Hold options that these engines share to their ranges; None passes.

    Raises:
        RequestError: One is outside; says what is allowed.
    """
    for name, value in options.items():
        within(name, value, *_RANGES[name])


class Mailbox:
    """What a call sampled, between the worker's thread and its reader."""

    __slots__ = ("arrived", "error", "ids", "logprobs", "stop")

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.stop: StopReason | None = None
        self.error: EngineError | None = None
        self.arrived = anyio.Event()


class InProcessEngine:
    """Base of the engines that compute in this process. They open a scheduler on entering and free it in its thread."""

    name: str
    supports_merge = True
    max_context: int
    vocab_size: int

    def __init__(self, *, cells: int) -> None:
        self._cells = cells
        self._numbers = count()
        self._scheduler: Scheduler[Any] | None = None
        self._stopped = anyio.Event()
        self._closed = False
        self._process = os.getpid()
        self._loop: object = None
        """The event loop that it was opened in, where deliveries go."""
        self._ended = EngineStats()
        """What was counted until it was closed."""

    def _call(self, number: int, parts: tuple[Part, ...], params: SamplingParams, mailbox: Mailbox) -> Call:
        """A call as its scheduler takes it.

        Raises:
            RequestError: The engine cannot take it.
        """
        raise NotImplementedError

    def _free(self) -> None:
        """Give back what is held before the engine is opened."""

    def _check_unopened(self) -> None:
        if self._closed or self._scheduler is not None:
            raise EngineUnavailable(f"the {self.name} engine is opened once; make another one")
        self._loop = anyio.lowlevel.current_token()

    def _check_open(self) -> Any:
        if self._process != os.getpid():
            raise EngineUnavailable(f"the {self.name} engine was made in another process; make one in this")
        if self._scheduler is None or self._closed:
            raise EngineUnavailable(
                f"the {self.name} engine is closed" if self._closed else "open the engine first: `async with engine`"
            )
        if self._loop != anyio.lowlevel.current_token():
            raise EngineUnavailable(f"the {self.name} engine was opened in another event loop; make one in this")
        return self._scheduler

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End every call and free the memory; again is fine."""
        first, self._closed = not self._closed, True
        if self._scheduler is None:
            self._free()
            return
        if self._process != os.getpid():
            return  # its thread, which frees it, is in the process that opened it
        if first:
            self._scheduler.put(("close", None))
        if self._loop != anyio.lowlevel.current_token():
            return  # its thread frees it, and tells a loop that may be over
        with anyio.CancelScope(shield=True):
            await self._stopped.wait()
        self._ended = replace(self.stats(), active=0, queued=0, cached_tokens=0)
        self._scheduler = None  # and with it weights and caches
        self._free()

    def stats(self) -> EngineStats:
        """Counters since it was opened."""
        s = self._scheduler
        if s is None:
            return self._ended
        return EngineStats(
            active=s.active,
            queued=s.queued,
            cached_tokens=s.cached_tokens,
            prefill_tokens=s.prefill_tokens,
            reused_tokens=s.reused_tokens,
            decode_tokens=s.decode_tokens,
            steps=s.steps,
            preemptions=s.preemptions,
            evictions=s.evictions,
            drafted_tokens=s.drafted_tokens,
            accepted_tokens=s.accepted_tokens,
            compute_s=s.compute_s,
            work_s=s.work_s,
        )

    async def forget(self) -> None:
        """Drop what is cached of calls that ended; calls that run keep what they stand on. Changes no token.

        Raises:
            EngineUnavailable: The engine is not open.
        """
        scheduler, post = self._check_open(), poster()
        over = anyio.Event()
        scheduler.put(("forget", lambda: post(over.set)))
        with anyio.CancelScope(shield=True):
            await over.wait()

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        """Continue a context. Chunks carry what was sampled since the last one, some milliseconds' worth.

        Raises:
            ContextLengthError: The context leaves no position or no cell to sample into.
            RequestError: It is empty, ends with a merge, or holds an id the model does not have; or all are banned.
            EngineUnavailable: The engine is not open, or was closed while the call ran.
            EngineError: The model gave NaN.
        """
        scheduler = self._check_open()
        check_params(params, range(self.vocab_size))
        try:
            parts = self._checked(context)
        except TypeError as exc:
            raise no_context(context) from exc
        mailbox = Mailbox()
        call = self._call(next(self._numbers), parts, params, mailbox)
        stated = stated_affinity()
        call.salt = stated.cache_salt if stated else None
        scheduler.put(("submit", call))
        try:
            while True:
                await mailbox.arrived.wait()
                if mailbox.error is not None:
                    # One of its own: what all calls raised would gather the tracebacks and notes of all of them.
                    raise type(mailbox.error)(*mailbox.error.args) from mailbox.error.__cause__
                if np.isnan(sum(mailbox.logprobs)):
                    raise EngineError(f"the model of the {self.name} engine gave NaN")
                chunk = Chunk(token_ids=tuple(mailbox.ids), logprobs=tuple(mailbox.logprobs), stop=mailbox.stop)
                if chunk.stop is None:
                    mailbox.ids, mailbox.logprobs, mailbox.arrived = [], [], anyio.Event()
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
        elif not _all_below(part, vocab_size):
            bad = next(i for i in part if not 0 <= i < vocab_size)
            raise RequestError(f"token id {bad} is not in the vocabulary; ids go from 0 to {vocab_size - 1}")


def _all_below(ids: tuple[int, ...], limit: int) -> bool:
    """Whether ids go from 0 to below a limit: a third of the time of `min` and `max`, in each thread of a fork."""
    try:
        return bool(np.frombuffer(array("I", ids), np.uintc).max() < limit)
    except OverflowError:  # below 0, or far beyond
        return False


def poster() -> Callable[..., None]:
    """The running event loop's way to be called from another thread without waiting for it."""
    loop: Any = anyio.lowlevel.current_token().native_token
    call = loop.run_sync_soon if hasattr(loop, "run_sync_soon") else loop.call_soon_threadsafe

    def post(function: Callable[..., object], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is gone, and everybody who waited with it
            call(function, *args)

    return post


def deliver(deliveries: list[Delivery]) -> None:
    """On the event loop: put what was sampled into the mailboxes."""
    for call, ids, logprobs, stop, error in deliveries:
        mailbox: Mailbox = call.user
        mailbox.ids += ids
        mailbox.logprobs += logprobs
        mailbox.stop, mailbox.error = stop, error
        mailbox.arrived.set()
