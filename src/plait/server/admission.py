"""Who may sample now: limits in threads, shared by weight, and what gives way first when there are not enough.

A thread holds a place only while the engine samples for it. Free places go to the client that holds the fewest for its
weight, and of its requests to the one that holds the fewest; so a request of 64 threads waits like 64 requests of one.
An engine in which calls queue for room gets no more of them, however many places are free: what waits, waits here,
where it is fair. Under pressure, in this order: a request's threads wait for places (its result is the same); requests
that come now are admitted without forks; requests are refused, with a time to come back. Knows nothing of HTTP,
formats or text.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import anyio

from plait.engines.base import Engine, EngineStats
from plait.errors import EngineProtocolError, EngineTimeout
from plait.server.keys import Client
from plait.server.refusal import Refusal
from plait.types import Chunk, Context, SamplingParams


@dataclass(slots=True, eq=False)
class Lease:
    """A request that was admitted."""

    client: Client
    may_fork: bool
    """False: admitted under pressure, with its forks declined."""
    num_held: int = 0
    """Places it holds now."""
    peak: int = 0
    """Most places it held at once."""
    waiting: deque[anyio.Event] = field(default_factory=deque[anyio.Event])
    engine: Engine | None = None
    """What its places are used on."""
    silent: dict[object, float] = field(default_factory=dict[object, float])
    """Engine calls from which something is waited for, and since when."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    """Around the request's work."""
    failure: EngineTimeout | None = None
    """Why that was ended from here."""


class Admission:
    """Requests and places.

    Args:
        max_threads: Places: engine calls that sample at once.
        max_threads_per_key: Of these, for one client; None is all.
        max_requests: Requests at once, waiting ones included; more are refused with 503.
        max_requests_per_key: Of these, of one client; more are refused with 429. None is all.
    """

    def __init__(
        self,
        *,
        max_threads: int,
        max_threads_per_key: int | None = None,
        max_requests: int,
        max_requests_per_key: int | None = None,
    ) -> None:
        self.max_threads, self.max_requests = max_threads, max_requests
        self.max_threads_per_key, self.max_requests_per_key = max_threads_per_key, max_requests_per_key
        self.num_held = 0
        self.num_waiting = 0
        self.draining = False
        self._leases: dict[Lease, None] = {}
        self._held: Counter[str] = Counter()
        self._held_on: Counter[Engine] = Counter()
        self._requests: defaultdict[str, int] = defaultdict(int)
        self._seconds = 1.0
        """Running mean of how long a request takes."""

    @property
    def num_requests(self) -> int:
        return len(self._leases)

    def pressure(self, client: Client | None = None) -> float:
        """How full it is; forks are declined from 1 on, which comes before any refusal.

        Threads that sample or wait, and at least one for every request, against the places; or requests against half
        of those that may be at once. The same for a client's own limits, where that is more.
        """
        threads, requests = self.num_held + self.num_waiting, self.num_requests
        pressure = max(max(threads, requests) / self.max_threads, 2 * requests / self.max_requests)
        if client is None:
            return pressure
        threads = sum(o.num_held + len(o.waiting) for o in self._leases if o.client.name == client.name)
        requests = self._requests.get(client.name, 0)
        if self.max_threads_per_key is not None:
            pressure = max(pressure, max(threads, requests) / self.max_threads_per_key)
        if self.max_requests_per_key is not None:
            pressure = max(pressure, 2 * requests / self.max_requests_per_key)
        return pressure

    @contextmanager
    def admitted(self, client: Client) -> Iterator[Lease]:
        """Let a request in.

        Raises:
            Refusal: 503, the server is full or shutting down; 429, the client has too many requests.
        """
        if self.draining:
            raise Refusal("the server is shutting down", status=503, code="shutting_down", retry_after_s=1)
        if self.num_requests >= self.max_requests:
            raise Refusal(
                f"the server is full: {self.max_requests} requests at once",
                status=503,
                code="overloaded",
                retry_after_s=self._patience(),
            )
        if self._requests[client.name] >= (self.max_requests_per_key or self.max_requests):
            raise Refusal(
                f"too many requests at once: {self.max_requests_per_key} for one key",
                status=429,
                code="rate_limit_exceeded",
                retry_after_s=self._patience(),
            )
        lease = Lease(client, may_fork=self.pressure(client) < 1)
        started = anyio.current_time()
        self._leases[lease] = None
        self._requests[client.name] += 1
        try:
            yield lease
        finally:
            del self._leases[lease]
            self._requests[client.name] -= 1
            if not self._requests[client.name]:
                del self._requests[client.name]
            self._seconds += 0.1 * (anyio.current_time() - started - self._seconds)

    def end_silent(self, seconds: float) -> None:
        """End requests that have waited so long for a word of their engine.

        Looked at from outside, for a timer at every chunk costs more than all else that is done for one.
        """
        now = time.monotonic()
        for lease in self._leases:
            if lease.failure is None and any(now - since > seconds for since in lease.silent.values()):
                name = "" if lease.engine is None else f"{lease.engine.name} "
                lease.failure = EngineTimeout(f"the {name}engine said nothing for {seconds:g} s")
                lease.scope.cancel()

    def _patience(self) -> int:
        """Whole seconds until about as many requests have ended as wait now."""
        return max(1, min(60, math.ceil(self._seconds * self.pressure())))

    @asynccontextmanager
    async def place(self, lease: Lease) -> AsyncGenerator[None, None]:
        """Wait for a place, hold it."""
        ticket = anyio.Event()
        lease.waiting.append(ticket)
        self.num_waiting += 1
        self._serve()
        try:
            await ticket.wait()
            yield
        finally:
            if ticket.is_set():
                self.num_held -= 1
                lease.num_held -= 1
                self._held[lease.client.name] -= 1
                if lease.engine is not None:
                    self._held_on[lease.engine] -= 1
            else:
                lease.waiting.remove(ticket)
                self.num_waiting -= 1
            self._serve()

    def _serve(self) -> None:
        """Give out free places."""
        held, most = self._held, self.max_threads_per_key or self.max_threads
        while self.num_waiting and self.num_held < self.max_threads:
            # An engine that holds none is never full: somebody has to come back and ask again.
            full = {engine for engine, number in self._held_on.items() if number and engine.stats().queued}
            waiting = [
                lease
                for lease in self._leases
                if lease.waiting and held[lease.client.name] < most and lease.engine not in full
            ]
            if not waiting:
                return
            # The first of equals: leases are in the order in which they were admitted.
            lease = min(waiting, key=lambda lease: (held[lease.client.name] / lease.client.weight, lease.num_held))
            self.num_waiting -= 1
            self.num_held += 1
            lease.num_held += 1
            lease.peak = max(lease.peak, lease.num_held)
            held[lease.client.name] += 1
            if lease.engine is not None:
                self._held_on[lease.engine] += 1
            lease.waiting.popleft().set()


class Lane:
    """An engine as one request sees it: every call waits for a place first, and garbage is found out.

    Args:
        engine: Open; shared by all requests.
        admission: Has the places.
        lease: Whose calls these are.
        vocab_size: Ids that an engine may sample are below it; None lets all pass.
    """

    def __init__(self, engine: Engine, admission: Admission, lease: Lease, *, vocab_size: int | None = None) -> None:
        self._engine, self._admission, self._lease = engine, admission, lease
        self._vocab_size = vocab_size
        lease.engine = engine
        self.name, self.max_context = engine.name, engine.max_context
        self.supports_merge = engine.supports_merge

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        silent, call = self._lease.silent, object()
        async with self._admission.place(self._lease), aclosing(self._engine.generate(context, params)) as chunks:
            silent[call] = time.monotonic()
            try:
                async for chunk in chunks:
                    del silent[call]
                    self._check(chunk)
                    yield chunk
                    silent[call] = time.monotonic()
            finally:
                silent.pop(call, None)

    def _check(self, chunk: Chunk) -> None:
        """Nothing that a client would stumble over: the session looks at the rest."""
        most = math.inf if self._vocab_size is None else self._vocab_size
        for id in chunk.token_ids:
            if not 0 <= id < most:
                raise EngineProtocolError(f"C4: a chunk holds the id {id}; the vocabulary has {self._vocab_size}")
        if not all(map(math.isfinite, chunk.logprobs)):
            raise EngineProtocolError(f"C6: a log-probability is no number: {chunk.logprobs}")

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def __aenter__(self) -> Lane:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def aclose(self) -> None:
        """Nothing to close: the engine belongs to the server."""
