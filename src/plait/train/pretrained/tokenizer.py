"""A tokenizer of transformers as Plait's own, and the control tokens of a format in its vocabulary.

Takes an object, so it imports nothing: anything with the methods of a fast tokenizer will do. A text never becomes
control ids unless it is written as `special`; the one exception is a chat template, whose own markers are its business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from plait.errors import RequestError


class PretrainedTokenizer:
    """A fast tokenizer of transformers.

    Args:
        tokenizer: `AutoTokenizer.from_pretrained(...)`, or what a trainer hands out.
        control: Texts that are control tokens: a format's tags. By default all that its vocabulary holds as such.

    Raises:
        RequestError: It has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, *, control: Iterable[str] | None = None) -> None:
        self.inner = tokenizer
        if tokenizer.eos_token_id is None:
            raise RequestError("the tokenizer has no end-of-sequence token; set its eos_token")
        self.eos_ids: tuple[int, ...] = (int(tokenizer.eos_token_id),)
        bos = tokenizer.bos_token_id
        self.bos_ids: tuple[int, ...] = () if bos is None else (int(bos),)
        added = {str(token): int(id) for id, token in tokenizer.added_tokens_decoder.items()}
        self._control = added if control is None else {text: added[text] for text in control if text in added}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, without a beginning-of-sequence token."""
        if special:
            return self.inner.encode(text, add_special_tokens=False)
        # Tokens that were added are found in any text, whatever the tokenizer is asked; so it never sees them whole.
        ids: list[int] = []
        for piece in _cut(text, self.inner.added_tokens_decoder.values()):
            ids += self.inner.encode(piece, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def control_id(self, text: str) -> int | None:
        return self._control.get(text)

    def words(self, ids: Iterable[int]) -> dict[str, Any]:
        """The vocabulary as a list of distinct texts, for logs; ids other than these are called by their numbers."""
        needed = {*ids, *self.bos_ids, *self.eos_ids}
        texts = [f"<{id}>" for id in range(max(needed) + 1)]
        taken = {""}
        for id in sorted(needed):
            text = self.decode([id])
            if text not in taken:
                texts[id] = text
                taken.add(text)
        end = texts[self.eos_ids[0]]
        opening = texts[self.bos_ids[0]] if self.bos_ids else end
        return {"tokens": texts, "control": sorted(self._control.keys() & taken), "bos": opening, "eos": end}

    def chat_ids(self, messages: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """A prompt as ids: messages by the chat template, which a string is put in too where there is one.

        Raises:
            RequestError: There are messages and no template.
        """
        if not self.inner.chat_template:
            if not isinstance(messages, str):
                raise RequestError("the prompt is a list of messages, and this tokenizer has no chat template")
            return (*self.bos_ids, *self.encode(messages))
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(map(dict, messages))
        # What a user wrote must not become control ids: markers in it are cut in two, which only tokens can tell.
        mark = "\u2060"
        texts = {str(t) for t in self.inner.added_tokens_decoder.values()}
        for message in given:
            if any(t in message["content"] for t in texts):
                return self._templated(given, mark)
        return tuple(self._rendered(given))

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        text = self.inner.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.encode(text, special=True)

    def _templated(self, messages: Sequence[Mapping[str, str]], mark: str) -> tuple[int, ...]:
        """The template around placeholders, and what people wrote put in as text."""
        slots = [f"{mark}{i}{mark}" for i in range(len(messages))]
        shell = [{**m, "content": slot} for m, slot in zip(messages, slots, strict=True)]
        rest = self.inner.apply_chat_template(shell, tokenize=False, add_generation_prompt=True)
        ids: list[int] = []
        for slot, message in zip(slots, messages, strict=True):
            before, found, rest = rest.partition(slot)
            if not found:
                raise RequestError(f"the chat template leaves out or repeats the {message['role']} message")
            ids += self.encode(before, special=True) + self.encode(message["content"])
        return (*ids, *self.encode(rest, special=True))


def _cut(text: str, tokens: Iterable[Any]) -> list[str]:
    """The text in pieces none of which holds one of these tokens."""
    texts = [str(token) for token in tokens]
    pieces, at = [""], 0
    while at < len(text):
        found = next((t for t in texts if text.startswith(t, at)), "")
        if found and len(found) > 1:
            # Cut after its first character: neither half is the token.
            pieces[-1] += text[at]
            pieces.append("")
        else:
            pieces[-1] += text[at]
        at += 1
    return [piece for piece in pieces if piece]
