"""Runs problems through sessions and keeps one record of each: what was answered, whether forking was right, the cost.

Knows nothing of how a model was trained or how results are shown. Adaptive model and sequential twin go through the
same code; a comparison alternates them problem by problem, one at a time, so that both see the same machine.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import anyio

from plait import tasks
from plait.engines.base import Engine
from plait.errors import Failures, LogError, RequestError
from plait.events import Event
from plait.formats.base import TrajectoryFormat
from plait.models import Model, load_model, prompt_ids, response_text
from plait.session import open_run
from plait.tasks import Family, Problem, Split
from plait.tokenizer import Tokenizer
from plait.types import Budget, Request, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One problem, run once."""

    model: str
    """Name and content of the weights."""
    family: str
    prompt: str
    question: str
    answer: str | None
    """What was answered; None where no answer was given."""
    right: bool
    forked: bool
    forks: bool
    """Whether forking is the right decision."""
    decision_right: bool
    threads: int
    num_forks: int
    total_tokens: int
    """Sampled, all threads together."""
    critical_path_tokens: int
    token_latency: int
    """ThreadWeaver's L; counts inserted tokens too."""
    longest_context_tokens: int
    reread_tokens: int
    wall_s: float
    stop: str
    serial_cost: int | None
    """Tokens that the families expect in line and with threads; None where a family does not say."""
    parallel_cost: int | None
    concurrency: int
    """Problems that ran at the same time: wall times of different ones do not compare."""
    seed: int
    max_threads: int | None = Budget().max_threads
    """The run's limits."""
    max_tokens: int | None = Budget().max_tokens

    @property
    def predicted_saving(self) -> float | None:
        """Share of the critical path that forking is expected to save."""
        if not self.serial_cost or self.parallel_cost is None:
            return None
        return 1 - self.parallel_cost / self.serial_cost


OnRecord = Callable[[Record], None]
OnRun = Callable[[Problem, str, Sequence[Event]], None]
"""Told the problem, the model and the events of a run that has ended."""


def problems(families: Sequence[str | Family], n: int, *, seed: int = 0, split: Split = "held_out") -> list[Problem]:
    """Up to n distinct problems of each family, families in turn so that a run cut short has some of each."""
    drawn = [_distinct(family, n, seed, split) for family in families]
    return [problem for row in itertools.zip_longest(*drawn) for problem in row if problem is not None]


def _distinct(family: str | Family, n: int, seed: int, split: Split) -> list[Problem]:
    seen: dict[str, Problem] = {}
    # A small family may hold fewer than n problems.
    for problem in itertools.islice(tasks.problems(family, seed=seed, split=split), 50 * n):
        seen.setdefault(problem.prompt, problem)
        if len(seen) == n:
            break
    return list(seen.values())


async def evaluate(
    problems: Iterable[Problem],
    *,
    engine: Engine,
    format: TrajectoryFormat,
    tokenizer: Tokenizer,
    model: str = "",
    budget: Budget | None = None,
    concurrency: int = 1,
    seed: int = 0,
    on_record: OnRecord | None = None,
    on_run: OnRun | None = None,
) -> list[Record]:
    """Run problems greedily; records in the order of the problems, whatever order they end in.

    Args:
        problems: What to run; drawn from as places come free.
        engine: Open.
        format, tokenizer: The ones the engine's weights were trained with.
        model: What records say ran.
        concurrency: Problems at the same time.
        on_record: Called as each problem ends.
        on_run: Called with the events of each run, before its record.
    """
    if concurrency < 1:
        raise RequestError(f"concurrency is {concurrency}; it must be at least 1")
    records: dict[int, Record] = {}
    source = iter(enumerate(problems))
    runner = _Runner(engine, format, tokenizer, model, budget or Budget(), concurrency, seed, on_run)
    failures = Failures()

    async def work() -> None:
        with failures.noting():
            for number, problem in source:
                records[number] = record = await runner.record(problem)
                if on_record is not None:
                    on_record(record)

    with failures.unwrapped():
        async with anyio.create_task_group() as workers:
            for _ in range(concurrency):
                workers.start_soon(work)
    return [records[number] for number in sorted(records)]


async def compare(
    problems: Iterable[Problem],
    *,
    models: Sequence[Model],
    engine: str = "llamacpp",
    options: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    skip: Iterable[tuple[str, str]] = (),
    on_record: OnRecord | None = None,
    on_run: OnRun | None = None,
) -> list[Record]:
    """Run every problem on every model, one run at a time, the order reversed from problem to problem.

    Args:
        models: Usually an adaptive model and its twin.
        engine: Kind of the engines, the same for all.
        options: Passed to each.
        skip: Pairs of prompt and model id that are not run.
    """
    records: list[Record] = []
    done = set(skip)
    async with AsyncExitStack() as stack:
        runners: list[_Runner] = []
        for model in models:
            opened = await stack.enter_async_context(model.open_engine(engine, **(options or {})))
            limits = budget or Budget()
            runners.append(_Runner(opened, model.format, model.tokenizer, model.id, limits, 1, seed, on_run))
        warm: set[str] = set()
        for number, problem in enumerate(problems):
            for runner in runners if number % 2 == 0 else runners[::-1]:
                if (problem.prompt, runner.model) in done:
                    continue
                if runner.model not in warm:
                    # The first pass pays for memory that later ones find allocated.
                    warm.add(runner.model)
                    await replace(runner, on_run=None).record(problem)
                record = await runner.record(problem)
                records.append(record)
                if on_record is not None:
                    on_record(record)
    return records


def evaluate_gguf(
    path: str | Path,
    *,
    families: Sequence[str | Family] | None = None,
    n: int = 50,
    concurrency: int = 16,
    seed: int = 0,
    split: Split = "held_out",
    max_tokens: int = 1536,
) -> dict[str, Any]:
    """Score a GGUF file by true decoding: what a trainer calls while it trains.

    Args:
        max_tokens: Of one problem. Twice what the longest gold trace needs: a model that is not trained yet goes on
            until something stops it.

    Returns:
        For every family: n, accuracy, fork_right (shares), total_tokens and critical_path_tokens (means).
    """
    from plait.bench.metrics import by_family

    model = load_model(str(path))
    drawn = problems(families or model.families or list(tasks.FAMILIES), n, seed=seed, split=split)

    async def main() -> list[Record]:
        async with model.open_engine(**engine_options(model.engine, concurrency)) as engine:
            return await evaluate(
                drawn,
                engine=engine,
                format=model.format,
                tokenizer=model.tokenizer,
                model=model.id,
                budget=Budget(max_tokens=max_tokens),
                concurrency=concurrency,
                seed=seed,
            )

    scores = by_family(anyio.run(main))
    keys = ("n", "accuracy", "fork_right", "total_tokens", "critical_path_tokens")
    return {name: {key: round(getattr(s, key), 4) for key in keys} for name, s in scores.items()}


def engine_options(engine: str, concurrency: int) -> dict[str, Any]:
    """Room for so many problems at once."""
    if engine not in ("llamacpp", "torch"):
        return {}
    return {"cells": max(4096, 1024 * concurrency), "max_seqs": min(256, max(32, 8 * concurrency))}


def read_records(path: str | Path) -> list[Record]:
    """Records of a JSONL file, up to its last whole line; an empty list where there is no file.

    Raises:
        LogError: The file cannot be read.
        RequestError: A line is not a record.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as exc:
        raise LogError(f"cannot read {path}: {exc.strerror}") from exc
    names = [f.name for f in fields(Record) if f.default is MISSING]
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            # Files of before there were limits in them are of the usual ones.
            limits = {name: data[name] for name in ("max_threads", "max_tokens") if name in data}
            records.append(Record(**{name: data[name] for name in names}, **limits))
        except (ValueError, KeyError, TypeError) as exc:
            raise RequestError(
                f"{path}, line {number} is not a result of `plait eval` ({exc!r}); give another --out"
            ) from exc
    return records


class RecordFile:
    """Appends records to a JSONL file, each at once; a half-written last line of an earlier run is cut off."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            if self.path.is_file():
                whole = self.path.read_bytes()
                if whole and not whole.endswith(b"\n"):
                    self.path.write_bytes(whole[: whole.rfind(b"\n") + 1])
            self._file = self.path.open("ab", buffering=0)
        except OSError as exc:
            raise LogError(f"cannot write {self.path}: {exc.strerror}") from exc

    def write(self, record: Record) -> None:
        rest = memoryview((json.dumps(asdict(record)) + "\n").encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as exc:
            raise LogError(f"cannot write {self.path}: {exc.strerror}; what it holds can be resumed") from exc

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class _Runner:
    engine: Engine
    format: TrajectoryFormat
    tokenizer: Tokenizer
    model: str
    budget: Budget
    concurrency: int
    seed: int
    on_run: OnRun | None

    async def record(self, problem: Problem) -> Record:
        request = Request(
            prompt_ids=prompt_ids(self.tokenizer, problem.prompt),
            budget=self.budget,
            seed=self.seed,
            # Weights that were trained to read a budget are told it.
            conditioned=self.format.levels is not None,
            # They cost a softmax a token: only for who reads them.
            logprobs=self.on_run is not None,
        )
        started = anyio.current_time()
        async with open_run(request, engine=self.engine, format=self.format) as run:
            events = [event async for event in run]
        wall_s = anyio.current_time() - started
        tree = run.tree
        text = response_text(tree, self.tokenizer)
        usage = tree.usage()
        forked = usage.forks > 0
        if self.on_run is not None:
            self.on_run(problem, self.model, events)
        return Record(
            model=self.model,
            family=problem.family,
            prompt=problem.prompt,
            question=problem.question,
            answer=tasks.answer_of(text),
            right=tree.stop is StopReason.EOS and tasks.grade(problem, text),
            forked=forked,
            forks=problem.forks,
            decision_right=forked == problem.forks,
            threads=usage.threads,
            num_forks=usage.forks,
            total_tokens=usage.sampled_tokens,
            critical_path_tokens=usage.critical_path_tokens,
            token_latency=tree.token_latency(),
            longest_context_tokens=usage.longest_context_tokens,
            reread_tokens=usage.reread_tokens,
            wall_s=round(wall_s, 6),
            stop=str(tree.stop or StopReason.CANCELLED),
            serial_cost=problem.shape.get("serial_cost"),
            parallel_cost=problem.shape.get("parallel_cost"),
            concurrency=self.concurrency,
            seed=self.seed,
            max_threads=self.budget.max_threads,
            max_tokens=self.budget.max_tokens,
        )


def by_model(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each model, in order."""
    out: dict[str, list[Record]] = {}
    for record in records:
        out.setdefault(record.model, []).append(record)
    return out


def pairs(adaptive: Iterable[Record], twin: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
    """The same problem on both, in the order of the first."""
    of_twin = {record.prompt: record for record in twin}
    for record in adaptive:
        if record.prompt in of_twin:
            yield record, of_twin[record.prompt]
