"""Reads the events of one request and holds the server to the engine contract. Knows nothing of how they arrive."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

from plait.engines.http.base import MOST_IDS, Call, Dialect, Json, Piece
from plait.errors import EngineError, EngineProtocolError, PlaitError


class Reader:
    """The answer to one request so far.

    Args:
        call: What was asked.
        dialect: How its server answers.
        vocab_size: Ids are below it; None where nobody knows.
    """

    def __init__(self, call: Call, dialect: Dialect, vocab_size: int | None = None) -> None:
        self._call, self._dialect = call, dialect
        self._vocab_size = vocab_size or MOST_IDS
        self._ends = frozenset(call.end_ids)
        self._banned = frozenset(call.params.banned_ids)
        self._ended = False
        self.num_read = 0
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None

    def pieces(self, events: Iterable[Json]) -> Iterator[Piece]:
        """What events add that came together: one piece up to where the call ends, or what is left is wrong.

        Raises:
            EngineError: See `take`; what came before it comes first.
        """
        together: list[Piece] = []
        failure: EngineError | None = None
        for event in events:
            try:
                piece = self.take(event)
            except EngineError as exc:
                failure = exc
                break
            together.append(piece)
            if piece.finish is not None or (piece.token_ids and self._ended):
                yield _joined(together)
                together = []
        if together:
            yield _joined(together)
        if failure is not None:
            raise failure

    def take(self, event: Json) -> Piece:
        """What an event adds, cut after the first stop id and after `max_tokens`.

        Raises:
            EngineProtocolError: It is not what a server of this kind sends, or a token is not what was asked for.
            EngineError, RequestError: The server gave the call up, or refuses it.
        """
        piece = self._read(event)
        self.num_read += len(piece.token_ids)
        self.prompt_tokens = piece.prompt_tokens if piece.prompt_tokens is not None else self.prompt_tokens
        self.cached_tokens = piece.cached_tokens if piece.cached_tokens is not None else self.cached_tokens
        if piece.finish == "abort":
            raise EngineError("the server aborted the call")
        if not piece.token_ids or self._ended:
            return replace(piece, token_ids=(), logprobs=())
        return self._cut(piece)

    def _read(self, event: Json) -> Piece:
        try:
            return self._dialect.read(event, self.num_read)
        except PlaitError:
            raise
        except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
            raise EngineProtocolError(
                f"an event of {self._dialect.kind} has not the documented shape ({exc!r}): {reprlib.repr(event):.200}"
            ) from exc

    def _cut(self, piece: Piece) -> Piece:
        params = self._call.params
        ids = piece.token_ids
        num = len(ids)
        if not self._ends.isdisjoint(ids):
            num = next(n for n, id in enumerate(ids, 1) if id in self._ends)
        num = min(num, self._call.max_tokens - (self.num_read - len(ids)))
        if max(ids) >= self._vocab_size:
            raise EngineProtocolError(
                f"C4: the server sampled the id {max(ids)}; the vocabulary of {self._call.model} has {self._vocab_size}"
            )
        if not self._banned.isdisjoint(ids[:num]):
            raise EngineProtocolError(f"C4: the server sampled a banned id: {sorted(self._banned & set(ids[:num]))}")
        if params.logprobs and len(piece.logprobs) != len(ids):
            raise EngineProtocolError(f"C6: the server gave {len(piece.logprobs)} log-probabilities for {len(ids)} ids")
        self._ended = num < len(ids) or ids[num - 1] in self._ends or self.num_read == self._call.max_tokens
        if params.logprobs and num == len(ids):
            return piece
        logprobs = piece.logprobs[:num] if params.logprobs else (0.0,) * num
        return replace(piece, token_ids=ids[:num], logprobs=logprobs)


def _joined(pieces: list[Piece]) -> Piece:
    """Pieces in a row, of which at most the last one ends the call."""
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        logprobs=tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
        finish=pieces[-1].finish,
    )
