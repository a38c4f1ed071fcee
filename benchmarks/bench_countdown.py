"""Countdown as in the APR paper: what fits into a window, what children cost, and what ends at the first success.

    python benchmarks/bench_countdown.py gold   [--problems 300]
    python benchmarks/bench_countdown.py models --apr runs/apr/model.gguf --serial runs/sos/model.gguf [--wide ...]
                                                [--plait ...] [--problems 500] [--timed 20] --json outcomes.jsonl
    python benchmarks/bench_countdown.py report outcomes.jsonl ...

`gold` needs no weights: it draws searches of every width and counts how many end with the solution in a window, the
ceiling of whoever imitates them. `models` decodes greedily on held-out problems. A problem counts as solved in a window
if its answer is right and no sequence of its run was longer, as in the paper. Windows are given in tokens of the
compact vocabulary and, recounted from the same text, of a 32k SentencePiece vocabulary that splits digits (Mistral's
v1, a stand-in for Llama 2's). First success: the same weights, once with all children awaited and once with the others
cut when the first succeeds.

Every outcome is a line of the JSON file as soon as it is there. The same command goes on where it was stopped, several
may fill files of their own side by side, and `report` prints the tables of any number of files. Accuracy and tokens
come from runs side by side (`--concurrency`), wall time from runs alone (`--timed`), the settings in turns.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import anyio

from plait import tasks
from plait.bench.metrics import wilson
from plait.bench.report import table
from plait.engines.base import Engine
from plait.formats import Fork, Join, Malformed, ThreadOutcome, TrajectoryFormat, open_format, render
from plait.formats.apr import APR
from plait.formats.plait import Plait
from plait.models import Model, load_model, prompt_ids, response_text
from plait.session import run
from plait.tasks.countdown_search import CountdownSearch
from plait.tasks.vocabulary import SEARCH
from plait.tree import Tree
from plait.types import Budget, Context, Merge, Request, StopReason

WINDOWS = (256, 512, 768, 1024, 1536, 2048, 4096)
FAMILY = "countdown_search"
PAPER = (
    ("setting (paper)", "SoS+", "APR"),
    ("4k window, greedy, SFT", "57.3 %", "75.5 %"),
    ("4k window, greedy, SFT and RL", "60.0 %", "83.4 %"),
    ("APR conditioned on 10 children, SFT", "-", "83.2 %"),
    ("total tokens, SFT", "2,201", "10,964"),
)

LLAMA_TOKENS = {
    ", ": 2,
    ": ": 2,
    ":[": 2,
    "', '": 2,
    "Token Budget: ": 5,
    "Sub Call Budget: ": 6,
    "Moving to Node #": 4,
    "\nMoving to Node #": 6,
    "\nCurrent State: ": 5,
    "], Operations: []": 4,
    "], Operations: ['": 4,
    "\nExploring Operation: ": 7,
    ", Resulting Numbers: [": 7,
    "]\n": 2,
    "]\nGenerated Node #": 5,
    "] Operation: ": 4,
    " equal: Goal Reached": 6,
    " unequal: No Solution": 5,
    "\nNo solution found.": 5,
    "\nStart Sub Search at level ": 7,
    ": Moving to Node #": 6,
    "\nExit Sub Search at level ": 7,
    "\nNo solution found in sub search": 7,
    "\n<Start Sub Search ": 6,
    " at level 1> Moving to Node #": 10,
    "<Sub Searches>": 6,
    "\n<Goal Reached in Sub Search ": 10,
    "\n<No Solution in Sub Search ": 8,
    " at level 1 at Node #": 7,
    "\n<End Sub Searches>": 8,
    "\nAnswer: ": 5,
    "<Calling Sub Searches>": 8,
    "<End Calling Sub Searches>": 9,
}
"""Pieces of the SentencePiece vocabulary in each phrase; in a number one for each digit, in the rest one (a tag of the
plait format counts as one, too). On 10 traces the sum was off by one token at most."""

_GOAL = " equal: Goal Reached"
_WEIGHTS = [len(word) if word.isdigit() else LLAMA_TOKENS.get(word, 1) for word in SEARCH.tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One problem, run once."""

    right: bool
    longest: int
    """Positions of the longest sequence."""
    longest_llama: int
    total: int
    critical: int
    dropped: int
    """Tokens sampled past the cut of a race; not in `total`."""
    threads: int
    declined: int
    """Blocks that were not opened, for they were malformed or more than allowed."""
    end: str
    """How it ended."""
    reread: int
    prompt_of_threads: int
    """Tokens that were given to threads which see nothing of their parent."""
    wall_s: float


def outcome(tree: Tree, problem: tasks.Problem, wall_s: float = 0.0) -> Outcome:
    usage = tree.usage()
    contexts = [(*_flat(tree.context(s.id)), *s.sampled_ids) for s in tree.segments.values()]
    text = response_text(tree, SEARCH)
    right = tree.stop is StopReason.EOS and tasks.grade(problem, text)
    answered = "wrong answer" if tasks.answer_of(text) is not None else "no solution found"
    return Outcome(
        right=right,
        longest=usage.longest_context_tokens,
        longest_llama=max(sum(_WEIGHTS[id] for id in context) for context in contexts),
        total=usage.sampled_tokens,
        critical=usage.critical_path_tokens,
        dropped=tree.num_dropped,
        threads=usage.threads,
        declined=sum(s.stop in (StopReason.MALFORMED, StopReason.BUDGET) for s in tree.segments.values()),
        end="right" if right else answered if tree.stop is StopReason.EOS else "no end",
        reread=usage.reread_tokens,
        prompt_of_threads=sum(len(s.forced_ids) for s in tree.segments.values() if s.keep == 0),
        wall_s=wall_s,
    )


def _flat(context: Context) -> tuple[int, ...]:
    ids: list[int] = []
    for part in context:
        assert not isinstance(part, Merge), "these formats do not merge"
        ids += part
    return tuple(ids)


def share(outcomes: Sequence[Outcome], solved: Callable[[Outcome], bool]) -> str:
    hits = sum(map(solved, outcomes))
    low, high = wilson(hits, len(outcomes))
    return f"{100 * hits / len(outcomes):.1f} ({100 * low:.0f}-{100 * high:.0f})"


def row(name: str, outcomes: Sequence[Outcome], windows: Sequence[int], *, llama: bool = False) -> tuple[str, ...]:
    def inside(window: int) -> str:
        def solved(o: Outcome) -> bool:
            return o.right and (o.longest_llama if llama else o.longest) <= window

        return f"{100 * sum(map(solved, outcomes)) / len(outcomes):.1f}"

    def mean(field: str) -> str:
        return f"{statistics.fmean(getattr(o, field) for o in outcomes):.0f}"

    longest = "longest_llama" if llama else "longest"
    means = (mean("total"), mean("critical"), mean(longest), f"{statistics.fmean(o.threads for o in outcomes):.1f}")
    return (name, *map(inside, windows), share(outcomes, lambda o: o.right), *means)


def sweep(rows: dict[str, Sequence[Outcome]]) -> str:
    """Solved in every window, in both vocabularies."""
    tail = ("any length", "T", "L", "longest", "children")
    compact: list[Sequence[str]] = [("solved in a window of, %", *map(str, WINDOWS), *tail)]
    llama: list[Sequence[str]] = [("Llama-2-equivalent, %", *(str(2 * w) for w in WINDOWS), *tail)]
    for name, outcomes in rows.items():
        compact.append(row(name, outcomes, WINDOWS))
        llama.append(row(name, outcomes, [2 * w for w in WINDOWS], llama=True))
    return f"{table(compact)}\n\n{table(llama)}"


def held_out(count: int, seed: int) -> list[tasks.Problem]:
    """Distinct held-out problems."""
    seen: dict[str, tasks.Problem] = {}
    for problem in tasks.problems(FAMILY, seed=seed, split="held_out"):
        seen.setdefault(problem.prompt, problem)
        if len(seen) == count:
            return list(seen.values())
    raise AssertionError("the stream has no end")


def gold(args: argparse.Namespace) -> Outcomes:
    """Searches of every width, without weights."""
    drawn = held_out(args.problems, args.seed)
    family = CountdownSearch()
    apr, sequential = open_format("apr", SEARCH), open_format("sequential", SEARCH)
    out = Outcomes()

    def searched(name: str, format: TrajectoryFormat, trace: Callable[[tasks.Problem], Any], **shape: Any) -> None:
        outcomes: dict[str, Outcome] = {}
        raced: dict[str, Outcome] = {}
        for problem in drawn:
            problem = replace(problem, shape={**problem.shape, **shape})
            ids = prompt_ids(SEARCH, problem.prompt)
            tree = render(trace(problem), format=format, tokenizer=SEARCH, prompt_ids=ids)
            outcomes[problem.prompt] = whole = outcome(tree, problem)
            raced[problem.prompt] = cut_at_first_success(tree, whole)
        out.of[name] = outcomes
        if format is apr:
            out.of[f"{name}, first success"] = raced
        print(f"{name}: {share(list(outcomes.values()), lambda o: o.right)} %", file=sys.stderr)

    for beam in (1, 2, 3, 4, 5, 8):
        searched(f"serial, width {beam}", sequential, family.serial, serial_beam=beam)
    for beam in (2, 4, 6, 8):
        searched(f"message, {beam} children", apr, family.parallel, beam=beam, spawn=1.0)
    return out


def cut_at_first_success(tree: Tree, whole: Outcome) -> Outcome:
    """What a search would have cost if its other children had been stopped when the first reached the goal."""
    children = [s for s in tree.segments.values() if s.keep == 0]
    lengths = [len(child.sampled_ids) for child in children]
    found = [len(child.sampled_ids) for child in children if _GOAL in SEARCH.decode(child.sampled_ids)]
    if not found:
        return whole
    saved = sum(max(0, length - min(found)) for length in lengths)
    return replace(whole, total=whole.total - saved, critical=whole.critical - max(lengths) + min(found))


class FirstSuccess(APR):
    """APR whose children race: the first that reaches the goal ends the others, which its parent reads as failed."""

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Malformed | None:
        fork = super().parse(sampled_ids, depth)
        return replace(fork, race=True) if isinstance(fork, Fork) else fork

    def succeeded(self, outcome: ThreadOutcome) -> bool:
        return _GOAL in self._tokenizer.decode(outcome.token_ids)


class WaitForAll(Plait):
    """The plait format whose races run to their end: the parent reads what it would read of the race."""

    def is_race(self, head: str) -> bool:
        return False

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        found = [i for i, thread in enumerate(threads) if self.succeeded(thread)]
        winner = min(found, key=lambda i: len(threads[i].token_ids), default=None)
        return super().join([replace(thread, won=i == winner) for i, thread in enumerate(threads)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model, and how it is run."""

    name: str
    model: Model
    format: TrajectoryFormat
    children: int | None = None
    """Told to the model where it reads that, and never exceeded; None: as many as it likes."""

    def request(self, problem: tasks.Problem) -> Request:
        limit = self.children or 16
        return Request(
            prompt_ids=prompt_ids(SEARCH, problem.prompt),
            budget=Budget(max_threads=limit, max_threads_per_fork=limit, max_tokens=None),
            logprobs=False,
            conditioned=self.model.levels is not None,
        )

    def max_context(self, longest: int) -> int:
        """No sequence becomes longer than the rows it was trained on; where threads see their parent, a row was a
        whole tree, and a context is divided among the threads before any of them has written anything."""
        rows = self.model.train.get("data", {}).get("buckets", [])
        trained = max((tokens for _, tokens in rows), default=longest)
        return 2 * longest if self.format.join_kind == "concat" else min(longest, trained)


def settings(args: argparse.Namespace) -> list[Setting]:
    drawn: list[Setting] = []
    for name, path in (("serial", args.serial), ("serial, wider", args.wide)):
        if path:
            model = load_model(path)
            drawn.append(Setting(name=name, model=model, format=model.format))
    if args.apr:
        model = load_model(args.apr)
        for children in args.children:
            name = f"message, {children} children"
            drawn.append(Setting(name=name, model=model, format=model.format, children=children))
        drawn.append(
            Setting(
                name=f"message, {max(args.children)} children, first success",
                model=model,
                format=_over(FirstSuccess, model),
                children=max(args.children),
            )
        )
    if args.plait:
        model = load_model(args.plait)
        drawn.append(Setting(name="plait, all awaited", model=model, format=_over(WaitForAll, model)))
        drawn.append(Setting(name="plait, race", model=model, format=model.format))
    return drawn


def _over(cls: Callable[..., TrajectoryFormat], model: Model) -> TrajectoryFormat:
    return cls(model.tokenizer, **({"levels": model.levels} if model.levels else {}))


class Outcomes:
    """Outcomes by setting, then by problem; in a file, a line each, from which the same command goes on."""

    def __init__(self, *paths: Path) -> None:
        self.of: dict[str, dict[str, Outcome]] = {}
        self.alone: dict[str, dict[str, Outcome]] = {}
        self._weights: dict[str, str] = {}
        for path in paths:
            for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else ():
                self._add(**json.loads(line))

    def _add(self, *, setting: str, weights: str, prompt: str, alone: bool, outcome: dict[str, Any]) -> None:
        if self._weights.setdefault(setting, weights) != weights:
            raise SystemExit(
                f"outcomes of other weights are there for {setting!r}: {self._weights[setting]}, {weights}"
            )
        (self.alone if alone else self.of).setdefault(setting, {})[prompt] = Outcome(**outcome)

    def record(
        self, path: Path | None, setting: Setting, problem: tasks.Problem, outcome: Outcome, *, alone: bool
    ) -> None:
        line = {
            "setting": setting.name,
            "weights": setting.model.digest[:16],
            "prompt": problem.prompt,
            "alone": alone,
            "outcome": asdict(outcome),
        }
        self._add(**line)
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def rows(self) -> dict[str, Sequence[Outcome]]:
        return {name: list(outcomes.values()) for name, outcomes in self.of.items()}


async def decoded(
    setting: Setting, problems: Sequence[tasks.Problem], args: argparse.Namespace, outcomes: Outcomes
) -> None:
    """Greedy runs side by side, until every problem has an outcome."""
    there = outcomes.of.get(setting.name, {})
    todo = [problem for problem in problems if problem.prompt not in there]
    source, start = iter(todo), time.perf_counter()

    def progress() -> None:
        done = list(outcomes.of.get(setting.name, {}).values())
        right = share(done, lambda o: o.right and o.longest <= args.window) if done else "-"
        took = time.perf_counter() - start
        print(
            f"\r{setting.name}: {len(done)}/{len(problems)}, {right} % in a window of {args.window}, {took:.0f} s ",
            end="",
            file=sys.stderr,
            flush=True,
        )

    async def work(engine: Engine) -> None:
        for problem in source:
            tree = await run(setting.request(problem), engine=engine, format=setting.format)
            outcomes.record(args.json, setting, problem, outcome(tree, problem), alone=False)
            progress()

    if todo:
        async with _opened(setting, args, args.concurrency) as engine, anyio.create_task_group() as workers:
            for _ in range(args.concurrency):
                workers.start_soon(work, engine)
    progress()
    print(file=sys.stderr)


async def timed(
    drawn: Sequence[Setting], problems: Sequence[tasks.Problem], args: argparse.Namespace, outcomes: Outcomes
) -> None:
    """Greedy runs, one at a time, the settings in turns and from problem to problem in the opposite order."""
    async with AsyncExitStack() as stack:
        engines: dict[str, Engine] = {}
        for setting in drawn:
            engines[setting.name] = engine = await stack.enter_async_context(_opened(setting, args, 1))
            # The first run pays for memory that later ones find allocated.
            await run(setting.request(problems[0]), engine=engine, format=setting.format)
        for number, problem in enumerate(problems):
            print(f"\ralone: {number}/{len(problems)} ", end="", file=sys.stderr, flush=True)
            for setting in drawn if number % 2 == 0 else drawn[::-1]:
                if problem.prompt in outcomes.alone.get(setting.name, {}):
                    continue
                start = time.perf_counter()
                tree = await run(setting.request(problem), engine=engines[setting.name], format=setting.format)
                took = time.perf_counter() - start
                outcomes.record(args.json, setting, problem, outcome(tree, problem, took), alone=True)
    print(file=sys.stderr)


def _opened(setting: Setting, args: argparse.Namespace, concurrency: int) -> Engine:
    context = setting.max_context(args.longest)
    wide = setting.model.forks
    # Flash attention skips the cells of other sequences, of which there are many.
    return setting.model.open_engine(
        max_context=context,
        cells=(8192 if wide else context + 512) * concurrency,
        max_seqs=min(256, (32 if wide else 4) * concurrency),
        flash_attention=True,
    )


def models(args: argparse.Namespace) -> Outcomes:
    drawn = settings(args)
    outcomes = Outcomes(*([args.json] if args.json else []))
    problems = held_out(args.problems, args.seed)
    try:
        for setting in drawn if not args.only_timed else ():
            anyio.run(decoded, setting, problems, args, outcomes)
        if args.timed and drawn:
            anyio.run(timed, drawn, problems[: args.timed], args, outcomes)
    except KeyboardInterrupt:
        print("\nstopped; what there is so far:", file=sys.stderr)
    return outcomes


def first_success(rows: Mapping[str, Mapping[str, Outcome]]) -> str:
    """What cutting at the first success saves, on the problems that both have."""
    lines = [("first success against all awaited", "n", "right, %", "L", "T", "L saved", "T saved", "past the cut")]
    for name in rows:
        base = name.removesuffix(", first success") if name.endswith("first success") else ""
        base = base or (name.removesuffix("race") + "all awaited" if name.endswith(", race") else "")
        if base not in rows:
            continue
        both = [prompt for prompt in rows[base] if prompt in rows[name]]
        awaited = [rows[base][prompt] for prompt in both]
        for label, outcomes in ((base, awaited), (name, [rows[name][prompt] for prompt in both])):
            (all_l, all_t), (own_l, own_t) = (
                [sum(getattr(o, field) for o in some) for field in ("critical", "total")]
                for some in (awaited, outcomes)
            )
            n = len(outcomes)
            saved = (f"{100 * (1 - own_l / all_l):.1f} %", f"{100 * (1 - own_t / all_t):.1f} %")
            right = share(outcomes, lambda o: o.right)
            means = (f"{own_l / n:.0f}", f"{own_t / n:.0f}")
            lines.append((label, str(n), right, *means, *saved, f"{sum(o.dropped for o in outcomes) / n:.1f}"))
    return table(lines) if len(lines) > 1 else ""


def costs(rows: dict[str, Sequence[Outcome]], alone: Mapping[str, Mapping[str, Outcome]]) -> str:
    lines: list[Sequence[str]] = [
        ("means a problem", "n", "T", "L", "longest", "read again", "given to children", "wall alone, s (median)")
    ]
    for name, outcomes in rows.items():
        fields = ("total", "critical", "longest", "reread", "prompt_of_threads")
        walls = [o.wall_s for o in alone.get(name, {}).values()]
        wall = f"{statistics.fmean(walls):.3f} ({statistics.median(walls):.3f}), n={len(walls)}" if walls else "-"
        means = (f"{statistics.fmean(getattr(o, f) for o in outcomes):.0f}" for f in fields)
        lines.append((name, str(len(outcomes)), *means, wall))
    return table(lines)


def spent(rows: dict[str, Sequence[Outcome]]) -> str:
    """One model, told how many children it may have."""
    lines: list[Sequence[str]] = [("children told", "n", "children had, mean", "just as told, %", "blocks declined")]
    for name, outcomes in rows.items():
        match = re.fullmatch(r"message, (\d+) children", name)
        if match is None:
            continue
        told = int(match[1])
        had = [o.threads for o in outcomes if o.threads]
        just = sum(n == told for n in had)
        lines.append(
            (
                match[1],
                str(len(outcomes)),
                f"{statistics.fmean(had):.2f}" if had else "-",
                f"{100 * just / len(had):.1f} of {len(had)} that had any" if had else "-",
                str(sum(o.declined for o in outcomes)),
            )
        )
    return table(lines) if len(lines) > 1 else ""


def endings(rows: dict[str, Sequence[Outcome]]) -> str:
    """How the runs ended."""
    kinds = ("right", "wrong answer", "no solution found", "no end")
    lines: list[Sequence[str]] = [("ends, %", *kinds)]
    for name, outcomes in rows.items():
        counts = [sum(o.end == kind for o in outcomes) for kind in kinds]
        lines.append((name, *(f"{100 * count / len(outcomes):.1f}" for count in counts)))
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("gold", "models"):
        command = commands.add_parser(name)
        command.add_argument("--problems", type=int, default=300 if name == "gold" else 500)
        command.add_argument("--seed", type=int, default=7)
    command = commands.choices["models"]
    command.add_argument("--json", type=Path, help="every outcome, a line each; the same command goes on from there")
    command.add_argument("--apr", help="weights of configs/sft_countdown_apr.toml")
    command.add_argument("--serial", help="weights of configs/sft_countdown_sos.toml")
    command.add_argument("--wide", help="weights of configs/sft_countdown_sos_wide.toml")
    command.add_argument("--plait", help="weights of configs/sft_countdown_plait.toml")
    command.add_argument("--children", type=int, nargs="+", default=[2, 4, 6, 8])
    command.add_argument("--window", type=int, default=1024, help="of the comparison; progress lines say it")
    command.add_argument("--longest", type=int, default=4096, help="positions that a sequence may reach at all")
    command.add_argument("--concurrency", type=int, default=2, help="problems at once; wall time is of one at a time")
    command.add_argument("--timed", type=int, default=0, help="problems that run alone as well, for their wall time")
    command.add_argument("--only-timed", action="store_true", help="only those")
    commands.add_parser("report").add_argument("files", nargs="+", type=Path, help="that --json wrote")
    args = parser.parse_args()
    if args.command == "gold":
        outcomes = gold(args)
    else:
        outcomes = models(args) if args.command == "models" else Outcomes(*args.files)
    rows = outcomes.rows()
    if not rows:
        parser.error("nothing to show; name weights (--apr, --serial, --wide or --plait) or files that hold outcomes")
    count = max(map(len, rows.values()))
    parts = [f"{count} held-out problems", sweep(rows), costs(rows, outcomes.alone), spent(rows)]
    parts += [first_success(outcomes.of), endings(rows), table(PAPER)]
    print("\n\n".join(filter(None, parts)))


if __name__ == "__main__":
    main()
