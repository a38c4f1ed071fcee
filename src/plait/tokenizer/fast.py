"""A tokenizer of Hugging Face as Plait's own, from a folder or from one of transformers in memory: the same ids, texts
and ends either way, so what is trained is what is sampled from. Needs the tokenizers package, not transformers.

A text is written as what follows another text: nothing is put before it, and nothing of it is lost when it is read
back, so texts can be put together and read piece by piece. A prompt alone begins as the tokenizer begins a text, which
in vocabularies like Llama's is with a space. Knows nothing of weights and formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import EngineUnavailable, ModelError, RequestError
from plait.tokenizer import parts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INSTALL = "pip install 'plait[torch]'"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What a chat template may write by name."""


class FastTokenizer:
    """Made by `of_folder` and `of_fast`.

    Its control tokens are all the tokens that were added to the vocabulary, but for runs of white space. What a person
    writes never becomes one of them.

    Args:
        inner: Of the tokenizers package; is read and never changed.
        named: Texts of its tokens by the names that chat templates use.
        eos_ids: What else ends a text, as configs say it: ids, lists of them, None.
        template: Jinja; None: prompts are the plain text.
        name: For errors.

    Raises:
        ModelError: Nothing says which token ends a text.
    """

    def __init__(
        self,
        inner: Tokenizer,
        *,
        named: Mapping[str, str],
        eos_ids: Iterable[Any],
        template: str | None,
        name: str,
    ) -> None:
        described: dict[str, Any] = json.loads(inner.to_str())
        self._name, self._named, self._template = name, dict(named), template
        self._added = {str(t["content"]): int(t["id"]) for t in described["added_tokens"]}
        self._control = {text: id for text, id in self._added.items() if text.replace("\u2581", " ").strip()}
        self._control_ids = frozenset(self._control.values())
        self.control = frozenset(self._control)
        """Texts of the control tokens."""
        self._spelled: dict[int, str] = {id: text for text, id in inner.get_vocab(with_added_tokens=True).items()}
        self.tokens = tuple(self._spelled.get(id, f"<{id}>") for id in range(max(self._spelled, default=-1) + 1))
        """Every id as the vocabulary spells it."""
        self.eos_ids: tuple[int, ...] = tuple(_declared(inner, [named.get("eos_token"), *eos_ids]))
        """Any of them ends a text; the first is the one that is written."""
        if not self.eos_ids:
            raise ModelError(f"{name} does not say which token ends a text (eos_token, or eos_token_id in config.json)")

        self.bos_ids: tuple[int, ...] = parts.opening_ids(described)
        """What the tokenizer itself puts before a text."""
        self._opening = parts.plain(inner.model, described)
        self._spaces_every_stretch = parts.spaces_every_stretch(described)
        self._plain = parts.continuing(inner.model, described)
        self._decoder = self._plain.decoder
        self._marks = parts.marks(described)
        self._added_by_mark = {self._marks.token_to_id(text): text for text in self._added if text}

    @classmethod
    def of_folder(cls, folder: Path) -> FastTokenizer:
        """The tokenizer of a folder as transformers saves it: its `tokenizer.json`, and what its configs add to it.

        Raises:
            ModelError: A file is missing or damaged, or nothing says which token ends a text.
            EngineUnavailable: The package that reads it is not installed.
        """
        file = folder / "tokenizer.json"
        try:
            from tokenizers import Tokenizer
        except ImportError as exc:
            raise EngineUnavailable(f"reading {file} needs tokenizers: {INSTALL}") from exc
        try:
            inner = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as exc:  # the package raises no narrower one
            raise ModelError(f"cannot read {file}: {exc}; a folder must be as transformers saves it") from exc
        settings = read_object(folder / "tokenizer_config.json", needed=False)
        named = {name: text for name in _NAMES if (text := _content(settings.get(name)))}
        # As transformers does: what has such a name is a control token, wherever it stands in the vocabulary.
        added = {token.content for token in inner.get_added_tokens_decoder().values()}
        known = [text for text in named.values() if inner.token_to_id(text) is not None and text not in added]
        inner.add_special_tokens(known)
        return cls(
            inner, named=named, eos_ids=_folder_ends(folder), template=_template(folder, settings), name=str(folder)
        )

    @classmethod
    def of_fast(cls, fast: Any, *, eos_ids: Iterable[Any] | None = None) -> FastTokenizer:
        """A fast tokenizer of transformers, as it is now.

        Args:
            fast: `AutoTokenizer.from_pretrained(...)`, or what a trainer hands out.
            eos_ids: What the model's configs call `eos_token_id`; these end a text too. None asks the folder that it
                was read from, where it was one.

        Raises:
            RequestError: It is not a fast tokenizer.
            ModelError: Nothing says which token ends a text.
        """
        try:
            inner = fast.backend_tokenizer
        except AttributeError as exc:
            raise RequestError(f"{type(fast).__name__} is no fast tokenizer of transformers") from exc
        path = str(getattr(fast, "name_or_path", ""))
        if eos_ids is None:
            eos_ids = _folder_ends(Path(path)) if path and Path(path).is_dir() else ()
        named = {name: str(text) for name in _NAMES if (text := getattr(fast, name, None))}
        template = fast.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return cls(inner, named=named, eos_ids=eos_ids, template=template, name=path or type(fast).__name__)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, with nothing put around it.

        Args:
            special: Whether control tokens in it are meant as such.

        Raises:
            RequestError: The vocabulary has no other way to write it than with a control token.
        """
        return self._ids(self._pieces(text, special=special))

    def decode(self, ids: Sequence[int]) -> str:
        texts = [self._spelled[id] for id in ids if id in self._spelled]
        return self._decoder.decode(texts) if self._decoder is not None else " ".join(texts)

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
        return {"tokens": texts, "control": sorted(self.control & taken), "bos": opening, "eos": end}

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
            return (*self.bos_ids, *self._ids(self._pieces(messages), opens=True))
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
        try:
            from plait.tokenizer.chat import render
        except ImportError as exc:
            raise EngineUnavailable(f"filling in a chat template needs jinja2: {INSTALL}") from exc
        try:
            return render(self._template or "", messages, self._named)
        except Exception as exc:  # a template is a program, and may fail in any way
            raise ModelError(f"the chat template of {self._name} cannot be filled in: {exc}") from exc

    def _pieces(self, text: str, *, special: bool = False) -> list[int | str]:
        """The added tokens of a text that are meant as such, and what is between them."""
        found = self._marks.encode(text, add_special_tokens=False)
        pieces: list[int | str] = []
        at = 0
        for mark, (start, end) in zip(found.ids, found.offsets, strict=True):
            added = self._added_by_mark.get(mark)
            if added is not None and (special or added not in self.control):
                pieces += [text[at:start], self._added[added]]
                at = end
        return [piece for piece in (*pieces, text[at:]) if piece != ""]

    def _controls(self, pieces: Iterable[int | str]) -> list[int | str]:
        return [piece for piece in pieces if piece in self._control_ids]

    def _ids(self, pieces: Iterable[int | str], *, opens: bool = False) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            tokenizer = self._opening if opens and (self._spaces_every_stretch or not number) else self._plain
            written = tokenizer.encode(piece, add_special_tokens=False).ids
            if wrong := self._control_ids.intersection(written):
                name = self._spelled[min(wrong)]
                raise RequestError(f"the text {piece[:60]!r} cannot be written without the control token {name!r}")
            ids += written
        return ids


def read_object(file: Path, *, needed: bool = True) -> dict[str, Any]:
    """A JSON object of a model's folder; nothing where the file is not needed and not there.

    Raises:
        ModelError: It is missing or damaged.
    """
    if not needed and not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"cannot read {file}: {exc}; a folder must be as transformers saves it") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds no JSON object; a folder must be as transformers saves it")
    return value


def _folder_ends(folder: Path) -> list[Any]:
    """What the configs of a model call `eos_token_id`."""
    files = ("generation_config.json", "config.json")
    return [read_object(folder / file, needed=False).get("eos_token_id") for file in files]


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template; where there are several, the default one."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template


def _content(token: Any) -> str | None:
    """A token as configs write it: a text, or an object that holds one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _declared(inner: Tokenizer, values: Iterable[Any]) -> list[int]:
    """Ids of what configs call a token: an id, a text, several of them, or nothing."""
    found: list[int | None] = []
    for value in values:
        for one in value if isinstance(value, list) else [value]:
            text = _content(one)
            found.append(one if isinstance(one, int) else inner.token_to_id(text) if text is not None else None)
    return [id for id in dict.fromkeys(found) if id is not None]


def _joined(pieces: Iterable[int | str]) -> list[int | str]:
    """The same with stretches of text in one piece each: words may go over from the template to what people wrote."""
    joined: list[int | str] = []
    for piece in pieces:
        if joined and isinstance(piece, str) and isinstance(last := joined[-1], str):
            joined[-1] = last + piece
        else:
            joined.append(piece)
    return joined
