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
from plait.errors import EngineUnavailable, RequestError
from plait.train.checkpoint import export_gguf
from plait.train.learners import Learner
from plait.train.model import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An open engine."""

    engine: Engine
    version: Callable[[], int]
    """How many updates the weights that it has now have seen."""


class Serving(Protocol):
    """Gives an open engine over a model's weights, step after step. Used as an async context manager."""

    def at(self, learner: Learner, version: int) -> AbstractAsyncContextManager[Served]:
        """An engine over a copy of the weights as they are now; the next call may reuse it for newer ones.

        Where several processes train, all of them ask.
        """
        ...

    async def __aenter__(self) -> Serving: ...
    async def __aexit__(self, *exc: object) -> None: ...


class TorchServing:
    """The torch engine: one for the whole run, given new weights at each step.

    Args:
        concurrency: Rollouts it has room for at a time.
        threads: CPU threads of a step; 0: as many as torch takes.
        cells: Tokens that its cache holds.
    """

    def __init__(self, *, concurrency: int, threads: int, cells: int | None = None) -> None:
        self._options = {"threads": threads or None, **_room(concurrency, cells)}
        self._engine: Any = None

    async def __aenter__(self) -> TorchServing:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.__aexit__(*exc)

    @asynccontextmanager
    async def at(self, learner: Learner, version: int) -> AsyncGenerator[Served, None]:
        if self._engine is None:
            try:
                engine_class = import_module("plait.engines.torch").TorchEngine
            except ImportError as exc:
                raise EngineUnavailable(f"the torch engine cannot be imported: {exc}") from exc
            weights, config = learner.weights()
            options = self._options | learner.engine_options()
            engine = engine_class.from_weights(weights, config, version=version, **options)
            await engine.__aenter__()
            self._engine = engine
        elif self._engine.version != version:
            await self._engine.load_weights(learner.weights()[0], version=version)
        engine = self._engine
        yield Served(engine=engine, version=lambda: engine.version)


class GgufServing:
    """The llama.cpp engine: one for each step, over a GGUF file in a temporary folder; milliseconds at small sizes.

    Weights and cache are float32, so that its log-probabilities agree with the trainer's.
    """

    def __init__(self, *, concurrency: int, threads: int, cells: int | None = None) -> None:
        self._options = {"cache": "F32", "threads": threads or None, **_room(concurrency, cells)}
        self._stack = ExitStack()
        self._folder = Path()

    async def __aenter__(self) -> GgufServing:
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="plait-")))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stack.close()

    @asynccontextmanager
    async def at(self, learner: Learner, version: int) -> AsyncGenerator[Served, None]:
        path = self._folder / f"{version}.gguf"
        if not isinstance(learner.model, Decoder):
            raise RequestError("the llamacpp engine samples from Plait's own models; take rollout.engine = 'torch'")
        export_gguf(path, learner.model, about={})
        try:
            async with open_engine("llamacpp", path=path, **self._options) as engine:
                yield Served(engine=engine, version=lambda: version)
        finally:
            path.unlink(missing_ok=True)


def _room(concurrency: int, cells: int | None) -> dict[str, int]:
    return {"cells": cells or max(4096, 1024 * concurrency), "max_seqs": min(256, max(32, 8 * concurrency))}


SERVINGS: dict[str, Callable[..., Serving]] = {"torch": TorchServing, "llamacpp": GgufServing}
