"""Countdown as in the APR paper: what fits into a window, what children cost, and what ends at the first success.

    python benchmarks/bench_countdown.py gold   [--problems 300]
    python benchmarks/bench_countdown.py models --apr runs/apr/model.gguf --serial runs/sos/model.gguf [--wide ...]
                                                [--plait ...] [--problems 1000] [--window 1024] [--json FILE]

`gold` needs no weights: it draws searches of every width and counts how many end with the solution in a window, the
ceiling of whoever imitates them. `models` decodes greedily on held-out problems. A problem counts as solved in a window
if its answer is right and no sequence of its run was longer, as in the paper. Windows are given in tokens of the
compact vocabulary and, recounted from the same text, of a 32k SentencePiece vocabulary that splits digits (Mistral's
v1, a stand-in for Llama 2's). First success: the same weights, once with all children awaited and once with the others
cut when the first succeeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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
    reread: int
    prompt_of_threads: int
    """Tokens that were given to threads which see nothing of their parent."""
    wall_s: float


def outcome(tree: Tree, problem: tasks.Problem, wall_s: float = 0.0) -> Outcome:
    usage = tree.usage()
    contexts = [(*_flat(tree.context(s.id)), *s.sampled_ids) for s in tree.segments.values()]
    return Outcome(
        right=tree.stop is StopReason.EOS and tasks.grade(problem, response_text(tree, SEARCH)),
        longest=usage.longest_context_tokens,
        longest_llama=max(sum(_WEIGHTS[id] for id in context) for context in contexts),
        total=usage.sampled_tokens,
        critical=usage.critical_path_tokens,
        dropped=tree.num_dropped,
        threads=usage.threads,
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


def gold(args: argparse.Namespace) -> dict[str, Sequence[Outcome]]:
    """Searches of every width, without weights."""
    drawn = held_out(args.problems, args.seed)
    family = CountdownSearch()
    apr, sequential = open_format("apr", SEARCH), open_format("sequential", SEARCH)
    out: dict[str, Sequence[Outcome]] = {}

    def searched(name: str, format: TrajectoryFormat, trace: Callable[[tasks.Problem], Any], **shape: Any) -> None:
        outcomes: list[Outcome] = []
        raced: list[Outcome] = []
        for problem in drawn:
            problem = replace(problem, shape={**problem.shape, **shape})
            ids = prompt_ids(SEARCH, problem.prompt)
            tree = render(trace(problem), format=format, tokenizer=SEARCH, prompt_ids=ids)
            outcomes.append(outcome(tree, problem))
            raced.append(cut_at_first_success(tree, outcomes[-1]))
        out[name] = outcomes
        if format is apr:
            out[f"{name}, first success"] = raced
        print(f"{name}: {share(outcomes, lambda o: o.right)} %", file=sys.stderr)

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


async def decoded(
    model: Model,
    format: TrajectoryFormat,
    problems: Sequence[tasks.Problem],
    *,
    children: int | None,
    concurrency: int,
    window: int,
) -> list[Outcome]:
    """Greedy runs, in the order of the problems; no sequence exceeds the window."""
    options: dict[str, Any] = {"cells": 8192 * concurrency, "max_seqs": 16 * concurrency}
    budget = Budget(max_threads=children or 16, max_threads_per_fork=children or 16, max_tokens=None)
    outcomes: dict[int, Outcome] = {}
    todo = iter(enumerate(problems))

    async def work(engine: Engine) -> None:
        for i, problem in todo:
            request = Request(
                prompt_ids=prompt_ids(SEARCH, problem.prompt),
                budget=budget,
                logprobs=False,
                conditioned=model.levels is not None,
            )
            start = time.perf_counter()
            tree = await run(request, engine=engine, format=format)
            outcomes[i] = outcome(tree, problem, time.perf_counter() - start)

    async with model.open_engine(max_context=window, **options) as engine, anyio.create_task_group() as workers:
        for _ in range(concurrency):
            workers.start_soon(work, engine)
    return [outcomes[i] for i in range(len(problems))]


def models(args: argparse.Namespace) -> dict[str, Sequence[Outcome]]:
    drawn = held_out(args.problems, args.seed)
    out: dict[str, Sequence[Outcome]] = {}

    def measure(name: str, model: Model, format: TrajectoryFormat, children: int | None = None) -> None:
        start = time.perf_counter()
        few = drawn[: args.timed]
        timed = anyio.run(_decoded(model, format, few, children, 1, args.longest))
        rest = anyio.run(_decoded(model, format, drawn[args.timed :], children, args.concurrency, args.longest))
        out[name] = [*timed, *(replace(o, wall_s=0.0) for o in rest)]
        right = share(out[name], lambda o: o.right and o.longest <= args.window)
        took = time.perf_counter() - start
        print(f"{name}: {right} % in a window of {args.window}, {took:.0f} s", file=sys.stderr)

    for name, path in (("serial", args.serial), ("serial, wider", args.wide)):
        if path:
            model = load_model(path)
            measure(name, model, model.format)
    if args.apr:
        model = load_model(args.apr)
        for children in args.children:
            measure(f"message, {children} children", model, model.format, children)
        most = max(args.children)
        measure(f"message, {most} children, first success", model, _over(FirstSuccess, model), most)
    if args.plait:
        model = load_model(args.plait)
        measure("plait, all awaited", model, _over(WaitForAll, model))
        measure("plait, race", model, model.format)
    return out


def _decoded(
    model: Model,
    format: TrajectoryFormat,
    problems: Sequence[tasks.Problem],
    children: int | None,
    concurrency: int,
    window: int,
) -> Callable[[], Any]:
    async def main() -> list[Outcome]:
        return await decoded(
            model, format, problems, children=children, concurrency=concurrency, window=min(window, model.max_context)
        )

    return main


def _over(cls: Callable[..., TrajectoryFormat], model: Model) -> TrajectoryFormat:
    return cls(model.tokenizer, **({"levels": model.levels} if model.levels else {}))


def first_success(rows: dict[str, Sequence[Outcome]]) -> str:
    """What cutting at the first success saves, pair by pair."""
    lines = [("first success against all awaited", "right, %", "L", "T", "L saved", "T saved", "sampled past the cut")]
    for name, raced in rows.items():
        base = name.removesuffix(", first success") if name.endswith("first success") else ""
        base = base or (name.removesuffix("race") + "all awaited" if name.endswith(", race") else "")
        if base not in rows:
            continue
        for label, outcomes in ((base, rows[base]), (name, raced)):
            all_l, all_t = (sum(getattr(o, f) for o in rows[base]) for f in ("critical", "total"))
            own_l, own_t = (sum(getattr(o, f) for o in outcomes) for f in ("critical", "total"))
            n = len(outcomes)
            saved = (f"{100 * (1 - own_l / all_l):.1f} %", f"{100 * (1 - own_t / all_t):.1f} %")
            past = f"{sum(o.dropped for o in outcomes) / n:.1f}"
            lines.append(
                (label, share(outcomes, lambda o: o.right), f"{own_l / n:.0f}", f"{own_t / n:.0f}", *saved, past)
            )
    return table(lines) if len(lines) > 1 else ""


def costs(rows: dict[str, Sequence[Outcome]]) -> str:
    lines: list[Sequence[str]] = [
        ("means a problem", "children", "T", "L", "longest", "read again", "given to children", "wall alone, s")
    ]
    for name, outcomes in rows.items():
        fields = ("total", "critical", "longest", "reread", "prompt_of_threads")
        timed = [o.wall_s for o in outcomes if o.wall_s]
        wall = f"{statistics.fmean(timed):.3f}" if timed else "-"
        means = (f"{statistics.fmean(getattr(o, f) for o in outcomes):.0f}" for f in fields)
        lines.append((name, f"{statistics.fmean(o.threads for o in outcomes):.1f}", *means, wall))
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("gold", "models"):
        command = commands.add_parser(name)
        command.add_argument("--problems", type=int, default=300 if name == "gold" else 1000)
        command.add_argument("--seed", type=int, default=7)
        command.add_argument("--json", type=Path, help="write every outcome there")
    command = commands.choices["models"]
    command.add_argument("--apr", help="weights of configs/sft_countdown_apr.toml")
    command.add_argument("--serial", help="weights of configs/sft_countdown_sos.toml")
    command.add_argument("--wide", help="weights of configs/sft_countdown_sos_wide.toml")
    command.add_argument("--plait", help="weights of configs/sft_countdown_plait.toml")
    command.add_argument("--children", type=int, nargs="+", default=[2, 4, 6, 8])
    command.add_argument("--window", type=int, default=1024, help="of the comparison; progress lines say it")
    command.add_argument("--longest", type=int, default=4096, help="positions that a sequence may reach at all")
    command.add_argument("--concurrency", type=int, default=4, help="problems at once; wall time is of one at a time")
    command.add_argument("--timed", type=int, default=50, help="problems that run alone, for their wall time")
    args = parser.parse_args()
    rows = gold(args) if args.command == "gold" else models(args)
    if not rows:
        parser.error("name weights: --apr, --serial, --wide or --plait")
    print(f"{args.problems} held-out problems, seed {args.seed}\n\n{sweep(rows)}")
    print(f"\n{costs(rows)}\n\n{first_success(rows)}\n\n{table(PAPER)}")
    if args.json:
        data = {name: [asdict(o) for o in outcomes] for name, outcomes in rows.items()}
        args.json.write_text(json.dumps(data), encoding="utf-8")


if __name__ == "__main__":
    main()
