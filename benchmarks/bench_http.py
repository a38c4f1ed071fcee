"""What Plait adds to a server: the same requests sent by hand and through the HTTP engine, in turn.

    python benchmarks/bench_http.py [--server llama-server|vllm] [--engine URL] [--runs 15] [--threads 1,4] [--json]

By hand: one httpx2 client that streams the very bodies the engine sends and parses each event, nothing else.
Through Plait: a run of the same problem in a format that never forks, events read and folded. Without --engine a
server is started on the embedded sequential model (one thread, loopback), which is so small that every microsecond of
a client shows: a token takes a llama-server 0.1 ms. --weights takes any GGUF instead. vLLM needs PLAIT_VLLM_PYTHON, the
interpreter of an environment that has it. Medians over the runs with their range; `CPU a token` is the client's own,
less spoiled by a busy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import process_time
from typing import Any

import anyio
import httpx2
from blocks import together

from plait.engines import open_engine
from plait.engines.http import HttpEngine
from plait.engines.http.base import Call
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
    async with client.stream("POST", url, json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                count += len(event.get("tokens") or (event.get("choices") or [{}])[0].get("token_ids") or ())
    return count


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


async def measure(url: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds of `threads` problems at once, by hand and through Plait, in turn."""
    requests, format = never_forking(options.weights, options.tokens, threads)
    runs = options.runs
    wall: dict[str, list[float]] = {"by_hand": [], "plait": []}
    cpu: dict[str, list[float]] = {"by_hand": [], "plait": []}
    counts = {"hand": 0, "plait": 0}
    async with open_engine("http", urls=url) as engine, httpx2.AsyncClient(timeout=60, trust_env=False) as client:
        assert isinstance(engine, HttpEngine)
        server = engine.servers[0]
        sent = [await what_is_sent(engine, request, format) for request in requests]

        async def one_by_hand(i: int) -> None:
            route, body = sent[i]
            came = await by_hand(client, f"{url}{route}", body)
            counts["hand"] += came

        async def one_through_plait(i: int) -> None:
            tree = await run(requests[i], engine=engine, format=format)
            counts["plait"] += tree.usage().sampled_tokens

        for number in range(runs + 1):
            for name, work in (("by_hand", one_by_hand), ("plait", one_through_plait)):
                before = process_time()
                seconds = await together(threads, work)
                if number:  # the first round warms up
                    wall[name].append(seconds)
                    cpu[name].append(process_time() - before)
    assert counts["hand"] == counts["plait"], f"not the same work: {counts}"
    tokens = counts["hand"] // (runs + 1)
    by, through = (statistics.median(seconds) for seconds in wall.values())
    return {
        "engine": server.kind,
        "threads": threads,
        "tokens": tokens,
        **{f"{name}_ms": round(statistics.median(seconds) * 1e3, 2) for name, seconds in wall.items()},
        **{
            f"{name}_range_ms": [round(min(seconds) * 1e3, 2), round(max(seconds) * 1e3, 2)]
            for name, seconds in wall.items()
        },
        **{f"{name}_cpu_us": round(statistics.median(seconds) / tokens * 1e6, 1) for name, seconds in cpu.items()},
        "added_ms": round((through - by) * 1e3, 2),
        "added_us_per_token": round((through - by) / tokens * 1e6, 1),
        "of_by_hand": round(by / through, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", metavar="URL", help="a server that runs; its vocabulary must be the model's")
    parser.add_argument("--server", choices=["llama-server", "vllm"], default="llama-server", help="what is started")
    parser.add_argument("--weights", type=Path, metavar="GGUF", help="other weights than the embedded model's")
    parser.add_argument("--tokens", type=int, default=64, help="of each request to other weights")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", default="1,4")
    parser.add_argument("--json", action="store_true", help="print the rows as the last line")
    options = parser.parse_args()
    numbers = [int(n) for n in options.threads.split(",")]
    with served(options, max(numbers)) as url:
        rows = [anyio.run(measure, url, n, options) for n in numbers]
    print("| engine | streams | tokens | by hand | through Plait | added | of the speed by hand | CPU a token |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        by, through = (
            f"{r[f'{k}_ms']} ms ({r[f'{k}_range_ms'][0]}-{r[f'{k}_range_ms'][1]})" for k in ("by_hand", "plait")
        )
        print(
            f"| {r['engine']} | {r['threads']} | {r['tokens']} | {by} | {through} | {r['added_ms']} ms | "
            f"{r['of_by_hand']:.1%} | {r['by_hand_cpu_us']} -> {r['plait_cpu_us']} us |"
        )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
