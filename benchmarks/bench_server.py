"""What the server adds to an engine: a request that never forks, and the first byte of one that does.

    python benchmarks/bench_server.py [--engine embedded|scripted] [--runs 100] [--limit-ms 3] [--json]

Starts `plait serve`; opens the same engine over the same weights in this process. Question by question, and in turns:
the engine alone (one call, from the call to its last chunk), the server's whole reply, and its stream, both over
one kept connection, from the request's first byte sent. The model that never forks is the sequential twin. Then the
adaptive model: the engine's first chunk against the stream's first byte and its first frame with text. Shown are the
median of the differences of each pair and their quartiles, in milliseconds. The exit code is 0 where the overhead of
a whole reply and the delay of the first text are within the limit at the median. The scripted engine takes no time, so
there every microsecond of the server shows that an engine's own work would hide; `a token` is that time per token.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio

from plait.bench import problems
from plait.engines import Engine
from plait.models import Model, gold_model, load_model
from plait.types import SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from server_process import HOST, MODELS, Probe, server_process

TEXT = b'"reasoning":"'
"""What the first frame with text holds."""
CPU = "process_cpu_seconds_total"
_END = b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one call or request; of what is not there, 0."""

    first: float
    """To the first chunk of the engine, or byte of a body."""
    text: float
    """To the first text."""
    whole: float
    tokens: int = 0


class Client:
    """One kept connection, spoken to by hand."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, model: str, question: str, *, stream: bool) -> Times:
        body = json.dumps(
            {"model": model, "messages": [{"role": "user", "content": question}], "stream": stream, "seed": 1}
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        started = perf_counter()
        self._socket.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        data, first, text, length = b"", 0.0, 0.0, -1
        while True:
            got = self._socket.recv(1 << 16)
            now = 1000 * (perf_counter() - started)
            if not got:
                raise ConnectionError("the server closed the connection")
            data += got
            at = data.find(b"\r\n\r\n") + 4
            if at < 4:
                continue
            if length < 0:
                assert data.startswith(b"HTTP/1.1 200 "), data[:300]
                lines = data[:at].lower().split(b"\r\n")
                length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
            first = first or (now if len(data) > at else 0.0)
            text = text or (now if TEXT in data else 0.0)
            if data.endswith(_END) if stream else len(data) == at + length:
                return Times(first, text, now)


async def alone(engine: Engine, model: Model, question: str) -> Times:
    """The engine's own time for the first call of a question."""
    prompt = model.request(question).prompt_ids
    params = SamplingParams(
        max_tokens=2048, stop_ids=model.format.stop_ids(0), eos_ids=model.format.eos_ids(), seed=1, logprobs=False
    )
    first, tokens, started = 0.0, 0, perf_counter()
    async with aclosing(engine.generate((prompt,), params)) as chunks:
        async for chunk in chunks:
            tokens += len(chunk.token_ids)
            first = first or 1000 * (perf_counter() - started)
    return Times(first, first, 1000 * (perf_counter() - started), tokens)


async def measure(port: int, models: Sequence[Model], options: dict[str, Any], runs: int) -> dict[str, Any]:
    """Differences of all pairs."""
    adaptive, twin = models
    # A question is asked once of each model on each side, so that nobody finds its prompt in a cache.
    asked = [p.question for p in problems(["long_multiplication"], 2 * (runs + 3), seed=7)]
    questions, others = asked[::2], asked[1::2]
    client = Client(port)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    async with twin.open_engine(**options) as engine, adaptive.open_engine(**options) as forking:
        for number, (question, other) in enumerate(zip(questions, others, strict=True)):
            # Who comes first changes from question to question.
            before = await alone(engine, twin, question) if number % 2 else None
            whole = client.ask(twin.name, question, stream=False)
            own = before or await alone(engine, twin, question)
            second = await alone(engine, twin, other) if number % 2 else None
            stream = client.ask(twin.name, other, stream=True)
            second = second or await alone(engine, twin, other)
            early = await alone(forking, adaptive, question) if number % 2 else None
            forked = client.ask(adaptive.name, question, stream=True)
            early = early or await alone(forking, adaptive, question)
            if number < 3:
                continue
            note("engine alone, whole", own.whole)
            note("server, whole reply", whole.whole)
            note("overhead of a whole reply", whole.whole - own.whole)
            note("overhead of a stream", stream.whole - second.whole)
            note("overhead of a whole reply, a token", (whole.whole - own.whole) / own.tokens)
            note("first text of a stream, later by", stream.text - second.first)
            note("forked: engine's first chunk", early.first)
            note("forked: first byte, later by", forked.first - early.first)
            note("forked: first text, later by", forked.text - early.first)
    # A process's own clock: it says the same on a busy machine, but ticks slowly, so many replies are taken together.
    probe = Probe(port)
    before = probe.read()[CPU]
    for question in questions:
        client.ask(twin.name, question, stream=False)
    cpu = 1000 * (probe.read()[CPU] - before) / len(questions)
    probe.close()
    found["server and engine, CPU of a whole reply"] = [cpu] * 2
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=tuple(MODELS), default="embedded")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--limit-ms", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    if args.engine == "embedded":
        models = [load_model(name) for name in MODELS["embedded"]]
        options: dict[str, Any] = {"max_seqs": 64, "cells": 8192}
    else:
        models, options = [gold_model(), gold_model(traces="serial")], {}
    with server_process(args.engine) as server:
        found = anyio.run(measure, server.port, models, options, args.runs)
    rows = {name: quartiles(values) for name, values in found.items()}
    held = all(rows[name][1] <= args.limit_ms for name in ("overhead of a whole reply", "forked: first text, later by"))
    if args.json:
        about = {"engine": args.engine, "runs": args.runs, "load": load, "python": platform.python_version()}
        print(json.dumps({**about, "held": held, "quartiles_ms": rows}))
    else:
        print(f"{args.engine} engine, {args.runs} questions; load average before: {load:.1f}\n")
        print("| milliseconds | median | quartiles |\n|---|--:|--:|")
        for name, (low, median, high) in rows.items():
            print(f"| {name} | {median:.2f} | {low:.2f} - {high:.2f} |")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
