"""A folder as transformers saves it: what it says of itself.

Reads `config.json` and the headers of the weights; neither transformers nor the weights themselves are needed for that.
Weights that Plait's trainer made say so under `plait` in `config.json` (format, join, train, scores), as GGUF files do
under `plait.config`, and are asked in Plait's notation. Others are asked in plain words, by their chat template where
they have one, and in the format that is named.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import ModelError
from plait.tokenizer.fast import read_object

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def describe_folder(folder: Path) -> Mapping[str, Any]:
    """What a folder says of itself.

    Returns:
        `config`; `plait`, what Plait's trainer wrote, or None; `num_weights`, `dtype` and `digest` of the weights.

    Raises:
        ModelError: A file is missing or damaged.
    """
    config = read_object(folder / "config.json")
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
