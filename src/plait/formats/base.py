"""The format seam: a format says where sampled tokens fork, how each branch opens, what the parent reads at the join.

It looks only at ids sampled in the present call, never at the prompt. It knows nothing of engines.
A `Trajectory` is a run before it has tokens: what data generators write and what `render` turns into a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from plait.errors import RequestError
from plait.tokenizer import Tokenizer
from plait.types import Budget, JoinKind, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One thread that a fork asks for."""

    header_ids: tuple[int, ...]
    """Ids the runtime writes to open it."""
    label: str
    """What the thread was told, for people."""
    key: str = ""
    """What the model calls it, where it asks for it later (`Await`)."""
    needs: tuple[int, ...] = ()
    """Branches of the same fork, by index, that must have ended before it starts. `order` says whether that is
    possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A block of threads, in outline order."""

    branches: tuple[Branch, ...]
    note: str = ""
    """What had to be repaired, in plain words; empty for a well-formed block."""
    fresh: bool = False
    """True: a thread's context is its header alone; it does not see its parent."""
    race: bool = False
    """True: the first thread that succeeds, by its own critical path in tokens, ends the block. At the join no other
    may be read as more than a thread that wrote nothing: the context is divided among the winner and the parent."""
    waits: bool = True
    """False: the parent goes on at once, and reads the threads where it asks for them with an `Await`."""
    keep: int | None = None
    """After the join, how many of the ids sampled in the call stay: a message join puts its text in the block's
    place. None: all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Await:
    """The model asks for threads that it forked without waiting."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """The model ended a call on a fork token, but what it wrote cannot be read as a block."""

    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadOutcome:
    """What a finished thread of a block holds, for the join."""

    header_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Everything after the header: sampled ids, and what nested joins inserted."""
    stop: StopReason
    """Of its last segment, before any forced closing."""
    won: bool | None = None
    """In a race: whether this thread won it. None where there is no race."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """What the parent is given when its threads have ended."""

    forced_ids: tuple[int, ...]
    """concat: the threads' text and what follows. merge: what follows the merged threads (at least one id)."""
    end: bool = False
    """True where the format's rule is that the trajectory ends here."""
    kind: JoinKind | None = None
    """Where this join is of another kind than the format's: `message` where a concat format passes conclusions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """Limits that belong to a format, whatever the request's budget: those of its paper's runtime."""

    max_blocks: int | None = None
    """Blocks that one thread may open."""
    min_tokens: int = 0
    """Sampled tokens that must be left to a thread for a block to open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetLevels:
    """The limits that weights were trained to read in a prompt; a prompt says no other."""

    threads: tuple[int, ...] = ()
    """Empty: the prompt never says how many threads there are."""
    tokens: tuple[int, ...] = ()

    def within(self, budget: Budget) -> Budget:
        """What a prompt says of a budget: of each limit the largest level that it allows.

        Weights are never promised more than there is. A limit below all levels is said as it is.
        """
        return replace(
            budget,
            max_threads=_said(budget.max_threads, self.threads),
            max_threads_per_fork=_said(budget.max_threads_per_fork, self.threads),
            max_tokens=_said(budget.max_tokens, self.tokens),
        )


def _said(limit: int | None, levels: tuple[int, ...]) -> int | None:
    if not levels:
        return None
    return max((level for level in levels if limit is None or level <= limit), default=limit)


class TrajectoryFormat(Protocol):
    """Where a thread forks, how each branch opens, what the parent reads at the join.

    Inherit from it: what most formats do alike has a default.
    """

    name: str
    paper: str
    join_kind: JoinKind
    fork_ids: tuple[int, ...]
    """Control ids that begin a block: banned where the budget declines forks."""
    caps: Caps = Caps()
    levels: BudgetLevels | None = None
    """What the weights were trained to read of a budget; None: they were not, or it is not known."""

    def stop_ids(self, depth: int) -> tuple[int, ...]:
        """Ids that end a call of a thread at this depth (root: 0). End-of-sequence ids are `eos_ids`."""
        ...

    def eos_ids(self) -> tuple[int, ...]: ...

    def begin(self) -> Fork | None:
        """A block that the run starts with, before the model says anything; None where the model decides."""
        return None

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Await | Malformed | None:
        """Read the end of a call that stopped on a stop id. None: no fork was asked for."""
        ...

    def opening(self, branch: Branch, reads: Sequence[ThreadOutcome]) -> Join:
        """What the runtime writes to open a thread that waited for others, in the order of `branch.needs`."""
        return Join(forced_ids=branch.header_ids)

    def succeeded(self, outcome: ThreadOutcome) -> bool:
        """Whether a thread of a race found what was searched."""
        return False

    def condition(self, prompt_ids: Sequence[int], budget: Budget) -> tuple[int, ...]:
        """A prompt that says the budget, in the form that models of this format are trained on.

        Raises:
            RequestError: The format has no such form.
        """
        raise RequestError(f"the {self.name} format has no way to write a budget into a prompt (plait and apr have)")

    def conditioned(self, prompt_ids: Sequence[int]) -> tuple[Budget, tuple[int, ...]]:
        """The inverse of `condition`: the limits that a prompt says, and the prompt without them."""
        return Budget(max_threads=None, max_tokens=None), tuple(prompt_ids)

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        """What the runtime appends to a thread that did not close itself; empty where it did."""
        ...

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        """What the parent reads. Outcomes are in outline order and closed."""
        ...

    def open_text(self, block: Block) -> str:
        """What the model writes to open a block."""
        ...

    def spawn_text(self, part: Spawn) -> str:
        """What the model writes to start a thread and go on.

        Raises:
            RequestError: In this format a parent waits.
        """
        raise RequestError(f"the {self.name} format has no form for a thread that its parent does not wait for")

    def wait_text(self, part: Wait) -> str:
        """What the model writes to wait for a thread that it started."""
        raise RequestError(f"the {self.name} format has no form for a thread that its parent does not wait for")

    lead: str = ""
    """What the model writes between a thread's header and its text."""

    def end_text(self, returns: str | None, number: int = 1) -> str:
        """What the model writes to end a thread of its block, from 1: what it returns, where it does, and the closing
        tag. Empty where a thread ends with end-of-sequence."""
        ...

    def close_text(self, conclusion: str) -> str:
        """What the model writes after the join to close the block."""
        ...

    @classmethod
    def tags(cls) -> tuple[str, ...]:
        """The control tokens of this format."""
        return ()

    def control_id(self, tokenizer: Tokenizer, tag: str) -> int:
        """The id of a tag that this format needs.

        Raises:
            RequestError: The vocabulary does not have it as one control token.
        """
        id = tokenizer.control_id(tag)
        if id is None:
            raise RequestError(f"the {self.name} format needs {tag} as one control token; this vocabulary has none")
        return id

    def refuse(self, block: Block, depth: int) -> None:
        """Say what of a block, in a thread at this depth, this format has no form for.

        Raises:
            RequestError: There is something.
        """

    def write(self, trajectory: Trajectory) -> str:
        """A trajectory as text, every thread in its place.

        Raises:
            RequestError: It has something that this format has no form for.
        """
        raise RequestError(f"the {self.name} format has no text of its own")

    def read(self, text: str) -> Trajectory:
        """The trajectory that `write` wrote; no other spelling is accepted.

        Raises:
            FormatError: The text is not of this format; it says line and column.
        """
        raise RequestError(f"the {self.name} format has no text of its own")


@dataclass(frozen=True, slots=True)
class Block:
    """A fork and its join, in text. `outlines[i]` is what thread i was told, `threads[i]` what it wrote."""

    outlines: tuple[str, ...]
    threads: tuple[Trajectory, ...]
    conclusion: str = ""
    """What the model writes inside the block after the join; only in formats that have a place for it."""
    needs: tuple[tuple[int, ...], ...] = ()
    """For each thread, the threads it waits for, by index; empty where none does."""
    race: bool = False
    """Whether the first thread that succeeds ends the block."""


@dataclass(frozen=True, slots=True)
class Return:
    """The end of a thread: what its parent reads of it; only in formats that have a place for it."""

    text: str


@dataclass(frozen=True, slots=True)
class Spawn:
    """A thread that starts while its parent goes on; only in formats whose parents do not wait."""

    number: int
    """What its parent calls it; free again after its `Wait`."""
    outline: str
    thread: Trajectory


@dataclass(frozen=True, slots=True)
class Wait:
    """Where a parent waits for a thread that it spawned, and reads what it returns."""

    number: int


Part: TypeAlias = "str | Block | Return | Spawn | Wait"
Trajectory: TypeAlias = tuple[Part, ...]
"""Plain text and blocks, in order; in a thread perhaps a `Return` as the last part."""


def ended(thread: Trajectory) -> tuple[Trajectory, str | None]:
    """A thread's parts, and what it returns; None where it has no `Return`."""
    if thread and isinstance(thread[-1], Return):
        return thread[:-1], thread[-1].text
    return thread, None


def order(needs: Sequence[Sequence[int]]) -> list[int] | None:
    """Threads in an order in which each comes after all that it needs, else as written; None where there is none."""
    left, done = list(range(len(needs))), list[int]()
    while left:
        ready = next((i for i in left if all(n in done for n in needs[i])), None)
        if ready is None:
            return None
        left.remove(ready)
        done.append(ready)
    return done


def ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a format's own text, control tokens included."""
    return tuple(tokenizer.encode(text, special=True))
