"""Figures from records: shares with intervals, means per family, speedup against the twin, fork decisions.

Pure functions of records; knows nothing of engines or files. Any one figure alone misleads: accuracy, total tokens,
critical path and wall time go together.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from plait.bench.records import Record, by_method, pairs

Z = 1.959964
"""Quantile of the normal distribution for intervals of 95 %."""


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 %; (0, 1) of nothing.

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if not n:
        return 0.0, 1.0
    p, scale = hits / n, 1 + Z * Z / n
    middle = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One model on one set of problems; tokens and seconds are means."""

    n: int
    right: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    forked: float
    """Share of runs that forked."""
    fork_right: float
    """Share of runs that forked where forking is right, or did not where it is wrong."""
    threads: float
    total_tokens: float
    critical_path_tokens: float
    token_latency: float
    longest_context_tokens: float
    reread_tokens: float
    wall_s: float
    wall_median_s: float
    self_parallelism: float
    """Total over critical path, ratio of sums. Not a speedup: the twin writes fewer tokens."""


_MEANS = (
    *("forked", "threads", "total_tokens", "critical_path_tokens", "token_latency", "longest_context_tokens"),
    *("reread_tokens", "wall_s"),
)
"""What a summary has of its records under their own names."""


def summary(records: Sequence[Record]) -> Summary:
    n = len(records)
    right = sum(r.right for r in records)
    low, high = wilson(right, n)
    path = sum(r.critical_path_tokens for r in records)
    return Summary(
        n=n,
        right=right,
        accuracy=right / max(1, n),
        accuracy_low=low,
        accuracy_high=high,
        fork_right=sum(r.decision_right for r in records) / max(1, n),
        **{name: sum(getattr(r, name) for r in records) / max(1, n) for name in _MEANS},
        wall_median_s=statistics.median(r.wall_s for r in records) if n else 0.0,
        self_parallelism=sum(r.total_tokens for r in records) / path if path else 1.0,
    )


def by_family(records: Iterable[Record]) -> dict[str, Summary]:
    """A summary for each family, in the order of their first records."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.family, []).append(record)
    return {name: summary(group) for name, group in groups.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Twin over adaptive: above 1 the adaptive model is faster."""

    mean: float
    """Mean of the ratios of single problems."""
    error: float
    """Standard error of that mean."""
    of_sums: float
    """Ratio of the totals: long problems weigh more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """An adaptive model against its twin, on the same problems."""

    n: int
    accuracy: float
    twin_accuracy: float
    tokens: Ratio
    """Critical-path tokens."""
    wall: Ratio
    total_tokens: float
    """Total tokens, adaptive over twin, ratio of sums: what forking costs."""
    kept: float
    """Share of the speedup in tokens that is there in wall time."""


def speedup(adaptive: Iterable[Record], twin: Iterable[Record]) -> Speedup | None:
    """Speedup on the problems that both ran; None where there are none. Wrong answers count like right ones."""
    both = list(pairs(adaptive, twin))
    if not both:
        return None
    tokens = _ratio([(t.critical_path_tokens, a.critical_path_tokens) for a, t in both])
    wall = _ratio([(t.wall_s, a.wall_s) for a, t in both])
    return Speedup(
        n=len(both),
        accuracy=sum(a.right for a, _ in both) / len(both),
        twin_accuracy=sum(t.right for _, t in both) / len(both),
        tokens=tokens,
        wall=wall,
        total_tokens=sum(a.total_tokens for a, _ in both) / max(1, sum(t.total_tokens for _, t in both)),
        kept=wall.mean / tokens.mean if tokens.mean else 0.0,
    )


def _ratio(both: Sequence[tuple[float, float]]) -> Ratio:
    ratios = [twin / adaptive for twin, adaptive in both if adaptive]
    if not ratios:
        return Ratio(mean=1.0, error=0.0, of_sums=1.0)
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    return Ratio(mean=statistics.fmean(ratios), error=error, of_sums=sum(t for t, _ in both) / sum(a for _, a in both))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much more often one method is right than another, on the same problems."""

    n: int
    mean: float
    """A share: 0.01 is one point."""
    half: float
    """Half of its interval of 95 %, by the differences of single problems; 0 where all are alike."""


def difference(records: Iterable[Record], others: Iterable[Record]) -> Difference | None:
    """First less second, paired; None where no problem is in both."""
    less = [float(a.right) - float(b.right) for a, b in pairs(records, others)]
    if not less:
        return None
    error = statistics.stdev(less) / math.sqrt(len(less)) if len(less) > 1 else 0.0
    return Difference(n=len(less), mean=statistics.fmean(less), half=Z * error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Fork decisions as a table of two by two."""

    forked_rightly: int
    over_forked: int
    """Forked where it is wrong."""
    under_forked: int
    """Did not fork where it is right."""
    held_rightly: int

    @property
    def right(self) -> float:
        n = self.forked_rightly + self.over_forked + self.under_forked + self.held_rightly
        return (self.forked_rightly + self.held_rightly) / n if n else 0.0


def decisions(records: Iterable[Record]) -> Decisions:
    counts = {(forks, forked): 0 for forks in (True, False) for forked in (True, False)}
    for record in records:
        counts[record.forks, record.forked] += 1
    return Decisions(
        forked_rightly=counts[True, True],
        over_forked=counts[False, True],
        under_forked=counts[True, False],
        held_rightly=counts[False, False],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """How often the model forks where forking is expected to save a share of the critical path in this bin."""

    low: float
    high: float
    n: int
    forked: float
    forked_low: float
    forked_high: float
    wanted: float
    """Share on which forking is right."""


EDGES = (-math.inf, 0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, math.inf)


def decision_curve(records: Iterable[Record], edges: Sequence[float] = EDGES) -> list[CurvePoint]:
    """Share of runs that forked, by the saving that the problem's costs predict; bins without problems are left out."""
    known = [(record.predicted_saving, record) for record in records]
    points: list[CurvePoint] = []
    for low, high in itertools.pairwise(edges):
        inside = [r for saving, r in known if saving is not None and low <= saving < high]
        if inside:
            forked = sum(r.forked for r in inside)
            interval = wilson(forked, len(inside))
            points.append(
                CurvePoint(
                    low=low,
                    high=high,
                    n=len(inside),
                    forked=forked / len(inside),
                    forked_low=interval[0],
                    forked_high=interval[1],
                    wanted=sum(r.forks for r in inside) / len(inside),
                )
            )
    return points


def result(adaptive: Sequence[Record], twin: Sequence[Record] = ()) -> dict[str, Any]:
    """Everything as plain values: what `plait eval --json` prints.

    `accuracy`, `fork_right` and `twin_accuracy` are shares of all problems; `speedup_tokens` and `speedup_wall` are
    means over the decomposable ones, those on which forking is right.
    """
    whole = summary(adaptive)
    table = decisions(adaptive)
    out: dict[str, Any] = {
        "n": whole.n,
        "accuracy": whole.accuracy,
        "accuracy_interval": [whole.accuracy_low, whole.accuracy_high],
        "fork_right": whole.fork_right,
        "decisions": asdict(table),
        "total_tokens": whole.total_tokens,
        "critical_path_tokens": whole.critical_path_tokens,
        "wall_s": whole.wall_s,
    }
    if twin:
        out |= _against(adaptive, twin)
    out["families"] = {
        name: asdict(s) | (_against_family(adaptive, twin, name) if twin else {})
        for name, s in by_family(adaptive).items()
    }
    return out


def methods_result(records: Sequence[Record], adaptive: Sequence[Record]) -> list[dict[str, Any]]:
    """Every method as plain values, with its families; `difference` is the adaptive model less it."""
    out: list[dict[str, Any]] = []
    for (model, name), own in by_method(records).items():
        less = difference(adaptive, own)
        out.append(
            {
                "method": name,
                "model": model,
                "samples": own[0].samples,
                "temperature": own[0].temperature,
                **asdict(summary(own)),
                "difference": asdict(less) if less else None,
                "families": {family: asdict(s) for family, s in by_family(own).items()},
            }
        )
    return out


def _against(adaptive: Sequence[Record], twin: Sequence[Record]) -> dict[str, Any]:
    on_decomposable = speedup([r for r in adaptive if r.forks], twin)
    on_controls = speedup([r for r in adaptive if r.family == "control"], twin)
    return {
        "twin_accuracy": summary(twin).accuracy,
        "twin_wall_s": summary(twin).wall_s,
        "speedup_tokens": on_decomposable.tokens.mean if on_decomposable else None,
        "speedup_wall": on_decomposable.wall.mean if on_decomposable else None,
        "speedup_kept": on_decomposable.kept if on_decomposable else None,
        "speedup_tokens_of_sums": on_decomposable.tokens.of_sums if on_decomposable else None,
        "speedup_wall_of_sums": on_decomposable.wall.of_sums if on_decomposable else None,
        "decomposable": on_decomposable.n if on_decomposable else 0,
        "control_tokens": on_controls.total_tokens if on_controls else None,
    }


def _against_family(adaptive: Sequence[Record], twin: Sequence[Record], family: str) -> dict[str, Any]:
    own = [r for r in adaptive if r.family == family]
    decomposable = speedup([r for r in own if r.forks], twin)
    every = speedup(own, twin)
    return {
        "twin_accuracy": every.twin_accuracy if every else None,
        "speedup_tokens": decomposable.tokens.mean if decomposable else None,
        "speedup_wall": decomposable.wall.mean if decomposable else None,
        "decomposable": decomposable.n if decomposable else 0,
        "all_speedup_tokens": every.tokens.mean if every else None,
        "all_speedup_wall": every.wall.mean if every else None,
        "tokens_over_twin": every.total_tokens if every else None,
    }
