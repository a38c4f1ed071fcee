"""A million mutated model outputs through the session: none may raise, none may exceed its budget.

    python benchmarks/check_mutations.py [--outputs 1000000] [--seed 0] [--shard 0/1] [--out state.json] [--json]

Gold traces of every format are run under random budgets by a model that gets half of its calls wrong
(`plait.testing.mutation`): parts deleted, doubled, turned round, taken from other calls, control tokens in any place,
lists that never end. An output is one engine call; only those that were mutated count. Every run is checked for: tokens
in all and of each thread, threads in all, of each fork and at once, depth, positions, calls that were not freed, tokens
that the tree does not account for. A run depends on the seed and its number alone, so a failure is run again by
`--first N --outputs 1`. With `--out` the state is kept there, and the same command goes on from it. Shards I/N
divide the runs; start one for each core. Exit code 1: something failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio

from plait.formats import FORMATS, format_class, open_format
from plait.formats.text import CharTokenizer
from plait.testing.mutation import Mutations, palette
from plait.testing.trajectories import Trajectories

OPTIONS: dict[str, dict[str, Any]] = {"npr": {"min_tokens": 0}}
"""The paper's floor of 1,024 tokens would decline most blocks of traces this short."""
NUM_GOLD = 60
"""Gold traces of each format."""
MAX_FAILURES = 20
"""After these there is something to mend."""


@dataclass(slots=True)
class State:
    """Counts so far."""

    next: int
    seed: int
    shard: str
    cpu_s: float = 0.0
    runs: int = 0
    outputs: int = 0
    mutated: int = 0
    threads: int = 0
    declined: int = 0
    tokens: int = 0
    stops: dict[str, int] = field(default_factory=dict[str, int])
    formats: dict[str, int] = field(default_factory=dict[str, int])
    """Mutated outputs of each."""
    failures: list[str] = field(default_factory=list[str])


def mutations(name: str, seed: int) -> Mutations:
    """Mutated runs of a format."""
    tags = format_class(name).tags()
    tokenizer = CharTokenizer(tags)
    format = open_format(name, tokenizer, **OPTIONS.get(name, {}))
    drawn = Trajectories(format, tokenizer, prompt_ids=(*tokenizer.bos_ids, *tokenizer.encode("What?")))
    trees = [drawn.render(drawn.draw(random.Random(f"{seed}/{name}/{n}"))) for n in range(NUM_GOLD)]
    return Mutations(format, trees, palette=palette(format, tokenizer, tags), seed=seed)


async def check(state: State, outputs: int, *, progress: bool, out: Path | None) -> None:
    """Run until so many mutated outputs were checked."""
    runs = [(name, mutations(name, state.seed)) for name in FORMATS]
    number, step = state.next, int(state.shard.partition("/")[2])
    began = shown = time.monotonic()
    before, cpu = state.mutated, time.process_time() - state.cpu_s
    while state.mutated < outputs and len(state.failures) < MAX_FAILURES:
        name, of_format = runs[number // step % len(runs)]
        try:
            with anyio.fail_after(1800):
                told = await of_format.run(number)
        except Exception as exc:
            state.failures.append(f"run {number} ({name}): {type(exc).__name__}: {exc}")
        else:
            state.outputs += told.num_outputs
            state.mutated += told.num_mutated
            state.threads += told.num_threads
            state.declined += told.num_declined
            state.tokens += told.num_tokens
            state.stops[told.stop] = state.stops.get(told.stop, 0) + 1
            state.formats[name] = state.formats.get(name, 0) + told.num_mutated
            if told.excess:
                state.failures.append(f"run {number} ({name}): {told.excess}")
        state.runs += 1
        number += step
        state.next = number
        now = time.monotonic()
        if now - shown > 10:
            shown = now
            state.cpu_s = time.process_time() - cpu
            _save(state, out)
            if progress:
                rate = (state.mutated - before) / (now - began)
                left = (outputs - state.mutated) / rate / 60
                print(
                    f"{state.mutated:,} of {outputs:,} mutated outputs, {state.runs:,} runs, {len(state.failures)} "
                    f"failures, {rate:,.0f}/s, left {left:.1f} min",
                    file=sys.stderr,
                )
    state.cpu_s = time.process_time() - cpu
    _save(state, out)


def _save(state: State, out: Path | None) -> None:
    if out is not None:
        partial = out.with_name(out.name + ".partial")
        partial.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        partial.replace(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=1_000_000, help="Mutated outputs, of this shard.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", default="0/1", metavar="I/N")
    parser.add_argument("--first", type=int, help="Number of the first run.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Keep the state there, and go on from it.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.out is not None and args.out.exists():
        state = State(**json.loads(args.out.read_text(encoding="utf-8")))
        if (state.seed, state.shard) != (args.seed, args.shard):
            parser.error(f"{args.out} is of seed {state.seed} and shard {state.shard}")
    else:
        first = int(args.shard.partition("/")[0]) if args.first is None else args.first
        state = State(next=first, seed=args.seed, shard=args.shard)
    anyio.run(lambda: check(state, args.outputs, progress=not args.json, out=args.out))
    result = asdict(state) | {"python": platform.python_version(), "machine": platform.machine()}
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{state.mutated:,} mutated outputs of {state.outputs:,} in {state.runs:,} runs, seed {state.seed}")
        print(f"{state.threads:,} threads, {state.declined:,} blocks declined, {state.tokens:,} tokens")
        print("mutated outputs by format: " + ", ".join(f"{n} {c:,}" for n, c in state.formats.items()))
        print("runs by stop reason: " + ", ".join(f"{n} {c:,}" for n, c in sorted(state.stops.items())))
        print(f"{state.cpu_s:.0f} s of CPU, {state.mutated / max(state.cpu_s, 1e-9):,.0f} mutated outputs a second")
        print("\n".join(state.failures) or "none raised, none exceeded its budget")
    return 1 if state.failures else 0


if __name__ == "__main__":
    sys.exit(main())
