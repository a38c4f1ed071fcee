"""What a step of the llama.cpp engine costs, and what a fork and a join add to it.

    python benchmarks/bench_step.py [--runs 7] [--threads 1] [--dtype Q8_0] [--width 128] [--json]

A random Llama of the embedded model's shape (time does not depend on the weights), or of another width, is written as
GGUF in F32, F16 and Q8_0. First table: microseconds a step at 1 to 16 rows, in all and inside llama.cpp; the difference
is what Python adds. Second table: one block as a problem has it (a prompt, four threads of 30 tokens, a merge join, a
conclusion), the Python time of the fork and of the join, the way from the last thread's stop to the parent's next
token, and the same number of tokens in one line. Medians over the runs with their range; nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
import numpy as np
from blocks import call, side_by_side, spread

from plait.engines.llamacpp import LlamaCppEngine
from plait.train.gguf import write_gguf
from plait.types import Context, Merge

PROMPT, HEADER, THREADS, LENGTH, CONCLUSION = tuple(range(24)), 3, 4, 30, 10


def shape(width: int) -> dict[str, int]:
    """Four layers, heads of 64, three times as many hidden units."""
    return {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 2048,
    }


def random_weights(config: dict[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    width, hidden = config["hidden_size"], config["intermediate_size"]

    def matrix(rows: int, columns: int) -> Any:
        return (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(64, width), "model.norm.weight": np.ones(width, np.float32)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        tensors |= {f"{at}self_attn.{n}_proj.weight": matrix(width, width) for n in "qkvo"}
        tensors |= {f"{at}mlp.{n}_proj.weight": matrix(hidden, width) for n in ("gate", "up")}
        tensors[f"{at}mlp.down_proj.weight"] = matrix(width, hidden)
        tensors |= {
            f"{at}{n}.weight": np.ones(width, np.float32) for n in ("input_layernorm", "post_attention_layernorm")
        }
    return tensors


async def step_cost(path: Path, rows: int, options: dict[str, Any]) -> tuple[float, float]:
    """Microseconds a step: in all, and inside llama.cpp. The first round warms up."""
    async with LlamaCppEngine(path, **options) as engine:
        scheduler = engine._scheduler
        assert scheduler is not None
        before = (0.0, 0.0, 0)
        for _ in range(2):
            await anyio.sleep(0.005)  # the last step's own books are closed
            before = (scheduler.work_s, scheduler.compute_s, scheduler.steps)
            await side_by_side(engine, [(PROMPT, (i,)) for i in range(rows)], 60)
        await anyio.sleep(0.005)
        steps = scheduler.steps - before[2]
        return (scheduler.work_s - before[0]) / steps * 1e6, (scheduler.compute_s - before[1]) / steps * 1e6


@contextmanager
def timed(owner: Any, name: str) -> Iterator[list[tuple[float, float]]]:
    """Start and end of every call of a method while inside."""
    spans: list[tuple[float, float]] = []
    original: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any) -> Any:
        start = perf_counter()
        try:
            return original(*args)
        finally:
            spans.append((start, perf_counter()))

    setattr(owner, name, wrapper)
    try:
        yield spans
    finally:
        setattr(owner, name, original)


async def block_cost(path: Path, options: dict[str, Any]) -> dict[str, float]:
    """One block, in microseconds; the second of two, so that everything is warm."""
    out: dict[str, float] = {}
    async with LlamaCppEngine(path, **options) as engine:
        scheduler = engine._scheduler
        assert scheduler is not None
        for mark in (0, 1):
            start = perf_counter()
            parent = (*PROMPT, 40 + mark, *await call(engine, ((*PROMPT, 40 + mark),), CONCLUSION))
            with timed(scheduler, "_compose") as compositions:
                contexts: list[Context] = [(parent, (30, i, 31)) for i in range(THREADS)]
                threads = await side_by_side(engine, contexts, LENGTH)
            fork = sum(b - a for a, b in compositions)
            branches = tuple(((30, i, 31, *ids),) for i, ids in enumerate(threads))
            with timed(scheduler, "_compose") as compositions, timed(scheduler._decoder, "decode") as decodes:
                stopped = perf_counter()
                await call(engine, (parent, Merge(branches), (32,)), CONCLUSION)
            out = {
                "block": perf_counter() - start,
                "fork": fork,
                "join": sum(b - a for a, b in compositions),
                "round trip": decodes[0][0] - stopped,
                "join step": decodes[0][1] - decodes[0][0],
            }
        start = perf_counter()
        await call(engine, ((*PROMPT, 45),), 2 * CONCLUSION + THREADS * LENGTH)
        out["one line"] = perf_counter() - start
        out["ratio"] = out["one line"] / out["block"] / 1e6
    return {name: value * 1e6 for name, value in out.items()}


async def main(args: argparse.Namespace) -> None:
    options = {"threads": args.threads, "cells": 2048, "flash_attention": {"on": True, "off": False}.get(args.flash)}
    results: dict[str, Any] = {"options": options, "steps": {}, "blocks": {}}
    with tempfile.TemporaryDirectory() as folder:
        dtypes = [args.dtype] if args.dtype else ["F32", "F16", "Q8_0"]
        config = shape(args.width)
        paths = {d: write_gguf(Path(folder) / f"{d}.gguf", random_weights(config), config, dtype=d) for d in dtypes}
        print("| weights | rows | step us | llama.cpp us | Python us |\n|---|---|---|---|---|")
        for dtype, path in paths.items():
            for rows in (1, 2, 4, 8, 16):
                costs = [await step_cost(path, rows, options) for _ in range(args.runs)]
                whole, inside = ([c[i] for c in costs] for i in (0, 1))
                python = [a - b for a, b in costs]
                results["steps"][f"{dtype} {rows}"] = {"step": whole, "llama.cpp": inside, "python": python}
                print(f"| {dtype} | {rows} | {spread(whole)} | {spread(inside)} | {spread(python)} |", flush=True)
        names = ("fork", "join", "round trip", "join step", "block", "one line", "ratio")
        print(f"\n| weights | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
        for dtype, path in paths.items():
            blocks = [await block_cost(path, options) for _ in range(args.runs)]
            results["blocks"][dtype] = blocks
            print(f"| {dtype} | {' | '.join(spread([b[n] for b in blocks]) for n in names)} |", flush=True)
    tokens = (2 * CONCLUSION + THREADS * LENGTH, 2 * CONCLUSION + LENGTH)
    print(f"\nThe block samples {tokens[0]} tokens; its longest line has {tokens[1]}.")
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["F32", "F16", "Q8_0"])
    parser.add_argument("--width", type=int, default=128, choices=range(64, 1025, 64), metavar="64*N")
    parser.add_argument("--flash", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--json", action="store_true")
    anyio.run(main, parser.parse_args())
