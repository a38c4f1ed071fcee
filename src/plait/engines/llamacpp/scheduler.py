"""Continuous batching: every live call of every session in one decode a step. Runs in the worker's thread, by turns.

Slot i is row i of every batch. A step is a *burst* as long as only sampling goes on: rows stay where they are,
positions count up, and no Python object is made for a token. When calls arrive or end, one *mixed* step carries the
sampling rows, the tokens of new contexts, and the last tokens of finished calls, which were sampled but not computed
yet. Such a token is computed once, in a row that belongs to the finished sequence and to all that fork from it in the
same step; so neither a fork nor a merge of threads that just ended costs a step of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from plait.engines.inprocess import calls, scheduler
from plait.engines.inprocess.calls import Part
from plait.engines.inprocess.sampling import Floats, Sampler
from plait.engines.llamacpp.binding import Decoder
from plait.engines.llamacpp.cache import Cache, Node, Seq
from plait.engines.llamacpp.lookup import Lookup
from plait.engines.llamacpp.pace import Pace
from plait.errors import EngineError
from plait.types import Merge, SamplingParams, StopReason, context_cells

_HISTORY = 256
_TRIAL = 4
"""Steps with another number of threads than has been fastest."""
_MARGIN = 16
"""Cells left free for each live call when another is let in, so that it is not pushed out again at once."""


class Call(calls.Call):
    """One engine call, and the sequences it takes."""

    __slots__ = ("lookup", "need", "seen", "seq")

    def __init__(self, number: int, context: tuple[Part, ...], params: SamplingParams, limit: int, user: Any) -> None:
        super().__init__(number, context, params, limit, user)
        self.seen = 0
        """How many of `ids` were in the context it was last admitted with: more than none after it was pushed out."""
        self.seq: Seq | None = None
        self.need = 1 + _depth(context)
        """Sequences it may hold at once: its own, and one a level of merges whose branches must be computed again."""
        self.lookup: Lookup | None = None


def _depth(parts: tuple[Part, ...]) -> int:
    return max((1 + max(map(_depth, p.branches)) for p in parts if isinstance(p, Merge)), default=0)


class Fill:
    """Brings a sequence to hold a context: that of a call, or a branch of a merge that is no longer cached."""

    __slots__ = ("branch", "call", "parent", "parts", "seq", "sub", "tips")

    def __init__(self, seq: Seq, parts: list[Part], *, call: Call | None = None, parent: Fill | None = None) -> None:
        self.seq = seq
        self.parts = parts
        self.call = call
        self.parent = parent
        self.branch = 0
        """Which branch of the parent's merge this is."""
        self.sub: Fill | None = None
        """The branch that is being computed for this one's merge."""
        self.tips: dict[int, Node] = {}
        """Branches of the merge at hand that this sequence already holds."""

    @property
    def apart(self) -> list[Seq]:
        """Sequences that branches of its merge must not share cells with: its own, and those it is a branch for."""
        return [self.seq, *(self.parent.apart if self.parent is not None else ())]

    @property
    def tokens(self) -> int:
        return context_cells(tuple(self.parts))


class Scheduler(scheduler.Scheduler[Call]):
    """The calls of one decoder.

    Args:
        pace: Threads of a step of several rows.
        prefill_rows: Tokens of new contexts that one step computes while other calls sample; so a long prompt delays
            each of their tokens by no more than this.
        speculate: Tokens guessed ahead of a greedy call in a step that only samples; 0 guesses none.
        rest: As of the base class.
    """

    name = "llama.cpp"

    def __init__(
        self,
        decoder: Decoder,
        cache: Cache,
        sampler: Sampler,
        pace: Pace,
        *,
        prefill_rows: int,
        speculate: int,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self._decoder, self._cache, self._sampler, self._pace = decoder, cache, sampler, pace
        self._prefill_rows, self._speculate = prefill_rows, speculate
        decoder.set_threads(1, pace.one)
        decoder.set_threads(2, pace.several[0])
        self.fills: list[Fill] = []
        self._tails: list[Seq] = []
        """Sequences that ended while others go on: their last token is computed beside the others' next."""
        self._merges_seen = False
        """Until a context holds a merge, nobody needs the last tokens of threads early."""
        self._ids = np.zeros((_HISTORY, cache.max_seqs), np.int32)
        self._logprobs = np.zeros((_HISTORY, cache.max_seqs), np.float32)
        self._steps = 0
        """Steps since slots last changed, whose tokens are only in the history yet."""
        self._rows = self._left = 0

    @property
    def active(self) -> int:
        return len(self.slots) + sum(f.call is not None for f in self.fills)

    @property
    def cached_tokens(self) -> int:
        return self._cache.used + self._tail_cells()

    @property
    def evictions(self) -> int:
        return self._cache.evictions

    # The thread

    def _cancel(self, call: Call) -> None:
        if call.seq is not None:
            self._evict(call)

    def _forget(self) -> None:
        self._cache.forget()

    def _work(self) -> None:
        if self.queue or self.fills or (self._tails and self.slots):
            self._mixed()
        if self.slots and not (self.fills or self._tails):
            if self._speculate:
                self._guessing_burst()
            else:
                self._burst()

    def _evict(self, call: Call) -> None:
        """Take a live call's sequences away."""
        assert call.seq is not None
        for fill in [f for f in self.fills if _root(f).call is call]:
            self.fills.remove(fill)
            self._cache.drop(fill.seq)
        if call in self.slots:
            self._cache.drop(call.seq)
            self.slots.remove(call)
            self._arrange()
        call.seq = None

    def _push_out(self) -> bool:
        """Send the youngest live call back to the queue; its tokens so far are kept. False if it is the only one."""
        live = [_root(f).call for f in self.fills] + self.slots
        calls = [c for c in live if c is not None]
        if len(set(map(id, calls))) < 2:
            return False
        victim = max(calls, key=lambda c: c.number)
        self.preemptions += 1
        self._evict(victim)
        self.queue.appendleft(victim)
        return True

    # A step

    def _burst(self) -> None:
        """Sample until a call ends, a message arrives, or it is time to tell what was sampled."""
        slots = len(self.slots)
        most = min(_HISTORY, min(c.limit - len(c.ids) for c in self.slots), self._room() // slots)
        if most < 1:
            return self._make_room()
        decoder, sample, pressed = self._decoder, self._sampler.sample, self._wake.is_set
        positions, tokens = decoder.positions[:slots], decoder.tokens[:slots]
        until, spent = self._flush_at, 0.0
        threads = self._pace.choose(slots)
        decoder.set_threads(slots, threads)
        for step in range(min(most, _TRIAL) if self._pace.tries else most):
            start = perf_counter()
            code = decoder.decode(slots)
            logits = decoder.logits(slots)
            now = perf_counter()
            spent += now - start
            if code:
                return self._broken(code)
            ended = sample(logits, tokens, self._logprobs[step, :slots])
            self._ids[step, :slots] = tokens
            positions += 1
            self._steps += 1
            if ended or now >= until or pressed():
                break
        self.compute_s += spent
        self._pace.record(slots, threads, spent, steps=self._steps)
        self._settle()

    def _guessing_burst(self) -> None:
        """As `_burst`, with rows for tokens that are guessed; what the model would not have sampled is taken back."""
        decoder = self._decoder
        ended = False
        while not ended:
            slots = len(self.slots)
            left = min(self._room(), len(decoder.tokens)) - slots
            if left < 0:
                return self._make_room()
            guesses = [self._guess(call, left // slots) for call in self.slots]
            rows = slots
            for slot, guess in enumerate(guesses):
                rows = self._place_guess(slot, guess, rows)
            threads = self._pace.choose(rows)
            decoder.set_threads(rows, threads)
            start = perf_counter()
            code = decoder.decode(rows)
            logits = decoder.logits(rows)
            now = perf_counter()
            self.compute_s += now - start
            if code:
                return self._broken(code)
            self._pace.record(rows, threads, now - start)
            self.steps += 1
            ended = self._accept(guesses, logits) or now >= self._flush_at or self._wake.is_set()
        self._settle()

    def _guess(self, call: Call, most: int) -> list[int]:
        if call.params.temperature > 0:
            return []
        if call.lookup is None:
            call.lookup = Lookup(_in_line(call.context), self._speculate)
        call.lookup.extend(call.ids[call.lookup.sampled :])
        return call.lookup.guess(min(most, call.limit - len(call.ids) - 1))

    def _place_guess(self, slot: int, guess: list[int], row: int) -> int:
        """Put guessed tokens into the batch, behind the row of their slot. Returns the row after the last."""
        if guess:
            decoder, end = self._decoder, row + len(guess)
            decoder.tokens[row:end] = guess
            decoder.positions[row:end] = decoder.positions[slot] + np.arange(1, len(guess) + 1)
            decoder.seq_ids[row:end, 0] = decoder.seq_ids[slot, 0]
            decoder.num_seqs[row:end] = 1
            decoder.outputs[row:end] = 1
            row = end
        return row

    def _accept(self, guesses: list[list[int]], logits: Floats) -> bool:
        """Give every call what was sampled and as many guesses as are right. True if one of them ended."""
        decoder, slots = self._decoder, len(self.slots)
        self._sampler.sample(logits[:slots], decoder.tokens[:slots], self._logprobs[0, :slots])
        first, first_logprobs = decoder.tokens[:slots].tolist(), self._logprobs[0, :slots].tolist()
        owners = [slot for slot, guess in enumerate(guesses) for _ in guess]
        further, further_logprobs = self._sampler.sample_greedily(logits[slots:], owners) if owners else ([], [])
        at, ended = 0, False
        for slot, (call, guess) in enumerate(zip(self.slots, guesses, strict=True)):
            ids, logprobs = [first[slot]], [first_logprobs[slot]]
            for k, guessed in enumerate(guess):
                if ids[-1] != guessed or guessed in call.ends:
                    break
                ids.append(further[at + k])
                logprobs.append(further_logprobs[at + k])
            at += len(guess)
            call.ids += ids
            call.logprobs += logprobs
            decoder.tokens[slot] = ids[-1]
            decoder.positions[slot] += len(ids)
            if guess:
                assert call.seq is not None
                assert call.lookup is not None
                call.lookup.judge(len(ids) - 1)
                self.drafted_tokens += len(guess)
                self.accepted_tokens += len(ids) - 1
                if len(ids) <= len(guess):
                    decoder.truncate(call.seq.id, int(decoder.positions[slot]))
            self.decode_tokens += len(ids)
            ended = ended or call.stop() is not None
        return ended

    def _mixed(self) -> None:
        """One step that also lets calls in and computes what was given, not sampled."""
        slots = len(self.slots)
        if not self._plan_room(slots):
            return
        self._rows = slots
        fed = self._compose(slots)
        self._decoder.set_threads(self._rows, self._pace.best(self._rows))
        start = perf_counter()
        code = self._decoder.decode(self._rows) if self._rows else 0
        if code:
            return self._broken(code)
        self._cache.land()
        for fill, ids in fed:
            self._cache.extend(fill.seq, ids)
            self.prefill_tokens += len(ids)
        self._decoder.positions[:slots] += 1
        for fill in [f for f in self.fills if not f.parts]:
            self._filled(fill)
        self._cache.trim()  # not earlier: what a new call shares or merges is live now
        if self.slots:
            logits = self._decoder.logits(len(self.slots))
            self.compute_s += perf_counter() - start
            self._first(logits)
        else:
            self.compute_s += perf_counter() - start
            self.steps += self._rows > 0

    def _compose(self, slots: int) -> list[tuple[Fill, tuple[int, ...]]]:
        """Put everything that is not a sampling row into the batch; returns which fill got which tokens."""
        self._admit()
        if slots or self.fills:
            self._feed_tails()
        fed: list[tuple[Fill, tuple[int, ...]]] = []
        quota = self._prefill_rows if slots else len(self._decoder.tokens)
        for fill in self.fills:  # grows where a branch has to be computed
            share = max(1, min(quota, self._left) // max(1, len(self.fills) - len(fed)))
            ids = self._advance(fill, share)
            if ids:
                fed.append((fill, ids))
                quota = max(1, quota - len(ids))
        return fed

    def _first(self, logits: Floats) -> None:
        """The sampling half of a mixed step: calls that were let in sample their first token."""
        slots = len(self.slots)
        self._sampler.sample(logits, self._decoder.tokens[:slots], self._logprobs[0, :slots])
        self._ids[0, :slots] = self._decoder.tokens[:slots]
        self._steps = 1
        self._settle()

    def _settle(self) -> None:
        """Hand the history to the calls, end those that ended, tell what is due."""
        steps, slots = self._steps, len(self.slots)
        self._steps = 0
        self.steps += steps
        self.decode_tokens += steps * slots
        columns = zip(
            self.slots, self._ids[:steps, :slots].T.tolist(), self._logprobs[:steps, :slots].T.tolist(), strict=True
        )
        for call, ids, logprobs in columns:
            call.ids += ids
            call.logprobs += logprobs
        self._deliver()

    def _end(self, ended: Sequence[tuple[Call, StopReason]]) -> None:
        for call, stop in ended:
            self._keep(call, stop)
        self._arrange()
        if not self.slots:
            self._tails.clear()  # a step for them alone would cost more than it saves

    def _keep(self, call: Call, stop: StopReason) -> None:
        """Keep the sequence of a call that ended: all but its last token is computed."""
        seq = call.seq
        assert seq is not None
        computed = tuple(call.ids[call.seen : -1])
        if computed:
            self._cache.extend(seq, computed)
        self._cache.finish(seq, call.ids[-1])
        self.slots.remove(call)
        call.seq = None
        if stop is not StopReason.EOS and self._merges_seen:
            self._tails.append(seq)

    def _arrange(self) -> None:
        """Give every sampling call its row again after one left."""
        for slot, call in enumerate(self.slots):
            assert call.seq is not None
            self._place(slot, call)
            self._decoder.tokens[slot] = call.ids[-1]
            self._decoder.positions[slot] = call.seq.tip.end + len(call.ids) - call.seen - 1
        self._sampler.arrange(len(self.slots))

    def _place(self, slot: int, call: Call) -> None:
        assert call.seq is not None
        self._decoder.seq_ids[slot, 0] = call.seq.id
        self._decoder.num_seqs[slot] = 1
        self._decoder.outputs[slot] = 1
        self._sampler.place(slot, call.params, call.draws)

    def _broken(self, code: int) -> None:
        """A decode failed: nobody knows what the cells hold, so every call fails and the cache starts anew."""
        why = self._decoder.last_error()
        self._fail(EngineError(f"llama_decode of the llama.cpp engine returned {code}{why}"))

    def _drop(self) -> None:
        self.fills, self.slots, self._tails, self._steps = [], [], [], 0
        self._cache.clear()
        self._decoder.clear()

    # Room

    def _tail_cells(self) -> int:
        """Cells of sampled tokens, which are not in the cache's books before their call ends."""
        return sum(max(0, len(c.ids) - c.seen - 1) for c in self.slots)

    def _room(self) -> int:
        return self._decoder.cells - self._cache.used - self._tail_cells()

    def _make_room(self) -> None:
        """No cell is left for the next token of every sampling call."""
        slots = len(self.slots)
        taken = self._tail_cells() + slots
        self._cache.make_room(self._decoder.cells - taken - 64 * slots)
        if self._cache.used + taken <= self._decoder.cells or self._push_out():
            return
        call = self.slots[0]  # alone, and the whole cache is its own
        self._say([call.delivery(StopReason.LENGTH)])
        self._end([(call, StopReason.LENGTH)])

    def _plan_room(self, slots: int) -> bool:
        """Find room for the sampling rows and a share of what is to be computed. False if calls had to leave."""
        most = len(self._decoder.tokens) - slots
        wanted = sum(f.tokens for f in self.fills) + len(self._tails)
        scarce = self._room() - slots < min(most, wanted + sum(c.cells for c in self.queue))
        for call in self.queue:
            if wanted >= most:
                break
            # Only where cells are scarce it is worth to ask what a call will find, which then must not make way for it.
            wanted += self._cache.missing(call.resumed(), self._cache.root_of(call.salt)) if scarce else call.cells
        wanted = min(wanted, most)
        self._cache.make_room(self._decoder.cells - self._tail_cells() - slots - wanted)
        self._left = min(self._room(), len(self._decoder.tokens)) - slots
        if self._left < (1 if self.fills else 0):
            if not self._push_out():
                self._make_room()
            return False
        return True

    def _admit(self) -> None:
        """Let waiting calls in, first come first served, as far as sequences and cells go round."""
        cache = self._cache
        while self.queue:
            call = self.queue[0]
            reserved = sum(f.call.need for f in self.fills if f.call is not None) + len(self.slots)
            if reserved + call.need > cache.max_seqs or not cache.available:
                return
            if reserved and not self._fits(call):
                return
            self.queue.popleft()
            self._open(call)

    def _fits(self, call: Call) -> bool:
        """Whether there are cells for a call beside the live ones."""
        planned = sum(f.tokens for f in self.fills) + self._tail_cells() + _MARGIN * (self.active + 1)
        free = self._decoder.cells - self._cache.live_cells - planned
        if call.cells <= free:
            return True
        node, _ = self._cache.find(call.context, start=self._cache.root_of(call.salt), spare=1)
        shared = sum(n.num_cells for n in {n for n, _ in node.path()} if n.live)
        return call.cells - shared <= free

    def _open(self, call: Call) -> None:
        context = call.resumed()
        call.seen = len(call.ids)
        seq, rest = self._fork(context, start=self._cache.root_of(call.salt), spare=1)
        call.seq = seq
        self.reused_tokens += call.cells + len(call.ids) - context_cells(tuple(rest))
        self._merges_seen = self._merges_seen or any(isinstance(p, Merge) for p in context)
        self.fills.append(Fill(seq, rest, call=call))

    # Contexts

    def _row(self, token: int, position: int, seq: int) -> int:
        """Add a row without output to the batch."""
        decoder, row = self._decoder, self._rows
        decoder.tokens[row], decoder.positions[row] = token, position
        decoder.seq_ids[row, 0], decoder.num_seqs[row], decoder.outputs[row] = seq, 1, 0
        self._rows += 1
        self._left -= 1
        return row

    def _couple(self, row: int, seq: int) -> None:
        """Let a row compute its token for one more sequence. Both must end at the same position before it."""
        seqs, count = self._decoder.seq_ids[row], int(self._decoder.num_seqs[row])
        seqs[count], seqs[count - 1] = seqs[count - 1], seq  # it attends as the last: the one it was sampled in
        self._decoder.num_seqs[row] = count + 1

    def _feed_pending(self, seq: Seq) -> Node:
        assert seq.pending is not None
        self.prefill_tokens += 1
        return self._cache.feed_pending(seq, self._row(seq.pending, seq.tip.end, seq.id))

    def _feed_tails(self) -> None:
        for seq in self._tails:
            if seq in self._cache.idle and seq.pending is not None and self._left > 0:
                self._feed_pending(seq)
        self._tails.clear()

    def _fork(
        self, parts: tuple[Part, ...], *, start: Node | None = None, apart: Sequence[Seq] = (), spare: int = 0
    ) -> tuple[Seq, list[Part]]:
        """A new sequence that holds as much of `parts` as is cached, and what remains."""
        cache = self._cache
        cache.make_free()
        node, rest = cache.find(parts, start=start, spare=spare, apart=apart)
        first = rest[0] if rest else None
        if isinstance(first, tuple) and len(first) + len(rest) - 1 > spare and self._left > 0:
            waiting = node.waiting.get(first[0])
            if waiting is not None:
                node = self._feed_pending(waiting)
                rest = (first[1:], *rest[1:]) if len(first) > 1 else rest[1:]
        seq = cache.fork(node)
        if node.row is not None:
            self._couple(node.row, seq.id)
        return seq, list(rest)

    def _advance(self, fill: Fill, share: int) -> tuple[int, ...]:
        """Put the next tokens of a fill into the batch; returns those of its current run."""
        while fill.parts and fill.sub is None and self._left > 0:
            part = fill.parts[0]
            if isinstance(part, Merge):
                if not self._merge(fill, part):
                    return ()
                fill.parts.pop(0)
                continue
            count = min(len(part), share, self._left)
            ids, rest = part[:count], part[count:]
            start, end = self._rows, self._rows + count
            decoder = self._decoder
            decoder.tokens[start:end] = ids
            decoder.positions[start:end] = np.arange(fill.seq.tip.end, fill.seq.tip.end + count)
            decoder.seq_ids[start:end, 0] = fill.seq.id
            decoder.num_seqs[start:end] = 1
            decoder.outputs[start:end] = 0
            self._rows, self._left = end, self._left - count
            if rest:
                fill.parts[0] = rest
            else:
                fill.parts.pop(0)
                if not fill.parts and fill.call is not None:
                    decoder.outputs[end - 1] = 1
            return ids
        return ()

    def _filled(self, fill: Fill) -> None:
        """A fill is complete: its call samples from now on, or its branch goes into the merge."""
        self.fills.remove(fill)
        if fill.call is not None:
            slot = len(self.slots)
            self.slots.append(fill.call)
            self._place(slot, fill.call)
            self._decoder.positions[slot] = fill.seq.tip.end
            self._sampler.arrange(slot + 1)
            return
        parent = fill.parent
        assert parent is not None
        self._cache.absorb(parent.seq, fill.seq.tip)
        parent.tips[fill.branch] = fill.seq.tip
        parent.sub = None
        self._cache.finish(fill.seq, None)

    def _merge(self, fill: Fill, key: Merge) -> bool:
        """Bring the branches of a merge into a sequence. False if one of them has to be computed first.

        A branch that ended is taken as it is. One whose last token is still to be computed is taken with that token
        in flight, if it is the longest (or as long): then the row belongs to branch and parent alike, and what
        follows can be computed in the same step.
        """
        cache, base, apart = self._cache, fill.seq.tip, fill.apart
        if base.row is not None:
            return False
        late: dict[int, Node | Seq] = {}
        missing: int | None = None
        wait = False
        for i, branch in enumerate(key.branches):
            if i in fill.tips:
                continue
            node, rest = cache.find(branch, start=base, apart=apart)
            if not rest and node.row is None:
                cache.absorb(fill.seq, node)
                fill.tips[i] = node
                continue
            coming: Node | Seq | None = node
            if rest:
                only = rest[0]
                one = len(rest) == 1 and isinstance(only, tuple) and len(only) == 1
                coming = node.waiting.get(only[0]) if one else None  # type: ignore[arg-type]
            if coming is None:
                missing = i if missing is None else missing
            elif coming in late.values() or self._left <= len(late):
                wait = True
            else:
                late[i] = coming
        nodes = {i: self._feed_pending(c) if isinstance(c, Seq) else c for i, c in late.items()}
        if missing is not None and cache.available:
            seq, rest = self._fork(key.branches[missing], start=base, apart=apart)
            fill.sub = Fill(seq, rest, parent=fill)
            fill.sub.branch = missing
            self.fills.append(fill.sub)
        if missing is not None or wait:
            return False
        end = max([base.end, *(t.end for t in fill.tips.values()), *(n.start for n in nodes.values())])
        if any(n.start != end for n in nodes.values()):
            return False
        for i, node in nodes.items():
            assert node.row is not None
            if any(not n.holders.isdisjoint(apart) for n, _ in node.path(base)):
                return False  # it shares cells with a branch just taken: it will be computed again
            cache.absorb(fill.seq, node)
            self._couple(node.row, fill.seq.id)
            fill.tips[i] = node
        cache.merge(fill.seq, key, tuple(fill.tips[i] for i in range(len(key.branches))))
        fill.tips.clear()
        return True


def _in_line(context: tuple[Part, ...]) -> list[int]:
    """All ids of a context, branches one after another."""
    return [
        id
        for part in context
        for id in (part if isinstance(part, tuple) else (i for b in part.branches for i in _in_line(b)))  # type: ignore[arg-type]
    ]


def _root(fill: Fill) -> Fill:
    while fill.parent is not None:
        fill = fill.parent
    return fill
