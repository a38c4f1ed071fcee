"""One block, timed on any engine: threads side by side after a shared prefix, a join, and the same tokens in one line.

What the benchmarks of engines share. It asks an engine through its one method and nothing else, so a server and an
engine in this process are timed alike. Tokens are whatever the weights say: time does not depend on them.
"""

from __future__ import annotations

import statistics
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import Any, Protocol

import anyio

from plait.engines.base import EngineStats
from plait.types import Chunk, Context, Merge, SamplingParams

HEADER, SEPARATOR = 3, (5,)
COLUMNS = (
    ("threads", "threads"),
    ("fork_ms", "fork ms"),
    ("fork_own_ms", "of it not in the model"),
    ("fork_engine_ms", "in the engine's thread"),
    ("tokens_per_s", "tokens/s"),
    ("tokens_per_s_of_one", "of one thread"),
    ("join_ms", "join ms"),
    ("join_own_ms", "of it not in the model"),
    ("join_engine_ms", "in the engine's thread"),
    ("prefilled_again", "computed again"),
    ("block_ms", "block ms"),
    ("line_ms", "one line ms"),
    ("speedup_wall", "against one line"),
)


class Timed(Protocol):
    """What a block needs of an engine."""

    def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]: ...
    def stats(self) -> EngineStats: ...


async def call(engine: Timed, context: Context, tokens: int) -> tuple[int, ...]:
    """Sample so many tokens, whatever they are."""
    ids: list[int] = []
    async with aclosing(engine.generate(context, SamplingParams(max_tokens=tokens))) as chunks:
        async for chunk in chunks:
            ids += chunk.token_ids
    return tuple(ids)


async def together(number: int, work: Callable[[int], Any]) -> float:
    """Seconds until `work(0)` to `work(number - 1)`, all at once, are done."""
    start = perf_counter()
    async with anyio.create_task_group() as tasks:
        for i in range(number):
            tasks.start_soon(work, i)
    return perf_counter() - start


async def side_by_side(engine: Timed, contexts: Sequence[Context], tokens: int) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = [()] * len(contexts)

    async def one(i: int) -> None:
        out[i] = await call(engine, contexts[i], tokens)

    await together(len(contexts), one)
    return out


def prefix_ids(tokens: int, number: int) -> tuple[int, ...]:
    """A prefix of its own for each number, so that no cache knows what comes after it."""
    digits = tuple(HEADER + number // 10**i % 10 for i in range(4))
    return (digits * (tokens // 4 + 1))[:tokens]


def headers(threads: int, mark: int) -> list[tuple[int, ...]]:
    """How each thread opens; another mark, other threads."""
    return [(HEADER + mark, HEADER + i % 7, HEADER + i // 7) for i in range(threads)]


async def block(
    engine: Timed, join: str, threads: int, tokens: int, prefix: tuple[int, ...], *, line: bool = True
) -> dict[str, float]:
    """Time one block, and the same number of tokens sampled one after the other.

    Args:
        join: `merge`, or `concat`.
        line: Whether to time the line too, which takes longest.

    Returns:
        `fork_ms` until all threads have their first token, less the same for one thread; `tokens_per_s` of all
        threads, first tokens included; `join_ms` until the parent's next token; `prefilled_again` tokens of threads
        that the join computed although they were computed before; `block_ms` from the start of the threads to the
        parent's next token; `line_ms` of the line, and their ratio `speedup_wall`. Of an engine that tells its
        `compute_s`, also `fork_own_ms` and `join_own_ms`: from the calls to all their first tokens, less the time
        inside the model, so what it costs to share a prefix and to take threads back, and all else that is no model;
        and of these `fork_engine_ms` and `join_engine_ms`, the work of the engine's own thread: finding, sharing,
        putting a batch together, sampling. The rest is a task for each thread in the event loop, and the ways between.
    """
    await call(engine, (prefix,), 1)
    start = perf_counter()
    await call(engine, (prefix, headers(1, 0)[0]), 1)
    one, stats = perf_counter(), [engine.stats()]
    await side_by_side(engine, [(prefix, header) for header in headers(threads, 1)], 1)
    forked = perf_counter()
    stats.append(engine.stats())
    sampled = await side_by_side(engine, [(prefix, header) for header in headers(threads, 2)], tokens)
    done = perf_counter()
    stats.append(engine.stats())
    branches = [(*header, *ids) for header, ids in zip(headers(threads, 2), sampled, strict=True)]
    if join == "merge":
        context: Context = (prefix, Merge(tuple((branch,) for branch in branches)), SEPARATOR)
    else:
        context = (prefix, *branches, SEPARATOR)
    await call(engine, context, 1)
    joined = perf_counter()
    stats.append(engine.stats())
    # The last token of a thread is sampled but was never computed: computing it now is not again.
    again = stats[3].prefill_tokens - stats[2].prefill_tokens - len(SEPARATOR) - threads
    measured = {
        "fork_ms": ((forked - one) - (one - start)) * 1e3,
        "tokens_per_s": threads * tokens / (done - forked),
        "tokens_per_s_of_one": tokens / (done - forked),
        "join_ms": (joined - done) * 1e3,
        "prefilled_again": max(0, again),
        "block_ms": (joined - forked) * 1e3,
    }
    for name, seconds, before, after in (("fork", forked - one, *stats[:2]), ("join", joined - done, *stats[2:])):
        computed = after.compute_s - before.compute_s
        if after.compute_s:
            measured[f"{name}_own_ms"] = (seconds - computed) * 1e3
        if after.work_s:
            measured[f"{name}_engine_ms"] = (after.work_s - before.work_s - computed) * 1e3
    if line:
        alone = perf_counter()
        await call(engine, (prefix, headers(1, 3)[0]), threads * tokens + 1)
        measured["line_ms"] = (perf_counter() - alone) * 1e3
        measured["speedup_wall"] = measured["line_ms"] / measured["block_ms"]
    return measured


def medians(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each column over the rounds."""
    row = {key: round(statistics.median(m[key] for m in measured), 4) for key in measured[0]}
    return row | {"prefilled_again": int(row["prefilled_again"])}


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    digits = 2 if max(values) < 100 else 0
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def head(names: Sequence[str]) -> str:
    """The table's first two lines, with columns for these names before the measured ones."""
    titles = [*names, *(title for _, title in COLUMNS)]
    return f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"


def cells(names: Sequence[str], threads: int, measured: Sequence[dict[str, float]]) -> str:
    """A line of the table; what was not measured stays empty."""
    texts = [*names, str(threads)]
    for key, _ in COLUMNS[1:]:
        values = [m[key] for m in measured if key in m]
        whole = key == "prefilled_again"
        texts.append("" if not values else str(int(statistics.median(values))) if whole else spread(values))
    return f"| {' | '.join(texts)} |"
