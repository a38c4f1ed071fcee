"""A tokenizer that is a list of texts. Standard library only; knows nothing of models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from plait.errors import RequestError


class FixedTokenizer:
    """Longest match over a fixed list of strings: the tokenizer of the models that Plait trains itself.

    Args:
        tokens: Text of every id, in order; texts are distinct.
        control: Which of them are control tokens; only `encode(special=True)` produces those.
        bos, eos: Texts of the tokens that open a prompt and end a response.
    """

    def __init__(self, tokens: Sequence[str], *, control: Sequence[str], bos: str, eos: str) -> None:
        self.tokens = tuple(tokens)
        self.control = frozenset(control)
        self._texts = _Texts(enumerate(self.tokens))
        self._ids = {text: i for i, text in enumerate(self.tokens)}
        assert len(self._ids) == len(self.tokens), "two tokens have the same text"
        self._any = _pattern(self.tokens)
        self._plain = _pattern(t for t in self.tokens if t not in self.control)
        self.bos_ids = (self._ids[bos],)
        self.eos_ids = (self._ids[eos],)

    @classmethod
    def from_dict(cls, about: Mapping[str, Any]) -> FixedTokenizer:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, AssertionError: It is something else.
        """
        return cls(about["tokens"], control=about["control"], bos=about["bos"], eos=about["eos"])

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary as plain values: what weights and logs hold of it."""
        return {
            "tokens": list(self.tokens),
            "control": sorted(self.control),
            "bos": self.tokens[self.bos_ids[0]],
            "eos": self.tokens[self.eos_ids[0]],
        }

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text.

        Raises:
            RequestError: A character is not in the vocabulary.
        """
        pieces = (self._any if special else self._plain).findall(text)
        if sum(map(len, pieces)) != len(text):
            at = self._first_unknown(text, special)
            raise RequestError(f"this model's vocabulary has no {text[at]!r} (character {at + 1} of {text[:60]!r})")
        ids = self._ids
        return [ids[piece] for piece in pieces]

    def _first_unknown(self, text: str, special: bool) -> int:
        at = 0
        while match := (self._any if special else self._plain).match(text, at):
            at = match.end()
        return at

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(self._texts.__getitem__, ids))

    def control_id(self, text: str) -> int | None:
        return self._ids[text] if text in self.control else None


class _Texts(dict[int, str]):
    """Text by id; an id that is none reads as such."""

    def __missing__(self, id: int) -> str:
        return f"<{id}?>"


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)))
