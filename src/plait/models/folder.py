"""A folder as transformers saves it, as a model: its own tokenizer, and what it says of itself. Needs the torch extra.

Reads `config.json`, `tokenizer.json` and the headers of the weights; neither transformers nor the weights themselves
are needed for that. Weights that Plait's trainer made say so under `plait` in `config.json` (format, join, train,
scores), as GGUF files do under `plait.config`, and are asked in Plait's notation. Others are asked in plain words, by
their chat template where they have one, and in the format that is named.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import EngineUnavailable, ModelError, RequestError

INSTALL = "pip install 'plait[torch]'"
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_SLOT = "\u2060slot\u2060"
"""Stands for what a person wrote while a chat template is filled in."""


class FileTokenizer:
    """The tokenizer of a `tokenizer.json`.

    A person's text never becomes control ids: it is read by a copy of the tokenizer that has no added tokens.

    Args:
        folder: Also of `tokenizer_config.json` and `config.json`, which say what opens and ends a text.
        trained: Whether Plait's trainer made the weights: a prompt then begins with the `bos_token`, elsewhere with
            what the tokenizer itself puts there.

    Raises:
        ModelError: A file is missing or damaged, or nothing says which token ends a text.
        EngineUnavailable: The package that reads it is not installed.
    """

    def __init__(self, folder: Path, *, trained: bool) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as exc:
            raise EngineUnavailable(f"reading {folder / 'tokenizer.json'} needs tokenizers: {INSTALL}") from exc
        described, config = _json(folder / "tokenizer.json"), _json(folder / "config.json")
        settings = _json(folder / "tokenizer_config.json", needed=False)
        try:
            self._any = Tokenizer.from_str(json.dumps(described))
            bare = {**described, "added_tokens": [], "post_processor": None}
            self._plain = Tokenizer.from_str(json.dumps(bare))
        except Exception as exc:  # the package raises no narrower one
            raise ModelError(f"cannot read {folder / 'tokenizer.json'}: {exc}") from exc
        self._added = {str(t["content"]): int(t["id"]) for t in described.get("added_tokens", ())}
        self._template: str | None = _template(folder, settings)
        generation = _json(folder / "generation_config.json", needed=False)
        self.eos_ids: tuple[int, ...] = self._ids(
            generation.get("eos_token_id"), config.get("eos_token_id"), settings.get("eos_token")
        )
        """Any of them ends a text."""
        if not self.eos_ids:
            raise ModelError(f"{folder} does not say which token ends a text (eos_token_id in config.json)")
        bos = self._ids(settings.get("bos_token"))[:1] if trained else self._opening()
        self.bos_ids: tuple[int, ...] = bos
        self._anchor = self._plain.encode("a", add_special_tokens=False).ids[-1:]
        self.control = frozenset(self._added)
        """Texts of the added tokens."""
        vocabulary = {id: text for text, id in self._any.get_vocab(with_added_tokens=True).items()}
        self.tokens = tuple(vocabulary.get(id, f"<{id}>") for id in range(max(vocabulary, default=-1) + 1))
        """Every id as the vocabulary spells it."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, with nothing put around it.

        Raises:
            RequestError: It is not special and yet holds what the vocabulary knows only as a control token.
        """
        ids = list((self._any if special else self._plain).encode(text, add_special_tokens=False).ids)
        if not special and (control := set(ids) & set(self._added.values())):
            name = next(text for text, id in self._added.items() if id in control)
            raise RequestError(f"the text {text[:60]!r} cannot be written without the control token {name!r}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        # After another token: what opens a text loses its space in some vocabularies.
        whole = self._any.decode([*self._anchor, *ids], skip_special_tokens=False)
        return whole.removeprefix(self._any.decode(self._anchor, skip_special_tokens=False))

    def control_id(self, text: str) -> int | None:
        return self._added.get(text)

    def prompt_ids(self, question: str) -> tuple[int, ...]:
        """A question in plain words as a prompt: by the chat template, without one as it stands.

        Raises:
            ModelError: The template cannot be filled in.
        """
        if self._template is None:
            return (*self.bos_ids, *self.encode(question))
        before, _, after = self._rendered().partition(_SLOT)
        return (*self.encode(before, special=True), *self.encode(question), *self.encode(after, special=True))

    def _rendered(self) -> str:
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as exc:
            raise EngineUnavailable(f"filling in a chat template needs jinja2: {INSTALL}") from exc

        def fail(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = fail
        names = {f"{kind}_token": self._text(ids) for kind, ids in (("bos", self.bos_ids), ("eos", self.eos_ids))}
        messages = [{"role": "user", "content": _SLOT}]
        try:
            text = environment.from_string(self._template or "").render(
                messages=messages, add_generation_prompt=True, **names
            )
        except Exception as exc:  # a template is a program, and may fail in any way
            raise ModelError(f"the chat template of these weights cannot be filled in: {exc}") from exc
        if text.count(_SLOT) != 1:
            raise ModelError("the chat template of these weights leaves the question out, or says it twice")
        return text

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokens[ids[0]] if ids else ""

    def _opening(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text."""
        bare = self._any.encode("a", add_special_tokens=False).ids
        dressed = self._any.encode("a", add_special_tokens=True).ids
        at = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        return tuple(dressed[:at])

    def _ids(self, *values: Any) -> tuple[int, ...]:
        """Ids of what configs call a token: an id, several, a text, or an object that holds one."""
        found: list[int] = []
        for value in values:
            for one in value if isinstance(value, list) else [value]:
                text = one.get("content") if isinstance(one, dict) else one
                id = text if isinstance(text, int) else self._any.token_to_id(text) if isinstance(text, str) else None
                if id is not None and id not in found:
                    found.append(id)
        return tuple(found)


def describe_folder(folder: Path) -> Mapping[str, Any]:
    """What a folder says of itself.

    Returns:
        `config`; `plait`, what Plait's trainer wrote, or None; `num_weights`, `dtype` and `digest` of the weights.

    Raises:
        ModelError: A file is missing or damaged.
    """
    config = _json(folder / "config.json")
    about = config.get("plait")
    if about is not None and not (isinstance(about, dict) and {"format", "join"} <= set(about)):
        raise ModelError(f"the plait entry of {folder / 'config.json'} lacks format and join; export the model again")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors; save the model with safe serialization")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return {
        "config": config,
        "plait": about,
        "num_weights": sum(_num_weights(file) for file in files),
        "dtype": _DTYPES.get(dtype, dtype),
        "digest": _digest([folder / "config.json", folder / "tokenizer.json", *files]),
    }


def _json(file: Path, *, needed: bool = True) -> dict[str, Any]:
    if not needed and not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"cannot read {file}: {exc}; a folder must be as transformers saves it") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds no JSON object; a folder must be as transformers saves it")
    return value


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template; where there are several, the default one."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template


def _num_weights(file: Path) -> int:
    """Numbers in a safetensors file, by its header: a length of 8 bytes, then JSON."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > file.stat().st_size:
                raise ModelError(f"{file} is damaged: its header is longer than the file")
            header = json.loads(opened.read(length))
        count = 0
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for side in tensor["shape"]:
                    size *= side
                count += size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as exc:
        raise ModelError(f"cannot read {file}: {type(exc).__name__}: {exc}") from exc
    return count


def _digest(files: Sequence[Path]) -> str:
    sums = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as opened:
                sums.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as exc:
            raise ModelError(f"cannot read {file}: {exc.strerror or exc}") from exc
    return sums.hexdigest()
