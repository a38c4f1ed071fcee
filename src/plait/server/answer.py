"""A finished text in two: the reasoning, and the answer, which ends where a stop string says.

How the two are told apart belongs to the model: those that Plait trains write a mark, others may think before they
answer. What any thread but the root writes is reasoning. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

from plait.formats.base import TrajectoryFormat
from plait.models import Model
from plait.server.transcript import ANSWER, ROOT, Cut, Piece

THINK, UNTHINK = "<think>", "</think>"
"""Around what models that think write before they answer."""
_TAIL = 32
"""Ids at the end of a prompt in which a template may open a thought."""


def stops_of(stop: str | list[str] | None) -> list[str]:
    """Stop strings of a request; empty ones stop nothing."""
    return [text for text in ([stop] if isinstance(stop, str) else stop or []) if text]


def answer_of(model: Model, format: TrajectoryFormat, prompt_ids: Sequence[int], stops: Sequence[str] = ()) -> Answer:
    """What splits a run of this model on this prompt."""
    if not model.plain:
        return Answer(stops)
    decode = model.tokenizer.decode
    opens = {decode((id,)) for id in format.fork_ids}
    thinks = decode(prompt_ids[-_TAIL:]).rstrip().endswith(THINK)
    return PlainAnswer(stops, thinks=thinks, tags=format.tags(), opens=opens)


class Answer:
    """Splits pieces of a run of a model that Plait trained: the answer follows its mark.

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
        reasoning, answer = self._split(piece)
        if self.stopped:
            return reasoning, ""
        answer, _ = self._stop.put(answer)
        if piece.kind == "close":
            answer += self._stop.rest()
        return reasoning, answer

    def _split(self, piece: Piece) -> tuple[str, str]:
        reasoning, answer = self._mark.put(piece.text)
        if piece.kind == "close" and self._mark.found is None:
            reasoning += self._mark.rest()
        return reasoning, answer


class PlainAnswer(Answer):
    """Splits pieces of a run of any other model: all that the root writes is the answer, but for a thought that it
    begins with, and blocks of threads. Marks of thoughts are no part of either, tags of a format none of the answer.

    Args:
        stops: As of every one.
        thinks: Whether the prompt ends in an opened thought.
        tags: Of the format.
        opens: Those of them that begin a block.
    """

    def __init__(
        self, stops: Sequence[str] = (), *, thinks: bool, tags: Sequence[str] = (), opens: set[str] | None = None
    ) -> None:
        super().__init__(stops)
        self._tags = [tag for tag in tags if tag not in (THINK, UNTHINK)]
        self._ends = {tag: f"</{tag[1:]}" for tag in opens or () if tag[:1] == "<" and tag[:2] != "</"}
        self._closed = False
        self._enter("thought" if thinks else "start")

    def _enter(self, where: str, marks: Sequence[str] | None = None) -> None:
        """Go on at a place of the text: its start, the thought, the answer, a block of threads."""
        self._where, self._held = where, ""
        usual = {"thought": [UNTHINK], "answer": self._tags}
        self._next = Cut(usual.get(where, ()) if marks is None else marks)

    def _split(self, piece: Piece) -> tuple[str, str]:
        reasoning, answer = "", ""
        text, ends = piece.text, piece.kind == "close"
        if piece.kind == "join" and self._where == "block" and not self._closed:
            # Nothing closes such a block: it is over when its threads are.
            self._enter("answer")
        if self._where == "start":
            text = self._held + text
            said = text.lstrip()
            if not ends and THINK.startswith(said):
                self._held = text
                return "", ""
            if said.startswith(THINK):
                reasoning, text = text[: len(text) - len(said)], said.removeprefix(THINK)
                self._enter("thought")
            else:
                self._enter("answer")
        while True:
            where = self._where
            before, text = self._next.put(text)
            if self._next.found is None and ends:
                before += self._next.rest()
            if where == "answer":
                answer += before
            else:
                reasoning += before
            mark = self._next.found
            if mark is None:
                return reasoning, answer
            if where == "answer" and mark in self._ends:
                reasoning += mark
                closers = [tag for tag in self._tags if tag == self._ends[mark]]
                self._closed = bool(closers)
                self._enter("block", closers)
            else:
                reasoning += mark if where == "block" else ""
                self._enter("answer")
