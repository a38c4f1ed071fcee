"""Five formats on the same problems: accuracy, tokens, critical path, longest context, tokens read again, wall-clock.

    python benchmarks/bench_formats.py runs/joins_*/model.gguf [--problems 100] [--timed 10] --json records.jsonl
    python benchmarks/bench_formats.py gold [--problems 200]

The models are those of configs/sft_joins_*.toml: the same problems, size and number of training tokens, one format
each. Problems are held out, decoding is greedy. Accuracy and tokens come from runs side by side (`--concurrency`); wall
time from runs alone (`--timed` of each family), every problem on every model in turns, the order reversed from problem
to problem, so all see the same machine. Each record is a line of the JSON file as soon as it is there: the same command
goes on where it was stopped, and several, with one model each, may fill one file side by side. Beside each family
stands what the gold traces would cost: what a format can gain, whoever learned what better. `gold` in place of files
prints that alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio

from plait import tasks
from plait.bench import Record, RecordFile, compare, evaluate, problems, read_records
from plait.bench.metrics import Z, speedup, summary, wilson
from plait.bench.report import table
from plait.formats import open_format
from plait.models import Model, gold_tree, load_model
from plait.tasks.vocabulary import JOINS
from plait.types import Budget

FAMILIES = ("long_multiplication", "expression", "bundle", "countdown", "nested")
FORMATS = ("sequential", "threadweaver", "multiverse", "apr", "plait")
BUDGET = Budget(max_threads=None, max_threads_per_fork=None, max_tokens=None, max_thread_tokens=2048)
HEAD = (
    "right, %",
    "95 %",
    "T",
    "L",
    "L of one line / L",
    "longest",
    "read again",
    "wall alone, ms (median)",
    "threads",
)


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
    rows: list[Sequence[str]] = [("problems", "n", "format", *HEAD)]
    for group in (*dict.fromkeys(groups.values()), "all"):
        one_line = 0.0
        for model in models:
            own = [r for r in records if r.model == model.id and group in (groups[r.prompt], "all")]
            # A mean over all families is one only where none is missing.
            if not own or (group == "all" and {r.prompt for r in own} != groups.keys()):
                continue
            # Tokens of runs side by side where there are any: greedy runs alone are the same up to rounding.
            s = summary([r for r in own if r.concurrency > 1] or own)
            walls = [1000 * r.wall_s for r in own if r.concurrency == 1]
            if model.format_name == "sequential":
                one_line = s.critical_path_tokens
            low, high = wilson(s.right, s.n)
            rows.append(
                (
                    group,
                    str(s.n),
                    model.format_name,
                    f"{100 * s.accuracy:.1f}",
                    f"{100 * low:.0f}-{100 * high:.0f}",
                    f"{s.total_tokens:.0f}",
                    f"{s.critical_path_tokens:.0f}",
                    f"{one_line / s.critical_path_tokens:.2f}" if one_line else "-",
                    f"{s.longest_context_tokens:.0f}",
                    f"{s.reread_tokens:.0f}",
                    f"{statistics.fmean(walls):.0f} ({statistics.median(walls):.0f})" if walls else "-",
                    f"{s.threads:.1f}",
                )
            )
    return table(rows)


def nesting(records: Sequence[Record], models: Sequence[Model], drawn: Sequence[tasks.Problem]) -> str:
    """Nested blocks against one flat block, problem by problem, by how deep the expressions are."""
    ids = {model.format_name: model.id for model in models}
    groups = {problem.prompt: group_of(problem) for problem in drawn if problem.shape.get("depth")}
    if not {"threadweaver", "plait"} <= ids.keys() or not groups:
        return ""
    rows: list[Sequence[str]] = [
        ("nested against flat", "n", "threadweaver right, %", "plait right, %", "L flat", "L nested", "of sums", "mean")
    ]
    for group in dict.fromkeys(groups.values()):
        own = [r for r in records if groups.get(r.prompt) == group]
        flat, nested = ([r for r in own if r.model == ids[name]] for name in ("threadweaver", "plait"))
        found = speedup(nested, flat)
        if found is None:
            continue
        tokens = found.tokens
        rows.append(
            (
                group,
                str(found.n),
                f"{100 * found.twin_accuracy:.1f}",
                f"{100 * found.accuracy:.1f}",
                f"{summary(flat).critical_path_tokens:.0f}",
                f"{summary(nested).critical_path_tokens:.0f}",
                f"{tokens.of_sums:.2f}",
                f"{tokens.mean:.2f} +- {Z * tokens.error:.2f}",
            )
        )
    return table(rows)


def run(drawn: Sequence[tasks.Problem], models: Sequence[Model], args: argparse.Namespace) -> list[Record]:
    """What is not in the file yet: runs side by side, a model at a time; then some of them alone, models in turns."""
    records = read_records(args.json) if args.json else []
    with ExitStack() as stack:
        file = stack.enter_context(RecordFile(args.json)) if args.json else None

        def on_record(record: Record) -> None:
            records.append(record)
            if file is not None:
                file.write(record)
            right = sum(r.right for r in records if r.model == record.model)
            done = sum(r.model == record.model for r in records)
            print(f"\r{record.model}: {right} right of {done} ", end="", file=sys.stderr, flush=True)

        async def side_by_side(model: Model, problems: Sequence[tasks.Problem]) -> None:
            places = args.concurrency
            options = {"cells": 6144 * places, "max_seqs": min(256, 32 * places), "flash_attention": True}
            async with model.open_engine(**options) as engine:
                await evaluate(
                    problems,
                    engine=engine,
                    format=model.format,
                    tokenizer=model.tokenizer,
                    model=model.id,
                    budget=BUDGET,
                    concurrency=places,
                    on_record=on_record,
                )

        async def alone(problems: Sequence[tasks.Problem]) -> None:
            there = {r.key for r in records if r.concurrency == 1}
            options: dict[str, Any] = {"cells": 8192, "max_seqs": 96}
            await compare(problems, models=models, options=options, budget=BUDGET, skip=there, on_record=on_record)

        try:
            for model in models if not args.only_timed else ():
                there = {r.prompt for r in records if r.model == model.id and r.concurrency > 1}
                anyio.run(side_by_side, model, [problem for problem in drawn if problem.prompt not in there])
                print(file=sys.stderr)
            if args.timed:
                counts: Counter[str] = Counter()
                few: list[tasks.Problem] = []
                for problem in drawn:
                    counts[group_of(problem)] += 1
                    if counts[group_of(problem)] <= args.timed:
                        few.append(problem)
                anyio.run(alone, few)
                print(file=sys.stderr)
        except KeyboardInterrupt:
            print("\nstopped; what there is so far:", file=sys.stderr)
    prompts, ids = {problem.prompt for problem in drawn}, {model.id for model in models}
    return [record for record in records if record.prompt in prompts and record.model in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="GGUF files, or the word gold")
    parser.add_argument("--problems", type=int, default=100, help="of each family")
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=4, help="problems at once; at least 2")
    parser.add_argument("--timed", type=int, default=0, help="problems of each group that run alone, for wall time")
    parser.add_argument("--only-timed", action="store_true", help="only those")
    parser.add_argument("--json", type=Path, help="every record, a line each; the same command goes on from there")
    args = parser.parse_args()
    if args.concurrency < 2:
        parser.error(f"--concurrency is {args.concurrency}; runs one at a time are those of --timed")
    only_gold = args.models == ["gold"]
    loaded = [] if only_gold else [load_model(path) for path in args.models]
    loaded.sort(key=lambda model: FORMATS.index(model.format_name))
    drawn = drawn_for(loaded[0] if loaded else None, args.families, args.problems, args.seed)
    print(f"{args.problems} held-out problems of each family on which forking is right, seed {args.seed}\n")
    if loaded:
        records = run(drawn, loaded, args)
        print(f"{measured(records, loaded, drawn)}\n")
        own = [r for r in records if r.concurrency > 1] or records
        if found := nesting(own, loaded, drawn):
            print(f"{found}\n")
    print(gold(drawn))


if __name__ == "__main__":
    main()
