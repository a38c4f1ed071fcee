"""Reads the header of a GGUF file: its metadata, its tensors' sizes, and whether the file is whole.

Standard library only, so that a model can be listed and checked before llama.cpp is loaded; a file that is cut off is
refused in words instead of by a failing engine. Knows nothing of what the metadata means.
Format: GGUF 2 and 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from plait.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 30: (1, 2)}
"""Weights of one block and its bytes, by tensor type; other types are not checked for size."""
_NAMES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 30: "BF16"}
_NAMES |= {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 39: "MXFP4"}
_MOST = 1 << 24
"""Entries of one table or bytes of one string; more is garbage, not a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a GGUF file says of itself."""

    metadata: dict[str, Any]
    num_weights: int
    dtype: str
    """Type of most of its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the parts of a GGUF file lie, for copying it with other metadata."""

    version: int
    num_tensors: int
    pairs: tuple[tuple[str, bytes], ...]
    """Key, and the bytes of the whole pair."""
    tensor_infos: bytes
    """Names, shapes and offsets; the offsets count from `data_start`."""
    data_start: int
    alignment: int


def read_header(path: Path) -> Header:
    """Read the header and check that the tensors it promises are there.

    Raises:
        ModelError: The file is missing, not GGUF, or cut off.
    """
    return _read(path)[0]


def read_layout(path: Path) -> Layout:
    """Find the parts of a file that `read_header` accepts.

    Raises:
        ModelError: The file is missing, not GGUF, or cut off.
    """
    return _read(path)[1]


def _read(path: Path) -> tuple[Header, Layout]:
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as exc:
        raise ModelError(f"cannot read the model file {path}: {exc.strerror}") from exc


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file

    def header(self) -> tuple[Header, Layout]:
        if self._bytes(4) != b"GGUF":
            raise ModelError(f"{self.path} is not a GGUF model file")
        (version,) = self._unpack("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path} is GGUF version {version}; this Plait reads 2 and 3")
        num_tensors, num_pairs = self._unpack("QQ")
        if max(num_tensors, num_pairs) > _MOST:
            raise self._corrupt("its header is garbage")
        metadata: dict[str, Any] = {}
        pairs: list[tuple[str, bytes]] = []
        for _ in range(num_pairs):
            start = self.file.tell()
            key = self._string()
            (kind,) = self._unpack("I")
            metadata[key] = self._value(kind)
            pairs.append((key, self._between(start, self.file.tell())))
        start = self.file.tell()
        header, end = self._tensors(metadata, num_tensors)
        alignment = _alignment(metadata)
        layout = Layout(
            version=version,
            num_tensors=num_tensors,
            pairs=tuple(pairs),
            tensor_infos=self._between(start, end),
            data_start=-(-end // alignment) * alignment,
            alignment=alignment,
        )
        return header, layout

    def _between(self, start: int, end: int) -> bytes:
        self.file.seek(start)
        return self._bytes(end - start)

    def _tensors(self, metadata: dict[str, Any], count: int) -> tuple[Header, int]:
        """The header, and where the descriptions of the tensors end."""
        weights: dict[int, int] = {}
        end = 0
        for _ in range(count):
            self._string()
            (dims,) = self._unpack("I")
            if dims > 4:
                raise self._corrupt("its header is garbage")
            size = math.prod(self._unpack(f"{dims}Q"))
            kind, offset = self._unpack("IQ")
            weights[kind] = weights.get(kind, 0) + size
            block, num_bytes = _BLOCKS.get(kind, (1, 0))
            end = max(end, offset + size // block * num_bytes)
        infos_end = self.file.tell()
        alignment = _alignment(metadata)
        needed = -(-infos_end // alignment) * alignment + end
        held = self.file.seek(0, 2)
        if held < needed:
            raise self._corrupt(f"it has {held:,} bytes of {needed:,}")
        most = max(weights, key=lambda kind: weights[kind], default=0)
        dtype = _NAMES.get(most, f"type {most}")
        return Header(metadata=metadata, num_weights=sum(weights.values()), dtype=dtype), infos_end

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._unpack("IQ")
            if count > _MOST:
                raise self._corrupt("its header is garbage")
            if inner in _SCALARS:
                return list(self._unpack(f"{count}{_SCALARS[inner]}"))
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._corrupt("its header is garbage")
        return self._unpack(_SCALARS[kind])[0]

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        if length > _MOST:
            raise self._corrupt("its header is garbage")
        return self._bytes(length).decode("utf-8", "replace")

    def _unpack(self, fmt: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{fmt}", self._bytes(struct.calcsize(f"<{fmt}")))

    def _bytes(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) < count:
            raise self._corrupt("it ends inside its header")
        return data

    def _corrupt(self, why: str) -> ModelError:
        return ModelError(f"the model file {self.path} is corrupt: {why}; copy or export it again")


def _alignment(metadata: dict[str, Any]) -> int:
    return int(metadata.get("general.alignment", 32)) or 32
