"""The line of truth: what a run cost, in tokens and seconds, and against its twin."""

from __future__ import annotations

from dataclasses import dataclass

from plait.tree import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one run cost."""

    name: str
    usage: Usage
    wall_s: float


def truth(cost: Cost) -> str:
    """Threads, total tokens, critical path, wall time."""
    u = cost.usage
    if not u.threads:
        return f"no threads, {u.sampled_tokens} tokens one after the other, {wall(cost.wall_s)}"
    forks = "1 fork" if u.forks == 1 else f"{u.forks} forks"
    return (
        f"{u.threads} threads in {forks}, {u.sampled_tokens} tokens, {u.critical_path_tokens} on the critical path, "
        f"{wall(cost.wall_s)}"
    )


def comparison(own: Cost, twin: Cost, *, runs: int) -> list[str]:
    """Both, one under the other, and the ratios."""
    rows = [_row(own), _row(twin)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    timed = f"median of {runs} runs each, in turn" if runs > 1 else "one run each"
    tokens, seconds = ratios(own, twin)
    steps, time = _times(tokens, "fewer", "more"), _times(seconds, "faster", "slower")
    return [*lines, f"{steps} token steps than in one line, {time} ({timed})"]


def ratios(own: Cost, twin: Cost) -> tuple[float, float]:
    """Twin over own: critical-path tokens, wall time."""
    return (
        twin.usage.critical_path_tokens / max(1, own.usage.critical_path_tokens),
        twin.wall_s / own.wall_s if own.wall_s else 1.0,
    )


def _row(cost: Cost) -> tuple[str, ...]:
    u = cost.usage
    return (
        cost.name,
        f"{u.threads} threads",
        f"{u.sampled_tokens} tokens",
        f"{u.critical_path_tokens} on the critical path",
        wall(cost.wall_s),
    )


def _times(ratio: float, above: str, below: str) -> str:
    return f"{ratio:.2f}x {above}" if ratio >= 1 else f"{1 / max(ratio, 1e-9):.2f}x {below}"


def wall(seconds: float) -> str:
    """Seconds for people: `34 ms`, `1.24 s`."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"
    return f"{seconds:.2f} s"
