"""Random workloads of forks, joins, cancellations and evictions in too little memory, on the engines of this process.

    python benchmarks/check_scarcity.py                            1,000 workloads on llama.cpp and on torch each
    python benchmarks/check_scarcity.py --engine llamacpp --seeds 200 --first 5000 --json

A workload is 3 to 8 runs at once of threads that fork and join by merge or by reading again, on tiny random float32
weights (those of `llamacpp-windows` have sliding windows, shorter than the contexts); the engine has 128 to 256 cells
(other sizes for each seed), of which one run alone takes most. Every sampled token and its log-probability are held
against a dense float64 forward with explicit mask and positions; after each workload the engine must be idle, its
books must balance, a context as long as it takes must fit, and after `forget` no cell may be held. Ends with code 1 at
the first workload where something does not hold, and says which. Needs the train extra (it writes its own weights);
torch if that engine is asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import scarce_engines
from plait.errors import EngineProtocolError
from plait.testing.scarcity import Findings

BACKENDS = ("asyncio", "trio")


def check(name: str, seeds: range, gguf: Path) -> tuple[Findings, str | None]:
    """Every workload on one engine, with a line of progress; what was found, and what does not hold."""
    found, start = Findings(), time.perf_counter()
    for number, seed in enumerate(seeds, 1):
        try:
            found += anyio.run(scarce_engines.run, name, seed, gguf, backend=BACKENDS[seed % 2])
        except (EngineProtocolError, AssertionError, BaseExceptionGroup) as exc:
            return found, f"workload {seed}: {type(exc).__name__}: {exc}"
        if sys.stderr.isatty() or number % 50 == 0 or number == len(seeds):
            end = "\r" if sys.stderr.isatty() and number < len(seeds) else "\n"
            passed = time.perf_counter() - start
            print(f"{name}: {number} of {len(seeds)}, {found.calls} calls, {passed:.0f} s", end=end, file=sys.stderr)
    return found, None


def main(args: argparse.Namespace) -> int:
    rows: list[dict[str, object]] = []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in args.engine.split(","):
            gguf = scarce_engines.MODELS[name].write(Path(folder) / f"{name}.gguf")
            start = time.perf_counter()
            found, wrong = check(name, range(args.first, args.first + args.seeds), gguf)
            package = "torch" if name == "torch" else "xllamacpp"
            rows.append(
                {
                    "engine": name,
                    "version": f"{package} {version(package)}",
                    **asdict(found),
                    "wrong": wrong,
                    "wall_s": round(time.perf_counter() - start, 1),
                }
            )
            failed = failed or wrong is not None
    columns = ("engine", "workloads", "calls", "ended", "cut", "refused", "merges", "tokens", "preemptions")
    columns += ("evictions", "forgets", "unpressed", "drafted_tokens", "accepted_tokens")
    columns += ("largest_error", "largest_gap", "wall_s")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        values = (f"{v:.1e}" if isinstance(v := row[c], float) and c != "wall_s" else str(v) for c in columns)
        print(f"| {' | '.join(values)} |")
        if row["wrong"]:
            print(f"\n{row['engine']}: {row['wrong']}")
    if args.json:
        print(json.dumps(rows))
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(scarce_engines.MODELS)
    parser.add_argument("--engine", default=names, metavar="NAME[,NAME]", help=f"default: {names}")
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="workloads on each (default 1000)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first seed")
    parser.add_argument("--json", action="store_true", help="print a list of rows as the last line")
    sys.exit(main(parser.parse_args()))
