"""Five formats on the same problems: accuracy, tokens, critical path, longest context, tokens read again, wall-clock.

    python benchmarks/bench_formats.py runs/joins_*/model.gguf [--problems 100] [--families nested ...] [--json FILE]

Every problem runs on every model, one run at a time, the order reversed from problem to problem, so all see the same
machine. The models are those of configs/sft_joins_*.toml: the same problems, size and number of training tokens, one
format each. Problems are held out, decoding is greedy. Beside each family stands what the gold traces would cost: what
a format can gain, whoever learned what better. `gold` in place of files prints that alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio

from plait import tasks
from plait.bench import Record, compare, problems
from plait.bench.metrics import summary, wilson
from plait.bench.report import table
from plait.formats import open_format
from plait.models import Model, gold_tree, load_model
from plait.tasks.vocabulary import JOINS
from plait.types import Budget

FAMILIES = ("long_multiplication", "expression", "bundle", "countdown", "nested")
FORMATS = ("sequential", "threadweaver", "multiverse", "apr", "plait")
BUDGET = Budget(max_threads=None, max_threads_per_fork=None, max_tokens=None, max_thread_tokens=2048)
HEAD = ("right, %", "95 %", "T", "L", "L of one line / L", "longest", "read again", "wall, ms", "threads")


def drawn_for(model: Model | None, families: Sequence[str], count: int, seed: int) -> list[tasks.Problem]:
    """Held-out problems on which forking is right, from the ranges that a model was trained on."""
    knobs = model.train.get("data", {}).get("knobs", {}) if model else {}
    drawn = problems([tasks.family(name, knobs.get(name)) for name in families], 2 * count, seed=seed)
    kept: dict[str, list[tasks.Problem]] = {name: [] for name in families}
    for problem in drawn:
        if problem.forks and len(kept[problem.family]) < count:
            kept[problem.family].append(problem)
    return [problem for group in kept.values() for problem in group]


def group_of(problem: tasks.Problem) -> str:
    """What a problem is counted with: its family, nested expressions by how deep they are."""
    depth = problem.shape.get("depth")
    return f"{problem.family}, {depth} deep" if depth else problem.family


def gold(drawn: Sequence[tasks.Problem]) -> str:
    """What the gold traces cost."""
    rows = [("gold traces", "format", "T", "L", "L of one line / L", "longest", "read again", "threads")]
    for group in dict.fromkeys(map(group_of, drawn)):
        one_line = 0.0
        for name in FORMATS:
            format = open_format(name, JOINS)
            own = [p for p in drawn if group_of(p) == group]
            trees = [gold_tree(p, format=format, tokenizer=JOINS, parallel=name != "sequential") for p in own]
            usages = [tree.usage() for tree in trees]
            path = statistics.fmean(u.critical_path_tokens for u in usages)
            one_line = one_line or path
            means = [
                statistics.fmean(u.sampled_tokens for u in usages),
                path,
                statistics.fmean(u.longest_context_tokens for u in usages),
                statistics.fmean(u.reread_tokens for u in usages),
            ]
            total, path, longest, reread = (f"{mean:.0f}" for mean in means)
            threads = f"{statistics.fmean(u.threads for u in usages):.1f}"
            rows.append((group, name, total, path, f"{one_line / means[1]:.2f}", longest, reread, threads))
    return table(rows)


def measured(records: Sequence[Record], models: Sequence[Model], drawn: Sequence[tasks.Problem]) -> str:
    groups = {problem.prompt: group_of(problem) for problem in drawn}
    rows: list[Sequence[str]] = [("problems", "format", *HEAD)]
    for group in (*dict.fromkeys(groups.values()), "all"):
        one_line = 0.0
        for model in models:
            own = [r for r in records if r.model == model.id and group in (groups[r.prompt], "all")]
            s = summary(own)
            one_line = one_line or s.critical_path_tokens
            low, high = wilson(s.right, s.n)
            rows.append(
                (
                    group,
                    model.format_name,
                    f"{100 * s.accuracy:.1f}",
                    f"{100 * low:.0f}-{100 * high:.0f}",
                    f"{s.total_tokens:.0f}",
                    f"{s.critical_path_tokens:.0f}",
                    f"{one_line / s.critical_path_tokens:.2f}",
                    f"{s.longest_context_tokens:.0f}",
                    f"{s.reread_tokens:.0f}",
                    f"{1000 * s.wall_s:.1f}",
                    f"{s.threads:.1f}",
                )
            )
    return table(rows)


async def run(drawn: Sequence[tasks.Problem], models: Sequence[Model]) -> list[Record]:
    total = len(drawn) * len(models)
    done = 0

    def on_record(record: Record) -> None:
        nonlocal done
        done += 1
        if done % 100 == 0:
            print(f"{done}/{total}", file=sys.stderr)

    options: dict[str, Any] = {"cells": 16384, "max_seqs": 96}
    return await compare(drawn, models=models, options=options, budget=BUDGET, on_record=on_record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="GGUF files, or the word gold")
    parser.add_argument("--problems", type=int, default=100, help="of each family")
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every record there")
    args = parser.parse_args()
    only_gold = args.models == ["gold"]
    loaded = [] if only_gold else [load_model(path) for path in args.models]
    loaded.sort(key=lambda model: FORMATS.index(model.format_name))
    drawn = drawn_for(loaded[0] if loaded else None, args.families, args.problems, args.seed)
    print(f"{args.problems} held-out problems of each family on which forking is right, seed {args.seed}\n")
    if loaded:
        records = anyio.run(run, drawn, loaded)
        print(f"{measured(records, loaded, drawn)}\n")
        if args.json:
            args.json.write_text(json.dumps([asdict(record) for record in records]), encoding="utf-8")
    print(gold(drawn))


if __name__ == "__main__":
    main()
