"""`plait serve`: an OpenAI-compatible server over the embedded model, or others of its kind."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from plait.commands.choosing import Choice, choose, choose_twin
from plait.engines import is_address
from plait.models import twin_name
from plait.server import Process, ServeConfig, Served, as_toml, create_app, new_key, resolve
from plait.server.logs import NAME, configure


def serve(flags: Mapping[str, Any], *, config: str | None = None, print_config: bool = False) -> int:
    """Serve until a signal says to stop.

    Args:
        flags: Settings of the command line; None where nothing was said.
        config: A TOML file.
        print_config: Print what the settings come to, and stop.

    Returns:
        The exit code: 0, or 1 where the address could not be had.

    Raises:
        RequestError: A setting or a model is not possible.
        ModelError: Weights are missing or corrupt.
    """
    resolved = resolve(flags, os.environ, config)
    if print_config:
        print(as_toml(resolved))
        return 0
    configure(resolved.log)
    app, service = create_app(resolved, served(resolved))
    process = Process(app, service)
    try:
        process.run()
    except SystemExit:
        # Why is said already.
        logging.getLogger(NAME).error("not listening; `--port N` takes another port, 0 any that is free")
        return 1
    return 0


def key(name: str) -> int:
    """Print a fresh API key, and the entry by which a server knows it."""
    secret, entry = new_key(name)
    print(f"key    {secret}\nentry  {entry}")
    return 0


def served(config: ServeConfig) -> list[Served]:
    """The models that a config names; with none named, the embedded one and its sequential twin."""
    formats = config.formats or (None,)
    if config.models:
        each = formats if len(formats) > 1 else formats * len(config.models)
        named = zip(config.models, each, strict=True)
        choices = [choose(name, engine=config.engine, format=format, plain=True) for name, format in named]
    else:
        first = choose(None, engine=config.engine, format=formats[0], plain=True)
        # Another server runs one model, and so does an engine whose weights are named.
        named = is_address(first.engine) or ":" in (config.engine or "")
        choices = [first] if named else [first, choose_twin(first)]
    return [Served(model=c.model, engine_name=c.engine, twin=_twin(c, choices)) for c in choices]


def _twin(choice: Choice, choices: list[Choice]) -> str | None:
    """The other model that thinks the same in one line."""
    if choice.model.join == "none":
        return None
    others = [other.model for other in choices if other.model.join == "none"]
    if choice.model.script is not None:
        return next((model.name for model in others if model.script is not None), None)
    name = twin_name(choice.model)
    return next((model.name for model in others if name in (model.name, str(model.path))), None)
