"""Continuous batching: every live call of every session in one forward a step. Runs in the worker's thread, by turns.

A step carries one row for each call that samples and a share of the tokens that others were given. What is cached is
asked anew in each step: a context that was half computed, pushed out or forgotten is found as far as it is there, and
the rest is computed. The oldest call always gets its cells, at the price of younger ones, which wait and go on later
where they were; so every call ends, and none gets another token for having waited.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plait.engines.inprocess import calls, scheduler
from plait.engines.inprocess.calls import Part
from plait.engines.inprocess.sampling import Sampler
from plait.engines.torch.batch import Piece, assemble, assemble_padded
from plait.engines.torch.blocks import Cells, Node, Pool
from plait.engines.torch.model import Decoder
from plait.errors import EngineError
from plait.types import Context, Merge, SamplingParams, StopReason, context_cells

_TURN_S = 0.005
_MOST_ROWS = 1024
"""Given tokens of one step while nobody samples."""


class Call(calls.Call):
    """One engine call, and what it holds of the cache."""

    __slots__ = ("_sees", "computed", "holds", "length", "parts", "reserve", "shares", "tip")

    def __init__(self, number: int, context: tuple[Part, ...], params: SamplingParams, limit: int, user: Any) -> None:
        super().__init__(number, context, params, limit, user)
        self.tip: Node | None = None
        """The node after which it samples; None while its context is computed."""
        self.holds: list[Node] = []
        """What was found or computed of its context so far."""
        self.parts = context
        """What it was let in with: its context, and what it had sampled before it was pushed out."""
        self.computed = 0
        """Tokens of these that were not cached."""
        self.reserve = 0
        """Blocks it may still take until it samples."""
        self.shares = False
        """Whether those are left out that it shares with calls that were live when it was let in."""
        self.length = 0
        self._sees: Cells = np.empty(0, np.int64)

    @property
    def sees(self) -> Cells:
        """Cells that its next token sees."""
        return self._sees[: self.length]

    def see(self, cells: Cells) -> None:
        """Start with the cells of its context."""
        self.length = len(cells)
        self._sees = np.concatenate([cells, np.empty(64, np.int64)])

    def see_one(self, cell: int) -> None:
        """Add the cell of a token that it sampled."""
        if self.length == len(self._sees):
            self._sees = np.concatenate([self._sees, np.empty(self.length, np.int64)])
        self._sees[self.length] = cell
        self.length += 1


@dataclass(frozen=True, slots=True)
class NewWeights:
    """Weights to put in place of the present ones, and whom to tell."""

    weights: Mapping[str, Any]
    done: Callable[[EngineError | None], object]


def num_blocks(context: Context, block_size: int) -> int:
    """Blocks that a context takes when nothing of it is cached: every run of tokens begins a block."""
    return sum(
        sum(num_blocks(branch, block_size) for branch in part.branches)
        if isinstance(part, Merge)
        else -(-len(part) // block_size)
        for part in context
    )


def _coming(calls: Sequence[Call]) -> int:
    """Blocks that calls may take next: those that sample, one each."""
    return sum(1 if call.tip is not None else call.reserve for call in calls)


class _Walk:
    """One pass over a context: finds what is cached of it and hands out cells for the next tokens that are not."""

    def __init__(self, pool: Pool, quota: int) -> None:
        self.pool = pool
        self.left = quota
        self.pieces: list[Piece] = []
        self.holds: list[Node] = []
        """Nodes that must stay for what was handed out to be of use."""
        self.stuck = False
        """Whether it ended because no block was left."""

    def context(self, node: Node, parts: Sequence[Part], *, spare: int = 0) -> Node | None:
        """The node that holds `parts` after `node`; None if the quota or the blocks did not go so far.

        Args:
            spare: Tokens at the very end to compute even if they are cached (to sample, the last one's logits).
        """
        tip: Node | None = node
        for at, part in enumerate(parts):
            if isinstance(part, Merge):
                tip = self._merge(tip, part)
            else:
                limit = len(part) - (spare if at == len(parts) - 1 else 0)
                tip, reach = self.pool.match(tip, part, limit)
                if reach < len(part):
                    tip = self._compute(tip, part[reach:])
            if tip is None:
                return None
        return tip

    def _merge(self, base: Node, part: Merge) -> Node | None:
        # Held, for a run that only its first branch refers to would grow in place, under the feet of the others.
        self.holds.append(self.pool.hold(base))
        tips: list[Node] = []
        for branch in part.branches:
            tip = self.context(base, branch)
            if tip is None:
                return None
            self.holds.append(self.pool.hold(tip))
            tips.append(tip)
        node = self.pool.merge(base, tuple(tips))
        self.holds.append(self.pool.hold(node))
        return node

    def _compute(self, node: Node, ids: tuple[int, ...]) -> Node | None:
        start, end, tip = node.end, node.end, self.pool.hold(node)
        wanted = start + min(len(ids), self.left)
        while end < wanted:
            grown = self.pool.append(tip, ids[end - start : wanted - start])
            if grown is None:
                self.stuck = True
                break
            tip, end = grown, grown.end
        self.holds.append(tip)
        if end > start:
            self.left -= end - start
            self.pieces.append(Piece(token_ids=ids[: end - start], start=start, sees=self.pool.cells(tip)))
        return tip if end - start == len(ids) else None


class Scheduler(scheduler.Scheduler[Call]):
    """The calls of one decoder.

    Args:
        max_seqs: Calls that are live at once.
        prefill_rows: Given tokens that one step computes while other calls sample, so that a long prompt delays each
            of their tokens by no more than this.
        threads: CPU threads of torch; None leaves them as they are.
        padded: Whether steps that only sample are padded to few sizes, for a decoder that is compiled.
        rest: As of the base class.
    """

    name = "torch"

    def __init__(
        self,
        decoder: Decoder,
        pool: Pool,
        sampler: Sampler,
        *,
        max_seqs: int,
        prefill_rows: int,
        threads: int | None,
        padded: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self._padded = padded
        self._decoder, self.pool, self._sampler = decoder, pool, sampler
        self._max_seqs, self._prefill_rows, self._threads = max_seqs, prefill_rows, threads
        self._cache = decoder.new_cache(pool.num_blocks * pool.block_size)
        self.live: list[Call] = []
        """Calls that were let in, oldest first."""
        self._placed: list[Call] = []
        """Whose sampling parameters the sampler's slots hold."""
        self._ids = np.zeros(max_seqs, np.int32)
        self._logprobs = np.zeros(max_seqs, np.float32)
        self._full = False
        """Whether the first in the queue did not fit; looked at again when something changes."""

    @property
    def active(self) -> int:
        return len(self.live)

    @property
    def evictions(self) -> int:
        return self.pool.evictions

    @property
    def cached_tokens(self) -> int:
        return self.pool.used

    # The thread

    def _told(self, kind: str, what: Any) -> None:
        if kind == "load":
            self._load(what)
        else:
            super()._told(kind, what)

    def _cancel(self, call: Call) -> None:
        if call in self.live:
            self._leave(call)

    def _forget(self) -> None:
        self.pool.forget()

    def _work(self) -> None:
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        self._full = False
        until = perf_counter() + _TURN_S
        with torch.inference_mode():
            while self.queue or self.live:
                self._step()
                if self._wake.is_set() or perf_counter() > until:
                    return

    def _load(self, new: NewWeights) -> None:
        """Put weights in place. What was computed with the old ones is forgotten; calls go on from their contexts."""
        if self._bug is None:
            while self.live:
                self._push_out(self.live[-1])
            self.pool.clear()
            try:
                with torch.inference_mode():
                    self._decoder.load(new.weights)
                    for kv in self._cache:
                        kv.zero_()  # padding reads cells, and weights that diverged leave NaN there
            except Exception as exc:
                new.done(EngineError(f"the weights could not be put in place: {exc}"))
                raise
        new.done(self._bug)

    def _drop(self) -> None:
        self.live, self.slots = [], []
        self.pool.clear()

    # Calls

    def _admit(self) -> None:
        """Let waiting calls in, first come first served, as far as places and blocks go round."""
        while self.queue and len(self.live) < self._max_seqs and not self._full:
            call = self.queue[0]
            call.parts, call.computed = call.resumed(), 0
            call.reserve, call.shares = num_blocks(call.parts, self.pool.block_size) + 1, False
            if self.live and not self._fits(call):
                self._full = True
                return
            insort(self.live, self.queue.popleft(), key=lambda c: c.number)

    def _fits(self, call: Call) -> bool:
        """Whether there are blocks for a call beside the live ones, and one to come for each of these."""
        calls = [*self.live, call]
        held = self._blocks_of(c.sees for c in self.live)
        room = self.pool.num_blocks - int(held.sum())
        if _coming(calls) <= room:
            return True
        # Only where blocks are scarce it is worth to ask what calls find that live ones hold already.
        for c in calls:
            first = c.parts[0]
            if c.tip is None and not c.shares and not isinstance(first, Merge):
                node, _ = self.pool.match(self.pool.root_of(c.salt), first, len(first) - 1)
                c.reserve -= int((held & self._blocks_of([self.pool.cells(node)])).sum())
                c.shares = True
        return _coming(calls) <= room

    def _blocks_of(self, cells: Iterable[Cells]) -> npt.NDArray[np.bool_]:
        """In which blocks [num_blocks] they are."""
        blocks = np.zeros(self.pool.num_blocks, bool)
        for some in cells:
            blocks[some // self.pool.block_size] = True
        return blocks

    def _leave(self, call: Call) -> None:
        """Take a call out; what it computed stays as a memo."""
        self._hold(call, [])
        if call.tip is not None:
            self.pool.let_go(call.tip)
            self.slots.remove(call)
            call.tip = None
        call.length = 0
        self.live.remove(call)
        self._full = False

    def _hold(self, call: Call, holds: list[Node]) -> None:
        old, call.holds = call.holds, holds
        for node in old:
            self.pool.let_go(node)

    def _push_out(self, call: Call) -> None:
        """Send a live call back to the queue; its tokens so far are kept."""
        self._leave(call)
        self.queue.appendleft(call)

    # A step

    def _step(self) -> None:
        self._admit()
        step = _Step(self._prefill_rows if self.slots else _MOST_ROWS, sum(call.tip is None for call in self.live))
        for call in tuple(self.live):
            while call in self.live and not self._plan(call, step):
                self._make_way(call)
        if not self.live:
            return  # the only call starts anew
        outputs = [step.last[call] for call in self.slots]
        where = {"device": self._decoder.device, "dtype": self._decoder.dtype}
        if self._padded and step.only_samples:
            spare = self.pool.num_blocks * self.pool.block_size
            rows = assemble_padded(step.pieces, outputs, spare=spare, **where)
        else:
            rows = assemble(step.pieces, outputs, **where)
        start = perf_counter()
        try:
            logits = self._decoder.forward(rows, self._cache)[: len(outputs)].cpu().numpy()
        except RuntimeError as exc:
            # Such as no memory. Nobody knows what the cells hold, so every call fails and the cache starts anew.
            self._fail(EngineError(f"a forward pass of the torch engine failed: {exc}"))
            return
        self.compute_s += perf_counter() - start
        self.steps += 1
        if self.slots:
            self._sample(logits)

    def _plan(self, call: Call, step: _Step) -> bool:
        """Put a call's rows into a step. False if no block is left for one of them."""
        if call.tip is not None:
            node = self.pool.append(call.tip, call.ids[-1:])
            if node is None:
                return False
            call.tip = node
            call.see_one(node.cells[-1])
            step.add(Piece(token_ids=call.ids[-1:], start=node.end - 1, sees=call.sees))
            step.last[call] = step.rows - 1
            return True
        walk = _Walk(self.pool, step.share())
        tip = walk.context(self.pool.root_of(call.salt), call.parts, spare=1)
        for piece in walk.pieces:
            step.add(piece, given=True)
            call.computed += len(piece.token_ids)
            self.prefill_tokens += len(piece.token_ids)
        self._hold(call, walk.holds)
        if tip is None:
            return not walk.stuck
        call.tip = self.pool.hold(tip)
        self._hold(call, [])
        self.reused_tokens += max(0, context_cells(call.parts) - call.computed)
        call.see(walk.pieces[-1].sees)
        self.slots.append(call)
        step.last[call] = step.rows - 1
        return True

    def _make_way(self, call: Call) -> None:
        """No block is left for a call: the youngest waits, were it the call itself."""
        self.preemptions += 1
        self._push_out(self.live[-1])
        if not self.live:
            # What it held was full of holes, left by others. Computed anew it fits: that was checked at the door.
            self.pool.clear()

    def _sample(self, logits_SV: np.ndarray) -> None:
        slots = len(self.slots)
        if self._placed != self.slots:
            for slot, call in enumerate(self.slots):
                if slot >= len(self._placed) or self._placed[slot] is not call:
                    self._sampler.place(slot, call.params, call.draws)
            self._sampler.arrange(slots)
            self._placed = list(self.slots)
        ids_S, logprobs_S = self._ids[:slots], self._logprobs[:slots]
        self._sampler.sample(logits_SV, ids_S, logprobs_S)
        self.decode_tokens += slots
        for call, id, logprob in zip(self.slots, ids_S.tolist(), logprobs_S.tolist(), strict=True):
            call.ids.append(id)
            call.logprobs.append(logprob)
        self._deliver()

    def _end(self, ended: Sequence[tuple[Call, StopReason]]) -> None:
        for call, _ in ended:
            self._leave(call)


class _Step:
    """What a step computes, as it is put together.

    Args:
        quota: Given tokens it may compute.
        filling: Calls that share them.
    """

    def __init__(self, quota: int, filling: int) -> None:
        self._quota, self._filling = quota, filling
        self.only_samples = True
        """Whether nothing is computed but the next token of calls."""
        self.pieces: list[Piece] = []
        self.rows = 0
        self.last: dict[Call, int] = {}
        """The row whose logits a call samples from."""

    def share(self) -> int:
        """Given tokens for the next of the calls that share them."""
        share = max(1, self._quota // max(1, self._filling))
        self._filling -= 1
        return share

    def add(self, piece: Piece, *, given: bool = False) -> None:
        self.pieces.append(piece)
        self.rows += len(piece.token_ids)
        self.only_samples = self.only_samples and not given
        self._quota -= len(piece.token_ids) if given else 0
