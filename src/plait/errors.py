"""Every error Plait raises on purpose.

    PlaitError                                 status  retryable
    ├── RequestError (ValueError)                400      no       what was asked is not possible
    │   ├── ContextLengthError                   400      no       the prompt does not fit, found before sampling
    │   └── UnsupportedJoin                      400      no       this format's join on an engine without it
    ├── EngineError (RuntimeError)               502      yes      an engine failed
    │   ├── EngineUnavailable                    503      yes      closed, not started, or a library is missing
    │   ├── EngineTimeout (TimeoutError)         504      yes
    │   └── EngineProtocolError                  502      no       an engine broke its contract; names the clause
    ├── FormatError (ValueError)                  -       no       strict parsing of data; has line and column
    ├── FormatProtocolError (RuntimeError)       500      no       a format broke its contract; names the clause
    ├── ModelError (RuntimeError)                500      no       a weight file is missing, corrupt or of another kind
    ├── TreeError (RuntimeError)                 500      no       a log or tree contradicts itself
    └── LogError (OSError)                       500      no       a log file cannot be written or read

To add one: subclass the nearest class here, also the standard exception it specialises, keep `__init__` to one
message (so that it pickles), set `status` and `retryable`. What a model writes never raises: it is a `StopReason`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import anyio


class PlaitError(Exception):
    """Base of every error that Plait raises on purpose."""

    status = 500
    retryable = False


class RequestError(PlaitError, ValueError):
    """What was asked is not possible; the message says what is."""

    status = 400


class ContextLengthError(RequestError):
    """The prompt does not fit into the engine's context; found before anything is sampled."""


class UnsupportedJoin(RequestError):
    """This format joins in a way that this engine cannot; found before anything is sampled."""


class EngineError(PlaitError, RuntimeError):
    """An engine failed while it worked."""

    status = 502
    retryable = True


class EngineUnavailable(EngineError):
    """An engine is closed, or a library it needs is not installed."""

    status = 503


class EngineTimeout(EngineError, TimeoutError):
    """An engine took too long."""

    status = 504


class EngineProtocolError(EngineError):
    """An engine broke its contract; the message names the clause."""

    retryable = False


class FormatError(PlaitError, ValueError):
    """Text does not follow its format; the message starts with `line L, column C`."""

    status = 400


class FormatProtocolError(PlaitError, RuntimeError):
    """A format broke its contract; the message names the clause."""


class ModelError(PlaitError, RuntimeError):
    """A weight file is missing, corrupt, or of a kind that was not asked for."""


class TreeError(PlaitError, RuntimeError):
    """A log or tree contradicts itself."""


class LogError(PlaitError, OSError):
    """A log file cannot be written or read; what was written before stays readable."""


@contextmanager
def boundary(what: str) -> Iterator[None]:
    """Turn any failure inside into an `EngineError` that names the edge it crossed."""
    try:
        yield
    except PlaitError:
        raise
    except Exception as exc:
        raise EngineError(f"{what} failed: {type(exc).__name__}: {exc}") from exc


class Failures:
    """Unwraps the exception groups of nested task groups: the first failure, bare, the others as its notes.

    Groups do not keep the order in which their members failed; this does.
    """

    def __init__(self) -> None:
        self._in_order: list[BaseException] = []

    @contextmanager
    def noting(self, *, groups: bool = False) -> Iterator[None]:
        """Remember a failure inside, and let it pass.

        Args:
            groups: Whether a group counts as one failure, to be kept whole; else its members were noted before.
        """
        try:
            yield
        except Exception as exc:
            if groups or not isinstance(exc, BaseExceptionGroup):
                self._in_order.append(exc)
            raise

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Raise the first failure of the task groups inside; where nothing was but cancellations, those."""
        try:
            yield
        except BaseExceptionGroup as group:
            failure = self.first(group)
            if failure is None:
                raise
            raise failure from None

    def first(self, group: BaseExceptionGroup[Any]) -> BaseException | None:
        """The failure that came first; None where nothing was but cancellations."""
        found = [exc for exc in _leaves(group) if not isinstance(exc, anyio.get_cancelled_exc_class())]
        exits = [exc for exc in found if not isinstance(exc, Exception)]
        for first in (*exits, *self._in_order, *found):
            # By its members: a scheduler may have rebuilt the group on the way.
            own = {id(exc) for exc in _leaves(first)}
            others = [exc for exc in found if id(exc) not in own]
            if len(others) < len(found):
                # One cause may fail many calls with the same words: they are said once.
                for said in dict.fromkeys(repr(other) for other in others):
                    if said != repr(first):
                        first.add_note(f"also failed: {said}")
                return first
        return None


def _leaves(exc: BaseException) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for inner in exc.exceptions for leaf in _leaves(inner)]
    return [exc]


def nearest(given: str, allowed: list[str], what: str) -> RequestError:
    """A `RequestError` for an unknown name: what was given, the nearest valid name, all valid names."""
    given = without_password(given)
    close = get_close_matches(given, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return RequestError(f"unknown {what} {given!r}{hint} (known: {', '.join(sorted(allowed))})")


def without_password(text: str) -> str:
    """A name as a message may repeat it: it may be meant as an address.

    >>> without_password("http://user:secret@host:8000"), without_password("best@8")
    ('***@host:8000', 'best@8')
    """
    return re.sub(r"[^\s/@:]*:\S*@", "***@", text)


def needs(what: str, extra: str) -> str:
    """What to say where packages are missing that an extra of Plait brings."""
    # pip knows the extras of what is installed, wherever it came from.
    return (
        f"{what} needs packages of the extra {extra!r}: pip install '.[{extra}]' in a clone of Plait, or "
        f"'plait[{extra}]' where it is installed"
    )
