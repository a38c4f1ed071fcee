"""Runs one request: a thread samples until its format forks, waits for its branches, reads them, goes on.

The only place that knows both engines and formats. A fork is a task group and a join is leaving it, so nothing runs
that its parent does not wait for, and leaving a run cancels every engine call. The result does not depend on timing:
a segment's seed is a hash of its place in the program, joins are in outline order, budgets are divided at forks
(`plait.budget`). Only a deadline depends on time.

What a model writes never raises. Whatever it is, it ends a segment with a `StopReason` and a note in plain words:

    a stop id that forks            the block is opened; after the join the same thread goes on
    a block that cannot be read,    declined, `MALFORMED`: the thread goes on in plain text, up to `MAX_DECLINED`
    is too wide, or whose threads   times, then it ends
    wait for each other
    a block that does not fit the   declined as a whole, `BUDGET`: the thread goes on in plain text, and fork ids are
    budget or the context           not sampled any more
    end-of-sequence, a thread's     the thread ends; in a block, the runtime writes the closing tag where it is
    closer, a limit                 missing, and the join goes on with what there is

A race is decided by the run's own clock, which is the critical path in tokens. A thread that succeeds sets the moment
after which nothing of its siblings counts; those that have reached it are stopped at once, those that have not go on
until they do, for they may still succeed earlier. When all have ended, the earliest success wins (of equals, the first
outline) and its siblings are cut there. So the tree is what an engine with one pace for all threads would give, however
fast each of them really was. Tokens beyond the cut are dropped from the tree and counted; the budget counts them too.

Source: the fork and join of ThreadWeaver (Lian et al. 2025, arXiv:2512.07843).
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any

import anyio
from anyio.abc import TaskGroup

from plait.budget import UNLIMITED, Gate, Share, limit
from plait.channel import Channel
from plait.engines.base import Engine
from plait.errors import ContextLengthError, EngineProtocolError, Failures, RequestError, UnsupportedJoin, boundary
from plait.events import (
    Event,
    RunEnded,
    RunStarted,
    SegmentEnded,
    SegmentStarted,
    ThreadForked,
    ThreadsCut,
    TokensSampled,
)
from plait.formats.base import Await, Branch, Fork, Join, Malformed, ThreadOutcome, TrajectoryFormat, order
from plait.settings import of_type
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

    async def ended(self) -> None:
        """Wait until it has ended, where nobody wants its events: only the tree."""
        await self._channel.ended()


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
        RequestError: An argument is of another kind; or the budget is to be written into the prompt, and the format
            has no form for it.
        UnsupportedJoin: The format joins by merging and the engine cannot; before anything is sampled.
        ContextLengthError: The prompt leaves no room to sample; before anything is sampled.
        EngineError: An engine call failed: the first failure, later ones as its notes.
    """
    _refuse_strangers(request, engine, format, meta)
    if request.conditioned:
        prompt_ids = format.condition(request.prompt_ids, request.budget)
        request = replace(request, prompt_ids=prompt_ids, conditioned=False)
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
        failure = program.failures.first(group)
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
        await run.ended()
    return run.tree


def segment_seed(seed: int, id: str) -> int:
    """The seed of one engine call, 63 bits: from the request's seed and the segment's place in the program."""
    return int.from_bytes(blake2b(f"{seed} {id}".encode(), digest_size=8).digest(), "little") >> 1


@dataclass(slots=True, eq=False)
class _Call:
    """An engine call that may have to stop before its own end."""

    start: int
    """The thread's clock."""
    sampled: Sequence[int]
    scope: anyio.CancelScope

    @property
    def clock(self) -> int:
        return self.start + len(self.sampled)


class _Finish:
    """A moment of the run's clock after which nothing counts: a race was won, or a parent has ended."""

    def __init__(self) -> None:
        self.clock = UNLIMITED
        self._calls: list[_Call] = []

    def set(self, clock: int) -> None:
        """Nothing counts after `clock`; stop the calls that are there."""
        self.clock = min(self.clock, clock)
        for call in self._calls:
            if call.clock >= self.clock:
                call.scope.cancel()

    @contextmanager
    def watching(self, call: _Call) -> Iterator[None]:
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)


@dataclass(slots=True, kw_only=True, eq=False)
class _Thread:
    """A thread while it runs."""

    name: str
    depth: int
    parent: str | None
    header_ids: tuple[int, ...]
    share: Share
    end: int
    """Positions it may reach, its closer not counted."""
    clock: int = 0
    """Tokens on the longest dependent chain up to here: the run's own time."""
    finishes: tuple[_Finish, ...] = ()
    """Of the races it runs in, and of the parents that do not wait for it, outermost first."""
    reads: tuple[_Thread, ...] = ()
    """Threads that must end before it starts."""
    fresh: bool = False
    ticket: anyio.Event | None = None
    """Drawn at the fork, so that waiting threads start in outline order. One that needs others draws it when they have
    ended: it must not keep a place from them."""
    ended: anyio.Event = field(default_factory=anyio.Event)
    running: dict[str, _Thread] = field(default_factory=dict[str, "_Thread"])
    """Threads that it forked without waiting and has not read yet, by key."""
    num_opening: int = 0
    """Ids that the runtime wrote to open it."""
    num_blocks: int = 0
    succeeded: bool = False
    asked: Branch | None = None
    """What its parent asked for; None for the root."""
    segments: list[str] = field(default_factory=list[str])
    position: int = 0
    """After its last segment."""
    num_sampled: int = 0
    num_declined: int = 0
    may_fork: bool = True
    stop: StopReason = StopReason.FORCED
    note: str = ""

    @property
    def finish(self) -> int:
        """The moment of the run's clock after which nothing it samples counts."""
        return min((finish.clock for finish in self.finishes), default=UNLIMITED)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opening:
    """What the runtime writes before a segment samples."""

    forced_ids: tuple[int, ...] = ()
    joins: tuple[str, ...] = ()
    join: JoinKind = "none"
    keep: int | None = None
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
            await self.thread(root, _Opening(forced_ids=root.header_ids))
            await self.tell(RunEnded(stop=root.stop, note=root.note, t=self.now()))
        self.channel.close()

    async def tell(self, event: Event) -> None:
        self.tree.apply(event)
        await self.channel.put(event)

    def now(self) -> float:
        return anyio.current_time() - self.started

    async def thread(self, thread: _Thread, opening: _Opening) -> None:
        """Run a thread to its end, and stop what it forked and did not wait for."""
        left = _Finish()
        async with anyio.create_task_group() as beside:
            await self.talk(thread, opening, beside, left)
            left.set(thread.clock)
        if thread.running:
            names = tuple(branch.name for branch in thread.running.values())
            await self.cut(names, thread.clock, "its parent ended without waiting for it")

    async def talk(self, thread: _Thread, opening: _Opening, beside: TaskGroup, left: _Finish) -> None:
        """Sample until the format forks, run the block, read it, go on; return when the thread has ended."""
        thread.num_opening = len(opening.forced_ids)
        begin = None if thread.depth else self.format.begin()
        while True:
            id = await self.start(thread, opening)
            written: Fork | Await | Malformed | None = None
            stop, note = StopReason.FORCED, ""
            if begin is not None:
                written, begin = begin, None
                thread.position = context_positions(self.tree.context(id))
            elif not opening.end:
                stop, note = await self.sample(thread, id)
                if stop is StopReason.STOP:
                    written = self.format.parse(self.tree.segments[id].sampled_ids, thread.depth)
            asked = self.read(thread, written)
            if isinstance(asked, _Declined):
                stop, note = asked.stop, asked.note
            elif isinstance(asked, Fork):
                note = asked.note
            thread.stop, thread.note = stop, "; ".join(filter(None, (opening.note, note)))
            await self.tell(SegmentEnded(id=id, stop=stop, note=thread.note, t=self.now()))
            match asked:
                case Fork(waits=True):
                    opening = await self.block(thread, asked)
                case Fork():
                    opening = await self.spawn(thread, asked, beside, left)
                case Await():
                    opening = await self.wait(thread, asked)
                case _Declined() if thread.num_declined < MAX_DECLINED:
                    opening = _Opening()
                case _:
                    return

    async def block(self, thread: _Thread, fork: Fork) -> _Opening:
        """Run the threads of a block side by side; what their parent reads when all have ended."""
        race = _Finish() if fork.race else None
        branches = await self.fork(thread, fork, thread.finishes if race is None else (*thread.finishes, race))
        async with anyio.create_task_group() as block:
            for branch in branches:
                block.start_soon(self.branch, branch, race)
        winner = await self.decide(branches) if race is not None else None
        for branch in branches:
            # What a thread that was cut really used depends on timing, so its parent gets nothing of it back.
            if winner is None or branch is winner or branch.clock < winner.clock:
                thread.share.take_back(branch.share)
        thread.clock = max(branch.clock for branch in branches) if winner is None else winner.clock
        outcomes = [self.outcome(branch) for branch in branches]
        if race is not None:
            outcomes = [replace(o, won=b is winner) for o, b in zip(outcomes, branches, strict=True)]
        opening = self.joined(thread, branches, outcomes, self.kept(thread, fork))
        if winner is not None:
            note = f"{winner.name} ended the race of {len(branches)} threads"
            opening = replace(opening, note="; ".join(filter(None, (note, opening.note))))
        return opening

    async def decide(self, branches: list[_Thread]) -> _Thread | None:
        """The thread that won a race, by the run's clock; cut the others there."""
        winner = min((b for b in branches if b.succeeded), key=lambda b: b.clock, default=None)
        if winner is None:
            return None
        losers = [branch for branch in branches if branch is not winner]
        if losers:
            await self.cut(tuple(b.name for b in losers), winner.clock, f"cut: {winner.name} ended the race")
        for branch in losers:
            branch.segments = [id for id in branch.segments if id in self.tree.segments]
        return winner

    async def cut(self, names: tuple[str, ...], clock: int, note: str) -> None:
        await self.tell(ThreadsCut(threads=names, clock=clock, note=note, t=self.now()))

    async def spawn(self, thread: _Thread, fork: Fork, beside: TaskGroup, left: _Finish) -> _Opening:
        """Start the threads of a block; their parent goes on at once."""
        for asked, branch in zip(fork.branches, await self.fork(thread, fork, (*thread.finishes, left)), strict=True):
            thread.running[asked.key] = branch
            beside.start_soon(self.branch, branch, None)
        return _Opening()

    async def wait(self, thread: _Thread, asked: Await) -> _Opening:
        """Wait for threads that were started before; what their parent reads of them."""
        branches = [thread.running[key] for key in asked.keys]
        for branch in branches:
            await branch.ended.wait()
            thread.share.take_back(branch.share)
            thread.clock = max(thread.clock, branch.clock)
        for key in asked.keys:
            del thread.running[key]
        return self.joined(thread, branches, [self.outcome(branch) for branch in branches], None)

    async def fork(self, thread: _Thread, fork: Fork, finishes: tuple[_Finish, ...]) -> list[_Thread]:
        """The threads of a block, before they start."""
        thread.num_blocks += 1
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
                end=(0 if fork.fresh else thread.position) + len(branch.header_ids) + room,
                clock=thread.clock,
                finishes=finishes,
                fresh=fork.fresh,
                ticket=None if branch.needs else self.gate.ticket(),
            )
            for i, branch in enumerate(fork.branches)
        ]
        for branch, asked in zip(branches, fork.branches, strict=True):
            branch.reads = tuple(branches[i] for i in asked.needs)
            branch.asked = asked
        labels = tuple(branch.label for branch in fork.branches)
        await self.tell(ThreadForked(segment=segment, threads=tuple(b.name for b in branches), labels=labels))
        return branches

    async def branch(self, thread: _Thread, race: _Finish | None) -> None:
        """Run a thread of a block; write its closer where it did not."""
        with self.failures.noting():
            for other in thread.reads:
                await other.ended.wait()
            await self.thread(thread, self.opened(thread))
            closer = self.format.closer_ids(self.outcome(thread))
            if closer:
                id = await self.start(thread, _Opening(forced_ids=closer))
                note = f"closed by the runtime, the thread ended with {thread.stop}"
                await self.tell(SegmentEnded(id=id, stop=StopReason.FORCED, note=note, t=self.now()))
            elif race is not None and thread.stop in (StopReason.STOP, StopReason.EOS):
                thread.succeeded = self.format.succeeded(self.outcome(thread))
                if thread.succeeded:
                    race.set(thread.clock)
            thread.ended.set()

    def opened(self, thread: _Thread) -> _Opening:
        """What the runtime writes to open a thread, of those it waited for too."""
        if not thread.reads:
            return _Opening(forced_ids=thread.header_ids, keep=0 if thread.fresh else None)
        assert thread.asked is not None
        thread.clock = max(other.clock for other in (thread, *thread.reads))
        join = self.format.opening(thread.asked, [self.outcome(other) for other in thread.reads])
        thread.end += len(join.forced_ids) - len(thread.header_ids)
        return _Opening(
            forced_ids=join.forced_ids,
            joins=tuple(other.segments[-1] for other in thread.reads),
            join=join.kind or self.format.join_kind,
        )

    def joined(
        self, thread: _Thread, branches: Sequence[_Thread], outcomes: list[ThreadOutcome], keep: int | None
    ) -> _Opening:
        """What a parent reads of threads that have ended."""
        notes: list[str] = []
        unfinished = sum(self.tree.segments[b.segments[-1]].stop is StopReason.FORCED for b in branches)
        if unfinished:
            notes.append(f"joins {unfinished} of {len(branches)} threads unfinished")
        room = thread.end - (thread.position if keep is None else keep)
        join, blanked = self.fitting(outcomes, room)
        if blanked:
            notes.append(f"{blanked} of {len(branches)} messages do not fit the context")
        assert join.forced_ids or self.format.join_kind != "merge", "no logits follow a merge alone"
        return _Opening(
            forced_ids=join.forced_ids,
            joins=tuple(branch.segments[-1] for branch in branches),
            join=join.kind or self.format.join_kind,
            keep=keep,
            end=join.end,
            note="; ".join(notes),
        )

    def fitting(self, outcomes: list[ThreadOutcome], room: int) -> tuple[Join, int]:
        """A join, and how many messages it leaves out, the longest first, so that the parent can go on.

        Threads of a concat or merge join were limited when they were forked; those that start afresh were not.
        """
        join = self.format.join(outcomes)
        if self.format.join_kind != "message":
            return join, 0
        left = sorted(range(len(outcomes)), key=lambda i: -len(outcomes[i].token_ids))
        blanked = 0
        while len(join.forced_ids) >= room and blanked < len(left):
            at = left[blanked]
            outcomes[at] = self.blank(outcomes[at].header_ids)
            blanked += 1
            join = self.format.join(outcomes)
        return join, blanked

    async def start(self, thread: _Thread, opening: _Opening) -> str:
        """Open the thread's next segment."""
        id = f"{thread.name}:{len(thread.segments)}"
        started = SegmentStarted(
            id=id,
            parent=thread.segments[-1] if thread.segments else thread.parent,
            forced_ids=opening.forced_ids,
            joins=opening.joins,
            join=opening.join,
            keep=opening.keep,
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
        sampled = self.tree.segments[id].sampled_ids
        call = _Call(thread.clock, sampled, anyio.CancelScope(deadline=self.deadline))
        try:
            if most < 1:
                return end, note
            with call.scope, ExitStack() as watched:
                for finish in thread.finishes:
                    watched.enter_context(finish.watching(call))
                if ticket is not None and not ticket.is_set():
                    await ticket.wait()
                if anyio.current_time() < self.deadline:
                    stop = await self.call(thread, id, context, self.params(thread, id, most))
        finally:
            if ticket is not None:
                self.gate.give_back(ticket)
        num_sampled = len(sampled)
        thread.clock += num_sampled
        thread.num_sampled += num_sampled
        thread.share.tokens -= num_sampled
        thread.position += num_sampled
        if stop is None and thread.clock >= thread.finish:
            return StopReason.CANCELLED, "it reached the end of a race"
        if stop is None:
            return StopReason.BUDGET, f"the deadline of {self.request.budget.deadline_s} s"
        if stop is StopReason.LENGTH:
            return (end, note) if num_sampled == most else (stop, "the engine's context is used up")
        return stop, ""

    async def call(self, thread: _Thread, id: str, context: Context, params: SamplingParams) -> StopReason | None:
        """One engine call, told chunk by chunk; None where nothing more of it counts."""
        sampled = self.tree.segments[id].sampled_ids
        tell, now, bounded = self.tell, self.now, bool(thread.finishes)
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
                    if bounded and thread.clock + len(sampled) >= thread.finish:
                        return None
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
            (thread.finish - thread.clock, StopReason.CANCELLED, "it reached the end of a race"),
        )
        return min(limits, key=lambda limit: limit[0])

    def read(self, thread: _Thread, asked: Fork | Await | Malformed | None) -> Fork | Await | _Declined | None:
        """What the end of a call asks for, if it may have it; None where it asks for nothing."""
        if asked is None:
            return None
        if isinstance(asked, Malformed):
            declined = _Declined(StopReason.MALFORMED, asked.note)
        elif isinstance(asked, Await):
            declined = self.unanswered(thread, asked)
            if declined is None:
                return asked
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

    def unanswered(self, thread: _Thread, asked: Await) -> _Declined | None:
        """Why threads that were started before cannot be read now."""
        unknown = [key for key in asked.keys if key not in thread.running]
        if unknown or not asked.keys:
            return _Declined(StopReason.MALFORMED, f"it asks for threads that do not run: {unknown}")
        blank = self.format.join([self.blank(thread.running[key].header_ids) for key in asked.keys])
        if thread.end - thread.position - len(blank.forced_ids) < 1:
            return _Declined(StopReason.BUDGET, f"the join needs more than max_context={self.engine.max_context}")
        return None

    def refusal(self, thread: _Thread, fork: Fork) -> _Declined | None:
        """Why a block is not opened. All of it fits, or none of it runs."""
        budget, share, n, caps = self.request.budget, thread.share, len(fork.branches), self.format.caps
        asked = f"a block of {n} threads"
        if not n:
            return _Declined(StopReason.MALFORMED, "a block without threads")
        needs = [branch.needs for branch in fork.branches]
        if order(needs) is None:
            return _Declined(StopReason.MALFORMED, f"{asked} that wait for each other")
        if fork.race and any(needs):
            return _Declined(StopReason.MALFORMED, f"{asked} in a race, of which some wait for others")
        if fork.fresh and any(needs):
            return _Declined(StopReason.MALFORMED, f"{asked} that see nothing, of which some wait for others")
        if not fork.waits and (again := [b.key for b in fork.branches if b.key in thread.running]):
            return _Declined(StopReason.MALFORMED, f"thread {again[0]} runs already")
        if n > limit(budget.max_threads_per_fork):
            return _Declined(StopReason.MALFORMED, f"{asked}; max_threads_per_fork={budget.max_threads_per_fork}")
        left = limit(budget.max_thread_tokens) - thread.num_sampled
        for refused, why in (
            (thread.depth >= limit(budget.max_depth), f"max_depth={budget.max_depth}"),
            (n > share.threads, f"{share.threads} are left of max_threads={budget.max_threads}"),
            (share.tokens <= n, f"{share.tokens} tokens are left of max_tokens={budget.max_tokens}"),
            (left < 1, f"max_thread_tokens={budget.max_thread_tokens} leaves none to go on with"),
            (share.tokens < caps.min_tokens, f"fewer than {caps.min_tokens} tokens are left of {budget.max_tokens}"),
            (thread.num_blocks >= limit(caps.max_blocks), f"the format opens at most {caps.max_blocks} in a thread"),
            (self.room(thread, fork) < 1, f"it and its join need more than max_context={self.engine.max_context}"),
        ):
            if refused:
                return _Declined(StopReason.BUDGET, f"{asked}; {why}")
        return None

    def room(self, thread: _Thread, fork: Fork) -> int:
        """Positions that each branch may fill between header and closer, so that the join fits whatever they write."""
        closed = [self.blank(branch.header_ids) for branch in fork.branches]
        frame = len(self.format.join(closed).forced_ids)
        if fork.fresh:
            # A thread that starts afresh has the whole context; what it returns is fitted at the join.
            keep = self.kept(thread, fork)
            keep = thread.position if keep is None else keep
            longest = max(len(outcome.header_ids) + len(outcome.token_ids) for outcome in closed)
            return self.engine.max_context - longest if thread.end - keep - frame > 0 else 0
        parts = len(closed) + 1
        if self.format.join_kind == "merge":
            # Branches lie side by side: the longest counts.
            frame += max(len(outcome.header_ids) + len(outcome.token_ids) for outcome in closed)
            parts = 2
        elif fork.race:
            # Whoever does not win is read as if it had written nothing.
            parts = 2
        return (thread.end - thread.position - frame) // parts

    def outcome(self, thread: _Thread) -> ThreadOutcome:
        """What a thread holds so far, for its format."""
        # Not its context: where a message took a block's place, the block is still part of what it wrote.
        ids = [id for segment in thread.segments for id in self.tree.segments[segment].token_ids]
        return ThreadOutcome(header_ids=thread.header_ids, token_ids=tuple(ids[thread.num_opening :]), stop=thread.stop)

    def kept(self, thread: _Thread, fork: Fork) -> int | None:
        """How many ids of its context a parent keeps after the join; None: all of them."""
        if fork.keep is None:
            return None
        return thread.position - len(self.tree.segments[thread.segments[-1]].sampled_ids) + fork.keep

    def blank(self, header_ids: tuple[int, ...]) -> ThreadOutcome:
        """A thread that wrote nothing and was closed."""
        empty = ThreadOutcome(header_ids=header_ids, token_ids=(), stop=StopReason.LENGTH)
        return replace(empty, token_ids=self.format.closer_ids(empty))

    def end_what_is_open(self, note: str) -> None:
        """After an early end, let the tree say which segments were cut off."""
        for segment in self.tree.segments.values():
            if segment.stop is None:
                event = SegmentEnded(id=segment.id, stop=StopReason.CANCELLED, note=note, t=self.now())
                self.tree.apply(event)
                self.channel.put_nowait(event)
        self.channel.close()


def _refuse_strangers(request: Any, engine: Any, format: Any, meta: Any) -> None:
    """Say what was likely meant, where an argument is of another kind."""
    if not isinstance(request, Request):
        raise RequestError(
            f"the request is {request!r:.60}; it must be a Request: `model.request(text)` makes one of text"
        )
    if isinstance(engine, type) or not all(hasattr(engine, name) for name in ("generate", "max_context", "name")):
        raise RequestError(
            f"the engine is {engine!r:.60}; it must be one that is open: `async with model.open_engine() as engine`"
        )
    if isinstance(format, type) or not all(hasattr(format, name) for name in ("parse", "join", "join_kind")):
        raise RequestError(
            f"the format is {format!r:.60}; it must be a TrajectoryFormat: `model.format`, or `open_format(name, "
            "tokenizer)`"
        )
    of_type(Mapping | None, meta, name="meta")


def _refuse_misfits(request: Request, engine: Engine, format: TrajectoryFormat) -> None:
    if format.join_kind == "merge" and not engine.supports_merge:
        raise UnsupportedJoin(
            f"the {format.name} format joins threads by merging their keys and values; the {engine.name} engine takes"
            " plain token sequences only. Use an engine with supports_merge (llamacpp, torch, scripted), or a model and"
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
