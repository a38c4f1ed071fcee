"""Connections cut at random bytes: how soon all threads of such a request have left the engine.

    python benchmarks/bench_cuts.py [--engine scripted|embedded] [--cuts 10000] [--servers 4] [--limit 0.25] [--json]

Starts some `plait serve` side by side, because each spends most of its time between two tokens. Of each, one connection
at a time is cut, so that what is measured is that cut; the others only make the machine busier. Asks every kind of
request, streams and whole replies, and leaves at a byte drawn evenly over the bytes of request and reply; half of the
time by an end of stream, half by a reset. A whole reply comes at once at its end, so half of those are left after a
time drawn evenly over what the reply takes. Then `/metrics` is read over another connection until no request runs and
no engine call samples or waits, which is the time that is shown; reading it takes some milliseconds itself. The exit
code is 0 where every cut was within the limit, nothing was left behind in any server at the end, and the servers' logs
hold nothing but requests.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from server_process import Ask, Probe, asks, cut, quantile, reply_length, server_process, until_idle

_GIVE_UP_S = 10.0


def cuts(
    engine: str,
    number: int,
    *,
    options: tuple[str, ...],
    seed: int = 0,
    say: Callable[[float], object] = lambda freed_s: None,
) -> dict[str, Any]:
    """Cut so many connections to a server of its own, one after the other."""
    rng = random.Random(seed)
    freed: list[float] = []
    where: Counter[str] = Counter()
    with server_process(engine, *options) as server:
        probe = Probe(server.port)
        menu = asks(engine, stream=False)
        lengths = {ask.data(): measured(server.port, ask) for ask in menu}
        before = settled(probe)
        for _ in range(number):
            ask = rng.choice(menu)
            length, seconds = lengths[ask.data()]
            at, wait_s = rng.randrange(len(ask.data()) + length), 0.0
            if ask.kind.endswith("whole") and rng.random() < 0.5:
                at, wait_s = len(ask.data()), rng.random() * seconds
            got = cut(server.port, ask, at, reset=rng.random() < 0.5, wait_s=wait_s)
            where["in the request" if at < len(ask.data()) else "before the reply" if got <= 0 else "in the reply"] += 1
            freed.append(until_idle(probe, seconds=_GIVE_UP_S))
            say(freed[-1])
        after = settled(probe)
        probe.close()
        left = after["plait:client_disconnects_total"]
        server.process.send_signal(signal.SIGTERM)
        code = server.wait(60)
        log = [line for line in server.lines if '"event": "draining"' not in line]
    return {
        "where": where,
        "noticed_in_a_run": left,
        "freed_s": freed,
        "files": (before["process_open_fds"], after["process_open_fds"]),
        "tasks": (before["plait:tasks"], after["plait:tasks"]),
        "mib": tuple(round(v["process_resident_memory_bytes"] / (1 << 20), 1) for v in (before, after)),
        "cells": (before["plait:engine_cached_tokens"], after["plait:engine_cached_tokens"]),
        "exit_code": code,
        "log": log[:10],
    }


def side_by_side(engine: str, number: int, servers: int, *, options: tuple[str, ...], seed: int = 0) -> dict[str, Any]:
    """Divide the cuts among servers; what was found, all of them together."""
    freed: list[float] = []

    def say(freed_s: float) -> None:
        freed.append(freed_s)
        if sys.stderr.isatty() and len(freed) % 50 == 0:
            print(f"\r{len(freed)} of {number}, slowest {1000 * max(freed):.1f} ms ", end="", file=sys.stderr)

    def one(index: int) -> dict[str, Any]:
        own = number // servers + (index < number % servers)
        return cuts(engine, own, options=options, seed=servers * seed + index, say=say)

    with ThreadPoolExecutor(servers) as threads:
        found = list(threads.map(one, range(servers)))
    return {"engine": engine, "servers": servers, "seed": seed} | together(found)


def together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts added up, times side by side; of what servers hold before and after, a pair for each."""
    freed = [seconds for one in found for seconds in one["freed_s"]]
    return {
        "cuts": len(freed),
        "where": dict(sum((one["where"] for one in found), Counter[str]())),
        "noticed_in_a_run": sum(one["noticed_in_a_run"] for one in found),
        "p50_ms": 1000 * quantile(freed, 0.5),
        "p99_ms": 1000 * quantile(freed, 0.99),
        "max_ms": 1000 * max(freed),
        **{name: [one[name] for one in found] for name in ("files", "tasks", "cells", "mib", "exit_code")},
        "log": [line for one in found for line in one["log"]],
    }


def measured(port: int, ask: Ask) -> tuple[int, float]:
    """Bytes and seconds of a whole reply."""
    started = time.perf_counter()
    return reply_length(port, ask), time.perf_counter() - started


def settled(probe: Probe) -> dict[str, float]:
    """The numbers when closed connections have been seen to be closed."""
    time.sleep(0.5)
    return probe.read()


def faults(found: dict[str, Any], limit_s: float) -> list[str]:
    """What did not hold."""
    wrong: list[str] = []
    if found["max_ms"] > 1000 * limit_s:
        wrong.append(f"the slowest cut was free after {found['max_ms']:.0f} ms")
    wrong += [
        f"{name} were {before:g} and are {after:g}"
        for name in ("files", "tasks")
        for before, after in found[name]
        if after > before
    ]
    if not found["noticed_in_a_run"]:
        wrong.append("no cut hit a run")
    wrong += [f"a server ended with {code}" for code in found["exit_code"] if code != 0]
    return wrong + [f"log: {line[:300]}" for line in found["log"]]


def table(found: dict[str, Any]) -> str:
    rows = [
        ("cuts", f"{found['cuts']}: {', '.join(f'{n} {name}' for name, n in sorted(found['where'].items()))}"),
        ("of these, while a run was under way", f"{found['noticed_in_a_run']:.0f}"),
        ("free after, p50, p99, slowest", f"{found['p50_ms']:.1f}, {found['p99_ms']:.1f}, {found['max_ms']:.1f} ms"),
        ("open files before, after", _pairs(found["files"])),
        ("tasks before, after", _pairs(found["tasks"])),
        ("cells held before, after", _pairs(found["cells"])),
        ("resident memory before, after, MiB", _pairs(found["mib"])),
    ]
    return "\n".join(
        [
            f"| {found['engine']} engine, {found['servers']} servers side by side, seed {found['seed']} | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def _pairs(pairs: Sequence[tuple[float, float]]) -> str:
    """Of every server; those that are the same once."""
    return "; ".join(dict.fromkeys(f"{before:g}, {after:g}" for before, after in pairs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("scripted", "embedded"), default="scripted")
    parser.add_argument("--cuts", type=int, default=10_000)
    parser.add_argument("--servers", type=int, default=4, help="side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=0.25, help="seconds")
    parser.add_argument("--delay", type=float, default=0.0005, help="seconds a token of the scripted engine takes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = ("--engine-option", f"delay_s={args.delay}") if args.engine == "scripted" else ()
    found = side_by_side(args.engine, args.cuts, args.servers, options=options, seed=args.seed)
    wrong = faults(found, args.limit)
    print(json.dumps(found | {"faults": wrong}) if args.json else table(found))
    for fault in wrong:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
