"""Adaptive parallel reasoning: a language model forks its reasoning into threads and joins them again.

import anyio, plait

async def main():
    model = plait.load_model("plait-tiny")
    async with model.open_engine() as engine:
        tree = await plait.run(model.request("What is 347 * 526?"), engine=engine, format=model.format)
    print(model.answer(tree), tree.critical_path())

anyio.run(main)
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # True to type checkers; importing `typing` would take longer than all else here

if TYPE_CHECKING:
    from plait.engines import Engine, EngineStats, open_engine
    from plait.errors import PlaitError
    from plait.events import Event
    from plait.formats import TrajectoryFormat, open_format
    from plait.models import Model, load_model
    from plait.session import Run, open_run, run
    from plait.tree import Segment, Tree
    from plait.types import Budget, Chunk, Context, Merge, Request, SamplingParams, StopReason

_HOMES = {
    "engines": ("Engine", "EngineStats", "open_engine"),
    "errors": ("PlaitError",),
    "events": ("Event",),
    "formats": ("TrajectoryFormat", "open_format"),
    "models": ("Model", "load_model"),
    "session": ("Run", "open_run", "run"),
    "tree": ("Segment", "Tree"),
    "types": ("Budget", "Chunk", "Context", "Merge", "Request", "SamplingParams", "StopReason"),
}
"""Modules and what they export here, imported when it is first asked for: a command that only says what it takes, and
one that is stopped at once, need none of them."""

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Chunk",
    "Context",
    "Engine",
    "EngineStats",
    "Event",
    "Merge",
    "Model",
    "PlaitError",
    "Request",
    "Run",
    "SamplingParams",
    "Segment",
    "StopReason",
    "TrajectoryFormat",
    "Tree",
    "load_model",
    "open_engine",
    "open_format",
    "open_run",
    "run",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        for home, names in _HOMES.items():
            if name == home:
                return import_module(f"plait.{home}")
            if name in names:
                value = globals()[name] = getattr(import_module(f"plait.{home}"), name)
                return value
        raise AttributeError(f"module 'plait' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
