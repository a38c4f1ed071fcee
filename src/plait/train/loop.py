"""The folder of a run and the walk through its steps: checkpoints, metrics, Ctrl-C, going on where it was.

A trainer finds its checkpoint here (`find`), opens its files (`open`), and does a step at every turn of `steps`; what
its state is, it alone knows. Knows nothing of models, data and losses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from plait.errors import ModelError, RequestError
from plait.train import checkpoint, machine
from plait.train.config import identity, to_toml
from plait.train.display import Display, Say, open_display
from plait.train.metrics import MetricsFile, Sink, open_sinks
from plait.train.ranks import Ranks


class Run(Protocol):
    """What a trainer says of itself."""

    progress: Any
    """A dataclass with a `step`."""
    scores: dict[str, Any]

    def done(self) -> float:
        """Share of the run that is over."""
        ...

    def state(self) -> dict[str, Any]:
        """What else goes into a checkpoint; every process is asked."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a training ended."""

    finished: bool
    """False: interrupted; the same command goes on from the checkpoint."""
    progress: Any
    scores: dict[str, Any]
    checkpoint: Path
    model: Path
    """The weights as other tools load them: a GGUF file, or a folder of transformers."""


class Loop:
    """A context manager.

    Args:
        out: Run folder, created where missing.
        resume: False starts over, and refuses a folder that holds a checkpoint.
        say: Takes lines of progress; default: a bar or lines on standard error.
        stop_after_steps: Leave as if interrupted once this many steps of the run are done.
    """

    def __init__(self, out: Path, *, resume: bool, say: Say | None, stop_after_steps: int | None) -> None:
        self.out, self.path, self.resume = out, out / "checkpoint.pt", resume
        self.ranks, self.finished = Ranks(), False
        self._say, self._stop_after = say, stop_after_steps
        self._stack, self._sinks = ExitStack(), list[Sink]()

    def __enter__(self) -> Loop:
        with ExitStack() as stack:
            stack.enter_context(self.ranks)
            self.display: Display = stack.enter_context(open_display(self._say if self.ranks.first else _silent))
            self._stack = stack.pop_all()
        self.out.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def say(self, line: str) -> None:
        self.display.say(line)

    def find(self, config: Any, *, read: Callable[[Mapping[str, Any]], Any], free: frozenset[str]) -> Any:
        """The state to go on from, None where the run begins.

        Args:
            config: Of this run, resolved.
            read: Makes a config of plain values, as checkpoints hold it: what is new since has its default.
            free: Names that may change between a start and a resume.

        Raises:
            ModelError: The folder holds a checkpoint of another run, or one that cannot be read.
            RequestError: It holds one, and `resume` is False.
        """
        if not self.path.exists():
            return None
        if not self.resume:
            raise RequestError(f"{self.out} holds a run already; resume it, or choose another folder")
        saved = checkpoint.load(self.path, format=config.data.format)
        ours, theirs = (identity(asdict(c), free=free) for c in (config, read(saved["config"])))
        if differing := sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n)):
            name = differing[0]
            raise ModelError(
                f"{self.path} is of another run: {name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
            )
        return saved

    def open(self, config: Any, *, sinks: tuple[str, ...], saved: Mapping[str, Any] | None) -> None:
        """Write down what is run, and open what its numbers go to."""
        self.config = config
        self.ranks.barrier()
        if self.ranks.first:
            (self.out / "config.toml").write_text(to_toml(config), encoding="utf-8")
            self._metrics = MetricsFile(self.out / "metrics.jsonl", size=checkpoint.metrics_size(saved))
            self._sinks = open_sinks(sinks, out=self.out, config=asdict(config))
            for sink in self._sinks:
                self._stack.callback(sink.close)

    def write(self, record: Mapping[str, Any], shown: Mapping[str, float]) -> None:
        """A line of metrics, with its `step`, and what of it dashboards show."""
        if self.ranks.first:
            self._metrics.write(record)
            for sink in self._sinks:
                sink.write(record["step"], shown)

    def steps(self, run: Run) -> Iterator[None]:
        """A turn for each step that is left. Ends at the end of the run, or where it was interrupted; both save."""
        self._last_save = time.monotonic()
        interrupted = self._stack.enter_context(machine.interrupt())
        while run.done() < 1:
            stop = self._stop_after is not None and run.progress.step >= self._stop_after
            if self.ranks.any(interrupted.is_set() or stop):
                self.save(run)
                self.say(f"stopped at step {run.progress.step}; the same command goes on from here")
                return
            yield
            if self.ranks.any(time.monotonic() - self._last_save > self.config.checkpoint_every_s):
                self.save(run)
        self.finished = True
        self.save(run)

    def save(self, run: Run) -> None:
        """Write a checkpoint. Every process takes part; the first one writes."""
        state = run.state()
        if self.ranks.first:
            about = {"config": asdict(self.config), "progress": asdict(run.progress), "scores": run.scores}
            checkpoint.save(self.path, {**about, **state, "metrics": self._metrics.size})
        self.ranks.barrier()
        self._last_save = time.monotonic()

    def result(self, run: Run, model: Path) -> RunResult:
        """How it ended, with the model that was exported."""
        return RunResult(
            finished=self.finished, progress=run.progress, scores=run.scores, checkpoint=self.path, model=model
        )


def _silent(line: str) -> None:
    """What processes other than the first one say."""
