"""`plait bench load`: throughput, latency and fork rate of a server against offered load."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import anyio

from plait.bench import problems
from plait.bench.load import Point, Target, as_data, offer, table
from plait.engines.http.engine import base_urls
from plait.errors import RequestError
from plait.tasks import FAMILIES

KEY_VARIABLE = "PLAIT_API_KEY"


def load(
    url: str, *, rates: str, seconds: float, model: str | None, families: Sequence[str], seed: int, as_json: bool
) -> int:
    """Offer each rate in turn and print a row for each.

    Args:
        url: Of the server, without `/v1`.
        rates: Requests a second, separated by commas.

    Raises:
        RequestError: A rate is no number, the address is none, or a family is not known.
    """
    try:
        numbers = [float(text) for text in rates.split(",") if text.strip()]
    except ValueError as exc:
        raise RequestError(f"--rates is {rates!r}; it must be numbers separated by commas") from exc
    base, *others = base_urls(url)
    if others:
        raise RequestError("--url names several servers; offer to one at a time")
    asked = [problem.question for problem in problems(families or list(FAMILIES), 50, seed=seed)]
    target = Target(url=base, questions=asked, model=model, api_key=os.environ.get(KEY_VARIABLE))
    points = anyio.run(_offers, target, numbers, seconds, seed)
    print(json.dumps(as_data(points)) if as_json else table(points))
    return 0 if any(point.done_rps for point in points) else 1


async def _offers(target: Target, rates: Sequence[float], seconds: float, seed: int) -> list[Point]:
    points: list[Point] = []
    for rate in rates:
        print(f"{rate:g} requests a second for {seconds:g} s", file=sys.stderr)
        points.append(await offer(target, rate, seconds=seconds, seed=seed))
    return points
