"""What the runtime costs for each chunk: many sessions at once on an engine that takes no time.

    python benchmarks/bench_overhead.py [--sessions 64] [--threads 8] [--tokens 64] [--repeats 5] [--json]

Every session runs one block of threads in the ThreadWeaver format; every chunk is one token. `total` is all of it;
`engine` is the same engine calls read by as many plain tasks, without sessions: the scheduler and the scripted engine
themselves. `overhead` is the difference: tree, events, channel and reader. Both run in turn in the same process; the
median and the range over the repeats are shown. The target is on wall time, which means something on a machine with
a core to spare; the CPU time of the process stands beside it for a busy one.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from contextlib import aclosing
from typing import Any

import anyio

from plait.engines.scripted import ScriptedEngine
from plait.formats import Block, open_format, render
from plait.session import open_run
from plait.tasks.vocabulary import TOKENIZER
from plait.tree import Tree
from plait.types import Budget, Request, SamplingParams

PROMPT = (*TOKENIZER.bos_ids, *TOKENIZER.encode("1+2?"))
BUDGET = Budget(max_tokens=None, max_threads_per_fork=None)


def program(threads: int, tokens: int) -> Tree:
    """A run with one block: every thread says `tokens` tokens."""
    body = "1" * (tokens - 3)  # beside these a space, a newline and the closing tag
    outlines = tuple(str(i) for i in range(threads))
    block = Block(outlines=outlines, threads=((body,),) * threads)
    return render(
        ("1", block, "2"), format=open_format("threadweaver", TOKENIZER), tokenizer=TOKENIZER, prompt_ids=PROMPT
    )


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = clocks()
    return wall - start[0], cpu - start[1]


async def sessions(tree: Tree, n: int) -> tuple[float, float]:
    """Wall and CPU seconds for n sessions that run this program at once."""
    engine = ScriptedEngine(script=tree)
    format = open_format("threadweaver", TOKENIZER)
    request = Request(prompt_ids=PROMPT, budget=BUDGET)

    async def one() -> None:
        async with open_run(request, engine=engine, format=format) as run:
            async for _ in run:
                pass
        assert run.tree.num_sampled == tree.num_sampled

    start = clocks()
    async with anyio.create_task_group() as tasks:
        for _ in range(n):
            tasks.start_soon(one)
    return since(start)


async def engine_alone(tree: Tree, n: int) -> tuple[float, float]:
    """Wall and CPU seconds for the same engine calls in the same order, each thread a plain task."""
    engine = ScriptedEngine(script=tree)
    calls = [(tree.context(s.id), SamplingParams(max_tokens=len(s.sampled_ids))) for s in tree.segments.values()]

    async def read(i: int) -> None:
        async with aclosing(engine.generate(*calls[i])) as chunks:
            async for _ in chunks:
                pass

    async def one() -> None:
        await read(0)
        async with anyio.create_task_group() as block:
            for i in range(1, len(calls) - 1):
                block.start_soon(read, i)
        await read(len(calls) - 1)

    start = clocks()
    async with anyio.create_task_group() as tasks:
        for _ in range(n):
            tasks.start_soon(one)
    return since(start)


def measure(*, num_sessions: int, threads: int, tokens: int, repeats: int, backend: str) -> dict[str, Any]:
    """Microseconds a chunk; medians over the repeats, with range."""
    tree = program(threads, tokens)
    chunks = tree.num_sampled * num_sessions
    rows: dict[str, list[float]] = {}
    for _ in range(repeats):
        gc.collect()
        totals = anyio.run(sessions, tree, num_sessions, backend=backend)
        engines = anyio.run(engine_alone, tree, num_sessions, backend=backend)
        for clock, total, engine in zip(("wall", "cpu"), totals, engines, strict=True):
            for name, seconds in (("total", total), ("engine", engine), ("overhead", total - engine)):
                rows.setdefault(f"{name}, {clock}", []).append(seconds / chunks * 1e6)
    return {
        "sessions": num_sessions,
        "threads": threads,
        "chunks": chunks,
        "repeats": repeats,
        "backend": backend,
        "python": platform.python_version(),
        "us_per_chunk": {
            name: {"median": round(statistics.median(v), 2), "min": round(min(v), 2), "max": round(max(v), 2)}
            for name, v in rows.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(
        num_sessions=args.sessions,
        threads=args.threads,
        tokens=args.tokens,
        repeats=args.repeats,
        backend=args.backend,
    )
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['chunks']} chunks, {args.sessions} sessions of {args.threads} threads, {args.backend}")
    print("| microseconds a chunk | median | range |\n|---|---|---|")
    for name, row in result["us_per_chunk"].items():
        print(f"| {name} | {row['median']} | {row['min']} - {row['max']} |")


if __name__ == "__main__":
    main()
