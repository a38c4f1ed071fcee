"""Texts beside the ids of a run: what makes a log readable without the model, where its vocabulary is too large for it.

A model of Plait's own has a small vocabulary, and a log's meta holds it. Of any other the events say what their ids
spell where they stand: a character whose bytes are several tokens is the text of the last of these. Such a log is read
as if it had a vocabulary of its own, so that whoever reads runs knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plait.events import Event, RunStarted, SegmentEnded, SegmentStarted, TokensSampled
from plait.tokenizer import FixedTokenizer, Tokenizer
from plait.tokenizer.text import TextTokenizer

_BROKEN = "\ufffd"
_MAX_HELD = 8
"""Tokens that may wait for the rest of a character; more of them are no character."""
_NOWHERE = -1
"""Stands for text that a log's vocabulary cannot write."""


def describe(tokenizer: Tokenizer, tags: Iterable[str] = ()) -> dict[str, Any]:
    """A tokenizer as plain values, for a log's meta: a whole small vocabulary, or the control tokens of a large one.

    Args:
        tags: The control tokens of the run's format.
    """
    if isinstance(tokenizer, FixedTokenizer):
        return tokenizer.to_dict()
    return tokenizer.about(tags) if isinstance(tokenizer, TextTokenizer) else {}


class Spelling:
    """Puts texts into the events of one run, as they come. Where the log holds the vocabulary, events stay as they are.

    Args:
        tokenizer: The one that the run uses.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer if isinstance(tokenizer, TextTokenizer) else None
        self._segments: dict[str, _Segment] = {}

    def spell(self, event: Event) -> Event:
        """The same event, with texts where it carries ids."""
        if self._tokenizer is None:
            return event
        match event:
            case SegmentStarted():
                segment = self._segments[event.id] = _Segment(self._tokenizer)
                return replace(event, texts=tuple(map(segment.text, event.forced_ids)))
            case TokensSampled():
                return replace(event, texts=tuple(map(self._segments[event.id].text, event.token_ids)))
            case SegmentEnded():
                self._segments.pop(event.id, None)
            case _:
                pass
        return event


class _Segment:
    """What the tokens of a segment add to its text, one after the other."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        """The tokens of the last whole text: some vocabularies spell a token by what is before it."""
        self._held: list[int] = []
        """What came after them: of its last character, bytes are missing."""
        self._said = 0
        """Characters of these that were given."""

    def text(self, id: int) -> str | None:
        """None where all that a token adds is a part of a character that others may finish.

        What it began and nobody finished is a U+FFFD before the text of the token that shows it.
        """
        decode = self._tokenizer.decode
        if self._tokenizer.is_control(id):
            text = f"{_BROKEN if self._held else ''}{decode((id,))}"
            self._before, self._held, self._said = [], [], 0
            return text
        self._held.append(id)
        before, whole = decode(self._before), decode(self._before + self._held)
        new = whole.removeprefix(before) if whole.startswith(before) else decode(self._held)
        ready = new.rstrip(_BROKEN) if len(self._held) < _MAX_HELD else new
        text = ready[self._said :]
        if ready == new:
            self._before, self._held, self._said = ([] if new.endswith(_BROKEN) else self._held), [], 0
            return text
        self._said = max(self._said, len(ready))
        return text or None


def readable(events: Sequence[Event]) -> list[Event]:
    """A run whose events carry texts as one whose meta holds a vocabulary; any other as it is.

    An id that spells the same wherever it stands keeps its number. One that does not, as bytes do, gets a further
    number, below zero, for each other text; the vocabulary says which id that is.
    """
    if not any(isinstance(event, SegmentStarted | TokensSampled) and event.texts for event in events):
        return list(events)
    meta = next((event.meta for event in events if isinstance(event, RunStarted)), {})
    numbers = _Numbers(meta.get("tokenizer"))
    texts = _whole(events, numbers.control)
    out: list[Event] = []
    for at, event in enumerate(events):
        if isinstance(event, SegmentStarted):
            event = replace(event, forced_ids=numbers.of(event.forced_ids, texts[at]), texts=())
        elif isinstance(event, TokensSampled):
            event = replace(event, token_ids=numbers.of(event.token_ids, texts[at]), texts=())
        out.append(event)
    said = {"tokenizer": numbers.vocabulary()}
    return [replace(e, meta={**e.meta, **said}) if isinstance(e, RunStarted) else e for e in out]


def _whole(events: Sequence[Event], control: Mapping[int, str]) -> list[list[str]]:
    """Texts of the ids of every event. Of a character that nobody finished, U+FFFD at its last token."""
    texts: list[list[str]] = []
    last: dict[str, tuple[list[str], int, bool]] = {}
    """By segment its last token: where its text is, and whether others are to finish it."""
    for event in events:
        own: list[str] = []
        texts.append(own)
        segment = getattr(event, "id", "")
        for id, text in _spelled(event):
            if segment in last and id in control and text == _BROKEN + control[id]:
                where, i, _ = last[segment]
                where[i] += _BROKEN
            last[segment] = own, len(own), text is None
            own.append(text or "")
    for where, i, unfinished in last.values():
        if unfinished:
            where[i] += _BROKEN
    return texts


def _spelled(event: Event) -> Iterator[tuple[int, str | None]]:
    match event:
        case SegmentStarted(forced_ids=ids) | TokensSampled(token_ids=ids):
            yield from zip(ids, event.texts or [f"<{id}?>" for id in ids], strict=True)
        case _:
            pass


class _Numbers:
    """Gives every pair of id and text a number.

    Args:
        about: What the log's meta says of the tokenizer.
    """

    control: dict[int, str]

    def __init__(self, about: Any) -> None:
        try:
            self.control = {int(id): str(text) for text, id in about["control"].items()}
            self._bos, self._eos = tuple(map(int, about["bos"])), tuple(map(int, about["eos"]))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            self.control, self._bos, self._eos = {}, (), ()
        self._texts = dict(self.control)
        self._others: dict[tuple[int, str], int] = {}

    def of(self, ids: Sequence[int], texts: Sequence[str]) -> tuple[int, ...]:
        return tuple(map(self._of, ids, texts))

    def _of(self, id: int, text: str) -> int:
        if id in self.control or self._texts.setdefault(id, text) == text:
            return id
        number = self._others.setdefault((id, text), _NOWHERE - 1 - len(self._others))
        self._texts[number] = text
        return number

    def vocabulary(self) -> LogVocabulary:
        """Of the pairs so far."""
        return LogVocabulary(
            texts=self._texts,
            ids={number: id for (id, _), number in self._others.items()},
            control={text: id for id, text in self.control.items()},
            bos_ids=self._bos,
            eos_ids=self._eos,
        )


@dataclass(slots=True, kw_only=True)
class LogVocabulary:
    """What a log spells, as a tokenizer: reads all that the run holds, and writes nothing but control tokens."""

    texts: Mapping[int, str]
    """By number."""
    ids: Mapping[int, int]
    """Numbers that are not ids, and what id each is."""
    control: Mapping[str, int]
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """A control token, where the text is one and that is meant; any other text is no token of the run's."""
        id = self.control.get(text) if special else None
        return [_NOWHERE if id is None else id] if text else []

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.texts.get(id, "") for id in ids)

    def control_id(self, text: str) -> int | None:
        return self.control.get(text)
