"""`plait eval`: many held-out problems, one record each, resumable; tables and figures from the records."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from plait import tasks
from plait.bench import Record, RecordFile, compare, evaluate, problems, read_records, result
from plait.bench.methods import GREEDY, TEMPERATURE, Method, method, refuse_misfits
from plait.bench.metrics import methods_result
from plait.bench.report import methods_table, report
from plait.bench.runner import OnRecord, OnRun, engine_options
from plait.commands.choosing import Choice, choose, choose_twin
from plait.commands.settings import overrides, with_knobs
from plait.errors import RequestError
from plait.events import Event, RunStarted
from plait.log import RunLog
from plait.spelling import Spelling, describe
from plait.tasks import Problem, Split
from plait.terminal.truth import wall
from plait.types import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `plait eval` can be told."""

    families: Sequence[str] = ()
    """Empty: all that the model was trained on."""
    n: int = 500
    model: str | None = None
    engine: str | None = None
    engine_options: Sequence[str] = ()
    """`name=value`."""
    twin: str | None = None
    compare: bool = False
    against: Sequence[str] = ()
    """Methods, by name; `compare` is `sequential` among them."""
    temperature: float | None = None
    """Of methods that sample; None: `TEMPERATURE`."""
    as_json: bool = False
    out: str | None = None
    trace: str | None = None
    """Where every run is logged; appended to where results are resumed."""
    concurrency: int | None = None
    seed: int = 0
    split: Split = "held_out"
    budget: Budget = field(default_factory=Budget)
    settings: Sequence[str] = ()
    """Knobs of the families, `family.knob=value`."""


def evaluation(options: Options) -> int:
    """Run what the records do not hold yet, then print the tables; with `as_json` one object as the last line.

    Raises:
        RequestError: The options ask for what there is not.
        ModelError, EngineError, LogError: Weights, engine or results file failed.
    """
    methods = _methods(options)
    if methods and options.concurrency not in (None, 1):
        flag = "--against" if options.against else "--compare"
        raise RequestError(f"{flag} measures wall time one problem at a time: leave out --concurrency")
    choice = choose(options.model, engine=options.engine, options=overrides(options.engine_options))
    needed = any(method.of == "twin" for method in methods)
    if options.twin is not None and not needed:
        raise RequestError("--twin names what the model is compared with: add --compare, or --against sequential")
    twin = choose_twin(choice, options.twin) if needed else None
    families = _families(options.families, choice)
    for wanted in methods:
        refuse_misfits(wanted, choice.model, families)
    drawn = problems(with_knobs(families, options.settings), options.n, seed=options.seed, split=options.split)
    concurrency = 1 if methods else options.concurrency or 16
    earlier = read_records(options.out) if options.out else []
    sides = [(choice, GREEDY)]
    sides += [(twin if twin is not None and wanted.of == "twin" else choice, wanted) for wanted in methods]
    kept = _kept(earlier, drawn, sides, concurrency, options)
    with RecordFile(options.out) if options.out else nullcontext() as file:
        progress = _Progress(len(drawn) * len(sides), len(kept))

        def on_record(record: Record) -> None:
            if file is not None:
                file.write(record)
            progress.step(record)

        with RunLog(options.trace, append=bool(earlier)) if options.trace else nullcontext() as log, progress:
            on_run = _logging(log, sides) if log is not None else None
            anyio.run(_run, drawn, sides, kept, concurrency, options, on_record, on_run)
    records = _ordered([*kept.values(), *progress.records], drawn)
    return _print(records, sides, options)


def _methods(options: Options) -> list[Method]:
    """What the model is compared with, each once."""
    names = [*(["sequential"] if options.compare else []), *options.against]
    temperature = TEMPERATURE if options.temperature is None else options.temperature
    methods = list(dict.fromkeys(method(name, temperature=temperature) for name in names))
    if options.temperature is not None and not any(how.temperature for how in methods):
        raise RequestError("--temperature is of methods that sample (--against majority@8), and none is asked for")
    return methods


def _families(names: Sequence[str], choice: Choice) -> list[str]:
    trained = list(choice.model.families or tasks.FAMILIES)
    if not names or list(names) == ["all"]:
        return trained
    for name in names:
        tasks.family(name)
    return list(dict.fromkeys(names))


Side = tuple[Choice, Method]
Kept = dict[tuple[str, str, str], Record]


def _kept(
    earlier: Sequence[Record], drawn: Sequence[Problem], sides: Sequence[Side], concurrency: int, options: Options
) -> Kept:
    """Earlier records that are what this call would measure, by what they measure."""
    wanted: dict[tuple[str, str, str], tuple[object, ...]] = {}
    for problem in drawn:
        for choice, how in sides:
            budget = how.budget(options.budget)
            limits = budget.max_threads, budget.max_tokens
            key = problem.prompt, choice.model.id, how.name
            wanted[key] = concurrency, options.seed, *limits, how.temperature
    return {
        r.key: r
        for r in earlier
        if wanted.get(r.key) == (r.concurrency, r.seed, r.max_threads, r.max_tokens, r.temperature)
    }


def _logging(log: RunLog, sides: Sequence[Side]) -> OnRun:
    """Write each run with what makes it readable without its model."""
    models = {choice.model.id: choice.model for choice, _ in sides}
    described = {id: describe(model.tokenizer, model.format.tags()) for id, model in models.items()}

    def on_run(problem: Problem, model: str, events: Sequence[Event]) -> None:
        about = {"question": problem.question, "family": problem.family, "prompt": problem.prompt, "model": model}
        spelling = Spelling(models[model].tokenizer)
        for event in events:
            if isinstance(event, RunStarted):
                event = replace(event, meta={**event.meta, **about, "tokenizer": described[model]})
            log.write(spelling.spell(event))

    return on_run


async def _run(
    drawn: Sequence[Problem],
    sides: Sequence[Side],
    kept: Kept,
    concurrency: int,
    options: Options,
    on_record: OnRecord,
    on_run: OnRun | None,
) -> None:
    if len(kept) == len(drawn) * len(sides):
        return
    choice = sides[0][0]
    if len(sides) > 1:
        await compare(
            drawn,
            models=[side.model for side, _ in sides],
            methods=[how for _, how in sides],
            engine=choice.engine,
            options=choice.options,
            budget=options.budget,
            seed=options.seed,
            skip=kept,
            on_record=on_record,
            on_run=on_run,
        )
        return
    engine_settings = {**engine_options(choice.engine, concurrency), **choice.options}
    async with choice.model.open_engine(choice.engine, **engine_settings) as engine:
        await evaluate(
            (p for p in drawn if (p.prompt, choice.model.id, GREEDY.name) not in kept),
            engine=engine,
            format=choice.model.format,
            tokenizer=choice.model.tokenizer,
            model=choice.model.id,
            budget=options.budget,
            concurrency=concurrency,
            seed=options.seed,
            on_record=on_record,
            on_run=on_run,
        )


def _ordered(records: Sequence[Record], drawn: Sequence[Problem]) -> list[Record]:
    place = {problem.prompt: number for number, problem in enumerate(drawn)}
    return sorted(records, key=lambda r: place[r.prompt])


def _print(records: Sequence[Record], sides: Sequence[Side], options: Options) -> int:
    model = sides[0][0].model
    twin = next((choice.model for choice, how in sides if how.of == "twin"), None)

    def of(choice: Choice, how: Method) -> list[Record]:
        return [r for r in records if (r.model, r.method) == (choice.model.id, how.name)]

    by_side = [of(*side) for side in sides]
    own = by_side[0]
    one_line = [r for (_, how), some in zip(sides, by_side, strict=True) if how == method("sequential") for r in some]
    every = [r for some in by_side for r in some] if options.against else []
    at_once = own[0].concurrency if own else 1
    if options.as_json:
        about: dict[str, Any] = {
            "model": model.id,
            "format": model.format_name,
            "engine": sides[0][0].engine,
            "twin": twin.id if twin else None,
            "split": options.split,
            "seed": options.seed,
            "concurrency": at_once,
            "max_threads": options.budget.max_threads,
            "max_tokens": options.budget.max_tokens,
        }
        methods = {"methods": methods_result(every, own)} if every else {}
        print(json.dumps(about | result(own, one_line) | methods))
        return 0
    against = f", against {twin.id}" if twin else ""
    sampled = next((f", samples at temperature {how.temperature:g}" for _, how in sides if how.temperature), "")
    print(
        f"{model.id} in {model.format_name} on {sides[0][0].engine}{against}; {options.split} problems, seed "
        f"{options.seed}, {at_once} at a time, greedy{sampled}\n"
    )
    print(report(own, one_line))
    if every:
        print(f"\n{methods_table(every, own)}")
    return 0


class _Progress:
    """A line on standard error: how far, how right, how long still. A bar where it is a terminal."""

    def __init__(self, total: int, done: int) -> None:
        self.records: list[Record] = []
        self._total, self._before = total, done
        self._right = 0
        self._shown = 0.0
        self._tty = sys.stderr.isatty()
        self._started = time.monotonic()

    def __enter__(self) -> _Progress:
        if self._before:
            print(f"{self._before} of {self._total} are there already", file=sys.stderr)
        return self

    def step(self, record: Record) -> None:
        self.records.append(record)
        self._right += record.right
        now = time.monotonic()
        if now - self._shown > (0.1 if self._tty else 30.0):
            self._shown = now
            self._show(now)

    def _show(self, now: float) -> None:
        done, new = self._before + len(self.records), len(self.records)
        left = (now - self._started) / new * (self._total - done) if new else 0.0
        width = 24
        filled = width * done // max(1, self._total)
        bar = "━" * filled + "─" * (width - filled)
        right = 100 * self._right / max(1, new)
        line = f"{bar} {done}/{self._total}  right {right:.1f} %  left {_clock(left)}"
        if self._tty:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            sys.stderr.write(f"\r{line[: columns - 1]}\x1b[K")
        else:
            sys.stderr.write(f"{done}/{self._total}, left {_clock(left)}\n")
        sys.stderr.flush()

    def __exit__(self, kind: object, exc: object, tb: object) -> None:
        took = time.monotonic() - self._started
        if self._tty and self.records:
            sys.stderr.write("\r\x1b[K")
        if self.records:
            print(f"{len(self.records)} runs in {wall(took)}", file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
