"""Runs one request: a thread samples until its format forks, waits for its branches, reads them, goes on.

The only place that knows both engines and formats. A fork is a task group and a join is leaving it, so nothing runs
that its parent does not wait for, and leaving a run cancels every engine call. The result does not depend on timing:
a segment's seed is a hash of its place in the program, joins are in outline order, budgets are divided at forks
(`plait.budget`). Only a deadline depends on time.

What a model writes never raises. Whatever it is, it ends a segment with a `StopReason` and a note in plain words:

    a stop id that forks            the block is opened; after the join the same thread goes on
    a block that cannot be read,    declined, `MALFORMED`: the thread goes on in plain text, up to `MAX_DECLINED`
    or too wide                     times, then it ends
    a block that does not fit the   declined as a whole, `BUDGET`: the thread goes on in plain text, and fork ids are
    budget or the context           not sampled any more
    end-of-sequence, a thread's     the thread ends; in a block, the runtime writes the closing tag where it is
    closer, a limit                 missing, and the join goes on with what there is

Source: the fork and join of ThreadWeaver (Lian et al. 2025, arXiv:2512.07843).
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any

import anyio

from plait.budget import Gate, Share, limit
from plait.channel import Channel
from plait.engines.base import Engine
from plait.errors import ContextLengthError, EngineProtocolError, Failures, UnsupportedJoin, boundary
from plait.events import Event, RunEnded, RunStarted, SegmentEnded, SegmentStarted, ThreadForked, TokensSampled
from plait.formats.base import Fork, Malformed, ThreadOutcome, TrajectoryFormat
from plait.tree import Tree
from plait.types import Context, JoinKind, Request, SamplingParams, StopReason, context_positions

MAX_DECLINED = 8
"""A thread whose model asks for this many blocks that cannot be opened is ended."""
CHANNEL_SIZE = 64
"""Events that a run may be ahead of its reader."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run while it runs: iterate over it for its events, once; `tree` is their fold so far."""

    tree: Tree
    _channel: Channel

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._channel

    def pending(self) -> list[Event]:
        """Events that were not read yet; after leaving early, all that is left to log."""
        return self._channel.pending()


@asynccontextmanager
async def open_run(
    request: Request, *, engine: Engine, format: TrajectoryFormat, meta: dict[str, Any] | None = None
) -> AsyncGenerator[Run, None]:
    """Start a request; leaving the block cancels whatever still runs and frees the engine.

    Args:
        request: What to continue, and within which limits. What is left of `max_tokens` and `max_threads` is divided
            equally at a fork, one part for each branch and one for the parent; what was not used flows back at the
            join. So is the context's length, for a join must fit whatever its threads write.
        engine: One that is open.
        format: Says where a thread forks and what is read at a join.
        meta: Goes into the first event, beside the names of engine and format and the budget.

    Raises:
        UnsupportedJoin: The format joins by merging and the engine cannot; before anything is sampled.
        ContextLengthError: The prompt leaves no room to sample; before anything is sampled.
        EngineError: An engine call failed: the first failure, later ones as its notes.
    """
    _refuse_misfits(request, engine, format)
    program = _Program(request, engine, format, meta or {})
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(program.main)
            with program.failures.noting(groups=True):
                yield Run(program.tree, program.channel)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        failure = program.failures.first(group, cancelled=anyio.get_cancelled_exc_class())
        if failure is None:
            raise
    finally:
        program.end_what_is_open("the run was left" if failure is None else f"the run failed: {failure}")
    if failure is not None:
        raise failure


async def run(
    request: Request, *, engine: Engine, format: TrajectoryFormat, meta: dict[str, Any] | None = None
) -> Tree:
    """Run a request to its end. See `open_run`."""
    async with open_run(request, engine=engine, format=format, meta=meta) as run:
        async for _ in run:
            pass
    return run.tree


def segment_seed(seed: int, id: str) -> int:
    """The seed of one engine call, 63 bits: from the request's seed and the segment's place in the program."""
    return int.from_bytes(blake2b(f"{seed} {id}".encode(), digest_size=8).digest(), "little") >> 1


@dataclass(slots=True, kw_only=True)
class _Thread:
    """A thread while it runs."""

    name: str
    depth: int
    parent: str | None
    header_ids: tuple[int, ...]
    share: Share
    end: int
    """Positions it may reach, its closer not counted."""
    ticket: anyio.Event | None = None
    """Drawn at the fork, so that waiting threads start in outline order."""
    segments: list[str] = field(default_factory=list[str])
    position: int = 0
    """After its last segment."""
    num_sampled: int = 0
    num_declined: int = 0
    may_fork: bool = True
    stop: StopReason = StopReason.FORCED
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opening:
    """What the runtime writes before a segment samples."""

    forced_ids: tuple[int, ...] = ()
    joins: tuple[str, ...] = ()
    join: JoinKind = "none"
    end: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Declined:
    """A block that is not opened."""

    stop: StopReason
    note: str


class _Program:
    """One run: what its threads share."""

    def __init__(self, request: Request, engine: Engine, format: TrajectoryFormat, meta: dict[str, Any]) -> None:
        self.request, self.engine, self.format = request, engine, format
        self.meta = {"engine": engine.name, "format": format.name, "budget": asdict(request.budget), **meta}
        self.tree, self.channel = Tree(), Channel(CHANNEL_SIZE)
        self.gate = Gate(request.budget.max_concurrent_threads)
        self.failures = Failures()
        self.started = anyio.current_time()
        seconds = request.budget.deadline_s
        self.deadline = math.inf if seconds is None else self.started + seconds

    async def main(self) -> None:
        """The root thread, from the first event to the last."""
        root = _Thread(
            name="0",
            depth=0,
            parent=None,
            header_ids=self.request.prompt_ids,
            share=Share.whole(self.request.budget),
            end=self.engine.max_context,
        )
        with self.failures.noting():
            await self.tell(RunStarted(seed=self.request.seed, meta=self.meta))
            await self.thread(root)
            await self.tell(RunEnded(stop=root.stop, note=root.note, t=self.now()))
        self.channel.close()

    async def tell(self, event: Event) -> None:
        self.tree.apply(event)
        await self.channel.put(event)

    def now(self) -> float:
        return anyio.current_time() - self.started

    async def thread(self, thread: _Thread) -> None:
        """Sample until the format forks, run the block, read it, go on; return when the thread has ended."""
        opening = _Opening(forced_ids=thread.header_ids)
        while True:
            id = await self.start(thread, opening)
            stop, note = (StopReason.FORCED, "") if opening.end else await self.sample(thread, id)
            fork = self.read(thread, id) if stop is StopReason.STOP else None
            if isinstance(fork, _Declined):
                stop, note = fork.stop, fork.note
            elif fork is not None:
                note = fork.note
            thread.stop, thread.note = stop, "; ".join(filter(None, (opening.note, note)))
            await self.tell(SegmentEnded(id=id, stop=stop, note=thread.note, t=self.now()))
            if isinstance(fork, Fork):
                opening = await self.block(thread, fork)
            elif isinstance(fork, _Declined) and thread.num_declined < MAX_DECLINED:
                opening = _Opening()
            else:
                return

    async def block(self, thread: _Thread, fork: Fork) -> _Opening:
        """Run the threads of a block side by side; what their parent reads when all have ended."""
        segment = thread.segments[-1]
        number = segment.rpartition(":")[2]
        room = self.room(thread, fork)
        shares = thread.share.split(len(fork.branches))
        branches = [
            _Thread(
                name=f"{thread.name}/{number}.{i}",
                depth=thread.depth + 1,
                parent=segment,
                header_ids=branch.header_ids,
                share=shares[i],
                end=thread.position + len(branch.header_ids) + room,
                ticket=self.gate.ticket(),
            )
            for i, branch in enumerate(fork.branches)
        ]
        labels = tuple(branch.label for branch in fork.branches)
        await self.tell(ThreadForked(segment=segment, threads=tuple(b.name for b in branches), labels=labels))
        async with anyio.create_task_group() as block:
            for branch in branches:
                block.start_soon(self.branch, branch)
        for branch in branches:
            thread.share.take_back(branch.share)
        join = self.format.join([self.outcome(branch) for branch in branches])
        assert join.forced_ids or self.format.join_kind != "merge", "no logits follow a merge alone"
        unfinished = sum(self.tree.segments[b.segments[-1]].stop is StopReason.FORCED for b in branches)
        return _Opening(
            forced_ids=join.forced_ids,
            joins=tuple(branch.segments[-1] for branch in branches),
            join=self.format.join_kind,
            end=join.end,
            note=f"joins {unfinished} of {len(branches)} threads unfinished" if unfinished else "",
        )

    async def branch(self, thread: _Thread) -> None:
        """Run a thread of a block; write its closer where it did not."""
        with self.failures.noting():
            await self.thread(thread)
            closer = self.format.closer_ids(self.outcome(thread))
            if closer:
                id = await self.start(thread, _Opening(forced_ids=closer))
                note = f"closed by the runtime, the thread ended with {thread.stop}"
                await self.tell(SegmentEnded(id=id, stop=StopReason.FORCED, note=note, t=self.now()))

    async def start(self, thread: _Thread, opening: _Opening) -> str:
        """Open the thread's next segment."""
        id = f"{thread.name}:{len(thread.segments)}"
        started = SegmentStarted(
            id=id,
            parent=thread.segments[-1] if thread.segments else thread.parent,
            forced_ids=opening.forced_ids,
            joins=opening.joins,
            join=opening.join,
            t=self.now(),
        )
        thread.segments.append(id)
        await self.tell(started)
        return id

    async def sample(self, thread: _Thread, id: str) -> tuple[StopReason, str]:
        """Let the engine continue a segment, within what the thread may use; why it ended."""
        ticket = thread.ticket or (self.gate.ticket() if thread.depth else None)
        thread.ticket = None
        context = self.tree.context(id)
        thread.position = context_positions(context)
        most, end, note = self.most(thread)
        stop: StopReason | None = None
        try:
            if most < 1:
                return end, note
            with anyio.CancelScope(deadline=self.deadline):
                if ticket is not None and not ticket.is_set():
                    await ticket.wait()
                if anyio.current_time() < self.deadline:
                    stop = await self.call(id, context, self.params(thread, id, most))
        finally:
            if ticket is not None:
                self.gate.give_back(ticket)
        num_sampled = len(self.tree.segments[id].sampled_ids)
        thread.num_sampled += num_sampled
        thread.share.tokens -= num_sampled
        thread.position += num_sampled
        if stop is None:
            return StopReason.BUDGET, f"the deadline of {self.request.budget.deadline_s} s"
        if stop is StopReason.LENGTH:
            return (end, note) if num_sampled == most else (stop, "the engine's context is used up")
        return stop, ""

    async def call(self, id: str, context: Context, params: SamplingParams) -> StopReason:
        """One engine call, told chunk by chunk."""
        sampled = self.tree.segments[id].sampled_ids
        tell, now = self.tell, self.now
        with boundary(f"the {self.engine.name} engine"):
            async with aclosing(self.engine.generate(context, params)) as chunks:
                async for chunk in chunks:
                    if len(sampled) + len(chunk.token_ids) > params.max_tokens:
                        raise EngineProtocolError(f"C3: more than max_tokens={params.max_tokens} tokens")
                    if len(chunk.token_ids) != len(chunk.logprobs):
                        raise EngineProtocolError("C6: a chunk has not one log-probability for each token")
                    if chunk.token_ids:
                        await tell(TokensSampled(id=id, token_ids=chunk.token_ids, logprobs=chunk.logprobs, t=now()))
                    if chunk.stop is not None:
                        _check_stop(chunk.stop, sampled, params)
                        return chunk.stop
        raise EngineProtocolError("C5: a call's chunks ended without a stop reason")

    def params(self, thread: _Thread, id: str, most: int) -> SamplingParams:
        request = self.request
        return SamplingParams(
            max_tokens=most,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=segment_seed(request.seed, id),
            stop_ids=self.format.stop_ids(thread.depth),
            eos_ids=self.format.eos_ids(),
            banned_ids=() if self.may_fork(thread) else self.format.fork_ids,
            logprobs=request.logprobs,
        )

    def may_fork(self, thread: _Thread) -> bool:
        """Whether a fork id may be sampled; where the format does not fork at all, it is plain text and may."""
        budget = self.request.budget
        stops = self.format.stop_ids(thread.depth)
        if not all(id in stops for id in self.format.stop_ids(0)):
            return True
        width = min(thread.share.threads, limit(budget.max_threads_per_fork))
        return thread.may_fork and width > 0 and thread.depth < limit(budget.max_depth)

    def most(self, thread: _Thread) -> tuple[int, StopReason, str]:
        """How many tokens the thread may sample now, and what to say when it has."""
        budget = self.request.budget
        left_of_thread = limit(budget.max_thread_tokens) - thread.num_sampled
        limits = (
            (thread.share.tokens, StopReason.BUDGET, f"its share of max_tokens={budget.max_tokens} is used up"),
            (left_of_thread, StopReason.BUDGET, f"max_thread_tokens={budget.max_thread_tokens} is used up"),
            (thread.end - thread.position, StopReason.LENGTH, "its share of the context is used up"),
        )
        return min(limits, key=lambda limit: limit[0])

    def read(self, thread: _Thread, id: str) -> Fork | _Declined | None:
        """What the end of a call asks for; None where it asks for nothing."""
        asked = self.format.parse(self.tree.segments[id].sampled_ids, thread.depth)
        if asked is None:
            return None
        if isinstance(asked, Malformed):
            declined = _Declined(StopReason.MALFORMED, asked.note)
        else:
            declined = self.refusal(thread, asked)
            if declined is None:
                return asked
        thread.num_declined += 1
        if declined.stop is StopReason.BUDGET:
            thread.may_fork = False
        if thread.num_declined == MAX_DECLINED:
            note = f"{declined.note}; {MAX_DECLINED} blocks were declined, the thread is ended"
            return _Declined(StopReason.MALFORMED, note)
        return declined

    def refusal(self, thread: _Thread, fork: Fork) -> _Declined | None:
        """Why a block is not opened. All of it fits, or none of it runs."""
        budget, share, n = self.request.budget, thread.share, len(fork.branches)
        asked = f"a block of {n} threads"
        if not n:
            return _Declined(StopReason.MALFORMED, "a block without threads")
        if n > limit(budget.max_threads_per_fork):
            return _Declined(StopReason.MALFORMED, f"{asked}; max_threads_per_fork={budget.max_threads_per_fork}")
        left = limit(budget.max_thread_tokens) - thread.num_sampled
        for refused, why in (
            (thread.depth >= limit(budget.max_depth), f"max_depth={budget.max_depth}"),
            (n > share.threads, f"{share.threads} are left of max_threads={budget.max_threads}"),
            (share.tokens <= n, f"{share.tokens} tokens are left of max_tokens={budget.max_tokens}"),
            (left < 1, f"max_thread_tokens={budget.max_thread_tokens} leaves none to go on with"),
            (self.room(thread, fork) < 1, f"it and its join need more than max_context={self.engine.max_context}"),
        ):
            if refused:
                return _Declined(StopReason.BUDGET, f"{asked}; {why}")
        return None

    def room(self, thread: _Thread, fork: Fork) -> int:
        """Positions that each branch may fill between header and closer, so that the join fits whatever they write."""
        empty = [ThreadOutcome(header_ids=b.header_ids, token_ids=(), stop=StopReason.LENGTH) for b in fork.branches]
        closed = [replace(outcome, token_ids=self.format.closer_ids(outcome)) for outcome in empty]
        frame = len(self.format.join(closed).forced_ids)
        parts = len(closed) + 1
        if self.format.join_kind == "merge":
            # Branches lie side by side: the longest counts.
            frame += max(len(outcome.header_ids) + len(outcome.token_ids) for outcome in closed)
            parts = 2
        return (thread.end - thread.position - frame) // parts

    def outcome(self, thread: _Thread) -> ThreadOutcome:
        """What a thread holds so far, for its format."""
        ids = [id for segment in thread.segments for id in self.tree.segments[segment].token_ids]
        return ThreadOutcome(
            header_ids=thread.header_ids, token_ids=tuple(ids[len(thread.header_ids) :]), stop=thread.stop
        )

    def end_what_is_open(self, note: str) -> None:
        """After an early end, let the tree say which segments were cut off."""
        for segment in self.tree.segments.values():
            if segment.stop is None:
                event = SegmentEnded(id=segment.id, stop=StopReason.CANCELLED, note=note, t=self.now())
                self.tree.apply(event)
                self.channel.put_nowait(event)
        self.channel.close()


def _refuse_misfits(request: Request, engine: Engine, format: TrajectoryFormat) -> None:
    if format.join_kind == "merge" and not engine.supports_merge:
        raise UnsupportedJoin(
            f"the {format.name} format joins threads by merging their keys and values; the {engine.name} engine takes"
            " plain token sequences only. Use an engine with supports_merge (llamacpp, scripted), or a model and"
            " format with a concat join"
        )
    length = len(request.prompt_ids)
    if length >= engine.max_context:
        raise ContextLengthError(
            f"the prompt has {length} tokens, the {engine.name} engine's context {engine.max_context}; at most"
            f" {engine.max_context - 1} leave room to sample"
        )


def _check_stop(stop: StopReason, sampled: Sequence[int], params: SamplingParams) -> None:
    """Hold an engine to C4."""
    ends = {StopReason.STOP: params.stop_ids, StopReason.EOS: params.eos_ids, StopReason.LENGTH: sampled[-1:]}
    if not sampled or sampled[-1] not in ends.get(stop, ()):
        raise EngineProtocolError(f"C4: a call stopped with {stop.value!r}, its last token is {sampled[-1:]}")
