"""What forking and joining cost on an engine: n threads of m tokens after a shared prefix, joined, against one line.

    python benchmarks/bench_forkjoin.py [--engine llamacpp,torch] [--model PATH.gguf] [--quick] [--json]

For each number of threads, in turn and then again: fork (until all threads have their first token, less the same for
one thread), rate (tokens a second, of all threads and of one), join (until the parent's next token), tokens computed
again by the join (those of threads that were computed before; a merge computes none), and the whole block against the
same number of tokens sampled one after the other. Medians over the rounds with their range. Nothing else should run.
`--json` prints the rows as one list on the last line; with `--quick` it takes less than a minute. Servers, and all
engines in one table: `bench_engines.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import anyio
from blocks import block, cells, head, medians, prefix_ids

from plait.engines import open_engine
from plait.models import DEFAULT, load_model


async def main(args: argparse.Namespace) -> None:
    counts = (1, 4, 8) if args.quick else (1, 2, 4, 8, 16, 32)
    rounds = args.rounds or (3 if args.quick else 5)
    path = Path(args.model) if args.model else load_model(DEFAULT).path
    assert path is not None
    most = args.prefix + max(counts) * (args.tokens + 4) + 64
    rows: list[dict[str, Any]] = []
    print(f"{path.name}: a prefix of {args.prefix} tokens, threads of {args.tokens} tokens, {rounds} rounds\n")
    print(head(("engine", "join")))
    for name in args.engine.split(","):
        options: dict[str, Any] = {"path": path}
        if name == "llamacpp":
            options |= {"cells": 3 * most, "max_seqs": min(256, 8 * max(counts)), "threads": args.threads}
        async with open_engine(name, **options) as engine:
            cases = [(join, n) for n in counts for join in ("merge", "concat")]
            results: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
            for number in range((rounds + 1) * len(cases)):
                join, n = cases[number % len(cases)]
                prefix = prefix_ids(args.prefix, number)
                results[join, n].append(await block(engine, join, n, args.tokens, prefix))
        for (join, n), (_, *measured) in results.items():  # the first round warms up
            print(cells((name, join), n, measured), flush=True)
            rows.append({"engine": name, "join": join, "threads": n, **medians(measured)})
    if args.json:
        print(json.dumps(rows))


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="llamacpp", help="llamacpp, torch, or both separated by a comma")
    parser.add_argument("--model", help="a GGUF file; default: the embedded model")
    parser.add_argument("--prefix", type=int, default=256, help="tokens of the shared prefix")
    parser.add_argument("--tokens", type=int, default=30, help="tokens of a thread")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, help="CPU threads of the llama.cpp engine")
    parser.add_argument("--quick", action="store_true", help="1, 4 and 8 threads, three rounds")
    parser.add_argument("--json", action="store_true", help="the rows as a JSON list on the last line")
    args = parser.parse_args(argv)
    if unknown := set(args.engine.split(",")) - {"llamacpp", "torch"}:
        parser.error(
            f"--engine is {', '.join(sorted(unknown))}; it must be llamacpp or torch (bench_engines.py has more)"
        )
    if min(args.prefix, args.tokens, args.rounds or 1) < 1:
        parser.error("--prefix, --tokens and --rounds must be at least 1")
    return args


if __name__ == "__main__":
    anyio.run(main, parsed())
