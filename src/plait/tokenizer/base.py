"""Text to token ids and back. Knows nothing of engines and formats.

`encode` never turns a user's text into control ids: only `special=True`, used for what formats and gold
traces write, does. So a prompt that contains `<Parallel>` is text and forks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What formats and tasks need of a tokenizer."""

    eos_ids: tuple[int, ...]
    bos_ids: tuple[int, ...]

    def encode(self, text: str, *, special: bool = False) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def control_id(self, text: str) -> int | None:
        """The id of a control token by its text, None where the vocabulary has none."""
        ...


class Vocabulary(Tokenizer, Protocol):
    """A tokenizer that can say what it consists of."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Text of every id, in order."""
        ...

    @property
    def control(self) -> frozenset[str]:
        """Texts of the control tokens."""
        ...
