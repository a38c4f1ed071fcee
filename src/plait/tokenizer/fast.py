"""A tokenizer of Hugging Face as Plait's own, from a folder or from one of transformers in memory: the same ids, texts
and ends either way, so what is trained is what is sampled from. Needs the tokenizers package, not transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import EngineUnavailable, ModelError, RequestError, needs
from plait.tokenizer import parts
from plait.tokenizer.text import TextTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What a chat template may write by name."""


class FastTokenizer(TextTokenizer):
    """Made by `of_folder` and `of_fast`.

    Args:
        inner: Of the tokenizers package; is read and never changed.
        eos_ids: What else ends a text, as configs say it: ids, lists of them, None.
        named, template, name: As of every one.

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
        self._added = {str(t["content"]): int(t["id"]) for t in described["added_tokens"]}
        self._spelled: dict[int, str] = {id: text for text, id in inner.get_vocab(with_added_tokens=True).items()}
        super().__init__(
            control={text: id for text, id in self._added.items() if text.replace("\u2581", " ").strip()},
            tokens=[self._spelled.get(id, f"<{id}>") for id in range(max(self._spelled, default=-1) + 1)],
            bos_ids=parts.opening_ids(described),
            eos_ids=_declared(inner, [named.get("eos_token"), *eos_ids]),
            named=named,
            template=template,
            name=name,
        )
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
            raise EngineUnavailable(needs(f"reading {file}", "torch")) from exc
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

    def decode(self, ids: Sequence[int]) -> str:
        texts = [self._spelled[id] for id in ids if id in self._spelled]
        return self._decoder.decode(texts) if self._decoder is not None else " ".join(texts)

    def _pieces(self, text: str, *, special: bool = False) -> list[int | str]:
        found = self._marks.encode(text, add_special_tokens=False)
        pieces: list[int | str] = []
        at = 0
        for mark, (start, end) in zip(found.ids, found.offsets, strict=True):
            added = self._added_by_mark.get(mark)
            if added is not None and (special or added not in self.control):
                pieces += [text[at:start], self._added[added]]
                at = end
        return [piece for piece in (*pieces, text[at:]) if piece != ""]

    def _write(self, text: str, *, opens: bool, first: bool) -> list[int]:
        tokenizer = self._opening if opens and (self._spaces_every_stretch or first) else self._plain
        return tokenizer.encode(text, add_special_tokens=False).ids


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
