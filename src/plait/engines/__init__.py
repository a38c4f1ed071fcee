"""Engines by name, imported when opened: Plait's own, and those of installed packages (`plait.engines`)."""

from __future__ import annotations

from inspect import Parameter
from pathlib import Path
from typing import Any

from plait.engines.base import Engine, EngineStats
from plait.errors import EngineUnavailable, RequestError, nearest
from plait.registry import Registry
from plait.settings import of_type, parameters

ENGINES: Registry[type[Any]] = Registry(
    "plait.engines",
    "engine",
    {
        "scripted": "plait.engines.scripted:ScriptedEngine",
        "llamacpp": "plait.engines.llamacpp:LlamaCppEngine",
        "torch": "plait.engines.torch:TorchEngine",
        "http": "plait.engines.http:HttpEngine",
    },
    of=Engine,
    needs=("__aenter__", "__aexit__"),
)


def is_address(engine: str) -> bool:
    """Whether the name of an engine is the address of a server, or several."""
    return "://" in engine


def engine_class(name: str) -> type[Any]:
    """The class of an engine.

    Raises:
        RequestError: No engine has this name, or the package that brings it is broken.
        EngineUnavailable: A library it needs is not installed.
    """
    try:
        return ENGINES[name]
    except ImportError as exc:
        raise EngineUnavailable(f"the {name} engine cannot be imported: {exc}") from exc


def options_of(name: str) -> dict[str, Parameter]:
    """What the class of an engine takes.

    Raises:
        RequestError: No engine has this name, or the package that brings it is broken.
        EngineUnavailable: A library it needs is not installed.
    """
    return parameters(engine_class(name))


def open_engine(name: str, **options: Any) -> Engine:
    """An engine, not started: use it as an async context manager.

    Args:
        name: One of `ENGINES`, or the address of a server.
        options: Keyword arguments of its class.

    Raises:
        RequestError: No engine has this name, it has no such option, or does not take this value for it.
        EngineUnavailable: A library it needs is not installed.
    """
    of_type(str, name, name="the name of an engine")
    if is_address(name) and not options.get("urls"):
        name, options = "http", {"urls": name, **options}
    cls, known = engine_class(name), options_of(name)
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for option, value in options.items():
        if option in known:
            hint = known[option].annotation
            if hint is str and isinstance(value, Path):
                options[option] = str(value)
            else:
                of_type(hint, value, name=f"{option} of the {name} engine")
        elif not anything:
            raise nearest(option, list(known), f"option of the {name} engine")
    for option, parameter in known.items():
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and parameter.default is parameter.empty and option not in options:
            raise RequestError(f"the {name} engine needs {option}")
    try:
        return cls(**options)
    except TypeError as exc:
        if not anything:
            raise
        raise RequestError(f"the {name} engine does not take these options: {exc}") from exc


__all__ = ["ENGINES", "Engine", "EngineStats", "engine_class", "is_address", "open_engine", "options_of"]
