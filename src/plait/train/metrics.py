"""Where a run's numbers go: always `metrics.jsonl`, and whichever dashboards are asked for.

A dashboard is a `Sink`: three exist, packages bring others; each is imported only where it is named. Knows nothing of
what is measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from plait.errors import RequestError
from plait.registry import Registry


class Sink(Protocol):
    """Takes numbers by name, step by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricsFile:
    """One JSON object a line, each with its `step`; readable at any moment.

    Args:
        path: The file; what it holds beyond `size` is forgotten, for a run that was cut off does those steps again.
        size: `size` when the checkpoint was written that the run goes on from; 0 for a run that begins.
    """

    def __init__(self, path: Path, *, size: int) -> None:
        self.path = path
        if path.exists():
            os.truncate(path, min(size, path.stat().st_size))

    @property
    def size(self) -> int:
        """Bytes so far: kept in checkpoints, so that no line is lost or doubled by a kill between the two."""
        return self.path.stat().st_size if self.path.exists() else 0

    def write(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir`."""

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        module = _imported("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(out / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, or of any module with its `init` and its run's `log` and `finish`.

    Where it goes (server, offline, project) is set by that package's own environment variables.
    """

    package = "wandb"

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        self._run = _imported(self.package, self.package).init(project="plait", name=out.name, config=dict(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(Wandb):
    """Trackio, a local dashboard with the same interface."""

    package = "trackio"


SINKS: Registry[Callable[[Path, Mapping[str, Any]], Sink]] = Registry(
    "plait.dashboards",
    "dashboard",
    {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio},
    of=Sink,
)


def open_sinks(names: Sequence[str], *, out: Path, config: Mapping[str, Any]) -> list[Sink]:
    """Open dashboards by name.

    Args:
        out: Run folder; its name is the run's name.
        config: What the run depends on, to be shown beside its curves.

    Raises:
        RequestError: No dashboard has this name, or its package is not installed.
    """
    return [SINKS[name](out, config) for name in names]


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as exc:
        raise RequestError(f"metrics go to {package}, which is not installed: pip install {package}") from exc
