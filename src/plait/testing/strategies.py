"""Hypothesis strategies for random programs and the trees they run to: nested forks, merges, limits, malformed blocks.

Knows the runtime, no model and no text. A `Program` is a request for the scripted engine's pseudo-random model in a
`ToyFormat`, whose control ids are small numbers; its tree is the same under any timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from hypothesis import strategies as st

from plait.engines.scripted import ScriptedEngine
from plait.events import Event
from plait.formats.base import Await, Block, Branch, Fork, Join, Malformed, ThreadOutcome, TrajectoryFormat
from plait.session import open_run
from plait.testing.clock import virtual_time
from plait.tree import Tree
from plait.types import Budget, JoinKind, Request

FORK, CLOSE, EOS, JOIN, HEADER = range(5)
TEXT = 5
"""The first id that is plain text."""
VOCAB_SIZE = 16
WIDE = 40


@dataclass(slots=True, kw_only=True)
class ToyFormat(TrajectoryFormat):
    """Forks on `FORK`; a thread opens with `HEADER` and its number and ends on `CLOSE`; the parent reads `JOIN`.

    The last id before `FORK` says how many threads: `TEXT` + n asks for n mod 5, the last id of all for `WIDE`; none is
    malformed. `race`, `needs`, `fresh` and `waits` are what a `Fork` may ask for: in a race a thread succeeds whose
    last text id is odd; thread 1 needs thread 0, thread 3 needs 0 and 2; `JOIN`, sampled, asks for the thread that the
    id before it names.
    """

    join_kind: JoinKind = "concat"
    nested: bool = True
    race: bool = False
    needs: bool = False
    fresh: bool = False
    waits: bool = True
    name: str = "toy"
    paper: str = "-"
    fork_ids: tuple[int, ...] = (FORK,)

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        close = (CLOSE,) if depth else ()
        if depth and not self.nested:
            return close
        return (FORK, *close) if self.waits else (FORK, JOIN, *close)

    def eos_ids(self) -> tuple[int, ...]:
        return (EOS,)

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Await | Malformed | None:
        before = sampled_ids[-2] if len(sampled_ids) > 1 else 0
        if sampled_ids[-1] == JOIN:
            return Await(keys=(str(before % 3),))
        if sampled_ids[-1] != FORK:
            return None
        width = WIDE if before == VOCAB_SIZE - 1 else max(0, before - TEXT) % 5
        if not width:
            return Malformed(note="no width before the fork")
        headers = ((HEADER, TEXT + i % 5) for i in range(width))
        needs: dict[int, tuple[int, ...]] = {1: (0,), 3: (0, 2)} if self.needs else {}
        branches = tuple(
            Branch(header_ids=ids, label=str(i), key=str(i), needs=needs.get(i, ())) for i, ids in enumerate(headers)
        )
        keep = max(0, len(sampled_ids) - 2) if self.join_kind == "message" and self.waits else None
        return Fork(branches=branches, race=self.race, fresh=self.fresh, waits=self.waits, keep=keep)

    def opening(self, branch: Branch, reads: Sequence[ThreadOutcome]) -> Join:
        return Join(forced_ids=(*self.join(reads).forced_ids[:-1], *branch.header_ids))

    def succeeded(self, outcome: ThreadOutcome) -> bool:
        return outcome.token_ids[-2:-1] > (TEXT,) and outcome.token_ids[-2] % 2 == 1

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        return () if outcome.token_ids[-1:] == (CLOSE,) else (CLOSE,)

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        if self.join_kind == "merge":
            return Join(forced_ids=(JOIN,))
        threads = [t for t in threads if t.won is not False]
        read = [id for t in threads for id in (*t.header_ids, *t.token_ids) if id != EOS]
        return Join(forced_ids=(*read, JOIN))

    def open_text(self, block: Block) -> str:
        raise NotImplementedError("the toy format has no text")

    def end_text(self, returns: str | None, number: int = 1) -> str:
        raise NotImplementedError("the toy format has no text")

    def close_text(self, conclusion: str) -> str:
        raise NotImplementedError("the toy format has no text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A request, and the pseudo-random model that answers it."""

    request: Request
    format: ToyFormat = field(default_factory=ToyFormat)
    weights: dict[int, float] = field(default_factory=dict[int, float])
    max_context: int = 4096

    def engine(self, **options: Any) -> ScriptedEngine:
        """Any timing: `timing_seed`, `chunk_size`, `delay_s`, `fail`."""
        return ScriptedEngine(vocab_size=VOCAB_SIZE, weights=self.weights, max_context=self.max_context, **options)

    def run(self, *, backend: str = "asyncio", **options: Any) -> tuple[Tree, list[Event], ScriptedEngine]:
        """Tree, events and engine of one run in virtual time."""
        engine = self.engine(**options)

        async def main() -> tuple[Tree, list[Event]]:
            async with open_run(self.request, engine=engine, format=self.format) as run:
                events = [event async for event in run]
            return run.tree, events

        tree, events = anyio.run(main, backend=backend, backend_options=virtual_time(backend))
        return tree, events, engine


def _upto(most: int, *, least: int = 1) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(least, most)


def budgets() -> st.SearchStrategy[Budget]:
    """Small limits, so that runs are short and every limit is met."""
    return st.builds(
        Budget,
        max_threads=st.integers(0, 12),
        max_concurrent_threads=_upto(4),
        max_threads_per_fork=_upto(6, least=0),
        max_depth=_upto(3, least=0),
        max_thread_tokens=_upto(12),
        max_tokens=st.integers(1, 120),
    )


@st.composite
def formats(draw: st.DrawFn) -> ToyFormat:
    """Formats with all that a fork may ask for."""
    join: JoinKind = draw(st.sampled_from(("concat", "message")))
    race, needs = draw(st.sampled_from([(True, False), (False, True), (False, False)]))
    waits = race or needs or draw(st.booleans())
    fresh = join == "message" and draw(st.booleans()) and not needs
    return ToyFormat(join_kind=join, nested=draw(st.booleans()), race=race, needs=needs, fresh=fresh, waits=waits)


@st.composite
def programs(
    draw: st.DrawFn,
    *,
    joins: Sequence[JoinKind] = ("concat", "merge"),
    format: st.SearchStrategy[ToyFormat] | None = None,
) -> Program:
    """Random programs; control ids are likely enough that most of them fork.

    Args:
        joins: Kinds of join, where no format is given.
        format: Where the format is drawn from; `formats()` has all that a fork may ask for.
    """
    toys = st.builds(ToyFormat, join_kind=st.sampled_from(joins), nested=st.booleans())
    request = Request(
        prompt_ids=tuple(draw(st.lists(st.integers(TEXT, VOCAB_SIZE - 1), min_size=1, max_size=5))),
        budget=draw(budgets()),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return Program(
        request=request,
        format=draw(toys if format is None else format),
        weights={
            FORK: draw(st.sampled_from([2.0, 6.0])),
            CLOSE: draw(st.sampled_from([0.5, 4.0])),
            EOS: draw(st.sampled_from([0.1, 1.0])),
            JOIN: draw(st.sampled_from([0.1, 3.0])),
        },
        max_context=draw(st.sampled_from([24, 60, 4096])),
    )


def trees(*, joins: Sequence[JoinKind] = ("concat", "merge")) -> st.SearchStrategy[Tree]:
    """Trees of random programs."""
    return programs(joins=joins).map(lambda program: program.run()[0])
