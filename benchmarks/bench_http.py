"""What Plait adds to a server: the same requests sent by hand and through the HTTP engine, in pairs.

    python benchmarks/bench_http.py [--server llama-server|vllm] [--engine URL] [--runs 100] [--threads 1,4] [--json]

By hand: one httpx2 client that streams the very bodies the engine sends and parses each event, nothing else.
Through Plait: a run of the same problem in a format that never forks, events read and folded. --wire adds a third:
Plait's own connection and its events, nothing read into them. Without --engine a server is started on the embedded
sequential model (one thread, loopback), which is so small that every microsecond of a client shows: a token takes a
llama-server 0.1 ms. --weights takes any GGUF instead. vLLM needs PLAIT_VLLM_PYTHON, the interpreter of an environment
that has it.

A round sends each once, in an order that goes through all permutations. What is added is the median of the differences
within a round, its interval (95 %) is by order statistics (the sign test's), so it supposes nothing about how a
machine is busy. `CPU a token` is the client's own, less spoiled by a busy machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from itertools import permutations
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import anyio
import httpx2
from blocks import together

from plait.engines import open_engine
from plait.engines.http import HttpEngine
from plait.engines.http.base import Call
from plait.engines.http.wire import Wait
from plait.formats.base import TrajectoryFormat
from plait.formats.sequential import Sequential
from plait.models import load_model
from plait.session import run
from plait.types import Budget, Request

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
MODEL = "plait-tiny-sequential"
QUESTIONS = ("347 * 526", "836 * 472", "529 * 683", "974 * 385", "263 * 947", "718 * 264", "495 * 836", "652 * 719")
BUDGET = Budget(max_tokens=None)


class Line(Sequential):
    """As many tokens as the budget has: weights of others end where their text does, at another place each."""

    def __init__(self) -> None:
        self._eos = ()


def never_forking(weights: Path | None, length: int, threads: int) -> tuple[list[Request], TrajectoryFormat]:
    """Requests that never fork: questions for the embedded model, or given numbers of tokens for weights of others."""
    if weights is not None:
        budget = Budget(max_tokens=length, max_thread_tokens=length)
        return [Request(prompt_ids=tuple(range(300 + i, 364 + i)), budget=budget) for i in range(threads)], Line()
    model = load_model(MODEL)
    return [model.request(f"What is {question}?", budget=BUDGET) for question in QUESTIONS[:threads]], model.format


@contextmanager
def served(options: argparse.Namespace, slots: int) -> Iterator[str]:
    if options.engine is not None:
        yield options.engine
        return
    from real_servers import llama_server, served_gguf, vllm_server

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.server == "vllm":
            import hf_weights

            weights = hf_weights.write(load_model(MODEL), folder / "hf")
            started = vllm_server(weights, native=True, seqs=slots)
        else:
            weights = options.weights or served_gguf(folder, MODEL)
            started = llama_server(weights, slots=slots, threads=1 if options.weights is None else 2)
        yield stack.enter_context(started)[0]


async def by_hand(client: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> int:
    """Tokens that came."""
    count = 0
    try:
        async with client.stream("POST", url, json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    count += num_tokens(json.loads(line[6:]))
    except httpx2.RemoteProtocolError:
        if count:
            raise
        # A llama-server closes each connection after its stream, at times just when the next call is on it.
        return await by_hand(client, url, body)
    return count


async def by_wire(engine: HttpEngine, url: str, body: dict[str, Any]) -> int:
    """The same with Plait's own client."""
    assert engine._client is not None
    count = 0
    async with aclosing(engine._client.events(url, body, {}, Wait(60.0, "nothing came"))) as batches:
        async for events in batches:
            count += sum(num_tokens(event) for event in events)
    return count


def num_tokens(event: dict[str, Any]) -> int:
    return len(event.get("tokens") or (event.get("choices") or [{}])[0].get("token_ids") or ())


async def what_is_sent(engine: HttpEngine, request: Request, format: TrajectoryFormat) -> tuple[str, dict[str, Any]]:
    """Route and body of the one call that a request is."""
    dialect, sent = engine._dialects[0], []
    spell = dialect.body

    def noting(call: Call) -> dict[str, Any]:
        sent.append((dialect.route(call), spell(call)))
        return sent[-1][1]

    dialect.body = noting
    try:
        await run(request, engine=engine, format=format)
    finally:
        dialect.body = spell
    (once,) = sent
    return once


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the smallest interval of values around it that holds the true one in 95 of 100 cases or more."""
    ordered, n = sorted(values), len(values)
    outside, below = 0.0, 0
    while below < n // 2 and outside + math.comb(n, below) / 2**n <= 0.025:
        outside += math.comb(n, below) / 2**n
        below += 1
    low = max(below - 1, 0)
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


async def measure(url: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds of `threads` problems at once, by hand and through Plait, in pairs."""
    requests, format = never_forking(options.weights, options.tokens, threads)
    counts: Counter[str] = Counter()
    async with open_engine("http", urls=url) as engine, httpx2.AsyncClient(timeout=60, trust_env=False) as client:
        assert isinstance(engine, HttpEngine)
        server = engine.servers[0]
        sent = [await what_is_sent(engine, request, format) for request in requests]

        async def one_by_hand(i: int) -> None:
            route, body = sent[i]
            came = await by_hand(client, f"{url}{route}", body)
            counts["by_hand"] += came

        async def one_by_wire(i: int) -> None:
            route, body = sent[i]
            came = await by_wire(engine, f"{url}{route}", body)
            counts["wire"] += came

        async def one_through_plait(i: int) -> None:
            tree = await run(requests[i], engine=engine, format=format)
            counts["plait"] += tree.usage().sampled_tokens

        ways = {"by_hand": one_by_hand, **({"wire": one_by_wire} if options.wire else {}), "plait": one_through_plait}
        wall: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        orders = list(permutations(ways))
        number, until = 0, math.inf
        while number <= options.runs and perf_counter() < until:
            for name in orders[number % len(orders)]:
                before = process_time()
                seconds = await together(threads, ways[name])
                if number:  # the first round warms up
                    wall[name].append(seconds)
                    cpu[name].append(process_time() - before)
            if not number:
                until = perf_counter() + options.seconds
            number += 1
    assert len(set(counts.values())) == 1, f"not the same work: {counts}"
    tokens = counts["plait"] // number
    row: dict[str, Any] = {"engine": server.kind, "threads": threads, "tokens": tokens, "runs": number - 1}
    for name in ways:
        row[f"{name}_ms"] = round(statistics.median(wall[name]) * 1e3, 2)
        row[f"{name}_range_ms"] = [round(min(wall[name]) * 1e3, 2), round(max(wall[name]) * 1e3, 2)]
        row[f"{name}_cpu_us"] = round(statistics.median(cpu[name]) / tokens * 1e6, 1)
    for name in (name for name in ways if name != "by_hand"):
        pairs = list(zip(wall["by_hand"], wall[name], strict=True))
        added, *interval = median_interval([mine - hand for hand, mine in pairs])
        row[f"{name}_added_ms"] = round(added * 1e3, 2)
        row[f"{name}_added_interval_ms"] = [round(end * 1e3, 2) for end in interval]
        speed, *interval = median_interval([hand / mine for hand, mine in pairs])
        row[f"{name}_of_by_hand"] = round(speed, 4)
        row[f"{name}_of_by_hand_interval"] = [round(end, 4) for end in interval]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", metavar="URL", help="a server that runs; its vocabulary must be the model's")
    parser.add_argument("--server", choices=["llama-server", "vllm"], default="llama-server", help="what is started")
    parser.add_argument("--weights", type=Path, metavar="GGUF", help="other weights than the embedded model's")
    parser.add_argument("--tokens", type=int, default=64, help="of each request to other weights")
    parser.add_argument("--runs", type=int, default=100, help="rounds of each number of streams")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no round begins later in a row than this")
    parser.add_argument("--wire", action="store_true", help="also with Plait's wire alone")
    parser.add_argument("--threads", default="1,4")
    parser.add_argument("--json", action="store_true", help="print the rows as the last line")
    options = parser.parse_args()
    numbers = [int(n) for n in options.threads.split(",")]
    with served(options, max(numbers)) as url:
        rows = [anyio.run(measure, url, n, options) for n in numbers]
    print(
        "| engine | streams | tokens | rounds | by hand | way | its time | added (95 %) | of the speed by hand | "
        "CPU a token |"
    )
    print("|---|--:|--:|--:|--:|---|--:|--:|--:|--:|")
    for r in rows:
        for way in (way for way in ("wire", "plait") if f"{way}_ms" in r):
            by, through = (
                f"{r[f'{k}_ms']} ms ({r[f'{k}_range_ms'][0]}-{r[f'{k}_range_ms'][1]})" for k in ("by_hand", way)
            )
            low, high = r[f"{way}_added_interval_ms"]
            least, most = r[f"{way}_of_by_hand_interval"]
            print(
                f"| {r['engine']} | {r['threads']} | {r['tokens']} | {r['runs']} | {by} | {way} | {through} | "
                f"{r[f'{way}_added_ms']} ms ({low} to {high}) | "
                f"{r[f'{way}_of_by_hand']:.1%} ({least:.1%}-{most:.1%}) | "
                f"{r['by_hand_cpu_us']} -> {r[f'{way}_cpu_us']} us |"
            )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
