"""Things that are chosen by name: Plait's own, and those of installed packages, found by their entry points.

A registry is a group of entry points (`plait.formats`, ...). Nothing is imported before it is asked for by its name,
and installed packages are not looked at while names of Plait's own are used. Knows nothing of what it holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from plait.errors import RequestError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


class Registry(Collection[str], Generic[T]):
    """Names, and what they mean, in order: what Plait has, what this process added, what packages bring.

    Args:
        group: Of entry points.
        what: What one of these is called in messages.
        own: Plait's, by name: the thing itself or `module:name`.
        of: What a thing has to be: an instance of this; where it is a protocol, a class with its methods.
        needs: What such a class must have besides.
        check: Raises where it is of no use in another way.
    """

    def __init__(
        self,
        group: str,
        what: str,
        own: Mapping[str, T | str],
        *,
        of: Any,
        needs: tuple[str, ...] = (),
        check: Callable[[Any], object] | None = None,
    ) -> None:
        self.group, self.what, self.own = group, what, own
        self._of, self._needs, self._check = of, needs, check
        self._added: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.own, *self._added, *(entry.name for entry in self._entries()))))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in (*self.own,) or any(one == name for one in self)

    def require(self, name: str) -> None:
        """Refuse a name that nothing has.

        Raises:
            RequestError: Nothing has it; the message says which names there are, and the nearest.
        """
        if name not in self:
            raise nearest(name, list(self), self.what)

    def __getitem__(self, name: str) -> T:
        """What has this name.

        Raises:
            RequestError: Nothing has it, or the package that brings it is broken; the message says which it is.
            ImportError, EngineUnavailable: It is one of Plait's own, and a library it needs is not installed.
        """
        found = self.own.get(name, self._added.get(name))
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            return getattr(import_module(module), attribute)
        if found is not None:
            return found
        self.require(name)
        entry, *others = (entry for entry in self._entries() if entry.name == name)
        if others:
            raise RequestError(
                f"the {self.what} {name!r} is in several packages ({', '.join(map(_source, (entry, *others)))}): "
                "uninstall all but one"
            )
        return self._load(entry)

    def add(self, name: str, thing: T) -> None:
        """Give a thing a name, in this process and no other; one that was added before gives way.

        Raises:
            RequestError: Plait has this name, or it is nothing of the kind.
        """
        if name in self.own:
            raise RequestError(f"Plait has a {self.what} {name!r}: choose another name")
        if fault := self._fault(name, thing):
            raise RequestError(f"the {self.what} {name!r} {fault}")
        self._added[name] = thing

    def listed(self) -> Iterator[tuple[str, str, T | Exception]]:
        """Every name, where it comes from (empty: Plait), and what it is, or why it cannot be had."""
        for name in (*self.own, *self._added):
            try:
                yield name, "this process" if name in self._added else "", self[name]
            except Exception as exc:
                # Whatever a library says that is not there, or does not fit.
                yield name, "", exc
        for entry in self._entries():
            source = _source(entry)
            first = "Plait" if entry.name in self.own else "this process" if entry.name in self._added else ""
            try:
                if first:
                    taken = f"{first} has a {self.what} of this name, which is used"
                    raise RequestError(f"{taken}; {source} must rename its own")
                yield entry.name, source, self[entry.name]
            except RequestError as exc:
                yield entry.name, source, exc

    def _entries(self) -> tuple[EntryPoint, ...]:
        return _entry_points(self.group, tuple(sys.path))

    def _load(self, entry: EntryPoint) -> T:
        source = _source(entry)
        where = f"the {self.what} {entry.name!r} of {source} ({entry.value})"
        try:
            found: T = entry.load()
        except Exception as exc:
            fault = f"cannot be imported: {type(exc).__name__}: {exc}"
            raise RequestError(f"{where} {fault}; mend or uninstall {source}") from exc
        if fault := self._fault(entry.name, found):
            raise RequestError(f"{where} {fault}; mend or uninstall {source}")
        return found

    def _fault(self, name: str, found: Any) -> str:
        """Why a thing cannot have this name; empty where it can."""
        contract, kind = f"{self._of.__module__}.{self._of.__qualname__}", type(found).__name__
        if not getattr(self._of, "_is_protocol", False):
            return "" if isinstance(found, self._of) else f"is of type {kind}; it must be a {contract}"
        if not isinstance(found, type):
            return f"is of type {kind}; it must be a class with the methods of {contract}"
        methods = (one for one in vars(self._of) if one[0] != "_" and callable(getattr(self._of, one)))
        if lacks := [one for one in (*self._needs, *methods) if not hasattr(found, one)]:
            return f"lacks {', '.join(lacks)}, which {contract} asks for"
        own = getattr(found, "name", name)
        if isinstance(own, str) and own != name:
            return f"calls itself {own!r}; both names must be the same"
        try:
            if self._check is not None:
                self._check(found)
        except Exception as exc:
            return f"is of no use: {type(exc).__name__}: {exc}"
        return ""


@lru_cache(maxsize=32)
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Of what is installed on this path, by name. Reading every package's metadata takes milliseconds: done once."""
    from importlib.metadata import entry_points

    try:
        return tuple(sorted(entry_points(group=group), key=lambda entry: (entry.name, _source(entry))))
    except Exception as exc:
        fault = f"{type(exc).__name__}: {exc}"
        raise RequestError(f"an installed package has an entry_points.txt that cannot be read: {fault}") from exc


def _source(entry: EntryPoint) -> str:
    # A package whose metadata is lost has no name.
    about = entry.dist.metadata if entry.dist else {}
    return f"{about['Name']} {about['Version']}" if "Name" in about else entry.value
