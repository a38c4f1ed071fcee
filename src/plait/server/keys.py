"""API keys: who is asking. The server holds hashes only and compares all of them in constant time.

Keys carry 256 random bits, so one round of SHA-256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.errors import RequestError
from plait.server.refusal import Refusal

_ENTRY = re.compile(r"(?P<name>[\w.@-]{1,64}):sha256:(?P<digest>[0-9a-f]{64})(?::(?P<weight>\d+(?:\.\d+)?))?")
SHAPE = "NAME:sha256:HEX, or NAME:sha256:HEX:WEIGHT; `plait serve --new-key NAME` makes one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Who a request belongs to."""

    name: str
    weight: float = 1.0
    """Its share of the threads when there are not enough, against the weights of the others."""


ANONYMOUS = Client(name="anonymous")


def new_key(name: str) -> tuple[str, str]:
    """A fresh key, and the entry that the server keeps of it.

    Raises:
        RequestError: Nobody can have this name.
    """
    key = f"plait-{secrets.token_urlsafe(32)}"
    entry = f"{name}:sha256:{_digest(key)}"
    if _ENTRY.fullmatch(entry) is None:
        raise RequestError(f"{name!r} cannot name a key; it must be 1 to 64 letters, digits and any of _ . @ -")
    return key, entry


def read_entries(path: str) -> tuple[str, ...]:
    """Entries of a file, one a line; empty lines and those that begin with `#` do not count.

    Raises:
        RequestError: It cannot be read.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise RequestError(f"cannot read the API keys in {path}: {exc}") from exc
    return tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))


class Keyring:
    """Knows the clients by their keys.

    Args:
        entries: `NAME:sha256:HEX[:WEIGHT]`; none lets everybody in, as one client.

    Raises:
        RequestError: An entry has another shape, or a weight of 0.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self._clients: list[tuple[str, Client]] = []
        for number, entry in enumerate(entries, 1):
            match = _ENTRY.fullmatch(entry)
            # The entry itself may be a key that was put there by mistake: it is not shown.
            if match is None or not float(match["weight"] or 1):
                raise RequestError(f"API key entry {number} is not of the shape {SHAPE}")
            self._clients.append((match["digest"], Client(name=match["name"], weight=float(match["weight"] or 1))))

    @property
    def open(self) -> bool:
        """Whether anybody may ask."""
        return not self._clients

    def client(self, authorization: str | None, api_key: str | None = None) -> Client:
        """Whose request this is.

        Args:
            authorization: The header of this name: `Bearer KEY`, or `Basic` with the key as password, for browsers.
            api_key: The header `x-api-key`.

        Raises:
            Refusal: 401, the key is missing or not known.
        """
        if self.open:
            return ANONYMOUS
        key = _key(authorization) or api_key
        if not key:
            raise Refusal(
                "an API key is needed: send the header `Authorization: Bearer KEY`", status=401, code="no_key"
            )
        digest = _digest(key)
        found = [client for known, client in self._clients if hmac.compare_digest(known, digest)]
        if not found:
            raise Refusal("this API key is not known", status=401, code="invalid_api_key")
        return found[0]


def cache_salt(client: Client, secret: str) -> str:
    """The salt of what a client's requests leave in an engine's cache, so that no other client finds it by timing.

    It is made of the name, which stands for the key: a client whose key was replaced keeps its cache.

    Args:
        secret: The server's.
    """
    return hmac.new(secret.encode(), client.name.encode(), hashlib.sha256).hexdigest()


def _key(authorization: str | None) -> str | None:
    scheme, _, value = (authorization or "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
