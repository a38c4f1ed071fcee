"""Trajectories as plain text: a scanner over tags that knows where it is, and a vocabulary that can say anything.

Knows no format. Strict reading is: read what is there, write it again, and compare; so a format has one spelling, and
whatever differs from it is found with its line and column.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from plait.errors import FormatError, RequestError


def fail(text: str, at: int, message: str) -> FormatError:
    """An error at a place in a text; lines and columns count from 1."""
    line = text.count("\n", 0, at) + 1
    column = at - (text.rfind("\n", 0, at) + 1) + 1
    return FormatError(f"line {line}, column {column}: {message}")


def compare(text: str, expected: str) -> None:
    """Hold a text to its one spelling.

    Raises:
        FormatError: They differ; it says where first.
    """
    if text == expected:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), min(len(text), len(expected))
    )
    raise fail(text, at, f"expected {_glimpse(expected, at)}, found {_glimpse(text, at)}")


def _glimpse(text: str, at: int) -> str:
    return repr(text[at : at + 16]) if at < len(text) else "the end"


class Scanner:
    """Reads a text tag by tag.

    Args:
        text: What to read.
        tags: The tags that count, with their brackets; everything else in brackets is text.
    """

    def __init__(self, text: str, tags: Sequence[str]) -> None:
        self.text, self.at = text, 0
        self._tag = re.compile("|".join(re.escape(tag) for tag in sorted(tags, key=len, reverse=True)))

    @property
    def tag(self) -> str:
        """The tag that is next; empty where text or the end is."""
        match = self._tag.match(self.text, self.at)
        return match[0] if match else ""

    def plain(self) -> str:
        """Read up to the next tag."""
        match = self._tag.search(self.text, self.at)
        end = match.start() if match else len(self.text)
        text, self.at = self.text[self.at : end], end
        return text

    def take(self, tag: str) -> None:
        """Read this tag.

        Raises:
            FormatError: Something else is there.
        """
        if self.tag != tag:
            raise self.fail(f"expected {tag}, found {self.tag or _glimpse(self.text, self.at)}")
        self.at += len(tag)

    def blank(self) -> None:
        """Read blanks up to the next tag.

        Raises:
            FormatError: Text is there.
        """
        start = self.at
        text = self.plain()
        if text.strip():
            raise fail(self.text, start + len(text) - len(text.lstrip()), f"text where only tags are: {text.strip()!r}")

    def fail(self, message: str) -> FormatError:
        return fail(self.text, self.at, message)


class CharTokenizer:
    """A character an id, beside control tokens: any text can be said, so formats can be used without a model.

    Args:
        control: Texts of the control tokens.
    """

    bos_ids: tuple[int, ...] = (0,)
    eos_ids: tuple[int, ...] = (1,)

    def __init__(self, control: Sequence[str]) -> None:
        self.control = ("<bos>", "<eos>", *control)
        self._ids = {tag: i for i, tag in enumerate(self.control)}
        longest_first = sorted(self.control, key=len, reverse=True)
        self._pieces = re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; its tags are control tokens only where `special`."""
        first = len(self.control)
        if not special:
            return [first + ord(char) for char in text]
        return [self._ids[p] if p in self._ids else first + ord(p) for p in self._pieces.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        first = len(self.control)
        return "".join(self.control[id] if id < first else chr(id - first) for id in ids)

    def control_id(self, text: str) -> int | None:
        return self._ids.get(text)


def refuse(format: str, what: str) -> RequestError:
    """An error for what a format has no form for."""
    return RequestError(f"the {format} format has no form for {what}")
