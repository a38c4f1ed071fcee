"""The engine seam: an engine continues a context. It knows nothing of threads, formats or text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass
from typing import Protocol, Self

from plait.errors import RequestError
from plait.types import Chunk, Context, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine was opened; `active`, `queued` and `cached_tokens` are now."""

    active: int = 0
    """Calls that sample now."""
    queued: int = 0
    """Calls that wait for room."""
    cached_tokens: int = 0
    """Tokens whose keys and values are held, live or for reuse."""
    prefill_tokens: int = 0
    """Tokens computed because they were given, not sampled: what a join or a lost cache costs."""
    reused_tokens: int = 0
    """Given tokens that were found in the cache."""
    decode_tokens: int = 0
    """Tokens sampled."""
    steps: int = 0
    """Forward passes."""
    preemptions: int = 0
    """Times that a call made way for older ones, to be computed again and go on where it was."""
    evictions: int = 0
    """Cached contexts, or parts of them, given up for room."""
    drafted_tokens: int = 0
    """Tokens guessed by speculative decoding."""
    accepted_tokens: int = 0
    """Those of them that the model would have sampled."""
    compute_s: float = 0.0
    """Seconds inside forward passes; 0 where that cannot be seen."""
    work_s: float = 0.0
    """Seconds of all work on calls, forward passes included: what is more is finding, sharing, sampling."""


class Engine(Protocol):
    """Continues a context of token ids.

    The contract is checked by `plait.testing.check_engine`. In short: greedy is repeatable and seeds are honoured;
    a stop or eos id ends the output, is included, and is named in the last chunk; a banned id is never sampled, and a
    call that bans all of them is refused; `max_tokens` gives exactly so many and `StopReason.LENGTH`; closing the
    generator frees what it held; a context that does not fit raises `ContextLengthError` before sampling; a context
    with a `Merge` raises `UnsupportedJoin` unless `supports_merge`.
    Used as an async context manager; entering starts it, leaving frees everything. Inherit from it where entering has
    nothing to do.
    """

    name: str
    max_context: int
    """Positions one call may use, prompt and completion."""
    supports_merge: bool

    def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]: ...
    def stats(self) -> EngineStats: ...
    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def check_params(params: SamplingParams, ids: Collection[int] | None) -> None:
    """Hold a call to C4, before it samples.

    Args:
        ids: All that the engine can sample, each once; None where nobody knows.

    Raises:
        RequestError: They are all banned, or the parameters are none.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"the parameters are {params!r:.60}; they must be SamplingParams")
    if ids is not None and len(params.banned_ids) >= len(ids) and set(ids) <= set(params.banned_ids):
        raise RequestError(f"all {len(ids)} ids that can be sampled are banned; leave one")


def no_context(given: object) -> RequestError:
    """What to say of a context that could not be read."""
    return RequestError(
        f"the context is {given!r:.60}; it must be a tuple of runs of token ids, and merges: ((1, 2, 3),) for one run"
    )
