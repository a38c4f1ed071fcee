"""The prefix tree over sequences, against cells that only count: books, sharing, and what may never be shared."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from plait.engines.inprocess.calls import normalise
from plait.engines.llamacpp.cache import MIN_SPLIT, Cache, Seq
from plait.types import Context, Merge


class CountingCells:
    """A decoder's cells: each has a position, a token, and the sequences that hold it."""

    def __init__(self) -> None:
        self.cells: list[tuple[int, int, set[int]]] = []

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        for position, _, seqs in self.cells:
            if source in seqs and start <= position < end:
                seqs.add(target)

    def remove(self, seq: int) -> None:
        for _, _, seqs in self.cells:
            seqs.discard(seq)
        self.cells = [cell for cell in self.cells if cell[2]]

    def compute(self, seq: int, start: int, ids: tuple[int, ...]) -> None:
        self.cells += [(start + i, id, {seq}) for i, id in enumerate(ids)]

    def held(self, seq: int) -> list[tuple[int, int]]:
        return sorted((position, id) for position, id, seqs in self.cells if seq in seqs)


class Fixture:
    """A cache whose sequences are filled at once."""

    def __init__(self, max_seqs: int = 16, keep: int = 10_000) -> None:
        self.cells = CountingCells()
        self.cache = Cache(self.cells, max_seqs=max_seqs, keep=keep)

    def fill(self, context: Context, *, live: bool = False) -> tuple[Seq, int]:
        """A sequence that holds a context, and how many tokens had to be computed for it."""
        cache = self.cache
        cache.make_free()
        node, rest = cache.find(normalise(context))
        seq, computed = cache.fork(node), 0
        for part in rest:
            if isinstance(part, tuple):
                computed += self.compute(seq, part)
            else:
                computed += self.merge(seq, part)
        if not live:
            cache.finish(seq, None)
        return seq, computed

    def compute(self, seq: Seq, ids: tuple[int, ...]) -> int:
        self.cells.compute(seq.id, seq.tip.end, ids)
        self.cache.extend(seq, ids)
        return len(ids)

    def merge(self, seq: Seq, key: Merge, above: tuple[Seq, ...] = ()) -> int:
        cache, computed = self.cache, 0
        base, tips, apart = seq.tip, [], (seq, *above)
        for branch in key.branches:
            cache.make_free()  # before it is found: making room may drop what was
            node, rest = cache.find(branch, start=base, apart=apart)
            if rest:
                own = cache.fork(node)
                for part in rest:
                    computed += self.compute(own, part) if isinstance(part, tuple) else self.merge(own, part, apart)
                node = own.tip
                cache.absorb(seq, node)
                cache.finish(own, None)
            else:
                cache.absorb(seq, node)
            tips.append(node)
        cache.merge(seq, key, tuple(tips))
        return computed

    def check(self) -> None:
        self.cache.check()
        assert self.cache.used == len(self.cells.cells)
        live = {seq.id for seq in self.cache.seqs if seq.live}
        assert self.cache.live_cells == sum(bool(seqs & live) for _, _, seqs in self.cells.cells)


def cells_of(context: Context, start: int = 0) -> list[tuple[int, int]]:
    """(position, token) of every token of a context, from the definition."""
    out: list[tuple[int, int]] = []
    for part in context:
        if isinstance(part, Merge):
            branches = [cells_of(b, start) for b in part.branches]
            out += [cell for branch in branches for cell in branch]
            start = max((p + 1 for branch in branches for p, _ in branch), default=start)
        else:
            out += [(start + i, id) for i, id in enumerate(part)]
            start += len(part)
    return sorted(out)


PREFIX = tuple(range(100, 120))


def test_a_context_has_one_canonical_form() -> None:
    assert normalise(((1, 2), (), (3,))) == ((1, 2, 3),)
    assert normalise(((1,), Merge((((2,), (3,)),)), (4,))) == ((1, 2, 3, 4),)
    assert normalise(((1,), Merge(((), ((),))), (4,))) == ((1, 4),)
    inner = Merge((((1,),), ((), (2,))))
    assert normalise((Merge(((inner,), ((), ()))),)) == (Merge((((1,),), ((2,),))),)


def test_a_known_context_is_found_whole_and_a_longer_one_goes_on_from_it() -> None:
    f = Fixture()
    assert f.fill((PREFIX,))[1] == 20
    assert f.fill((PREFIX,))[1] == 0
    assert f.fill(((*PREFIX, 1, 2),))[1] == 2
    assert f.fill((PREFIX, (1, 2, 3)))[1] == 1
    f.check()


def test_what_must_be_computed_again_to_sample_is_spared() -> None:
    f = Fixture()
    f.fill((PREFIX,))
    node, rest = f.cache.find((PREFIX,), spare=1)
    assert (node.end, rest) == (19, ((119,),))
    f.check()


def test_a_long_common_beginning_is_shared_and_a_short_one_is_not() -> None:
    f = Fixture()
    long = tuple(range(MIN_SPLIT))
    f.fill((PREFIX,))
    f.fill((PREFIX, (1, 2, 3)))
    assert f.fill((PREFIX, (1, 2, 4)))[1] == 3, "siblings that open alike keep their own cells"
    assert f.fill((PREFIX, long, (7,)))[1] == MIN_SPLIT + 1
    assert f.fill((PREFIX, long, (8,)))[1] == 1
    f.check()


def test_of_equal_beginnings_the_one_that_leads_further_is_taken() -> None:
    f = Fixture()
    f.fill((PREFIX,), live=True)
    node = f.cache.root.children[100][0]
    other = f.cache.fork(f.cache.root)
    f.compute(other, PREFIX)
    f.compute(other, (5, 6))
    found, rest = f.cache.find(((*PREFIX, 5, 6, 7),))
    assert rest == ((7,),)
    assert found is other.tip
    assert found.parent is not node
    f.check()


def test_a_merge_takes_branches_that_are_cached_and_copies_nothing() -> None:
    f = Fixture()
    f.fill((PREFIX,))
    f.fill((PREFIX, (1, 2)))
    f.fill((PREFIX, (1, 3, 4)))
    context: Context = (PREFIX, Merge((((1, 2),), ((1, 3, 4),))), (9,))
    used = f.cache.used
    seq, computed = f.fill(context)
    assert (computed, f.cache.used) == (1, used + 1)
    assert seq.tip.end == 20 + 3 + 1
    assert f.cells.held(seq.id) == cells_of(context)
    assert f.fill(context)[1] == 0
    f.check()


def test_after_a_merge_the_branches_are_found_only_where_they_have_their_own_sequence() -> None:
    f = Fixture()
    f.fill((PREFIX,))
    branches = [f.fill((PREFIX, b))[0] for b in ((1, 2), (3, 4))]
    seq, _ = f.fill((PREFIX, Merge((((1, 2),), ((3, 4),))), (9,)))
    f.cache.drop(branches[0])
    used = f.cache.used
    assert f.fill((PREFIX, (1, 2)))[1] == 2, "in the merged sequence it cannot be told apart"
    assert f.fill((PREFIX, (3, 4)))[1] == 0
    assert f.cache.used == used + 2
    f.cache.drop(seq)
    f.check()


def test_equal_branches_each_bring_their_own_cells() -> None:
    f = Fixture()
    context: Context = (PREFIX, Merge((((1, 2),), ((1, 2),))), (9,))
    seq, computed = f.fill(context)
    assert computed == 20 + 4 + 1
    assert f.cells.held(seq.id) == cells_of(context)
    f.cache.drop(seq)
    assert f.fill(context)[1] <= 1 + 20, "both copies are still there"
    f.check()


def test_cells_that_two_branches_share_are_computed_again_for_one_of_them() -> None:
    f = Fixture()
    long = tuple(range(MIN_SPLIT))
    f.fill((PREFIX,))
    f.fill((PREFIX, (*long, 1)))
    f.fill((PREFIX, (*long, 2)))
    context: Context = (PREFIX, Merge((((*long, 1),), ((*long, 2),))), (9,))
    seq, computed = f.fill(context)
    assert computed == MIN_SPLIT + 1 + 1
    assert f.cells.held(seq.id) == cells_of(context)
    f.check()


def test_the_least_recently_used_sequence_makes_way_and_live_ones_never() -> None:
    f = Fixture(max_seqs=3)
    live, _ = f.fill(((1, 1),), live=True)
    f.fill(((2, 2),))
    f.fill(((3, 3),))
    f.fill(((2, 2), (5,)))  # uses the second again; drops the third or a free one
    f.fill(((4, 4),))
    assert live in f.cache.seqs
    assert f.cache.find(((1, 1),))[1] == ()
    assert f.cache.find(((3, 3),))[1] != ()
    f.check()


def test_what_a_waiting_context_will_find_is_the_last_to_make_way() -> None:
    f = Fixture()
    branches = ((*PREFIX, 1, 2, 3), (*PREFIX, 4, 5))
    for branch in branches:
        f.fill((branch,))
    f.fill((tuple(range(50, 90)),))
    merged: Context = (PREFIX, Merge((((1, 2, 3),), ((4, 5, 6),))), (9, 9))
    assert f.cache.missing(merged, f.cache.root) == 1 + 2, "the 6, and what follows the merge"
    assert f.cache.missing(((*PREFIX, 7, 8),), f.cache.root) == 2
    assert f.cache.missing(((60, 61),), f.cache.root) == 2
    f.cache.make_room(len(PREFIX) + 5)
    assert f.fill(merged)[1] == 3
    f.check()


def test_trim_keeps_twice_as_many_idle_cells_as_live_ones_and_at_least_keep() -> None:
    f = Fixture(keep=5)
    for i in range(6):
        f.fill(((i, i, i),))
    f.cache.trim()
    assert f.cache.used == 3
    live, _ = f.fill((tuple(range(50, 60)),), live=True)
    for i in range(10):
        f.fill(((i, i, i),))
    f.cache.trim()
    assert f.cache.used == 10 + 18
    f.cache.finish(live, 7)
    assert f.cache.make_room(0)
    assert f.cache.used == 0
    f.check()


def test_a_pending_token_is_known_until_it_is_fed_or_its_sequence_is_dropped() -> None:
    f = Fixture()
    seq, _ = f.fill((PREFIX,), live=True)
    f.cache.finish(seq, 7)
    assert seq.tip.waiting == {7: seq}
    tip = seq.tip
    node = f.cache.feed_pending(seq, row=3)
    assert (tip.waiting, node.row, f.cache.available) == ({}, 3, 15), "in flight it cannot be dropped"
    f.cells.compute(seq.id, 20, (7,))
    f.cache.land()
    assert (node.row, f.cache.available) == (None, 16)
    f.check()
    other, _ = f.fill(((1,),), live=True)
    f.cache.finish(other, 2)
    f.cache.drop(other)
    assert other.tip.waiting == {}


@given(seed=st.integers(0, 2**32), max_seqs=st.sampled_from([4, 8, 40]), long=st.booleans())
def test_the_books_balance_after_any_program(seed: int, max_seqs: int, long: bool) -> None:
    """P9: forks, extensions, merges, drops and evictions, against cells that are counted one by one."""
    rng = random.Random(seed)
    f = Fixture(max_seqs=max_seqs, keep=rng.choice([0, 100]))
    contexts: list[Context] = [(PREFIX[: rng.randint(1, 20)],)]
    live: list[Seq] = []

    def run(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2) for _ in range(rng.randint(1, most * (8 if long else 1))))

    for _ in range(25):
        base = rng.choice(contexts)
        match rng.randrange(6):
            case 0:
                context: Context = (*base, run(4))
            case 1 | 2:
                context = (*base, Merge(tuple((run(3),) for _ in range(rng.randint(1, 3)))), run(2))
            case 3 if live:
                seq = live.pop(rng.randrange(len(live)))
                f.cache.finish(seq, None)
                continue
            case 4 if f.cache.idle:
                f.cache.drop(rng.choice(list(f.cache.idle)))
                f.check()
                continue
            case _:
                f.cache.trim()
                continue
        contexts.append(normalise(context))
        if len(live) + 3 > max_seqs:
            f.cache.finish(live.pop(0), None)
        seq, _ = f.fill(context, live=True)
        live.append(seq)
        assert f.cells.held(seq.id) == cells_of(context)
        f.check()
    for seq in list(f.cache.seqs):
        f.cache.drop(seq)
    f.check()
    assert (f.cache.used, f.cells.cells, len(f.cache.free)) == (0, [], max_seqs)
    assert not f.cache.root.children
    assert not f.cache.root.merges
