"""The vocabulary inside a GGUF file as a tokenizer, read by llama.cpp itself: every kind that it knows, and as it does.

The weights are not read. Knows nothing of the engine, which speaks token ids.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from plait.engines.llamacpp.binding import Vocabulary
from plait.tokenizer.text import TextTokenizer

_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class GgufTokenizer(TextTokenizer):
    """The tokenizer of a model.

    Args:
        path: The GGUF file.

    Raises:
        ModelError: It is missing or damaged, has no vocabulary, or nothing says which token ends a text.
        EngineUnavailable: llama.cpp is not installed in the version this was written for.
    """

    def __init__(self, path: str | Path) -> None:
        self._vocabulary = vocabulary = Vocabulary(path)
        weakref.finalize(self, vocabulary.close)
        ids = range(len(vocabulary))
        self._piece = lru_cache(None)(vocabulary.piece)
        users = {self.decode((id,)): id for id in ids if vocabulary.is_users(id)}
        added = users | {self.decode((id,)): id for id in ids if vocabulary.is_control(id)}
        named = {name: vocabulary.meta(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in _NAMED.items()}
        super().__init__(
            control={text: id for text, id in added.items() if text.strip()},
            tokens=[vocabulary.text(id) for id in ids],
            bos_ids=vocabulary.opening(),
            eos_ids=vocabulary.ends(),
            named={name: vocabulary.text(int(id)) for name, id in named.items() if id},
            template=vocabulary.meta("tokenizer.chat_template"),
            name=str(path),
        )
        self._controls_in = _any_of(self.control)
        self._users_in = _any_of(self.control & users.keys())

    def decode(self, ids: Sequence[int]) -> str:
        size = len(self._vocabulary)
        return b"".join(self._piece(id) for id in ids if 0 <= id < size).decode("utf-8", "replace")

    def _pieces(self, text: str, *, special: bool = False) -> list[int | str]:
        pieces: list[int | str] = []
        at = 0
        for found in self._controls_in.finditer(text) if special else ():
            pieces += [text[at : found.start()], self._control[found.group()]]
            at = found.end()
        return [piece for piece in (*pieces, text[at:]) if piece != ""]

    def _write(self, text: str, *, opens: bool, first: bool) -> list[int]:
        if opens and self._vocabulary.space_prefix:
            text = f" {text}"
        # llama.cpp reads the tokens that users added wherever their text stands; what is text here is cut in two.
        cuts = [found.start() + 1 for found in self._users_in.finditer(text)]
        stretches = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [id for stretch in stretches for id in self._vocabulary.tokenize(stretch)]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of these texts, the longest first, as llama.cpp does."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
