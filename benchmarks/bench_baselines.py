"""Countdown in a window: parallel search against majority and best of n of its serial twin, by tokens and by steps.

    python benchmarks/bench_baselines.py run --serial runs/sos/model.gguf --message runs/apr/model.gguf
                                             [--race runs/plait/model.gguf] --json records.jsonl [--timed 12]
    python benchmarks/bench_baselines.py report records.jsonl --svg baselines.svg

`run` answers the same held-out problems greedily with every setting, and samples the serial twin and the message-join
model several times. `report` makes of n samples one answer by the library's own methods (`plait.bench.methods`): the
vote of the majority, or one that the checker accepts, which computes the equations and is not told a solution. What n
samples cost is the sum of their tokens, and on the critical path the longest. A run with a sequence longer than the
window gives no answer. n samples of N are taken as N/n groups, whose mean counts; intervals are over problems.

"First success" stops the others when the first succeeds, by the token: of message and plait in the runtime, of best of
n counted from the lengths of samples that all advance together, as the runtime would.

Every record is a line of the JSON file as soon as it is there, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
from bench_countdown import FirstSuccess, Setting, held_out
from curves import Point, Series, scatter

from plait import tasks
from plait.bench import Record, RecordFile, evaluate, read_records
from plait.bench.methods import GREEDY, Method, best, combined, majority
from plait.bench.report import seconds, table
from plait.engines.base import Engine
from plait.models import load_model
from plait.types import Budget

Z = 1.959964
SERIAL, MESSAGE, RACE = "serial", "message", "plait, race"
TAKES = {"majority": majority, "best": best}
"""Of these problems every right answer can be verified, so best of n is pass@n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A setting, and how often its problems are sampled besides the greedy run."""

    setting: Setting
    samples: int = 0
    temperature: float = 0.0
    """Of the samples."""

    @property
    def label(self) -> str:
        return f"{self.setting.name} | {self.setting.model.id}"

    @property
    def budget(self) -> Budget:
        limit = self.setting.children or 16
        return Budget(max_threads=limit, max_threads_per_fork=limit, max_tokens=None)


def entries(args: argparse.Namespace) -> list[Entry]:
    drawn: list[Entry] = []
    if args.serial:
        model = load_model(args.serial)
        serial = Setting(name=SERIAL, model=model, format=model.format)
        drawn.append(Entry(setting=serial, samples=args.samples, temperature=args.temperature))
    if args.message:
        model = load_model(args.message)
        most = max(args.children)
        for children in args.children:
            setting = Setting(name=f"{MESSAGE} {children}", model=model, format=model.format, children=children)
            samples = args.message_samples if children == most else 0
            drawn.append(Entry(setting=setting, samples=samples, temperature=args.message_temperature))
        racing = FirstSuccess(model.tokenizer, levels=model.levels)
        name = f"{MESSAGE} {most}, first success"
        drawn.append(Entry(setting=Setting(name=name, model=model, format=racing, children=most)))
    if args.race:
        model = load_model(args.race)
        drawn.append(Entry(setting=Setting(name=RACE, model=model, format=model.format)))
    return drawn


def opened(entry: Entry, window: int, at_once: int) -> Engine:
    """Room for so many runs; where threads see their parent, contexts are divided among them, so there is more."""
    context = 4 * window if entry.setting.format.join_kind == "concat" else window
    wide = entry.setting.model.forks
    return entry.setting.model.open_engine(
        max_context=context,
        cells=(8192 if wide else context + 512) * at_once,
        max_seqs=min(256, (32 if wide else 4) * at_once),
        flash_attention=True,
    )


def run(args: argparse.Namespace) -> None:
    """What is not in the file yet: greedy runs of every setting first, then samples, then the timed ones."""
    there = read_records(args.json)
    drawn, problems = entries(args), held_out(args.problems, args.seed)
    with RecordFile(args.json) as file:
        passes = range(-1, max(entry.samples for entry in drawn))
        for number in passes if not args.only_timed else ():
            for entry in drawn:
                if number < entry.samples:
                    anyio.run(side_by_side, entry, number, problems, there, file, args)
        if args.timed:
            anyio.run(timed, drawn, problems[: args.timed], there, file, args)


async def side_by_side(
    entry: Entry,
    number: int,
    problems: Sequence[tasks.Problem],
    there: Sequence[Record],
    file: RecordFile,
    args: argparse.Namespace,
) -> None:
    """One pass over the problems: greedily where the number is -1, else the sample of that number."""
    method = GREEDY if number < 0 else Method(name="sample", temperature=entry.temperature)
    seed = max(number, 0)
    wanted = entry.label, method.name, method.temperature, seed
    done = {r.prompt for r in there if r.concurrency > 1 and (r.model, r.method, r.temperature, r.seed) == wanted}
    rest = [problem for problem in problems if problem.prompt not in done]
    if not rest:
        return
    count = right = 0

    def on_record(record: Record) -> None:
        nonlocal count, right
        file.write(record)
        count, right = count + 1, right + record.right
        line = f"{entry.setting.name}, {method.name} {seed}: {count}/{len(rest)}, right {100 * right / count:.1f} %"
        print(f"\r{line} ", end="", file=sys.stderr, flush=True)

    async with opened(entry, args.window, args.concurrency) as engine:
        await evaluate(
            rest,
            engine=engine,
            format=entry.setting.format,
            tokenizer=entry.setting.model.tokenizer,
            model=entry.label,
            budget=entry.budget,
            concurrency=args.concurrency,
            seed=seed,
            method=method,
            on_record=on_record,
        )
    print(file=sys.stderr)


async def timed(
    drawn: Sequence[Entry],
    problems: Sequence[tasks.Problem],
    there: Sequence[Record],
    file: RecordFile,
    args: argparse.Namespace,
) -> None:
    """One answer at a time, the settings and numbers of samples in turns, each with its own engine."""
    done = {r.key for r in there if r.concurrency == 1}
    ways = [(entry, GREEDY) for entry in drawn]
    for entry in drawn:
        ways += [
            (entry, Method(name=f"best@{n}", samples=n, temperature=entry.temperature, take=best))
            for n in doubled(entry.samples)[1:]
        ]
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(opened(entry, args.window, way.samples)) for entry, way in ways]
        warm: set[int] = set()
        for number, problem in enumerate(problems):
            print(f"\ralone: {number}/{len(problems)} ", end="", file=sys.stderr, flush=True)
            for at in list(range(len(ways)))[:: 1 if number % 2 == 0 else -1]:
                entry, way = ways[at]
                if (problem.prompt, entry.label, way.name) in done:
                    continue
                # The first run pays for memory that later ones find allocated.
                for again in (False, True) if at not in warm else (True,):
                    warm.add(at)
                    (record,) = await evaluate(
                        [problem],
                        engine=engines[at],
                        format=entry.setting.format,
                        tokenizer=entry.setting.model.tokenizer,
                        model=entry.label,
                        budget=entry.budget,
                        method=way,
                    )
                    if again:
                        file.write(record)
    print(file=sys.stderr)


def doubled(most: int) -> list[int]:
    """1, 2, 4 and so on."""
    return [1 << k for k in range(most.bit_length())] if most else []


def within(record: Record, window: int) -> Record:
    """A run as it counts in a window: without its answer where a sequence was longer."""
    return record if record.longest_context_tokens <= window else replace(record, answer=None, right=False)


def stopped(samples: Sequence[Record], whole: Record) -> Record:
    """What n samples cost that all advance together and stop with the first right answer: greedy in tokens."""
    ends = [s.critical_path_tokens for s in samples if s.right]
    if not ends:
        return whole
    end = min(ends)
    total = sum(min(s.total_tokens, end) for s in samples)
    return replace(whole, critical_path_tokens=end, total_tokens=total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A setting, n answers at a time: means over problems, and of each problem its share of right answers."""

    setting: str
    kind: str
    """`greedy`, or what is taken of n samples."""
    right: dict[str, float]
    total: float
    critical: float
    longest: float
    n: int = 1
    temperature: float = 0.0
    first: bool = False
    """Whether the first right sample ends the others."""
    wall: Sequence[float] = ()

    @property
    def name(self) -> str:
        if self.kind == "greedy":
            return f"{self.setting}, greedy"
        taken = "one sample" if self.n == 1 else f"{self.kind}@{self.n}{', first success' if self.first else ''}"
        return f"{self.setting}, {taken}, temperature {self.temperature:g}"

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.right.values())

    @property
    def half(self) -> float:
        """Half of the interval of 95 %, over problems."""
        return half_width(list(self.right.values()))


def half_width(values: Sequence[float]) -> float:
    return Z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


Rows = Mapping[str, Sequence[Record]]
"""Records of each problem."""


def averaged(setting: str, kind: str, rows: Rows, **about: Any) -> Measured:
    every = [record for records in rows.values() for record in records]
    return Measured(
        setting=setting,
        kind=kind,
        right={prompt: statistics.fmean(r.right for r in records) for prompt, records in rows.items()},
        total=statistics.fmean(r.total_tokens for r in every),
        critical=statistics.fmean(r.critical_path_tokens for r in every),
        longest=statistics.fmean(r.longest_context_tokens for r in every),
        **about,
    )


def measured(records: Iterable[Record], problems: Mapping[str, tasks.Problem], window: int) -> list[Measured]:
    """Of every setting its greedy runs, then what its samples give."""
    runs: dict[str, dict[float, dict[str, list[Record]]]] = {}
    walls: dict[tuple[str, str, float], list[float]] = {}
    for record in records:
        if record.prompt not in problems:
            continue
        name, temperature = record.model.partition(" | ")[0], record.temperature
        if record.concurrency == 1:
            walls.setdefault((name, record.method, temperature), []).append(record.wall_s)
        else:
            of = runs.setdefault(name, {}).setdefault(temperature, {})
            of.setdefault(record.prompt, []).append(within(record, window))
    out: list[Measured] = []
    for name, temperatures in runs.items():
        for temperature, by_problem in sorted(temperatures.items()):
            if not temperature:
                out.append(averaged(name, "greedy", by_problem, wall=walls.get((name, "greedy", 0.0), ())))
                continue
            # As many as every problem has: those of a pass that is not over would stand for some problems only.
            most = min(map(len, by_problem.values()))
            whole = {prompt: sorted(s, key=lambda r: r.seed)[:most] for prompt, s in by_problem.items()}
            for kind in TAKES:
                for n in doubled(most) if kind == "best" else doubled(most)[1:]:
                    about: dict[str, Any] = {"n": n, "temperature": temperature}
                    groups = taken(whole, kind, n, problems)
                    wall = walls.get((name, f"{kind}@{n}", temperature), ())
                    out.append(averaged(name, kind, groups, wall=wall, **about))
                    if kind == "best" and name == SERIAL and n > 1:
                        cut = taken(whole, kind, n, problems, first=True)
                        out.append(averaged(name, kind, cut, first=True, **about))
    return out


def taken(
    runs: Rows, kind: str, n: int, problems: Mapping[str, tasks.Problem], *, first: bool = False
) -> dict[str, list[Record]]:
    """Every n samples of a problem as one answer."""
    method = Method(name=f"{kind}@{n}", samples=n, take=TAKES[kind])
    out: dict[str, list[Record]] = {}
    for prompt, samples in runs.items():
        groups = [samples[at : at + n] for at in range(0, len(samples) - n + 1, n)]
        wholes = [combined(group, method, problems[prompt]) for group in groups]
        out[prompt] = [stopped(g, w) for g, w in zip(groups, wholes, strict=True)] if first else wholes
    return out


def results(rows: Sequence[Measured]) -> str:
    lines: list[Sequence[str]] = [
        ("setting", "problems", "right, % (95 %)", "total tokens", "critical path", "longest", "wall alone")
    ]
    for row in rows:
        wall = f"{seconds(statistics.fmean(row.wall))} ({seconds(statistics.median(row.wall))})" if row.wall else "-"
        right = f"{100 * row.accuracy:.1f} ± {100 * row.half:.1f}"
        means = (f"{row.total:.0f}", f"{row.critical:.0f}", f"{row.longest:.0f}")
        lines.append((row.name, str(len(row.right)), right, *means, wall))
    return table(lines)


def differences(rows: Sequence[Measured], temperature: float) -> str:
    """Each parallel setting against the serial twin: greedy, and best of as many as cost just less and just more."""
    serial = [row for row in rows if row.setting == SERIAL]
    lines: list[Sequence[str]] = [
        ("parallel", "against serial", "problems", "points more (95 %)", "total tokens", "critical path")
    ]
    for own in rows:
        if own.setting == SERIAL or own.kind == "majority":
            continue
        others = [row for row in serial if row.kind == "greedy"]
        for first in (False, True):
            samples = [
                row
                for row in serial
                if (row.kind, row.first, row.temperature) == ("best", first, temperature) and row.n > 1
            ]
            others += [row for row in samples if row.total < own.total][-1:]
            others += [row for row in samples if row.total >= own.total][:1]
        for other in others:
            both = own.right.keys() & other.right.keys()
            less = [100 * (own.right[prompt] - other.right[prompt]) for prompt in both]
            if less:
                points = f"{statistics.fmean(less):+.1f} ± {half_width(less):.1f}"
                ratios = (f"{own.total / other.total:.2f}x", f"{own.critical / other.critical:.2f}x")
                lines.append((own.name, other.name.removeprefix(f"{SERIAL}, "), str(len(both)), points, *ratios))
    return table(lines)


def picture(rows: Sequence[Measured], temperature: float) -> str:
    """Accuracy against total tokens, and against the critical path."""
    groups: dict[str, list[tuple[Measured, str]]] = {}
    for row in rows:
        racing = "first success" in row.setting or row.setting == RACE
        if row.setting == SERIAL and row.temperature not in (0.0, temperature):
            continue
        if row.setting == SERIAL:
            name = (
                "serial, best@n, first success"
                if row.first
                else f"serial, {row.kind}{'' if row.kind == 'greedy' else '@n'}"
            )
            label = str(row.n) if row.kind != "greedy" else ""
        elif row.kind == "greedy":
            name = "parallel, first success" if racing else "message, by children"
            label = RACE.partition(",")[0] if row.setting == RACE else row.setting.split()[1].rstrip(",")
        elif row.kind == "best":
            name, label = f"{row.setting}, best@n", str(row.n)
        else:
            continue
        groups.setdefault(name, []).append((row, label))

    def series(axis: str) -> list[Series]:
        return [
            Series(
                name=name,
                points=[
                    Point(x=getattr(row, axis), y=row.accuracy, half=row.half, label=label)
                    for row, label in sorted(points, key=lambda point: (point[0].n, point[0].total))
                ],
                joined=name != "parallel, first success",
            )
            for name, points in groups.items()
        ]

    panels = {"right, by total tokens": series("total"), "right, by critical path": series("critical")}
    return scatter(panels, xlabel="tokens, mean over problems")


def report(args: argparse.Namespace) -> None:
    records = [record for path in args.files for record in read_records(path)]
    problems = {problem.prompt: problem for problem in held_out(args.problems, args.seed)}
    rows = measured(records, problems, args.window)
    if not rows:
        raise SystemExit(f"no records of these problems in {', '.join(map(str, args.files))}; `run` writes them")
    print(f"{results(rows)}\n\n{differences(rows, args.temperature)}")
    if args.svg:
        args.svg.write_text(picture(rows, args.temperature), encoding="utf-8")
    if args.as_json:
        keys = (
            "name",
            "setting",
            "kind",
            "n",
            "temperature",
            "accuracy",
            "half",
            "total",
            "critical",
            "longest",
            "wall",
        )
        print(json.dumps([{key: getattr(row, key) for key in keys} for row in rows]))


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "report"):
        command = commands.add_parser(name)
        command.add_argument("--problems", type=int, default=300)
        command.add_argument("--seed", type=int, default=7, help="of the problems")
        command.add_argument("--window", type=int, default=1024, help="positions that a sequence may have")
        command.add_argument("--temperature", type=float, default=1.0, help="of samples of the serial twin")
    command = commands.choices["run"]
    command.add_argument("--serial", help="weights of configs/sft_countdown_sos.toml")
    command.add_argument("--message", help="weights of configs/sft_countdown_apr.toml")
    command.add_argument("--race", help="weights of configs/sft_countdown_plait.toml")
    command.add_argument("--children", type=int, nargs="+", default=[2, 4, 6, 8])
    command.add_argument("--samples", type=int, default=16, help="of the serial twin")
    command.add_argument("--message-samples", type=int, default=4, help="of the message-join model with most children")
    command.add_argument("--message-temperature", type=float, default=0.7)
    command.add_argument("--concurrency", type=int, default=2, help="problems at once; at least 2")
    command.add_argument("--timed", type=int, default=0, help="problems answered alone as well, for wall time")
    command.add_argument("--only-timed", action="store_true", help="only those")
    command.add_argument("--json", type=Path, required=True, help="records, a line each")
    command = commands.choices["report"]
    command.add_argument("files", type=Path, nargs="+", help="that `run` wrote")
    command.add_argument("--svg", type=Path, help="draw accuracy against tokens and critical path")
    command.add_argument("--json", action="store_true", dest="as_json", help="one array as the last line")
    args = parser.parse_args(argv)
    if args.command == "run" and args.concurrency < 2:
        parser.error(f"--concurrency is {args.concurrency}; runs one at a time are those of --timed")
    if args.command == "run" and not (args.serial or args.message or args.race):
        parser.error("name weights: --serial, --message or --race")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    try:
        run(args) if args.command == "run" else report(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    main()
