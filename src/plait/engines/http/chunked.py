"""The chunked coding of an HTTP body: its data out of bytes, however they are cut.

Servers stream a token as a chunk, and to read one through h11's events costs as much as all that Plait does with the
token, so this one thing h11 is not asked for; tests hold it to h11. Source: RFC 9112, section 7.1.
"""

from __future__ import annotations

import re

from h11 import RemoteProtocolError

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?")
_MOST_LINE_BYTES = 1 << 14
"""Of a size with its extensions, and of all trailers."""


class Chunked:
    """A body so far."""

    def __init__(self) -> None:
        self.ended = False
        self.failure: RemoteProtocolError | None = None
        """Why nothing more can be read; what came before was given out."""
        self.rest = b""
        """What was fed and not read: part of a line, or what follows the body."""
        self._left = 0
        """Bytes of the chunk that are still to come."""
        self._read = self._size
        """What the next line is."""
        self._trailing = 0

    def feed(self, data: bytes) -> bytes:
        """The data of all that is there now."""
        buffer = self.rest + data if self.rest else data
        parts: list[bytes] = []
        at = 0
        while not self.ended and self.failure is None:
            if self._left:
                part = buffer[at : at + self._left]
                if not part:
                    break
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                continue
            end = buffer.find(b"\r\n", at)
            if end < 0:
                if len(buffer) - at > _MOST_LINE_BYTES:
                    self._fail("a line of a chunked body has no end")
                break
            self._read(buffer[at:end])
            at = end + 2
        self.rest = buffer[at:]
        return b"".join(parts)

    def _size(self, line: bytes) -> None:
        size = _SIZE.fullmatch(line)
        if size is None:
            self._fail(f"this is no size of a chunk: {line[:20]!r}")
        else:
            self._left = int(size[1], 16)
            self._read = self._end_of_chunk if self._left else self._trailer

    def _end_of_chunk(self, line: bytes) -> None:
        if line:
            self._fail(f"a chunk is longer than was said: {line[:20]!r}")
        self._read = self._size

    def _trailer(self, line: bytes) -> None:
        """A line behind the last chunk; an empty one is the end."""
        self.ended = not line
        self._trailing += len(line)
        if self._trailing > _MOST_LINE_BYTES:
            self._fail("the trailers of a body have no end")

    def _fail(self, what: str) -> None:
        self.failure = RemoteProtocolError(what)
