"""The values that flow through a run. Standard library only; knows nothing of engines, formats or text.

A context is what an engine continues: runs of token ids and merges, in order. Almost always it is one
run; it holds a `Merge` where threads were joined by their keys and values instead of by re-reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from operator import index
from typing import Literal, TypeAlias

from plait.errors import RequestError
from plait.settings import of_type, within

JoinKind: TypeAlias = Literal["none", "concat", "merge", "message"]
"""How a parent reads its threads: not at all, as text read again, as keys and values, as messages."""


_HOTTEST = 1_000_000
"""Where tokens have long been equally likely, and infinity begins to be divided by itself."""


class StopReason(StrEnum):
    """Why a segment ended. How a thread ended is data, never an exception."""

    STOP = "stop"
    """The model sampled one of the format's stop ids (included in the output)."""
    EOS = "eos"
    """The model sampled end-of-sequence (included in the output)."""
    LENGTH = "length"
    """`max_tokens` of the call, or the engine's context, was used up."""
    BUDGET = "budget"
    """A limit of the request's `Budget` ended it: threads, tokens or the deadline."""
    MALFORMED = "malformed"
    """The model wrote control tokens that its format cannot read."""
    CANCELLED = "cancelled"
    """The run was left, or failed elsewhere, while this segment sampled; or another thread ended a race."""
    FORCED = "forced"
    """The runtime wrote this segment itself (a missing closing tag); the engine sampled nothing."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Branches computed in isolation, every one starting at the same position.

    What follows attends to the keys and values of all of them; its positions go on from the longest.
    A merge is followed by at least one forced id: no single token's logits predict what comes next.
    Source: Multiverse (Yang et al. 2025, arXiv:2506.09991).
    """

    branches: tuple[Context, ...]


Context: TypeAlias = tuple["tuple[int, ...] | Merge", ...]


def context_positions(context: Context) -> int:
    """Count positions: a merge is as long as its longest branch."""
    positions = 0
    for part in context:
        if isinstance(part, Merge):
            positions += max((context_positions(branch) for branch in part.branches), default=0)
        else:
            positions += len(part)
    return positions


def context_cells(context: Context) -> int:
    """Count tokens held in memory: a merge holds every branch."""
    cells = 0
    for part in context:
        cells += sum(map(context_cells, part.branches)) if isinstance(part, Merge) else len(part)
    return cells


def context_merges(context: Context) -> Iterator[Merge]:
    """Every merge in a context, outermost first."""
    for part in context:
        if isinstance(part, Merge):
            yield part
            for branch in part.branches:
                yield from context_merges(branch)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one engine call samples. `temperature=0` is greedy, whatever the other fields say."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    """Sampling one of these ends the call with `StopReason.STOP`; the id is part of the output."""
    eos_ids: tuple[int, ...] = ()
    """Sampling one of these ends the call with `StopReason.EOS`; the id is part of the output."""
    banned_ids: tuple[int, ...] = ()
    """Never sampled: how a fork is declined when the budget has no thread left."""
    logprobs: bool = True
    """False lets an engine report 0.0 for every token and save the softmax."""

    def __post_init__(self) -> None:
        # Made for every engine call.
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            within("max_tokens", self.max_tokens, 1, whole=True, or_none=False)
        if type(self.seed) is not int:
            of_type(int, self.seed, name="seed")
        _check_sampling(self.temperature, self.top_p, self.top_k)

    def stop_at(self, id: int, *, full: bool) -> StopReason | None:
        """Why a call ends after sampling an id; None where it goes on.

        Args:
            full: Whether there is no room for another.
        """
        if id in self.stop_ids:
            return StopReason.STOP
        if id in self.eos_ids:
            return StopReason.EOS
        return StopReason.LENGTH if full else None


@lru_cache(maxsize=256, typed=True)
def _check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    within("temperature", temperature, 0, _HOTTEST, or_none=False)
    within("top_p", top_p, 0, 1, above=True, or_none=False)
    within("top_k", top_k, 0, whole=True, or_none=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some tokens of one engine call, in order. The last chunk of a call, and only it, has `stop`."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural log, one for each token, 0 or below."""
    stop: StopReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Hard limits of one request. `None` means no limit of this kind; the engine's context still holds.

    A limit never fails a run: threads beyond it are not started or are ended, the join goes on with
    what there is, and the tree says so.
    """

    max_threads: int | None = 64
    """Forked threads in the whole run (the root is not counted)."""
    max_concurrent_threads: int | None = None
    """Forked threads that sample at once; more wait for a place. The result is the same."""
    max_threads_per_fork: int | None = 16
    """A fork that asks for more is malformed: its block is not opened."""
    max_depth: int | None = 8
    """How deep threads may nest, as far as the format nests at all. 0 declines every fork."""
    max_thread_tokens: int | None = None
    """Sampled tokens of one thread, the threads it forks not counted."""
    max_tokens: int | None = 4096
    """Sampled tokens of the whole run, all threads together."""
    deadline_s: float | None = None
    """Seconds from the start of the run."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least = 1 if name in ("max_concurrent_threads", "max_thread_tokens", "max_tokens") else 0
            within(f"budget {name}", getattr(self, name), least, whole=name != "deadline_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it."""

    prompt_ids: tuple[int, ...]
    budget: Budget = Budget()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    """Each segment samples with hash(seed, segment id): the result does not depend on timing."""
    logprobs: bool = True
    conditioned: bool = False
    """The budget is written into the prompt in the format's own words, for weights that were trained to read it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", _token_ids(self.prompt_ids))
        if not self.prompt_ids:
            raise RequestError("the prompt is empty; it must hold at least one token id")
        if not isinstance(self.budget, Budget):
            raise RequestError(f"the budget is {self.budget!r}; it must be a Budget, such as Budget(max_tokens=1000)")
        # Held to its ranges before anything runs.
        SamplingParams(max_tokens=1, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed)


def _token_ids(given: Sequence[int]) -> tuple[int, ...]:
    """Ids of any sequence as a tuple.

    Raises:
        RequestError: It is none of whole numbers.
    """
    if type(given) is tuple and {*map(type, given)} <= {int}:
        return given
    if isinstance(given, str | bytes):
        raise RequestError(
            f"the prompt is {given!r:.60}; prompt_ids are token ids: `model.request(text)` makes a request from text, "
            "`tokenizer.encode(text)` ids"
        )
    try:
        return tuple(map(index, given))
    except TypeError as exc:
        raise RequestError(f"the prompt is {given!r:.60}; it must be a sequence of token ids ({exc})") from None
