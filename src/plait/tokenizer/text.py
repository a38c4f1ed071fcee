"""A tokenizer of a language model, of whatever make: it writes any text, and prompts by its chat template.

A text is written as what follows another text: nothing is put before it, and nothing of it is lost when it is read
back, so texts can be put together and read piece by piece. A prompt alone begins as the tokenizer begins a text, which
in vocabularies like Llama's is with a space. Knows nothing of weights and formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from plait.errors import ModelError, RequestError


class TextTokenizer:
    """Base of the tokenizers that come with models.

    Its control tokens are all the tokens that were added to the vocabulary, but for runs of white space. What a person
    writes never becomes one of them.

    Args:
        control: Ids of the control tokens by their texts.
        tokens: Every id as the vocabulary spells it.
        bos_ids: What the tokenizer itself puts before a text.
        eos_ids: Any of them ends a text; the first is the one that is written.
        named: Texts of tokens by the names that chat templates use.
        template: Jinja; None: prompts are the plain text.
        name: For errors.

    Raises:
        ModelError: Nothing says which token ends a text.
    """

    def __init__(
        self,
        *,
        control: Mapping[str, int],
        tokens: Sequence[str],
        bos_ids: Iterable[int],
        eos_ids: Iterable[int],
        named: Mapping[str, str],
        template: str | None,
        name: str,
    ) -> None:
        self._control, self._control_ids = dict(control), frozenset(control.values())
        self._name, self._named, self._template = name, dict(named), template
        self.control = frozenset(control)
        """Texts of the control tokens."""
        self.tokens = tuple(tokens)
        """Every id as the vocabulary spells it."""
        self.bos_ids, self.eos_ids = tuple(bos_ids), tuple(eos_ids)
        if not self.eos_ids:
            raise ModelError(f"{name} does not say which token ends a text (eos_token, or eos_token_id in its config)")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, with nothing put around it.

        Args:
            special: Whether control tokens in it are meant as such.

        Raises:
            RequestError: The vocabulary has no other way to write it than with a control token.
        """
        return self._ids(self._pieces(text, special=special))

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids spell; ids outside of the vocabulary spell nothing."""
        raise NotImplementedError

    def control_id(self, text: str) -> int | None:
        return self._control.get(text)

    @property
    def template(self) -> str | None:
        """How a prompt is written, in Jinja; None: as plain text."""
        return self._template

    def text_ids(self, text: str) -> tuple[int, ...]:
        """A prompt that is a text to go on with, as it stands: opened as the tokenizer opens one, without a template.

        Raises:
            RequestError: The vocabulary cannot write it.
        """
        return (*self.bos_ids, *self._ids(self._pieces(text), opens=True))

    def is_control(self, id: int) -> bool:
        return id in self._control_ids

    def about(self, tags: Iterable[str] = ()) -> dict[str, Any]:
        """What a log says of it: ids of control tokens by their texts, what opens a prompt, what ends a text.

        Args:
            tags: Control tokens of a format. Others that are said are those of the chat template, and the ends; some
                vocabularies have thousands that nobody writes.
        """
        needed, ends = set(tags), {*self.bos_ids, *self.eos_ids}
        control = {
            text: id
            for text, id in sorted(self._control.items(), key=lambda item: item[1])
            if text in needed or id in ends or text in (self._template or "")
        }
        return {"control": control, "bos": list(self.bos_ids), "eos": list(self.eos_ids)}

    def prompt_ids(self, messages: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """A prompt: messages by the chat template, into which a text is put as one of a user. Without a template the
        text as it stands.

        Where nobody wrote control tokens the ids are those of transformers. Where somebody did, the template is filled
        in around places for what people wrote, and that goes in as it is.

        Raises:
            RequestError: There are messages and no template, or the vocabulary cannot write them.
            ModelError: The template cannot be filled in.
        """
        if self._template is None:
            if not isinstance(messages, str):
                raise RequestError("the prompt is a list of messages, and this tokenizer has no chat template")
            return self.text_ids(messages)
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(map(dict, messages))
        if not given:
            raise RequestError("the prompt is a list of no messages")
        slots = [f"\u2060{i}\u2060" for i in range(len(given))]
        shell = self._rendered([{**m, "content": slot} for m, slot in zip(given, slots, strict=True)])
        if shell.count(slots[-1]) != 1:
            raise ModelError(f"the chat template of {self._name} leaves the question out, or says it twice")
        whole = self._pieces(self._rendered(given), special=True)
        # The control tokens must be the template's own. An assistant's may have been there for the template to remove.
        said = [self._pieces(m["content"], special=True) for m in given if m["role"] != "assistant"]
        if any(map(self._controls, said)) or self._controls(whole) != self._controls(self._pieces(shell, special=True)):
            whole = self._filled(shell, given, slots)
        return tuple(self._ids(whole, opens=True))

    def _filled(self, shell: str, given: Sequence[Mapping[str, str]], slots: Sequence[str]) -> list[int | str]:
        """The template with what people wrote in its places, as text."""
        pieces: list[int | str] = []
        for slot, message in zip(slots, given, strict=True):
            before, found, shell = shell.partition(slot)
            if not found or slot in shell:
                raise ModelError(
                    f"the chat template of {self._name} leaves out, moves or repeats the {message['role']} message"
                )
            pieces += self._pieces(before, special=True) + self._pieces(message["content"])
        return _joined([*pieces, *self._pieces(shell, special=True)])

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        from plait.tokenizer.chat import render  # brings in jinja2, which most runs do without

        try:
            return render(self._template or "", messages, self._named)
        except Exception as exc:  # a template is a program, and may fail in any way
            raise ModelError(f"the chat template of {self._name} cannot be filled in: {exc}") from exc

    def _pieces(self, text: str, *, special: bool = False) -> list[int | str]:
        """The added tokens of a text that are meant as such, and what is between them."""
        raise NotImplementedError

    def _write(self, text: str, *, opens: bool, first: bool) -> list[int]:
        """Ids of a text without added tokens.

        Args:
            opens: Whether it belongs to a prompt, which begins as the tokenizer begins a text.
            first: Whether nothing is before it.
        """
        raise NotImplementedError

    def _controls(self, pieces: Iterable[int | str]) -> list[int | str]:
        return [piece for piece in pieces if piece in self._control_ids]

    def _ids(self, pieces: Iterable[int | str], *, opens: bool = False) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            written = self._write(piece, opens=opens, first=not number)
            if wrong := self._control_ids.intersection(written):
                name = self.tokens[min(wrong)]
                raise RequestError(f"the text {piece[:60]!r} cannot be written without the control token {name!r}")
            ids += written
        return ids


def _joined(pieces: Iterable[int | str]) -> list[int | str]:
    """The same with stretches of text in one piece each: words may go over from the template to what people wrote."""
    joined: list[int | str] = []
    for piece in pieces:
        if joined and isinstance(piece, str) and isinstance(last := joined[-1], str):
            joined[-1] = last + piece
        else:
            joined.append(piece)
    return joined
