"""Engines over the weights of a model that is being trained: the one interface that rollouts sample through.

Knows nothing of rollouts and losses. An engine gets a copy of the weights, so training may go on while it samples.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from plait.engines import open_engine
from plait.engines.base import Engine
from plait.errors import EngineUnavailable
from plait.train.checkpoint import export_gguf
from plait.train.model import Decoder, hf_config, to_hf


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An open engine."""

    engine: Engine
    version: Callable[[], int]
    """How many updates the weights that it has now have seen."""


class Serving(Protocol):
    """Gives an open engine over a model's weights, step after step. Used as an async context manager."""

    def at(self, model: Decoder, version: int) -> AbstractAsyncContextManager[Served]:
        """An engine over a copy of the weights as they are now; the next call may reuse it for newer ones."""
        ...

    async def __aenter__(self) -> Serving: ...
    async def __aexit__(self, *exc: object) -> None: ...


class TorchServing:
    """The torch engine: one for the whole run, given new weights at each step.

    Args:
        concurrency: Rollouts it has room for at a time.
        threads: CPU threads of a step.
    """

    def __init__(self, *, concurrency: int, threads: int) -> None:
        self._options = {"dtype": "float32", "threads": threads, **_room(concurrency)}
        self._engine: Any = None

    async def __aenter__(self) -> TorchServing:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.__aexit__(*exc)

    @asynccontextmanager
    async def at(self, model: Decoder, version: int) -> AsyncGenerator[Served, None]:
        if self._engine is None:
            try:
                engine_class = import_module("plait.engines.torch").TorchEngine
            except ImportError as exc:
                raise EngineUnavailable(f"the torch engine cannot be imported: {exc}") from exc
            engine = engine_class.from_weights(to_hf(model), hf_config(model.config), version=version, **self._options)
            await engine.__aenter__()
            self._engine = engine
        elif self._engine.version != version:
            await self._engine.load_weights(to_hf(model), version=version)
        engine = self._engine
        yield Served(engine=engine, version=lambda: engine.version)


class GgufServing:
    """The llama.cpp engine: one for each step, over a GGUF file in a temporary folder; milliseconds at small sizes.

    Weights and cache are float32, so that its log-probabilities agree with the trainer's.
    """

    def __init__(self, *, concurrency: int, threads: int) -> None:
        self._options = {"cache": "F32", "threads": threads, **_room(concurrency)}
        self._stack = ExitStack()
        self._folder = Path()

    async def __aenter__(self) -> GgufServing:
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="plait-")))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stack.close()

    @asynccontextmanager
    async def at(self, model: Decoder, version: int) -> AsyncGenerator[Served, None]:
        path = self._folder / f"{version}.gguf"
        export_gguf(path, model, about={})
        try:
            async with open_engine("llamacpp", path=path, **self._options) as engine:
                yield Served(engine=engine, version=lambda: version)
        finally:
            path.unlink(missing_ok=True)


def _room(concurrency: int) -> dict[str, int]:
    return {"cells": max(4096, 1024 * concurrency), "max_seqs": min(256, max(32, 8 * concurrency))}


SERVINGS: dict[str, Callable[..., Serving]] = {"torch": TorchServing, "llamacpp": GgufServing}
