"""A tokenizer of the tokenizers package taken apart: what it puts before a text, and the same tokenizer without that.

A tokenizer is described by the JSON of its `tokenizer.json`. What is made here shares the vocabulary of the one that is
described, and has none of the tokens that were added to it. Knows nothing of prompts and models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ANY_TEXT: dict[str, Any] = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
"""A vocabulary for which any text is one unknown token."""
_READS = ("normalizer", "pre_tokenizer", "decoder")


def plain(model: Any, described: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer without added tokens.

    Args:
        model: Its vocabulary, `Tokenizer.model`.
    """
    from tokenizers import Tokenizer

    parts, made = _around(described), Tokenizer(model)
    made.normalizer, made.pre_tokenizer, made.decoder = parts.normalizer, parts.pre_tokenizer, parts.decoder
    return made


def continuing(model: Any, described: Mapping[str, Any]) -> Tokenizer:
    """The same, for texts that follow others: it puts nothing before one and takes nothing off its beginning."""
    return plain(model, {**described, **{kind: _continuing(described[kind]) for kind in _READS}})


def marks(described: Mapping[str, Any]) -> Tokenizer:
    """Finds the added tokens in a text, as the tokenizer itself does, and reads nothing else. Its ids are its own."""
    from tokenizers import AddedToken

    made = _around({**described, "pre_tokenizer": None, "post_processor": None, "decoder": None})
    tokens = [{key: value for key, value in token.items() if key != "id"} for token in described["added_tokens"]]
    made.add_tokens([AddedToken(**token) for token in tokens])
    return made


def opening_ids(described: Mapping[str, Any]) -> tuple[int, ...]:
    """What the tokenizer puts before a text when it is asked for special tokens."""
    opened = _around(described).encode("a", add_special_tokens=True)
    text = next((i for i, put in enumerate(opened.special_tokens_mask) if not put), 0)
    return tuple(opened.ids[:text])


def spaces_every_stretch(described: Mapping[str, Any]) -> bool:
    """Whether it puts a space before each stretch of text between added tokens, not at most before the first."""
    return any(
        part["type"] == "Prepend"
        or (part["type"] == "ByteLevel" and part["add_prefix_space"])
        or (part["type"] == "Metaspace" and part["prepend_scheme"] == "always")
        for kind in ("normalizer", "pre_tokenizer")
        for part in _leaves(described[kind])
    )


def _around(described: Mapping[str, Any]) -> Tokenizer:
    """The parts of a tokenizer around no vocabulary."""
    from tokenizers import Tokenizer

    bare = {**described, "model": _ANY_TEXT, "added_tokens": [], "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(bare))


def _leaves(part: Any) -> Iterator[Mapping[str, Any]]:
    """The parts that stand alone, out of the sequences they come in."""
    match part:
        case {"type": "Sequence", **rest}:
            for within in rest.values():
                for each in within:
                    yield from _leaves(each)
        case {"type": _}:
            yield part
        case _:
            return


def _continuing(part: Any) -> Any:
    match part:
        case {"type": "Sequence"}:
            within = {key: list(filter(None, map(_continuing, v))) for key, v in part.items() if isinstance(v, list)}
            return {**part, **within}
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return {**part, "prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return {**part, "add_prefix_space": False}
        case {"type": "Strip", "content": " "}:
            return {**part, "start": 0}
        case _:
            return part
