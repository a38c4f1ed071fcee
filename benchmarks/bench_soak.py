"""A server under many streams for minutes: every byte checked, nothing grows, and SIGTERM loses no accepted request.

    python benchmarks/bench_soak.py [--engine scripted|embedded] [--streams N] [--minutes M] [--delay S] [--json]

Starts `plait serve` as its users do and holds N streams open at once (256 on the scripted engine, 64 on the embedded
model, by default), each followed by another the moment it ends: chat in both orders, completions, responses and runs,
on the adaptive model and its twin. Every frame is read to its last byte and held to its order. Once a second
`/metrics` says memory, descriptors, tasks, threads and the engine's cells; growth is the median of the last quarter
against that of the second. At the end SIGTERM comes under full load: what was accepted must end whole, what was not
must be told so with Retry-After, and the process must exit with 0 within its time to drain. The exit code is 0 where
all of that held. The clients share the machine with the server: rates are not what a server can do.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from server_process import Answered, Ask, Broken, Probe, Server, answered, asks, is_idle, quantile, server_process

STREAMS = {"scripted": 256, "embedded": 64}
_MIB = 1 << 20
_MEMORY, _FILES, _TASKS = "process_resident_memory_bytes", "process_open_fds", "plait:tasks"
_THREADS, _CELLS, _CALLS = "plait:threads_active", "plait:engine_cached_tokens", "plait:engine_inflight"
_REST = (_FILES, _TASKS, _THREADS, _CALLS, "plait:requests_running", "plait:threads_waiting", "plait:engine_queued")
"""What must be, when nothing runs, as it was before anything ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One number of `/metrics` over the time under load."""

    name: str
    before: float
    """When nothing had run yet."""
    second: float
    """Median of the second quarter of the time."""
    last: float
    """Median of the last."""
    highest: float
    after: float
    """When nothing ran any more."""


@dataclass(slots=True, kw_only=True)
class Soak:
    """What was seen."""

    engine: str
    streams: int
    minutes: float
    whole: dict[str, int] = field(default_factory=dict[str, int])
    """Streams that ended as they must, by kind."""
    frames: int = 0
    declined: int = 0
    broken: list[str] = field(default_factory=list[str])
    """What was wrong with a reply."""
    first_s: list[float] = field(default_factory=list[float])
    whole_s: list[float] = field(default_factory=list[float])
    growth: list[Growth] = field(default_factory=list[Growth])
    drain_limit_s: float = 60.0
    accepted: int = 0
    """Requests under way when SIGTERM came."""
    drained: int = 0
    """Of these, those that ended whole."""
    told: int = 0
    """Of these, those that were told to come back, before they were accepted."""
    lost: list[str] = field(default_factory=list[str])
    """The others."""
    drain_s: float = 0.0
    exit_code: int | None = None
    log: list[str] = field(default_factory=list[str])
    """Lines of the server that are no request that went well."""

    def faults(self) -> list[str]:
        """What did not hold."""
        found = [f"broken: {text}" for text in self.broken[:10]] + [f"lost: {text}" for text in self.lost[:10]]
        rows = {row.name: row for row in self.growth}
        memory = rows[_MEMORY]
        if memory.last > 1.05 * memory.second + 4 * _MIB:
            found.append(f"memory grew from {memory.second / _MIB:.1f} to {memory.last / _MIB:.1f} MiB under load")
        found += [
            f"{name} is {rows[name].after:g} at rest, and was {rows[name].before:g}"
            for name in _REST
            if rows[name].after > rows[name].before
        ]
        for name in (_FILES, _TASKS):
            if rows[name].last > 1.1 * rows[name].second + 8:
                found.append(f"{name} grew from {rows[name].second:g} to {rows[name].last:g} under load")
        if not self.whole:
            found.append("no stream ended")
        if self.exit_code != 0 or self.drain_s > self.drain_limit_s + 5:
            found.append(f"the server ended with {self.exit_code} after {self.drain_s:.1f} s")
        found += [f"log: {line[:300]}" for line in self.log if '"event": "draining"' not in line]
        return found


async def soak(server: Server, result: Soak, *, seed: int = 0, say: bool = True) -> None:
    """Hold the streams, for the time; then let the server drain."""
    probe, rng = Probe(server.port), random.Random(seed)
    menu = asks(result.engine)
    async with anyio.create_task_group() as clients:
        for ask in menu:
            # What is loaded and cached once is no growth.
            clients.start_soon(answered, server.port, ask, Answered())
    before = await at_rest(probe)
    samples: list[dict[str, float]] = []
    until = time.monotonic() + 60 * result.minutes
    async with anyio.create_task_group() as clients:
        for _ in range(result.streams):
            clients.start_soon(_client, server, menu, random.Random(rng.random()), result, until)
        while time.monotonic() < until:
            await anyio.sleep(min(1.0, 6 * result.minutes))
            samples.append(await anyio.to_thread.run_sync(probe.read))
            if say and sys.stderr.isatty():
                print(f"\r{_progress(result, samples[-1], until)}", end="", file=sys.stderr)
    after = await at_rest(probe)
    quarter = max(1, len(samples) // 4)
    for name in dict.fromkeys((_MEMORY, _CELLS, *_REST)):
        values = [sample[name] for sample in samples]
        row = Growth(
            name=name,
            before=before[name],
            second=statistics.median(values[quarter : 2 * quarter] or values),
            last=statistics.median(values[-quarter:]),
            highest=max(values),
            after=after[name],
        )
        result.growth.append(row)
    probe.close()
    await _drain(server, menu, rng, result)


async def at_rest(probe: Probe) -> dict[str, float]:
    """The numbers when nothing runs, nor has any connection but this one."""
    values = probe.read()
    for _ in range(100):
        await anyio.sleep(0.1)
        before, values = values, probe.read()
        if is_idle(values) and all(values[name] == before[name] for name in (_FILES, _TASKS)):
            break
    return values


async def _client(server: Server, menu: Sequence[Ask], rng: random.Random, result: Soak, until: float) -> None:
    # They start over a second, so that they are not in step.
    await anyio.sleep(rng.random() * min(1.0, 6 * result.minutes))
    while time.monotonic() < until:
        ask, reply = rng.choice(menu), Answered()
        try:
            await answered(server.port, ask, reply)
            if reply.status != 200:
                raise Broken(f"status {reply.status} while there was room")
        except (Broken, OSError, ValueError, LookupError) as exc:
            result.broken.append(f"{ask.kind}: {type(exc).__name__}: {exc}")
            continue
        result.whole[ask.kind] = result.whole.get(ask.kind, 0) + 1
        result.frames += reply.frames
        result.declined += reply.declined
        result.first_s.append(reply.first_s)
        result.whole_s.append(reply.whole_s)


async def _drain(server: Server, menu: Sequence[Ask], rng: random.Random, result: Soak) -> None:
    """SIGTERM while every stream is under way."""
    replies, late = [Answered() for _ in range(result.streams)], Answered()
    under_way: list[Answered] = []
    started = 0.0

    async def one(ask: Ask, reply: Answered) -> None:
        try:
            await answered(server.port, ask, reply)
        except (Broken, OSError, ValueError, LookupError) as exc:
            result.lost.append(f"{ask.kind}: {type(exc).__name__}: {exc}")

    async with anyio.create_task_group() as clients:
        for reply in replies:
            clients.start_soon(one, rng.choice(menu), reply)
        with anyio.move_on_after(30):
            for reply in replies:
                await reply.begun.wait()
        under_way += [reply for reply in replies if not reply.complete]
        server.terminate()
        started = time.monotonic()
        await anyio.sleep(0.3)
        if any(not reply.complete for reply in under_way):
            # One that comes too late is told when to come back.
            clients.start_soon(one, menu[0], late)
    result.exit_code = await anyio.to_thread.run_sync(server.wait, result.drain_limit_s + 30)
    result.drain_s = time.monotonic() - started
    result.accepted = len(under_way)
    result.drained = sum(reply.complete and reply.status == 200 for reply in under_way)
    told = [reply for reply in (*under_way, late) if reply.complete and reply.status == 503]
    result.told = len(told)
    result.lost += [f"a 503 without Retry-After: {reply}" for reply in told if not reply.retry_after]
    result.lost += [
        f"status {reply.status}" for reply in under_way if reply.complete and reply.status not in (200, 503)
    ]
    result.log = list(server.lines)


def _progress(result: Soak, now: dict[str, float], until: float) -> str:
    left = max(0.0, until - time.monotonic())
    return (
        f"{left:5.0f} s left; {sum(result.whole.values())} streams, {result.frames} frames, "
        f"{len(result.broken)} broken; "
        f"{now[_MEMORY] / _MIB:.1f} MiB, {now[_FILES]:.0f} files, {now[_TASKS]:.0f} tasks, {now[_THREADS]:.0f} threads "
    )


def table(result: Soak) -> str:
    """What was seen, in Markdown."""
    total, first = sum(result.whole.values()), [1000 * quantile(result.first_s, q) for q in (0.5, 0.95)]
    lines = [
        f"{result.streams} streams on the {result.engine} engine for {result.minutes:g} minutes: {total} ended whole, "
        f"{result.frames} frames, {len(result.broken)} broken, {result.declined} with forks declined",
        f"first byte p50 {first[0]:.0f} ms, p95 {first[1]:.0f} ms; "
        f"whole p50 {quantile(result.whole_s, 0.5):.2f} s, p95 {quantile(result.whole_s, 0.95):.2f} s",
        f"SIGTERM: {result.accepted} under way, {result.drained} ended whole, {result.told} told to come back, "
        f"{len(result.lost)} lost; exit code {result.exit_code} after {result.drain_s:.1f} s",
        "",
        "| | before | second quarter | last quarter | highest | after |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result.growth:
        unit, name = (_MIB, "resident memory, MiB") if row.name == _MEMORY else (1, row.name)
        cells = (row.before, row.second, row.last, row.highest, row.after)
        lines.append(f"| {name} | {' | '.join(f'{round(value / unit, 1):g}' for value in cells)} |")
    lines += ["", "| kind of stream | ended whole |", "|---|--:|"]
    lines += [f"| {kind} | {number} |" for kind, number in sorted(result.whole.items())]
    return "\n".join(lines)


def as_data(result: Soak) -> dict[str, Any]:
    data = asdict(result)
    for name in ("first_s", "whole_s"):
        values = data.pop(name)
        data[f"{name[:-2]}_p50_s"], data[f"{name[:-2]}_p95_s"] = quantile(values, 0.5), quantile(values, 0.95)
    return data | {"faults": result.faults(), "python": platform.python_version()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=tuple(STREAMS), default="scripted")
    parser.add_argument("--streams", type=int, help="at once; default 256 scripted, 64 embedded")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--delay", type=float, default=0.1, help="seconds a token of the scripted engine takes")
    parser.add_argument("--drain", type=float, default=60.0, help="seconds the server has after SIGTERM")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    streams = STREAMS[args.engine] if args.streams is None else args.streams
    result = Soak(engine=args.engine, streams=streams, minutes=args.minutes, drain_limit_s=args.drain)
    options = ["--drain-s", str(args.drain)]
    if args.engine == "scripted":
        options += ["--engine-option", f"delay_s={args.delay}"]
    with server_process(args.engine, *options) as server:
        anyio.run(soak, server, result)
    faults = result.faults()
    print(json.dumps(as_data(result)) if args.json else table(result))
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
