"""Speculative decoding by prompt lookup: the same problems with and without, in turn, in one process.

    python benchmarks/bench_speculation.py
    python benchmarks/bench_speculation.py --model plait-tiny-sequential --guess 0,2,4,8,16 -n 20 --json

Each problem of the model's families is answered greedily, one at a time, by engines that differ in `speculate` only;
the order turns from problem to problem, and the first pass of each engine is not counted. `speedup` is the median over
problems of wall seconds without, by wall seconds with, and its quartiles; `same` the problems whose every segment has
the same tokens (kernels of quantised weights round differently where more rows share a step). Threads as the engine
chooses, or --threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import AsyncExitStack
from typing import Any

import anyio

from plait.bench.runner import problems
from plait.models import DEFAULT, Model, load_model
from plait.session import open_run


async def answer(engine: Any, model: Model, question: str) -> tuple[dict[str, tuple[int, ...]], float]:
    """What every segment sampled, and wall seconds."""
    start = time.perf_counter()
    async with open_run(model.request(question, logprobs=False), engine=engine, format=model.format) as run:
        async for _ in run:
            pass
    seconds = time.perf_counter() - start
    return {id: tuple(segment.sampled_ids) for id, segment in run.tree.segments.items()}, seconds


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = load_model(args.model)
    drawn = problems(model.families, args.n, seed=args.seed)
    guesses = [0, *(int(g) for g in args.guess.split(",") if int(g))]
    seconds: dict[int, list[float]] = {g: [] for g in guesses}
    same = dict.fromkeys(guesses, 0)
    async with AsyncExitStack() as stack:
        options = {} if args.threads is None else {"threads": args.threads}
        engines = {
            g: await stack.enter_async_context(model.open_engine("llamacpp", speculate=g, **options)) for g in guesses
        }
        for engine in engines.values():
            await answer(engine, model, drawn[0].question)
        before = {g: engine.stats() for g, engine in engines.items()}
        for number, problem in enumerate(drawn):
            said: dict[int, Any] = {}
            turned = guesses[number % len(guesses) :] + guesses[: number % len(guesses)]
            for g in turned:
                said[g], wall = await answer(engines[g], model, problem.question)
                seconds[g].append(wall)
            for g in guesses:
                same[g] += said[g] == said[0]
        rows: list[dict[str, Any]] = []
        for g, engine in engines.items():
            after, ratios = engine.stats(), [a / b for a, b in zip(seconds[0], seconds[g], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            drafted = after.drafted_tokens - before[g].drafted_tokens
            accepted = after.accepted_tokens - before[g].accepted_tokens
            rows.append(
                {
                    "model": model.id,
                    "speculate": g,
                    "problems": len(drawn),
                    "tokens": after.decode_tokens - before[g].decode_tokens,
                    "steps": after.steps - before[g].steps,
                    "drafted": drafted,
                    "accepted": accepted,
                    "wall_ms": round(statistics.median(seconds[g]) * 1e3, 2),
                    "speedup": round(middle, 3),
                    "speedup_quartiles": [round(low, 3), round(high, 3)],
                    "same": same[g],
                }
            )
    return rows


def main(args: argparse.Namespace) -> None:
    rows = anyio.run(measure, args)
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(row[c]) for c in columns)} |")
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, metavar="NAME|PATH")
    parser.add_argument("--guess", default="2,4,8", metavar="N[,N]", help="values of speculate; 0 is always measured")
    parser.add_argument("-n", type=int, default=20, metavar="N", help="problems of each family (default 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which problems")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a step; default: as the engine finds")
    parser.add_argument("--json", action="store_true", help="print a list of rows as the last line")
    main(parser.parse_args())
