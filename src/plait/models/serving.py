"""A copy of a model's weights that servers of others can load: the same tensors, with a vocabulary beside them.

The files Plait trains carry no tokenizer, for the runtime speaks token ids; a llama-server aborts on the first request
to such a file. Copies bytes and knows nothing of servers. Format: GGUF 2 and 3.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

from plait.errors import ModelError, RequestError
from plait.models.header import Layout, read_layout
from plait.models.model import Model

_UINT32, _FLOAT32, _INT32, _BOOL, _STRING, _ARRAY = 4, 6, 5, 7, 8, 9
_NORMAL, _CONTROL = 1, 3
"""Kinds of token: control tokens have no text of their own in what a server prints."""


def write_served(model: Model, path: str | Path) -> Path:
    """Write a model's GGUF file again, with its vocabulary, for llama-server and whatever else reads GGUF.

    The vocabulary is declared as a SentencePiece one (`llama`). Ids, weights and `plait.config` stay as they are, so
    `load_model` reads the copy too. The file appears under its name only when it is complete.

    Raises:
        RequestError: The model has no weights.
        ModelError: Its file is damaged, or the copy cannot be written.
    """
    if model.path is None:
        raise RequestError(f"{model.name} is a script and has no weights to serve")
    layout = read_layout(model.path)
    tokenizer = model.tokenizer
    added = [
        _pair("tokenizer.ggml.model", _STRING, _text("llama")),
        _pair("tokenizer.ggml.tokens", _ARRAY, _array(_STRING, [_text(_spelled(t)) for t in tokenizer.tokens])),
        _pair("tokenizer.ggml.scores", _ARRAY, _array(_FLOAT32, [struct.pack("<f", 0.0)] * len(tokenizer.tokens))),
        _pair(
            "tokenizer.ggml.token_type",
            _ARRAY,
            _array(
                _INT32,
                [struct.pack("<i", _CONTROL if t in tokenizer.control else _NORMAL) for t in tokenizer.tokens],
            ),
        ),
        _pair("tokenizer.ggml.bos_token_id", _UINT32, struct.pack("<I", tokenizer.bos_ids[0])),
        _pair("tokenizer.ggml.eos_token_id", _UINT32, struct.pack("<I", tokenizer.eos_ids[0])),
        # The prompt is ids already: nothing may be put in front of it.
        _pair("tokenizer.ggml.add_bos_token", _BOOL, b"\0"),
        _pair("tokenizer.ggml.add_space_prefix", _BOOL, b"\0"),
    ]
    return _write(model.path, Path(path), layout, added)


def _write(source: Path, target: Path, layout: Layout, added: Sequence[bytes]) -> Path:
    kept = [raw for key, raw in layout.pairs if not key.startswith("tokenizer.")]
    head = b"GGUF" + struct.pack("<IQQ", layout.version, layout.num_tensors, len(kept) + len(added))
    head += b"".join(kept) + b"".join(added) + layout.tensor_infos
    head += bytes(-len(head) % layout.alignment)
    partial = target.with_name(target.name + ".partial")
    try:
        with source.open("rb") as file:
            file.seek(layout.data_start)
            partial.write_bytes(head + file.read())
        os.replace(partial, target)
    except OSError as exc:
        raise ModelError(f"cannot write {target}: {exc.strerror}") from exc
    finally:
        partial.unlink(missing_ok=True)
    return target


def _spelled(token: str) -> str:
    """SentencePiece writes a space as a low line of its own; printing turns it back."""
    return token.replace(" ", "▁")


def _pair(key: str, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


def _array(kind: int, values: Sequence[bytes]) -> bytes:
    return struct.pack("<IQ", kind, len(values)) + b"".join(values)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
