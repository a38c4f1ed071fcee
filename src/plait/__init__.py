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

from plait.engines import open_engine
from plait.engines.base import Engine, EngineStats
from plait.errors import PlaitError
from plait.events import Event
from plait.formats import TrajectoryFormat, open_format
from plait.models import Model, load_model
from plait.session import Run, open_run, run
from plait.tree import Segment, Tree
from plait.types import Budget, Chunk, Context, Merge, Request, SamplingParams, StopReason

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
