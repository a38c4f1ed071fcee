"""A finished text in two: the reasoning, and the answer after its mark, which ends where a stop string says.

Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

from plait.server.transcript import ANSWER, ROOT, Cut, Piece


def stops_of(stop: str | list[str] | None) -> list[str]:
    """Stop strings of a request; empty ones stop nothing."""
    return [text for text in ([stop] if isinstance(stop, str) else stop or []) if text]


class Answer:
    """Splits pieces of a run. What any thread but the root writes is reasoning.

    Args:
        stops: Strings that end the answer; they are not part of it.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._mark, self._stop = Cut([ANSWER]), Cut(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: nothing that follows counts."""
        return self._stop.found is not None

    def put(self, piece: Piece) -> tuple[str, str]:
        """What a piece adds to the reasoning and to the answer."""
        if piece.thread != ROOT:
            return piece.text, ""
        reasoning, answer = self._mark.put(piece.text)
        if piece.kind == "close" and self._mark.found is None:
            return reasoning + self._mark.rest(), ""
        if self.stopped:
            return reasoning, ""
        answer, _ = self._stop.put(answer)
        if piece.kind == "close":
            answer += self._stop.rest()
        return reasoning, answer
