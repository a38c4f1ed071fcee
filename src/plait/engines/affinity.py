"""Which calls belong together, stated by whoever knows: a server that answers many users, a trainer with many groups.

Engines that place calls or share caches between machines read it; in a single process it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from plait.errors import RequestError

_SALT_REFUSED = frozenset("@/\\\0")


@dataclass(frozen=True, slots=True)
class Affinity:
    """What a caller said about the calls it makes."""

    key: str
    cache_salt: str | None


_STATED: ContextVar[Affinity | None] = ContextVar("plait_affinity", default=None)


@contextmanager
def affinity(key: str, *, cache_salt: str | None = None) -> Iterator[None]:
    """State that all engine calls made inside, in every task started inside, belong to one request.

    Args:
        key: Sent as session id, routing key and header: routers keep calls with one key on one replica.
        cache_salt: Calls with different salts never share cached prefixes, so nobody can find out by timing what
            others asked. The same for all calls of a request, or its forks lose their prefix; a secret, at most 128
            characters.

    Raises:
        RequestError: The key is empty, or the salt is not one that servers take.
    """
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise RequestError(f"the affinity key is {key!r}; it must be printable ASCII, with no space around it")
    if cache_salt is not None and (not 0 < len(cache_salt) <= 128 or set(cache_salt) & _SALT_REFUSED):
        raise RequestError("a cache salt has 1 to 128 characters and none of @ / \\ NUL")
    token = _STATED.set(Affinity(key, cache_salt))
    try:
        yield
    finally:
        _STATED.reset(token)


def stated_affinity() -> Affinity | None:
    """What was stated around the present code; None where nothing was."""
    return _STATED.get()
