"""How likely a given sequence is to a model: the log-probability of every token after those before it.

An engine needs nothing of its own for it. The whole sequence is computed once, by a call that continues it; then every
prefix is continued by one token, and where the likeliest token is not the one that follows, once more with all others
banned. A cached prefix costs such a call one row, and calls that run at once share a step. It knows nothing of text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import anyio

from plait.engines.base import Engine
from plait.errors import EngineError, Failures, RequestError
from plait.types import SamplingParams

_AT_ONCE = 16
_SURE = 0.999
"""A probability that only the likeliest token can have, however two calls round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One position of a sequence."""

    logprob: float | None
    """Of the token that follows, natural log; None where the sequence has ended."""
    top_id: int
    """The likeliest token here."""
    top_logprob: float


async def score(engine: Engine, token_ids: Sequence[int], *, vocab_size: int) -> list[Scored]:
    """Score a sequence after each of its tokens.

    Args:
        engine: Open. Its log-probabilities must be those of the model, before bans.
        token_ids: At least one; the first is only a condition.
        vocab_size: Ids that the model has.

    Returns:
        A value for each token: what follows it.

    Raises:
        RequestError: The sequence is empty, or the engine's log-probabilities are those after bans.
        ContextLengthError: It does not fit into the engine's context, with one more token.
        EngineError: A call failed.
    """
    ids = tuple(token_ids)
    if not ids:
        raise RequestError("a sequence to be scored holds at least one token id")
    scored: dict[int, Scored] = {}
    limit, failures = anyio.Semaphore(_AT_ONCE), Failures()

    async def after(count: int) -> None:
        with failures.noting():
            async with limit:
                scored[count] = await _after(engine, ids, count, vocab_size)

    await after(len(ids))
    with failures.unwrapped():
        async with anyio.create_task_group() as calls:
            for count in range(1, len(ids)):
                calls.start_soon(after, count)
    return [scored[count] for count in sorted(scored)]


async def _after(engine: Engine, ids: tuple[int, ...], count: int, vocab_size: int) -> Scored:
    """What follows the first `count` ids."""
    top_id, top = await _next(engine, ids[:count])
    if count == len(ids):
        return Scored(logprob=None, top_id=top_id, top_logprob=top)
    if ids[count] == top_id:
        return Scored(logprob=top, top_id=top_id, top_logprob=top)
    others = tuple(id for id in range(vocab_size) if id != ids[count])
    given, logprob = await _next(engine, ids[:count], others)
    # The only token that was left has all of the probability where bans come first.
    if given != ids[count] or math.exp(logprob) > _SURE:
        raise RequestError(
            f"the {engine.name} engine cannot score a given text: its log-probabilities are those after bans. The"
            " llamacpp and torch engines can"
        )
    # Two batches may round differently; the likeliest token stays it.
    return Scored(logprob=min(logprob, top), top_id=top_id, top_logprob=top)


async def _next(engine: Engine, ids: tuple[int, ...], banned_ids: tuple[int, ...] = ()) -> tuple[int, float]:
    async with aclosing(engine.generate((ids,), SamplingParams(max_tokens=1, banned_ids=banned_ids))) as chunks:
        async for chunk in chunks:
            if chunk.token_ids:
                return chunk.token_ids[0], chunk.logprobs[0]
    raise EngineError(f"the {engine.name} engine ended a call without a token")
