"""Merge or concat: what each join leaves of the token speedup as wall-clock, on the engine that ships.

    python benchmarks/bench_join.py [--problems 40] [--rounds 3] [--json]

For the same held-out problems the gold solution is replayed in three formats (sequential, threadweaver with a concat
join, multiverse with a merge join): every engine call of the gold tree is made, on the real engine and weights, with as
many tokens sampled as the gold call has, threads side by side, joins as the format says. So the three differ in nothing
but the format: not in accuracy, and not in who learned what better. Sampled ids are whatever the model says; time does
not depend on them. Formats alternate problem by problem in one run, batch 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import islice
from typing import Any

import anyio

from plait import tasks
from plait.engines.base import Engine
from plait.formats import open_format, render
from plait.models import DEFAULT, load_model, prompt_ids
from plait.tree import Segment, Tree
from plait.types import Context, Merge, SamplingParams

FORMATS = ("sequential", "threadweaver", "multiverse")
FAMILIES = ("long_multiplication", "product", "expression", "bundle")


class Replay:
    """One gold tree's engine calls, with its lengths and its joins."""

    def __init__(self, engine: Engine, tree: Tree, weights: int) -> None:
        self.engine, self.tree, self.weights = engine, tree, weights
        self.sampled: dict[str, tuple[int, ...]] = {}

    async def run(self) -> float:
        start = time.perf_counter()
        await self.thread("0")
        return time.perf_counter() - start

    async def thread(self, name: str) -> None:
        k = 0
        while (segment := self.tree.segments.get(f"{name}:{k}")) is not None:
            await self.call(segment)
            branches = sorted({s.thread for s in self.tree.segments.values() if s.parent == segment.id} - {name})
            async with anyio.create_task_group() as block:
                for branch in branches:
                    block.start_soon(self.thread, branch)
            k += 1

    async def call(self, segment: Segment) -> None:
        wanted = len(segment.sampled_ids)
        params = SamplingParams(max_tokens=wanted, banned_ids=tuple(range(self.weights, 64)), logprobs=False)
        ids: list[int] = []
        async for chunk in self.engine.generate(self.context(segment.id), params):
            ids += chunk.token_ids
        assert len(ids) == wanted
        self.sampled[segment.id] = tuple(ids)

    def context(self, id: str, upto: str | None = None) -> Context:
        """Path to a segment, with what was really sampled on it; where threads are read again, with their ids."""
        parts: list[tuple[int, ...] | Merge] = []
        run: list[int] = []
        path = self.tree.path(id)
        if upto is not None:
            path = path[[s.id for s in path].index(upto) + 1 :]
        for segment in path:
            forced = list(segment.forced_ids)
            if segment.join == "merge":
                parts += [tuple(run), Merge(tuple(self.context(j, segment.parent) for j in segment.joins))]
                run = []
            elif segment.join == "concat":
                forced = self.read_again(segment)
            run += forced
            run += self.sampled.get(segment.id, ()) if segment.id != id or upto is not None else ()
        parts.append(tuple(run))
        return tuple(parts)

    def read_again(self, segment: Segment) -> list[int]:
        ids: list[int] = []
        for i, join in enumerate(segment.joins):
            header = self.tree.segments[join].forced_ids
            ids += [*(header if i == 0 else header[1:]), *self.sampled[join]]
        return [*ids, *segment.forced_ids[len(ids) :]]


async def measure(name: str, problems: int, rounds: int, options: dict[str, Any]) -> list[dict[str, object]]:
    model = load_model(name)
    tokenizer = model.tokenizer
    formats = {name: open_format(name, tokenizer) for name in FORMATS}
    known = sum(not t.startswith("<reserved") for t in tokenizer.tokens)
    walls: dict[str, list[list[float]]] = {name: [] for name in FORMATS}
    tokens: dict[str, list[int]] = {name: [] for name in FORMATS}
    async with model.open_engine(**options) as engine:
        for family in FAMILIES:
            drawn = (p for p in tasks.problems(family, seed=11, split="held_out") if p.forks)
            for problem in islice(drawn, problems // len(FAMILIES)):
                trees = {
                    name: render(
                        tasks.gold(problem, parallel=name != "sequential"),
                        format=format,
                        tokenizer=tokenizer,
                        prompt_ids=prompt_ids(tokenizer, problem.prompt),
                    )
                    for name, format in formats.items()
                }
                taken: dict[str, list[float]] = {name: [] for name in FORMATS}
                for _ in range(rounds):
                    for name, tree in trees.items():
                        taken[name].append(await Replay(engine, tree, known).run())
                for name, tree in trees.items():
                    walls[name].append(taken[name])
                    tokens[name].append(tree.critical_path())
    rows: list[dict[str, object]] = []
    for name in FORMATS:
        by_round = list(zip(*walls[name], strict=True))
        base = list(zip(*walls["sequential"], strict=True))
        ratios = [sum(b) / sum(w) for b, w in zip(base, by_round, strict=True)]
        speedup_tokens = sum(tokens["sequential"]) / sum(tokens[name])
        rows.append(
            {
                "format": name,
                "join": formats[name].join_kind,
                "critical_path_tokens": round(statistics.mean(tokens[name]), 1),
                "wall_ms": round(1000 * statistics.median(map(statistics.mean, by_round)), 2),
                "speedup_tokens": round(speedup_tokens, 3),
                "speedup_wall": round(statistics.median(ratios), 3),
                "speedup_wall_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "kept": round(statistics.median(ratios) / speedup_tokens, 3),
            }
        )
    return rows


def option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="the rows as one line of JSON")
    parser.add_argument(
        "--option", action="append", default=[], type=option, metavar="NAME=VALUE", help="of the engine"
    )
    args = parser.parse_args()
    rows = anyio.run(measure, args.model, args.problems, args.rounds, dict(args.option))
    if args.json:
        print(json.dumps(rows))
        return
    print("| format | join | critical path, tokens | wall, ms | speedup, tokens | speedup, wall (range) | kept |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        low, high = r["speedup_wall_range"]  # type: ignore[misc]
        print(
            f"| {r['format']} | {r['join']} | {r['critical_path_tokens']} | {r['wall_ms']} | {r['speedup_tokens']} "
            f"| {r['speedup_wall']} ({low}-{high}) | {r['kept']} |"
        )


if __name__ == "__main__":
    main()
