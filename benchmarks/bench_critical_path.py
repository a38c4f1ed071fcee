"""What nesting, dependencies and races save at best: the critical path of gold traces, in sampled tokens.

    python benchmarks/bench_critical_path.py [--problems 400] [--seed 0] [--json]

No model: this is what one that learned the traces without a mistake would need. Nested expressions, by how deep their
sums are: on one line; flat (ThreadWeaver: one block, a thread for each term of the outermost sum, brackets in line);
in waves (ThreadWeaver: a block for all innermost sums, then one for those around them, each waiting for its slowest);
nested (plait: every sum a block of its own); dependencies (plait: the same threads in one block, each needing those
whose values it reads). Countdown: threads for the first pairs that all run to their end (ThreadWeaver), and that race
to the first success (plait). A ratio is that of the means; the interval is of the ratio, over the problems, 95 %,
bootstrapped. Total tokens and the longest context stand beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from typing import Any

from plait import tasks
from plait.formats import Block, Part, Trajectory, open_format, render
from plait.formats.base import ended
from plait.formats.convert import unnested
from plait.models import prompt_ids
from plait.tasks import Problem
from plait.tasks.nested import Nested
from plait.tasks.vocabulary import JOINS
from plait.tree import Tree

Way = tuple[str, Callable[[Problem], Trajectory]]


def line(problem: Problem) -> Trajectory:
    return tasks.gold(problem, parallel=False)


def flat(problem: Problem) -> Trajectory:
    return tasks.gold(problem, parallel=True)


def full(problem: Problem) -> Trajectory:
    return tasks.gold(problem, parallel=True, plait=True)


def graph(problem: Problem) -> Trajectory:
    return unnested(full(problem))


def waves(problem: Problem) -> Trajectory:
    """Threads that need each other as blocks one after another: what a format without dependencies can do."""
    (block, *rest) = graph(problem)
    assert isinstance(block, Block)
    levels: list[int] = []
    for needs in block.needs or [()] * len(block.threads):
        levels.append(1 + max((levels[n] for n in needs), default=-1))
    parts: list[Part] = []
    for level in range(max(levels) + 1):
        own = [i for i, at in enumerate(levels) if at == level]
        threads: list[Trajectory] = []
        for i in own:
            body, returns = ended(block.threads[i])
            threads.append(("".join([*map(str, body), returns or ""]),))
        parts.append(Block(tuple(block.outlines[i] for i in own), tuple(threads)))
    return (*parts, block.conclusion, *rest)


EXPRESSIONS: dict[str, Way] = {
    "one line": ("sequential", line),
    "flat": ("threadweaver", flat),
    "waves": ("threadweaver", waves),
    "nested": ("plait", full),
    "dependencies": ("plait", graph),
}
SEARCHES: dict[str, Way] = {
    "one line": ("sequential", line),
    "flat": ("threadweaver", flat),
    "race": ("plait", full),
}


def measure(drawn: list[Problem], ways: dict[str, Way], rng: random.Random) -> dict[str, Any]:
    """Means over the problems of each way, and how much longer the flat path is."""
    trees: dict[str, list[Tree]] = {}
    for name, (format, solved) in ways.items():
        opened = open_format(format, JOINS)
        trees[name] = [
            render(solved(p), format=opened, tokenizer=JOINS, prompt_ids=prompt_ids(JOINS, p.prompt)) for p in drawn
        ]
    paths = {name: [tree.critical_path() for tree in of] for name, of in trees.items()}
    rows: dict[str, Any] = {}
    for name, of in trees.items():
        ratios = sorted(
            sum(paths["flat"][i] for i in picked) / sum(paths[name][i] for i in picked)
            for picked in (rng.choices(range(len(drawn)), k=len(drawn)) for _ in range(400))
        )
        rows[name] = {
            "critical_path_tokens": round(statistics.fmean(paths[name]), 1),
            "total_tokens": round(statistics.fmean(tree.num_sampled for tree in of), 1),
            "longest_context_tokens": round(statistics.fmean(tree.longest_context() for tree in of), 1),
            "threads": round(statistics.fmean(tree.num_threads for tree in of), 2),
            "flat_over_this": round(sum(paths["flat"]) / sum(paths[name]), 3),
            "interval": [round(ratios[9], 3), round(ratios[-10], 3)],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=400, help="Of each row.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    result: dict[str, Any] = {}
    for depth in (2, 3, 4):
        family = Nested(depths=(*[0.0] * (depth - 1), 1.0))
        drawn = [family.sample(rng) for _ in range(args.problems)]
        result[f"expressions, sums {depth} deep"] = measure(drawn, EXPRESSIONS, rng)
    countdown = [p for p in (tasks.sample("countdown", rng, "held_out") for _ in range(4 * args.problems)) if p.forks]
    for name, wanted in (("countdown, solvable", True), ("countdown, all", None)):
        drawn = [p for p in countdown if wanted is None or p.shape["solvable"]][: args.problems]
        result[name] = measure(drawn, SEARCHES, rng)
    if args.json:
        print(json.dumps({"problems": args.problems, "seed": args.seed, "results": result}))
        return
    print("| problems | trace | critical path | total | longest context | threads | flat / this |")
    print("|---|---|---|---|---|---|---|")
    for problems, rows in result.items():
        for name, row in rows.items():
            low, high = row["interval"]
            print(
                f"| {problems} | {name} | {row['critical_path_tokens']} | {row['total_tokens']} | "
                f"{row['longest_context_tokens']} | {row['threads']} | {row['flat_over_this']} [{low}, {high}] |"
            )


if __name__ == "__main__":
    main()
