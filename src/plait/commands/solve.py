"""`plait solve`: one question, one run, shown as it happens; with its twin beside it on request."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import anyio

from plait import tasks
from plait.commands.choosing import Choice, choose, choose_twin, understand
from plait.commands.settings import overrides
from plait.engines.base import Engine
from plait.errors import LogError, RequestError
from plait.events import Event
from plait.formats.base import TrajectoryFormat
from plait.log import RunLog
from plait.models import NAMES, Model, twin_name
from plait.session import open_run
from plait.spelling import Spelling, describe
from plait.tasks import Problem
from plait.terminal.plain import PlainView
from plait.terminal.reading import Reader, seconds
from plait.terminal.truth import Cost, comparison, ratios, truth
from plait.tree import Tree
from plait.types import Budget, Request

if TYPE_CHECKING:
    from rich.console import Console

Pace = Literal["auto", "real", "slow"]
QUICK_S = 0.3
"""A run that is over by then is replayed; a longer one is watched live."""
MAX_RUNS = 5
TIMING_S = 1.0
"""A comparison repeats its runs up to so often and so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `plait solve` can be told."""

    model: str | None = None
    engine: str | None = None
    engine_options: Sequence[str] = ()
    """`name=value`."""
    format: str | None = None
    twin: str | None = None
    compare: bool = False
    as_json: bool = False
    trace: str | None = None
    seed: int = 0
    temperature: float = 0.0
    budget: Budget = field(default_factory=Budget)
    conditioned: bool | None = None
    """Whether the prompt says the budget; None: as the weights were trained."""
    pace: Pace = "auto"
    lanes: bool | None = None
    """True: panes and lanes; False: plain lines; None: as standard output is."""
    check: bool = False


def solve(question: str, options: Options) -> int:
    """Run a question and print what came of it.

    Returns:
        The exit code: 0, or 1 where there is no answer, a checked one is wrong, or the trace could not be written.

    Raises:
        RequestError: The question, or what it asks for, is not possible.
        ModelError: The weights are missing or corrupt.
        EngineError: The engine failed.
    """
    choice = choose(
        options.model,
        engine=options.engine,
        format=options.format,
        options=overrides(options.engine_options),
        plain=True,
    )
    problem = understand(question, choice.model)
    if choice.model.plain and options.check:
        raise RequestError("an answer in plain words cannot be graded: leave out --check")
    if options.twin is not None and not options.compare:
        raise RequestError("--twin names what --compare runs beside the model: add --compare")
    twin = choose_twin(choice, options.twin) if options.compare else None
    return anyio.run(_Solve(problem, choice, twin, options).main)


@dataclass(slots=True)
class _Result:
    """One run, finished."""

    tree: Tree
    events: list[Event]
    wall_s: float


class _Side:
    """A model with its engine, ready to run."""

    def __init__(self, choice: Choice, engine: Engine, format: TrajectoryFormat) -> None:
        self.model, self.engine, self.format = choice.model, engine, format
        self.reader = Reader(choice.model.tokenizer, format)
        self.engine_name = choice.engine


class _Solve:
    def __init__(self, problem: Problem, choice: Choice, twin: Choice | None, options: Options) -> None:
        self.problem, self.options = problem, options
        self.choice, self.twin = choice, twin
        self.log: RunLog | None = None
        self.log_error: LogError | None = None

    async def main(self) -> int:
        try:
            return await self._main()
        finally:
            self._close_log()

    async def _main(self) -> int:
        started = time.perf_counter()
        async with _opened(self.choice) as side:
            load_s = time.perf_counter() - started
            if self.options.trace is not None:
                self._open_log(self.options.trace)
            if self.options.as_json:
                return await self._with_json(side, load_s)
            console = _console()
            lanes = self.options.lanes
            able = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
            if able if lanes is None else lanes:
                return await self._with_picture(side, console)
            return await self._with_lines(side)

    async def _with_json(self, side: _Side, load_s: float) -> int:
        result = await self._run(side, None)
        data = self._data(side, result) | {"load_s": round(load_s, 6)}
        if self.twin is not None:
            async with _opened(self.twin) as other:
                data["compare"] = await self._compared(side, other, result, data)
        print(json.dumps(data))
        return self._code(side, result)

    async def _with_lines(self, side: _Side) -> int:
        print(self.problem.question, flush=True)
        view = PlainView(side.reader, lambda line: print(line, flush=True))
        result = await self._run(side, view)
        view.finish(result.tree)
        lines = await self._truths(side, result)
        print()
        print("\n".join([*self._answer(side, result), *lines[0]]))
        return self._code(side, result)

    async def _with_picture(self, side: _Side, console: Console) -> int:
        from rich.text import Text

        from plait.terminal.screen import REPLAY_S, SLOW_S, Screen, replay
        from plait.terminal.view import ACCENT, QUIET, View

        title, pace = self.problem.question, self.options.pace
        result, shown_s = await self._watched(side, console, title)
        view = View(console, side.reader, title, final=result.tree)
        if shown_s is None and pace != "real":
            shown_s = SLOW_S if pace == "slow" else REPLAY_S
            with Screen(console, view) as screen:
                await replay(result.events, screen, seconds=shown_s)
        console.print(view.finished(result.tree))
        console.print()
        truths, twin_tree = await self._truths(side, result)
        console.print(view.lanes(result.tree, twin=twin_tree))
        console.print()
        for line in self._answer(side, result):
            console.print(Text(f"  {line}", style=f"bold {ACCENT}"))
        for line in truths:
            console.print(Text(f"  {line}", overflow="fold"))
        times = shown_s / result.wall_s if shown_s and result.wall_s else 0.0
        if times > 1.5:
            shown = f"shown {times:.0f} x slower than it ran (--pace real shows it as it is)"
            console.print(Text(f"  {shown}", style=QUIET))
        return self._code(side, result)

    async def _watched(self, side: _Side, console: Console, title: str) -> tuple[_Result, float | None]:
        """Run; live where it takes long enough to be watched. Also for how long it was shown, None for not at all."""
        from plait.terminal.screen import SLOW_S, Screen, follow
        from plait.terminal.view import View

        patience = {"real": 0.0, "auto": QUICK_S, "slow": SLOW_S}[self.options.pace]
        events: list[Event] = []
        async with self._opened_run(side, events) as (run, take):
            with anyio.move_on_after(patience) as quick:
                async for event in run:
                    take(event)
            if not quick.cancelled_caught:
                return self._result(run.tree, events), None
            with Screen(console, View(console, side.reader, title)) as screen:
                await follow(run, run.tree, screen, on=take)
            result = self._result(run.tree, events)
            return result, result.wall_s

    async def _run(self, side: _Side, view: PlainView | None) -> _Result:
        events: list[Event] = []
        async with self._opened_run(side, events) as (run, take):
            async for event in run:
                take(event)
                if view is not None:
                    view.on(run.tree, event)
            return self._result(run.tree, events)

    def _result(self, tree: Tree, events: list[Event]) -> _Result:
        return _Result(tree, events, seconds(events))

    @asynccontextmanager
    async def _opened_run(self, side: _Side, events: list[Event]) -> AsyncIterator[tuple[Any, Any]]:
        """A run whose every event is kept and logged, also when it is left early."""

        spelling = Spelling(side.model.tokenizer)

        def take(event: Event) -> None:
            events.append(event)
            if self.log is not None:
                self._write(spelling.spell(event))

        request, meta = self._request(side), self._meta(side)
        run = None
        try:
            async with open_run(request, engine=side.engine, format=side.format, meta=meta) as run:
                yield run, take
        finally:
            if run is not None:
                for event in run.pending():
                    take(event)

    def _request(self, side: _Side) -> Request:
        options = self.options
        # The twin has one line of reasoning, whatever the budget.
        said = {"conditioned": options.conditioned} if options.conditioned is not None and side.model.forks else {}
        return side.model.request(
            self.problem.prompt,
            **said,
            budget=options.budget,
            temperature=options.temperature,
            seed=options.seed,
            # The log is the only reader of log-probabilities.
            logprobs=self.log is not None,
        )

    def _meta(self, side: _Side) -> dict[str, Any]:
        return {
            "question": self.problem.question,
            "family": self.problem.family,
            "prompt": self.problem.prompt,
            "model": side.model.id,
            "temperature": self.options.temperature,
            "started_unix_s": round(time.time(), 3),
            "tokenizer": describe(side.model.tokenizer, side.format.tags()),
        }

    async def _truths(self, side: _Side, result: _Result) -> tuple[list[str], Tree | None]:
        """The closing lines, and the twin's tree where there is one."""
        own = Cost(name=side.model.name, usage=result.tree.usage(), wall_s=result.wall_s)
        if self.twin is None:
            return [truth(own)], None
        async with _opened(self.twin) as other:
            twin_tree, own_s, twin_s, runs = await self._timed(side, other, result)
            cost = Cost(name=other.model.name, usage=twin_tree.usage(), wall_s=twin_s)
            own = Cost(name=side.model.name, usage=result.tree.usage(), wall_s=own_s)
            answer = tasks.answer_of(other.model.text(twin_tree))
            lines = comparison(own, cost, runs=runs)
            if answer != self._given(side, result.tree):
                lines.append(f"the twin answers {answer or 'nothing'}")
            return lines, twin_tree

    async def _timed(self, side: _Side, other: _Side, result: _Result) -> tuple[Tree, float, float, int]:
        """Time both in turn; the first run of each, which pays for what later ones find ready, counts only if alone."""
        own: list[float] = [result.wall_s]
        twin = await self._run(other, None)
        self._close_log()
        twins: list[float] = [twin.wall_s]
        until = time.perf_counter() + TIMING_S
        while len(own) <= MAX_RUNS and time.perf_counter() + own[-1] + twins[-1] < until:
            own.append((await self._run(side, None)).wall_s)
            twins.append((await self._run(other, None)).wall_s)
        runs = max(1, len(own) - 1)
        return twin.tree, statistics.median(own[-runs:]), statistics.median(twins[-runs:]), runs

    async def _compared(self, side: _Side, other: _Side, result: _Result, data: dict[str, Any]) -> dict[str, Any]:
        twin_tree, own_s, twin_s, runs = await self._timed(side, other, result)
        own = Cost(name=side.model.name, usage=result.tree.usage(), wall_s=own_s)
        twin = Cost(name=other.model.name, usage=twin_tree.usage(), wall_s=twin_s)
        tokens, faster = ratios(own, twin)
        data["wall_s"] = round(own_s, 6)
        return {
            **self._data(other, _Result(twin_tree, [], twin_s)),
            "speedup_tokens": round(tokens, 4),
            "speedup_wall": round(faster, 4),
            "runs": runs,
        }

    def _data(self, side: _Side, result: _Result) -> dict[str, Any]:
        tree = result.tree
        usage = tree.usage()
        data: dict[str, Any] = {
            "answer": self._given(side, tree),
            "threads": usage.threads,
            "forks": usage.forks,
            "total_tokens": usage.sampled_tokens,
            "critical_path_tokens": usage.critical_path_tokens,
            "longest_context_tokens": usage.longest_context_tokens,
            "wall_s": round(result.wall_s, 6),
            "stop": str(tree.stop),
            "question": self.problem.question,
            "family": self.problem.family,
            "model": side.model.id,
            "engine": side.engine_name,
            "format": side.model.format_name,
            "join": side.model.join,
            "seed": self.options.seed,
            "text": side.model.text(tree),
            "usage": asdict(usage),
        }
        if self.options.check:
            data["right"] = tasks.grade(self.problem, side.model.text(tree))
        return data

    def _given(self, side: _Side, tree: Tree) -> str | None:
        if side.model.plain:
            ids = [id for s in tree.segments.values() if s.thread == "0" for id in s.sampled_ids]
            return side.reader.text(ids).strip() or None
        return tasks.answer_of(side.model.text(tree))

    def _answer(self, side: _Side, result: _Result) -> list[str]:
        given = self._given(side, result.tree)
        if given is None:
            note = f" ({result.tree.note})" if result.tree.note else ""
            return [f"no answer: the run ended with {result.tree.stop}{note}", *self._declined(side.model, result.tree)]
        if not self.options.check:
            return [f"answer: {given}"]
        right = tasks.grade(self.problem, side.model.text(result.tree))
        return [f"answer: {given} ({'right' if right else f'wrong, it is {self.problem.answer}'})"]

    def _declined(self, model: Model, tree: Tree) -> list[str]:
        """What to do where forks were declined, and the weights never learned to go on without."""
        if self.options.budget.max_threads == Budget().max_threads or tree.num_threads:
            return []
        if model.join == "none" or model.levels is not None or model.script is not None:
            return []
        twin = twin_name(model)
        instead = f"; its twin was, in one line: --model {twin}" if twin in NAMES else ""
        return [f"{model.name} was not trained to answer without its threads{instead}"]

    def _code(self, side: _Side, result: _Result) -> int:
        text = side.model.text(result.tree)
        if self.log_error is not None:
            sys.stdout.flush()
            print(f"plait: {self.log_error}", file=sys.stderr)
            return 1
        if self._given(side, result.tree) is None:
            return 1
        return 1 if self.options.check and not tasks.grade(self.problem, text) else 0

    def _open_log(self, path: str) -> None:
        try:
            self.log = RunLog(path)
        except LogError as exc:
            self.log_error = exc

    def _close_log(self) -> None:
        """After the run and the first of its twin: the log holds what was asked for, not what was timed."""
        if self.log is not None:
            self.log.close()
            self.log = None

    def _write(self, event: Event) -> None:
        if self.log is None or self.log_error is not None:
            return
        try:
            self.log.write(event)
        except LogError as exc:
            # The answer is worth more than its trace: the run goes on, the exit code tells.
            self.log_error = exc


@asynccontextmanager
async def _opened(choice: Choice) -> AsyncIterator[_Side]:
    async with choice.open_engine() as engine:
        yield _Side(choice, engine, choice.model.format)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
