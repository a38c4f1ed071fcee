"""Runs problems through sessions and keeps one record of each: what was answered, whether forking was right, the cost.

Knows nothing of how a model was trained or how results are shown. Adaptive model, sequential twin and every other
method go through the same code; a comparison takes them in turns problem by problem, one at a time, so that all see the
same machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import anyio

from plait import tasks
from plait.bench.methods import GREEDY, Method, combined, forced_ids
from plait.bench.records import Record
from plait.engines.base import Engine
from plait.errors import Failures, RequestError
from plait.events import Event
from plait.formats.base import TrajectoryFormat
from plait.models import Model, load_model, prompt_ids, response_text
from plait.session import open_run
from plait.tasks import Family, Problem, Split
from plait.tokenizer import Tokenizer
from plait.types import Budget, Request, StopReason

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
    method: Method = GREEDY,
    on_record: OnRecord | None = None,
    on_run: OnRun | None = None,
) -> list[Record]:
    """Answer problems; records in the order of the problems, whatever order they end in.

    Args:
        problems: What to run; drawn from as places come free.
        engine: Open.
        format, tokenizer: The ones the engine's weights were trained with.
        model: What records say ran.
        concurrency: Problems at the same time.
        seed: With the problem decides what a method samples.
        method: How each is answered; whose weights these are is not asked.
        on_record: Called as each problem ends.
        on_run: Called with the events of each run, before its record.
    """
    if concurrency < 1:
        raise RequestError(f"concurrency is {concurrency}; it must be at least 1")
    records: dict[int, Record] = {}
    source = iter(enumerate(problems))
    limits = budget or Budget()
    runner = _Runner(engine, format, tokenizer, model, limits, concurrency, seed, on_run, (method,))
    failures = Failures()

    async def work() -> None:
        with failures.noting():
            for number, problem in source:
                (record,) = await runner.records(problem)
                records[number] = record
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
    methods: Sequence[Method] | None = None,
    engine: str = "llamacpp",
    options: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    skip: Iterable[tuple[str, str, str]] = (),
    on_record: OnRecord | None = None,
    on_run: OnRun | None = None,
) -> list[Record]:
    """Answer every problem with every model, one at a time, the order reversed from problem to problem.

    Args:
        models: Usually an adaptive model and its twin.
        methods: How each of them answers, a model named again for another method; None: greedily. Those that run the
            same, as `majority@8` and `pass@8` of one model do, are run once.
        engine: Kind of the engines, the same for all; each has its own, so that none finds what another computed.
        options: Passed to each, over what its number of runs needs (`engine_options`).
        skip: Keys of records that are there.

    Raises:
        RequestError: A fork is to be forced on a model that cannot be.
    """
    records: list[Record] = []
    done = set(skip)
    entries: dict[tuple[Any, ...], tuple[Model, list[Method]]] = {}
    for model, method in zip(models, methods or [GREEDY] * len(models), strict=True):
        entries.setdefault((model.id, *method.runs), (model, []))[1].append(method)
    async with AsyncExitStack() as stack:
        runners: list[_Runner] = []
        for model, own in entries.values():
            settings = {**engine_options(engine, own[0].samples), **(options or {})}
            opened = await stack.enter_async_context(model.open_engine(engine, **settings))
            limits = budget or Budget()
            runners.append(
                _Runner(opened, model.format, model.tokenizer, model.id, limits, 1, seed, on_run, tuple(own))
            )
        warm: set[int] = set()
        for number, problem in enumerate(problems):
            for runner in runners if number % 2 == 0 else runners[::-1]:
                if all((problem.prompt, runner.model, method.name) in done for method in runner.methods):
                    continue
                if id(runner) not in warm:
                    # The first pass pays for memory that later ones find allocated.
                    warm.add(id(runner))
                    await replace(runner, on_run=None).records(problem)
                for record in await runner.records(problem):
                    if record.key in done:
                        continue
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


def sample_seed(seed: int, prompt: str, sample: int) -> int:
    """The seed of one of several runs of a problem, 63 bits."""
    return int.from_bytes(blake2b(f"{seed} {sample} {prompt}".encode(), digest_size=8).digest(), "little") >> 1


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
    methods: tuple[Method, ...]
    """That run the same; at least one."""

    async def records(self, problem: Problem) -> list[Record]:
        """A record for each method."""
        first = self.methods[0]
        runs: dict[int, Record] = {}
        failures = Failures()

        async def run(sample: int) -> None:
            with failures.noting():
                runs[sample] = await self.run(problem, sample)

        started = anyio.current_time()
        if first.samples == 1:
            await run(0)
        else:
            with failures.unwrapped():
                async with anyio.create_task_group() as together:
                    for sample in range(first.samples):
                        together.start_soon(run, sample)
        wall_s = anyio.current_time() - started
        samples = [runs[sample] for sample in range(first.samples)]
        if first.take is None:
            return samples
        return [combined(samples, method, problem, wall_s=wall_s) for method in self.methods]

    async def run(self, problem: Problem, sample: int) -> Record:
        method = self.methods[0]
        budget = method.budget(self.budget)
        ids = prompt_ids(self.tokenizer, problem.prompt)
        if self.format.levels is not None:
            # Weights that were trained to read a budget are told it.
            ids = self.format.condition(ids, budget)
        if method.forking == "always":
            ids += forced_ids(self.format, self.tokenizer)
        request = Request(
            prompt_ids=ids,
            budget=budget,
            temperature=method.temperature,
            seed=sample_seed(self.seed, problem.prompt, sample) if method.temperature else self.seed,
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
            max_threads=budget.max_threads,
            max_tokens=budget.max_tokens,
            method=method.name,
            temperature=method.temperature,
        )
