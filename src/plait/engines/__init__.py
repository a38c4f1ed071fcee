"""Engines by name, imported when opened. Adding one: write the file, add its line here, run `check_engine` on it."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from plait.engines.base import Engine, EngineStats
from plait.errors import EngineUnavailable, RequestError, nearest
from plait.settings import of_type

_WHERE = {
    "scripted": ("plait.engines.scripted", "ScriptedEngine"),
    "llamacpp": ("plait.engines.llamacpp", "LlamaCppEngine"),
    "torch": ("plait.engines.torch", "TorchEngine"),
    "http": ("plait.engines.http", "HttpEngine"),
}
ENGINES = tuple(_WHERE)


def is_address(engine: str) -> bool:
    """Whether the name of an engine is the address of a server, or several."""
    return "://" in engine


def engine_class(name: str) -> type[Any]:
    """The class of an engine.

    Raises:
        RequestError: No engine has this name.
        EngineUnavailable: A library it needs is not installed.
    """
    if name not in _WHERE:
        raise nearest(name, list(_WHERE), "engine")
    module, cls = _WHERE[name]
    try:
        return getattr(import_module(module), cls)
    except ImportError as exc:
        raise EngineUnavailable(f"the {name} engine cannot be imported: {exc}") from exc


def open_engine(name: str, **options: Any) -> Engine:
    """An engine, not started: use it as an async context manager.

    Args:
        name: One of `ENGINES`.
        options: Keyword arguments of its class.

    Raises:
        RequestError: No engine has this name, it has no such option, or does not take this value for it.
        EngineUnavailable: A library it needs is not installed.
    """
    cls = engine_class(name)
    known = inspect.signature(cls, eval_str=True).parameters
    for option, value in options.items():
        if option not in known:
            raise nearest(option, list(known), f"option of the {name} engine")
        of_type(known[option].annotation, value, name=f"{option} of the {name} engine")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise RequestError(f"the {name} engine needs {option}")
    return cls(**options)


__all__ = ["ENGINES", "Engine", "EngineStats", "engine_class", "is_address", "open_engine"]
