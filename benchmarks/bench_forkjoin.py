"""What forking and joining cost on an engine: n threads of m tokens after a shared prefix, joined, against one line.

    python benchmarks/bench_forkjoin.py [--engine llamacpp,torch] [--model PATH.gguf] [--quick] [--json]

For each number of threads, in turn and then again: fork (until all threads have their first token, less the same for
one thread), rate (tokens a second, of all threads and of one), join (until the parent's next token), tokens computed
again by the join (those of threads that were computed before; a merge computes none), and the whole block against the
same number of tokens sampled one after the other. Medians over the rounds with their range. Nothing else should run.
`--json` prints the rows as one list on the last line; with `--quick` it takes less than a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import aclosing
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio

from plait.engines import Engine, open_engine
from plait.models import DEFAULT, load_model
from plait.types import Context, Merge, SamplingParams

HEADER, SEPARATOR = 3, (5,)


async def call(engine: Engine, context: Context, tokens: int) -> tuple[int, ...]:
    """Sample so many tokens, whatever they are."""
    ids: list[int] = []
    async with aclosing(engine.generate(context, SamplingParams(max_tokens=tokens))) as chunks:
        async for chunk in chunks:
            ids += chunk.token_ids
    return tuple(ids)


async def side_by_side(engine: Engine, contexts: list[Context], tokens: int) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = [()] * len(contexts)

    async def one(i: int) -> None:
        out[i] = await call(engine, contexts[i], tokens)

    async with anyio.create_task_group() as tasks:
        for i in range(len(contexts)):
            tasks.start_soon(one, i)
    return out


async def block(engine: Engine, join: str, threads: int, tokens: int, prefix: tuple[int, ...]) -> dict[str, float]:
    """One block and the same in one line; seconds, and tokens that the join computed again."""

    def headed(mark: int) -> list[tuple[int, ...]]:
        return [(HEADER + mark, HEADER + i % 7, HEADER + i // 7) for i in range(threads)]

    await call(engine, (prefix,), 1)
    start = perf_counter()
    await call(engine, (prefix, headed(0)[0]), 1)
    one = perf_counter()
    await side_by_side(engine, [(prefix, header) for header in headed(1)], 1)
    forked = perf_counter()
    sampled = await side_by_side(engine, [(prefix, header) for header in headed(2)], tokens)
    done = perf_counter()
    before = engine.stats().prefill_tokens
    branches = [(*header, *ids) for header, ids in zip(headed(2), sampled, strict=True)]
    if join == "merge":
        context: Context = (prefix, Merge(tuple((branch,) for branch in branches)), SEPARATOR)
    else:
        context = (prefix, *branches, SEPARATOR)
    await call(engine, context, 1)
    joined = perf_counter()
    # The last token of a thread is sampled but was never computed: computing it now is not again.
    again = engine.stats().prefill_tokens - before - len(SEPARATOR) - threads
    alone = perf_counter()
    await call(engine, (prefix, headed(3)[0]), threads * tokens + 1)
    line = perf_counter() - alone
    return {
        "fork_ms": ((forked - one) - (one - start)) * 1e3,
        "tokens_per_s": threads * tokens / (done - forked),
        "join_ms": (joined - done) * 1e3,
        "prefilled_again": max(0, again),
        "speedup_wall": line / (joined - forked),
    }


def spread(values: list[float]) -> str:
    digits = 2 if max(values) < 100 else 0
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


async def main(args: argparse.Namespace) -> None:
    counts = (1, 4, 8) if args.quick else (1, 2, 4, 8, 16, 32)
    rounds = args.rounds or (3 if args.quick else 5)
    path = Path(args.model) if args.model else load_model(DEFAULT).path
    prefix = tuple(HEADER + i % 11 for i in range(args.prefix))
    most = args.prefix + max(counts) * (args.tokens + 4) + 64
    rows: list[dict[str, Any]] = []
    print(f"{path.name}: a prefix of {args.prefix} tokens, threads of {args.tokens} tokens, {rounds} rounds\n")
    print(
        "| engine | join | threads | fork ms | tokens/s | of one thread | join ms | computed again | against one line |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.engine.split(","):
        options: dict[str, Any] = {"path": path}
        if name == "llamacpp":
            options |= {"cells": 3 * most, "max_seqs": min(256, 8 * max(counts)), "threads": args.threads}
        async with open_engine(name, **options) as engine:
            cases = [(join, n) for n in counts for join in ("merge", "concat")]
            results: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
            for _ in range(rounds + 1):
                for join, n in cases:
                    results[join, n].append(await block(engine, join, n, args.tokens, prefix))
        for (join, n), measured in results.items():
            columns = {key: [m[key] for m in measured[1:]] for key in measured[0]}  # the first round warms up
            of_one = [rate / n for rate in columns["tokens_per_s"]]
            again = int(statistics.median(columns["prefilled_again"]))
            print(
                f"| {name} | {join} | {n} | {spread(columns['fork_ms'])} | {spread(columns['tokens_per_s'])} |"
                f" {spread(of_one)} | {spread(columns['join_ms'])} | {again} | {spread(columns['speedup_wall'])} |",
                flush=True,
            )
            medians = {key: round(statistics.median(values), 4) for key, values in columns.items()}
            rows.append({"engine": name, "join": join, "threads": n, **medians, "prefilled_again": again})
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="llamacpp", help="engines that read a GGUF file, separated by commas")
    parser.add_argument("--model", help="a GGUF file; default: the embedded model")
    parser.add_argument("--prefix", type=int, default=256, help="tokens of the shared prefix")
    parser.add_argument("--tokens", type=int, default=30, help="tokens of a thread")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, help="CPU threads of the llama.cpp engine")
    parser.add_argument("--quick", action="store_true", help="1, 4 and 8 threads, three rounds")
    parser.add_argument("--json", action="store_true", help="the rows as a JSON list on the last line")
    anyio.run(main, parser.parse_args())
