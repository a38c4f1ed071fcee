"""What a server does under load: requests offered at a fixed rate, whether it keeps up or not, and what came of them.

Arrivals are a Poisson process that does not wait for answers (an open loop): a closed one would slow down with the
server and hide its queue. Speaks OpenAI's chat stream, so it measures any such server; forks are seen where the `plait`
block of usage says them. Needs httpx2.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import anyio

from plait.errors import EngineUnavailable, RequestError, needs

try:
    import httpx2
except ImportError as exc:
    raise EngineUnavailable(f"{needs('measuring a server', 'http')} ({exc})") from exc

TIMEOUT_S = 120.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request."""

    status: int = 0
    """Of HTTP; 0 where the connection failed, 200 with `ok=False` where a stream broke off."""
    ok: bool = False
    first_s: float = 0.0
    """Seconds to the first reasoning or content."""
    total_s: float = 0.0
    tokens: int = 0
    threads: int = 0
    declined: bool = False
    """Forks were declined for load."""
    error: str = ""
    """Why there is no whole answer, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What came of one offered rate."""

    offered_rps: float
    sent: int
    done_rps: float
    """Whole answers a second, from the first request sent to the last answer."""
    tokens_per_s: float
    first_p50_s: float
    first_p95_s: float
    total_p50_s: float
    total_p95_s: float
    fork_rate: float
    """Share of the answers that came with threads."""
    declined_rate: float
    """Share of the answers whose forks were declined for load."""
    refused: int
    """429 and 503: asked to come back."""
    failed: int
    """Everything else that is no whole answer."""
    failures: Mapping[str, int] = field(default_factory=dict[str, int])
    """Why, and how often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and what it is asked."""

    url: str
    questions: Sequence[str]
    model: str | None = None
    api_key: str | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """The `plait` field of every request."""


async def offer(target: Target, rate: float, *, seconds: float, seed: int = 0) -> Point:
    """Send requests at a rate for some time; wait for the last answer.

    Args:
        rate: Requests a second, on average.
        seconds: How long requests are sent.
        seed: Of arrivals and questions: the same offers for every server.

    Raises:
        RequestError: Rate or time is none, or there is nothing to ask.
    """
    if not rate > 0 or not seconds > 0 or not target.questions:
        raise RequestError(f"rate is {rate} and seconds {seconds}; both must be above 0, with a question to ask")
    rng = random.Random(f"load/{seed}/{rate}")
    outcomes: list[Outcome] = []
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx2.AsyncClient(
        base_url=target.url, headers=headers, timeout=TIMEOUT_S, limits=limits, trust_env=False
    ) as http:
        started = anyio.current_time()
        async with anyio.create_task_group() as requests:
            at = started
            while (at := at + rng.expovariate(rate)) < started + seconds or not outcomes:
                await anyio.sleep_until(at)
                outcome = Outcome()
                outcomes.append(outcome)
                requests.start_soon(_ask, http, target, rng.choice(target.questions), outcome)
        took = anyio.current_time() - started
    return _point(rate, outcomes, took)


async def _ask(http: httpx2.AsyncClient, target: Target, question: str, outcome: Outcome) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= {"model": target.model} if target.model else {}
    body |= {"plait": target.options} if target.options else {}
    started = anyio.current_time()
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            outcome.status = reply.status_code
            if reply.status_code == 200:
                async for line in reply.aiter_lines():
                    _read(line, outcome, lambda: anyio.current_time() - started)
            else:
                outcome.error = _said(await reply.aread()) or f"the server says {reply.status_code}"
    except httpx2.HTTPError as exc:
        outcome.ok, outcome.error = False, str(exc) or type(exc).__name__
    outcome.total_s = anyio.current_time() - started


def _said(body: bytes) -> str:
    """The first line of an error as OpenAI writes it; empty where the body is another."""
    try:
        return str(json.loads(body)["error"]["message"]).partition("\n")[0][:200]
    except (ValueError, KeyError, TypeError):
        return ""


def _read(line: str, outcome: Outcome, since: Callable[[], float]) -> None:
    """Take what a line of the stream says."""
    if not line.startswith("data: "):
        return
    text = line.removeprefix("data: ")
    if text == "[DONE]":
        outcome.ok = True
        return
    data = json.loads(text)
    if "error" in data:
        outcome.error = _said(text.encode())
    for choice in data.get("choices", ()):
        delta = choice["delta"]
        if not outcome.first_s and any(delta.get(name) for name in ("reasoning", "reasoning_content", "content")):
            outcome.first_s = since()
    outcome.declined |= "forks_declined" in (data.get("plait") or {})
    usage = data.get("usage")
    if usage:
        outcome.tokens = usage["completion_tokens"]
        outcome.threads = (usage.get("plait") or {}).get("threads", 0)


def _point(rate: float, outcomes: Sequence[Outcome], took: float) -> Point:
    done = [o for o in outcomes if o.ok]
    refused = sum(o.status in (429, 503) for o in outcomes)
    failed = [o for o in outcomes if not o.ok and o.status not in (429, 503)]
    first, total = sorted(o.first_s for o in done), sorted(o.total_s for o in done)
    return Point(
        offered_rps=rate,
        sent=len(outcomes),
        done_rps=len(done) / took,
        tokens_per_s=sum(o.tokens for o in done) / took,
        first_p50_s=_quantile(first, 0.5),
        first_p95_s=_quantile(first, 0.95),
        total_p50_s=_quantile(total, 0.5),
        total_p95_s=_quantile(total, 0.95),
        fork_rate=sum(o.threads > 0 for o in done) / max(1, len(done)),
        declined_rate=sum(o.declined for o in done) / max(1, len(done)),
        refused=refused,
        failed=len(failed),
        failures=dict(Counter(o.error or "the stream broke off" for o in failed)),
    )


def _quantile(values: Sequence[float], q: float) -> float:
    """Of sorted values, the nearest one; 0 of none."""
    return values[min(len(values) - 1, int(q * len(values)))] if values else 0.0


def table(points: Sequence[Point]) -> str:
    """The points as a Markdown table."""
    head = "| offered /s | sent | answered /s | tokens /s | first p50, p95 ms | whole p50, p95 ms | forked | declined |"
    lines = [f"{head} refused | failed |", "|" + "--:|" * 10]
    for p in points:
        cells = (
            f"{p.offered_rps:g}",
            str(p.sent),
            f"{p.done_rps:.1f}",
            f"{p.tokens_per_s:.0f}",
            f"{1000 * p.first_p50_s:.0f}, {1000 * p.first_p95_s:.0f}",
            f"{1000 * p.total_p50_s:.0f}, {1000 * p.total_p95_s:.0f}",
            f"{100 * p.fork_rate:.0f} %",
            f"{100 * p.declined_rate:.0f} %",
            str(p.refused),
            str(p.failed),
        )
        lines.append(f"| {' | '.join(cells)} |")
    failures = sum((Counter(p.failures) for p in points), Counter[str]())
    lines += [f"\n{count} failed: {why}" for why, count in failures.most_common(5)]
    return "\n".join(lines)


def as_data(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [asdict(point) for point in points]
