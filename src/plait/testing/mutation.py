"""Models that write almost the right thing: gold calls, mutated, through the session, held to a random budget.

Knows no format by name. What a run says depends on its seed and its place in the program alone, so a run that went
wrong is run again by its number.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio.lowlevel

from plait.engines.base import EngineStats
from plait.errors import RequestError
from plait.events import ThreadForked, TokensSampled
from plait.formats.base import TrajectoryFormat
from plait.session import open_run
from plait.tokenizer import Tokenizer
from plait.tree import Tree
from plait.types import Budget, Chunk, Context, Request, SamplingParams, StopReason, context_positions

MAX_FLOOD = 200
"""Copies of a part that one mutation may write."""


class MutatingEngine:
    """Says what a gold tree's calls say, or other calls where the context is none of them, mutated.

    Args:
        gold: What each context is answered with.
        others: Answers for contexts that are not there.
        palette: Ids that are put in: control tokens and what stands beside them.
        max_context: Positions one call may use.
        pieces: Most chunks that one call comes in.
    """

    name = "mutating"
    supports_merge = True

    def __init__(
        self,
        gold: Mapping[Context, Sequence[int]],
        others: Sequence[Sequence[int]],
        *,
        palette: Sequence[int],
        max_context: int,
        pieces: int = 1,
    ) -> None:
        self._gold, self._others, self._palette = gold, others, palette
        self._pieces = pieces
        self.max_context = max_context
        self.num_calls = self.num_mutated = self.num_sampled = self.active = self.most_active = 0
        self.broken = ""
        """What a call asked for that the engine does not have."""

    async def __aenter__(self) -> MutatingEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def aclose(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(active=self.active, decode_tokens=self.num_sampled, steps=self.num_sampled)

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        if context_positions(context) + params.max_tokens > self.max_context:
            self.broken = f"{context_positions(context)} and {params.max_tokens} of {self.max_context} positions"
        said, stop = self._says(context, params)
        self.num_calls += 1
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            size = len(said) if self._pieces == 1 else max(1, len(said) // self._pieces)
            for at in range(0, len(said), size):
                await anyio.lowlevel.checkpoint()
                ids = said[at : at + size]
                self.num_sampled += len(ids)
                last = at + size >= len(said)
                yield Chunk(token_ids=ids, logprobs=(0.0,) * len(ids), stop=stop if last else None)
        finally:
            self.active -= 1

    def _says(self, context: Context, params: SamplingParams) -> tuple[tuple[int, ...], StopReason]:
        rng = random.Random(params.seed)
        gold = self._gold.get(context)
        ids = list(gold if gold is not None else rng.choice(self._others))
        if rng.random() < 0.5:
            self.num_mutated += 1
            for _ in range(rng.choice((1, 1, 1, 3))):
                ids = self._mutated(ids, rng)
        said: list[int] = []
        while True:
            for id in ids:
                if id in params.banned_ids:
                    continue
                said.append(id)
                if id in params.stop_ids:
                    return tuple(said), StopReason.STOP
                if id in params.eos_ids:
                    return tuple(said), StopReason.EOS
                if len(said) == params.max_tokens:
                    return tuple(said), StopReason.LENGTH
            # It has not ended yet: more of the same kind, and in the end an end.
            ids = rng.choices(self._palette, k=8) if rng.random() < 0.7 else [*params.eos_ids]

    def _mutated(self, ids: list[int], rng: random.Random) -> list[int]:
        """One change, at random."""
        n = len(ids)
        at = rng.randint(0, n)
        # Mostly something small, which leaves the rest to be read.
        upto = min(n, at + rng.choice((1, 1, 2, 4, 9, n)))
        match rng.randrange(9):
            case 0:
                return ids[:at] + ids[upto:]
            case 1:
                return ids[:at] + rng.choices(self._palette, k=rng.randint(1, 4)) + ids[at:]
            case 2:
                return [rng.choice(self._palette) if rng.random() < 0.1 else id for id in ids]
            case 3:
                return ids[:upto] + ids[at:]
            case 4:
                return ids[:at]
            case 5:
                other = rng.choice(self._others)
                return ids[:at] + list(other[rng.randint(0, len(other)) :])
            case 6:
                return ids[:at] + ids[at:upto][::-1] + ids[upto:]
            case 7:
                # A list that never ends, a block in a block in a block.
                return ids[:upto] + ids[at:upto][:40] * rng.randint(1, MAX_FLOOD // (upto - at + 1) + 1) + ids[upto:]
            case _:
                swapped = dict(zip(rng.choices(self._palette, k=4), rng.choices(self._palette, k=4), strict=True))
                return [swapped.get(id, id) for id in ids]


@dataclass(frozen=True, slots=True, kw_only=True)
class MutatedRun:
    """What came of one run."""

    num_outputs: int
    """Calls that the engine answered."""
    num_mutated: int
    """Of these, mutated."""
    num_threads: int
    num_declined: int
    """Blocks that were asked for and not opened."""
    num_tokens: int
    """Sampled, those that were dropped included."""
    stop: str
    excess: str
    """What broke a limit; empty where nothing did."""


class Mutations:
    """Runs of mutated gold trees under random budgets, by number.

    Args:
        format: Any.
        trees: Gold trees in it.
        palette: Ids that mutations put in.
        seed: With a run's number, says all about it.
    """

    def __init__(self, format: TrajectoryFormat, trees: Sequence[Tree], *, palette: Sequence[int], seed: int) -> None:
        self.format, self.palette, self.seed = format, tuple(palette), seed
        self._gold = [_answers(tree) for tree in trees]
        self._others = [ids for gold in self._gold for ids in gold.values() if ids]
        self._prompts = [tree.segments["0:0"].forced_ids for tree in trees]

    async def run(self, number: int) -> MutatedRun:
        """One run. Whatever it raises is a fault of the runtime or the format."""
        rng = random.Random(f"{self.seed}/{number}")
        which = rng.randrange(len(self._gold))
        budget = _budget(rng)
        engine = MutatingEngine(
            self._gold[which],
            self._others,
            palette=self.palette,
            max_context=len(self._prompts[which]) + rng.choice((12, 300, 2000, 8000, 8000, 8000)),
            pieces=rng.choice((1, 1, 1, 7)),
        )
        request = Request(
            prompt_ids=self._prompts[which], budget=budget, seed=rng.getrandbits(32), temperature=1.0, logprobs=False
        )
        forked: list[int] = []
        told = 0
        async with open_run(request, engine=engine, format=self.format) as run:
            async for event in run:
                if isinstance(event, ThreadForked):
                    forked.append(len(event.threads))
                elif isinstance(event, TokensSampled):
                    told += len(event.token_ids)
        tree = run.tree
        return MutatedRun(
            num_outputs=engine.num_calls,
            num_mutated=engine.num_mutated,
            num_threads=sum(forked),
            num_declined=sum("block" in s.note or s.stop is StopReason.MALFORMED for s in tree.segments.values()),
            num_tokens=engine.num_sampled,
            stop=str(tree.stop),
            excess=self._excess(tree, engine, budget, forked) or ("" if told == engine.num_sampled else "lost tokens"),
        )

    def _excess(self, tree: Tree, engine: MutatingEngine, budget: Budget, forked: list[int]) -> str:
        own: dict[str, int] = {}
        for segment in tree.segments.values():
            own[segment.thread] = own.get(segment.thread, 0) + len(segment.sampled_ids)
        # A parent that does not wait samples beside its threads; the root, which needs no place, is one.
        beside = int(self.format.join_kind == "message")
        limits = (
            ("tokens", engine.num_sampled, budget.max_tokens),
            ("tokens of a thread", max(own.values()), budget.max_thread_tokens),
            ("threads", sum(forked), budget.max_threads),
            ("threads of a fork", max(forked, default=0), budget.max_threads_per_fork),
            ("levels", max(name.count("/") for name in own), budget.max_depth),
            ("threads at once", engine.most_active, _plus(budget.max_concurrent_threads, beside)),
        )
        for what, used, limit in limits:
            if limit is not None and used > limit:
                return f"{used} {what}, of {limit}"
        if tree.stop is None or any(segment.stop is None for segment in tree.segments.values()):
            return "a segment that did not end"
        if tree.num_sampled + tree.num_dropped != engine.num_sampled:
            return "tokens that the tree does not account for"
        if engine.active:
            return "a call that was not freed"
        return engine.broken


def _plus(limit: int | None, more: int) -> int | None:
    return None if limit is None else max(limit, 1) + more


def _answers(tree: Tree) -> dict[Context, tuple[int, ...]]:
    out: dict[Context, tuple[int, ...]] = {}
    for segment in tree.segments.values():
        if segment.sampled_ids:
            out.setdefault(tree.context(segment.id), tuple(segment.sampled_ids))
    return out


def _budget(rng: random.Random) -> Budget:
    """Small limits, so that every one of them is met."""

    def perhaps(low: int, high: int) -> int | None:
        return rng.randint(low, high) if rng.random() < 0.3 else None

    return Budget(
        max_threads=rng.choice((0, 3, 8, 16, 40, 200, 200)),
        max_concurrent_threads=perhaps(1, 4),
        max_threads_per_fork=perhaps(0, 6),
        max_depth=perhaps(0, 4),
        max_thread_tokens=rng.choice((1, 40, 400, None, None, None, None, None)),
        max_tokens=rng.choice((1, 200, 1000, 4000, 4000, 16000, 16000)),
    )


def palette(format: TrajectoryFormat, tokenizer: Tokenizer, tags: Sequence[str]) -> list[int]:
    """Ids worth putting in: control tokens, what stands beside them, digits, and what ends a thread."""
    ids = {*format.stop_ids(0), *format.stop_ids(1), *format.eos_ids(), *format.fork_ids}
    for tag in tags:
        ids |= {id for id in (tokenizer.control_id(tag),) if id is not None}
    for char in "\n :,.;?()[]#-0123459a":
        # A vocabulary need not have all of them.
        with suppress(RequestError):
            ids |= {*tokenizer.encode(char)}
    return sorted(ids)
