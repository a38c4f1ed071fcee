"""The seam between the HTTP engine and a kind of server: how a call is spelled, and how an answer is read.

A dialect is a pure function in both directions: it sends nothing and remembers nothing of a call. It knows nothing of
pools, retries and placement, which are the same for every server.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from plait.errors import EngineProtocolError
from plait.types import SamplingParams

Json: TypeAlias = dict[str, Any]
Finish: TypeAlias = Literal["stop", "length", "abort"]

MOST_IDS = 2**31
"""Ids are below it everywhere: servers and in-process engines keep them as signed integers of 32 bits."""
_MOST_LOGPROB = 1e-3
"""Rounding on a server may leave a probability a hair above one; more is no rounding."""
_LEAST_LOGPROB = -sys.float_info.max


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to a server: plain ids to go on from."""

    model: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    key: str
    """Calls with the same key want the same replica: their prefixes are there."""
    cache_salt: str | None = None
    """Calls with another salt do not share cached prefixes."""
    stop_texts: Mapping[int, str]
    """Text of stop ids, for servers that know stops as text only."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Stop ids and eos ids, each once."""
        return tuple(dict.fromkeys((*self.params.stop_ids, *self.params.eos_ids)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one server-sent event adds."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """One for each token; empty where the server gave none."""
    finish: Finish | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Of the prompt, found in the server's prefix cache; None where it does not say."""


class Dialect(Protocol):
    """One kind of server."""

    kind: str
    """Name of the server, as its users call it."""
    shares_blocks: bool
    """Whether a prefix that one call computes is there for others while that call still runs."""
    needs_stop_texts: bool
    running_metric: str
    """Name of the gauge that counts calls in progress, in `/metrics`."""

    def route(self, call: Call) -> str:
        """Path of the POST."""
        ...

    def body(self, call: Call) -> Json: ...
    def ends_itself(self, call: Call) -> bool:
        """Whether the server ends a call at every stop and eos id by itself; else its stream has to be closed."""
        ...

    def read(self, event: Json, num_seen: int) -> Piece:
        """What an event adds to the `num_seen` tokens before it.

        It may fail in any way on an event that has not the documented shape; the engine reports that. An error of
        Plait's is what the server said, and is passed on.
        """
        ...


def piece(token_ids: Any, logprobs: Any, **rest: Any) -> Piece:
    """A piece from untrusted lists.

    A token that was sampled had a probability above zero: its logarithm is a finite number. Servers write one for a
    probability that is too small to tell from zero (vLLM -9999, llama-server the least float).

    Raises:
        EngineProtocolError: They hold other things than token ids and log-probabilities, or not one for each id; or
            the counts among the rest are none.
    """
    ids: tuple[Any, ...] = tuple(token_ids or ())
    # Loops and not generators, for this runs at every token.
    for id in ids:
        if type(id) is not int or not 0 <= id < MOST_IDS:
            raise EngineProtocolError(f"C4: the server gave token ids that are none: {list(ids)[:8]}")
    given: tuple[Any, ...] = tuple(logprobs or ())
    if given and len(given) != len(ids):
        raise EngineProtocolError(f"C6: the server gave {len(given)} log-probabilities for {len(ids)} tokens")
    values: list[float] = []
    for value in given:
        if type(value) not in (int, float) or not _LEAST_LOGPROB <= value <= _MOST_LOGPROB:
            raise EngineProtocolError(
                f"C6: the server gave log-probabilities that are none, finite numbers of 0 at most: {list(given)[:8]}"
            )
        values.append(min(0.0, float(value)))
    for name in ("prompt_tokens", "cached_tokens"):
        count = rest.get(name)
        if count is not None and (type(count) is not int or count < 0):
            raise EngineProtocolError(f"the server counts {count!r:.40} {name}")
    return Piece(token_ids=ids, logprobs=tuple(values), **rest)


def finish_of(reason: Any) -> Finish | None:
    """The reason an OpenAI-like answer gives; anything unknown ends a call like an abort."""
    if reason is None:
        return None
    return reason if reason in ("stop", "length") else "abort"


def signed_seed(seed: int) -> int:
    """63 bits at most: what every server takes as a signed integer."""
    return seed & (2**63 - 1)
