"""The format contract as tests: run `check_format` on every format, ours or yours.

Knows no format by name. Each clause is its own function and fails with a `FormatProtocolError` that starts with the
clause's name. Clauses are held on random trajectories of what the format has a form for (`plait.testing.trajectories`),
through the session and the scripted engine, in virtual time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import anyio

from plait.engines.scripted import ScriptedEngine
from plait.errors import FormatProtocolError, RequestError, nearest
from plait.formats.base import Await, Fork, Malformed, ThreadOutcome, Trajectory, TrajectoryFormat
from plait.formats.render import trajectory_of
from plait.formats.text import CharTokenizer
from plait.session import run
from plait.testing.clock import run_virtual
from plait.testing.mutation import MutatedRun, Mutations, palette
from plait.testing.trajectories import Trajectories
from plait.tokenizer import Tokenizer
from plait.tree import Tree
from plait.types import Budget, Context, Merge, Request, StopReason, context_positions

MakeFormat: TypeAlias = Callable[[Tokenizer], TrajectoryFormat]
_FREE = Budget(max_threads=None, max_threads_per_fork=None, max_depth=None, max_tokens=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatCase:
    """What the clauses are held on."""

    make_format: MakeFormat
    tags: tuple[str, ...]
    tokenizer: Tokenizer
    format: TrajectoryFormat
    drawn: Trajectories
    seed: int
    examples: int
    mutations: int

    def trajectories(self, *, whole: bool = False) -> Iterator[Trajectory]:
        """As many as there are examples, the same for each clause."""
        for number in range(self.examples):
            yield self.drawn.draw(random.Random(f"{self.seed}/{number}"), whole=whole)

    def palette(self) -> list[int]:
        """Control tokens, what stands beside them, and a few characters."""
        return palette(self.format, self.tokenizer, self.tags)

    def replayed(self, tree: Tree, budget: Budget = _FREE, **timing: Any) -> Tree:
        """What the runtime makes of a model that says what a tree says."""
        request = Request(prompt_ids=self.drawn.prompt_ids, budget=budget)

        async def main() -> Tree:
            return await run(request, engine=ScriptedEngine(script=tree, **timing), format=self.format)

        return run_virtual(main)


FormatClause: TypeAlias = Callable[[FormatCase], None]


def check_format(
    make_format: MakeFormat,
    *,
    tags: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    alphabet: str = "abc 12",
    seed: int = 0,
    examples: int = 25,
    mutations: int = 300,
    clauses: Sequence[str] | None = None,
) -> list[str]:
    """Hold a format to its contract.

    Args:
        make_format: Makes it over a vocabulary: usually its class.
        tags: Its control tokens; by default what `make_format.tags()` says.
        tokenizer: What to write in; by default a vocabulary of characters and those tags.
        alphabet: Characters that texts are made of, at least two.
        seed: Of all that is random.
        examples: Random trajectories for each clause.
        mutations: Mutated runs.
        clauses: Names of those to check; by default all that apply.

    Returns:
        Names of the clauses that were checked, in order. F2, F6 and F9 are left out where they do not apply: a format
        without whole texts, without blocks, or without tags.

    Raises:
        FormatProtocolError: A clause does not hold; the message starts with its name.

    Example:
        >>> from plait.formats.threadweaver import ThreadWeaver
        >>> check_format(ThreadWeaver, examples=2, mutations=2)
        ['F1', 'F2', 'F3', 'F4', 'F5', 'F6', 'F7', 'F8', 'F9']
    """
    if tags is None:
        tags = make_format.tags() if isinstance(make_format, type) else ()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = tokenizer or CharTokenizer(tuple(tags))
    format = make_format(tokenizer)
    prompt = (*tokenizer.bos_ids, *tokenizer.encode(alphabet[0]))
    case = FormatCase(
        make_format=make_format,
        tags=tuple(tags),
        tokenizer=tokenizer,
        format=format,
        drawn=Trajectories(format, tokenizer, alphabet=alphabet, prompt_ids=prompt),
        seed=seed,
        examples=examples,
        mutations=mutations,
    )
    for name in clauses or ():
        if name not in FORMAT_CLAUSES:
            raise nearest(name, list(FORMAT_CLAUSES), "clause")
    forms = case.drawn.forms
    apart = {"F2": not forms.text, "F6": not forms.text or forms.fresh, "F9": not tags}
    names = [n for n in FORMAT_CLAUSES if not apart.get(n, False) and (clauses is None or n in clauses)]
    for name in names:
        clause = FORMAT_CLAUSES[name]
        label = f"{name} ({clause.__name__.replace('_', ' ')})"
        try:
            clause(case)
        except _Broken as exc:
            raise FormatProtocolError(f"{label}: {exc}") from None
        except Exception as exc:
            raise FormatProtocolError(f"{label}: {type(exc).__name__}: {exc}") from exc
    return names


def what_is_rendered_is_read_back(case: FormatCase) -> None:
    """F1: trajectory and tree are each other's inverse; where a race cuts a thread, what is left of it."""
    for trajectory in case.trajectories():
        tree = case.drawn.render(trajectory)
        back = trajectory_of(tree, format=case.format, tokenizer=case.tokenizer)
        if case.drawn.render(back) != tree:
            raise _Broken(f"{trajectory} renders to another tree when it is read back as {back}")
        if back != trajectory and not any(s.stop == "cancelled" for s in tree.segments.values()):
            raise _Broken(f"{trajectory} is read back as {back}")


def what_is_written_is_read_again(case: FormatCase) -> None:
    """F2: of a thread that starts from what it is told, a parent's text says only what it returned."""
    for trajectory in case.trajectories():
        text = case.format.write(trajectory)
        read = case.format.read(text)
        if case.format.write(read) != text or (read != trajectory and not case.drawn.forms.fresh):
            raise _Broken(f"{text!r} is read as {read}, it was written from {trajectory}")


def the_runtime_gives_the_gold_tree(case: FormatCase) -> None:
    """F3: whatever the timing."""
    for number, trajectory in enumerate(case.trajectories()):
        tree = case.drawn.render(trajectory)
        timed = case.replayed(tree, timing_seed=number, chunk_size=64)
        if timed != tree:
            raise _Broken(f"of {trajectory} the runtime makes another tree (at timing seed {number})")


def cuts_of_the_stream_change_nothing(case: FormatCase) -> None:
    """F4: a call may come in chunks of any sizes."""
    for number, trajectory in enumerate(case.trajectories()):
        tree = case.drawn.render(trajectory)
        for size in (1, 2, 3 + number % 7):
            if case.replayed(tree, chunk_size=size) != tree:
                raise _Broken(f"{trajectory} gives another tree in chunks of {size}")


def mutated_outputs_stay_within_the_budget(case: FormatCase) -> None:
    """F5: and never raise."""
    trees = [case.drawn.render(t) for t in case.trajectories()]
    runs = Mutations(case.format, trees, palette=case.palette(), seed=case.seed)

    async def one(number: int) -> MutatedRun:
        with anyio.fail_after(60):
            return await runs.run(number)

    for number in range(case.mutations):
        if (told := run_virtual(one, number)).excess:
            raise _Broken(f"mutated run {number} (seed {case.seed}): {told.excess}")


def sampled_and_inserted_ids_make_up_the_text(case: FormatCase) -> None:
    """F6: what a parent has read at its end is the whole text, each id once: sampled by a thread or written for it."""
    for trajectory in case.trajectories(whole=True):
        tree = case.drawn.render(trajectory)
        last = max((s.id for s in tree.segments.values() if s.thread == "0"), key=lambda id: int(id.split(":")[1]))
        read = [*_flat(tree.context(last)), *tree.segments[last].sampled_ids]
        around = (*case.tokenizer.bos_ids, *case.tokenizer.eos_ids)
        text = case.tokenizer.decode([id for id in read[len(case.drawn.prompt_ids) :] if id not in around])
        if text != case.format.write(trajectory):
            raise _Broken(f"the parent reads {text!r}, the text is {case.format.write(trajectory)!r}")


def threads_start_where_their_parent_stopped_and_see_no_sibling(case: FormatCase) -> None:
    """F7: positions and visibility; a fresh thread starts at 0 and sees nothing but what it is told."""
    for trajectory in case.trajectories():
        tree = case.drawn.render(trajectory)
        ends = tree.positions()
        for segment in tree.segments.values():
            context = tree.context(segment.id)
            if ends[segment.id] != context_positions(context) + len(segment.sampled_ids):
                raise _Broken(f"segment {segment.id} ends at {ends[segment.id]}, its context says otherwise")
            if segment.parent is None or tree.segments[segment.parent].thread == segment.thread:
                continue
            before = (*tree.context(segment.parent), tuple(tree.segments[segment.parent].sampled_ids))
            expected = [] if segment.keep == 0 else _flat(before)
            if _flat(context) != [*expected, *segment.forced_ids]:
                raise _Broken(f"thread {segment.thread} of {trajectory} sees more or less than its parent and header")


def any_ids_can_be_read(case: FormatCase) -> None:
    """F8: whatever a model samples is a fork, a wait, malformed or nothing; a thread that was closed is closed."""
    format, rng = case.format, random.Random(case.seed)
    palette = case.palette()
    header = _headers(case)
    for number in range(20 * case.examples):
        ids = rng.choices(palette, k=rng.randint(1, 40))
        for depth in (0, 1, 2):
            ends = format.stop_ids(depth)
            asked = format.parse([*ids, rng.choice(ends)] if ends and number % 2 else ids, depth)
            if asked is not None and not isinstance(asked, (Fork, Await, Malformed)):
                raise _Broken(f"{ids} at depth {depth} is read as {asked}")
        if not header:
            continue
        stop = rng.choice((StopReason.STOP, StopReason.EOS, StopReason.LENGTH, StopReason.BUDGET))
        open_end = ThreadOutcome(header_ids=rng.choice(header), token_ids=tuple(ids), stop=stop)
        closed = replace(open_end, token_ids=(*ids, *format.closer_ids(open_end)))
        if format.closer_ids(closed):
            raise _Broken(f"a thread that ends in {closed.token_ids} is closed twice")
        format.succeeded(closed)
        if not format.join([closed]).forced_ids and format.join_kind == "merge":
            raise _Broken("no id follows a merge: no logits predict what comes next")


def _headers(case: FormatCase) -> list[tuple[int, ...]]:
    trees = map(case.drawn.render, case.trajectories())
    return [
        s.forced_ids for tree in trees for s in tree.segments.values() if s.parent is not None and s.id.endswith(".0:0")
    ]


def a_vocabulary_without_a_tag_is_refused_by_name(case: FormatCase) -> None:
    """F9: of the tags that a format needs as control tokens; others are text to it."""
    refused = 0
    for tag in case.tags:
        try:
            case.make_format(CharTokenizer([other for other in case.tags if other != tag]))
        except RequestError as exc:
            refused += 1
            if tag not in str(exc) and tag.replace("</", "<") not in str(exc):
                raise _Broken(f"without {tag} it is refused with another reason: {exc}") from None
    if not refused:
        raise _Broken("it is made over a vocabulary that lacks any one of its tags")


FORMAT_CLAUSES: dict[str, FormatClause] = {
    "F1": what_is_rendered_is_read_back,
    "F2": what_is_written_is_read_again,
    "F3": the_runtime_gives_the_gold_tree,
    "F4": cuts_of_the_stream_change_nothing,
    "F5": mutated_outputs_stay_within_the_budget,
    "F6": sampled_and_inserted_ids_make_up_the_text,
    "F7": threads_start_where_their_parent_stopped_and_see_no_sibling,
    "F8": any_ids_can_be_read,
    "F9": a_vocabulary_without_a_tag_is_refused_by_name,
}


class _Broken(Exception):
    """A clause does not hold."""


def _flat(context: Context) -> list[int]:
    """Ids of a context, branches of a merge one after another."""
    ids: list[int] = []
    for part in context:
        ids += [id for branch in part.branches for id in _flat(branch)] if isinstance(part, Merge) else part
    return ids
