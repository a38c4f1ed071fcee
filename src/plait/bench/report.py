"""Figures as markdown tables: what `plait eval` prints, readable in a terminal and in a results file alike."""

from __future__ import annotations

from collections.abc import Sequence

from plait.bench.metrics import Summary, by_family, decision_curve, decisions, difference, speedup, summary
from plait.bench.records import Record, by_method


def table(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, the first row its head; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return f"| {' | '.join([first.strip().ljust(widths[0]), *others])} |"

    rule = f"|{'|'.join('-' * (w + 2) if i == 0 else '-' * (w + 1) + ':' for i, w in enumerate(widths))}|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def families_table(records: Sequence[Record]) -> str:
    """One model: accuracy with its interval, fork decisions, tokens and seconds, a row for each family."""
    head = ("family", "n", "right", "95 %", "forked", "fork right", "threads", "T", "L", "L (TW)", "longest", "wall")
    rows = [(name, *_cells(s)) for name, s in by_family(records).items()]
    if len(rows) > 1:
        rows.append(("all", *_cells(summary(records))))
    legend = (
        "T: tokens sampled. L: of these, on the critical path. L (TW): ThreadWeaver's token latency. "
        "longest: positions of the longest context. Means."
    )
    return f"{table([head, *rows])}\n\n{legend}"


def _cells(s: Summary) -> tuple[str, ...]:
    return (
        str(s.n),
        _share(s.accuracy),
        f"{100 * s.accuracy_low:.1f}-{100 * s.accuracy_high:.1f}",
        _share(s.forked),
        _share(s.fork_right),
        f"{s.threads:.1f}",
        f"{s.total_tokens:.0f}",
        f"{s.critical_path_tokens:.0f}",
        f"{s.token_latency:.0f}",
        f"{s.longest_context_tokens:.0f}",
        seconds(s.wall_s),
    )


def speedup_table(adaptive: Sequence[Record], twin: Sequence[Record]) -> str:
    """Against the twin, on the problems where forking is right, a row for each family; then on the others."""
    head = ("against the twin", "n", "right", "twin", "tokens", "of sums", "wall", "of sums", "kept", "T/T twin")
    rows: list[tuple[str, ...]] = []
    names = list(by_family(adaptive))
    groups = [(name, [r for r in adaptive if r.family == name and r.forks]) for name in names]
    groups += [("all decomposable", [r for r in adaptive if r.forks])]
    groups += [("not to be forked", [r for r in adaptive if not r.forks])]
    groups += [("of these, control", [r for r in adaptive if not r.forks and r.family == "control"])]
    for name, group in groups:
        s = speedup(group, twin)
        if s is not None:
            rows.append(
                (
                    name,
                    str(s.n),
                    _share(s.accuracy),
                    _share(s.twin_accuracy),
                    f"{s.tokens.mean:.2f} ± {s.tokens.error:.2f}",
                    f"{s.tokens.of_sums:.2f}",
                    f"{s.wall.mean:.2f} ± {s.wall.error:.2f}",
                    f"{s.wall.of_sums:.2f}",
                    f"{100 * s.kept:.0f} %",
                    f"{s.total_tokens:.3f}",
                )
            )
    legend = (
        "tokens: critical-path tokens, twin over adaptive, mean over problems ± its standard error; wall: seconds "
        "likewise; kept: wall over tokens. T/T twin: total tokens, adaptive over twin."
    )
    return f"{table([head, *rows])}\n\n{legend}" if rows else "no problem was run on both models"


def methods_table(records: Sequence[Record], adaptive: Sequence[Record]) -> str:
    """Every method on all problems, then how often it is right on each family."""
    methods = by_method(records)
    rows = [("method", "model", "n", "right", "95 %", "adaptive less it", "T", "L", "longest", "wall")]
    for (model, name), own in methods.items():
        s, less = summary(own), difference(adaptive, own)
        apart = f"{100 * less.mean:+.1f} ± {100 * less.half:.1f}" if less and own[0].key != adaptive[0].key else ""
        interval = f"{100 * s.accuracy_low:.1f}-{100 * s.accuracy_high:.1f}"
        means = (f"{s.total_tokens:.0f}", f"{s.critical_path_tokens:.0f}", f"{s.longest_context_tokens:.0f}")
        rows.append(
            (name, model.partition("@")[0], str(s.n), _share(s.accuracy), interval, apart, *means, seconds(s.wall_s))
        )
    families = list(by_family(records))
    right: list[Sequence[str]] = [("right, %", "model", *families)]
    for (model, name), own in methods.items():
        of = by_family(own)
        cells = (f"{100 * of[family].accuracy:.1f}" if family in of else "-" for family in families)
        right.append((name, model.partition("@")[0], *cells))
    legend = (
        "adaptive less it: points, on the same problems, ± half of an interval of 95 %. T of several samples is their "
        "sum; L and longest are of the longest; wall: from the first start to the last end. pass@n is an oracle."
    )
    return "\n\n".join([table(rows), legend, *([table(right)] if len(families) > 1 else [])])


def decisions_table(records: Sequence[Record]) -> str:
    d = decisions(records)
    return table(
        [
            ("fork decisions", "forked", "did not fork"),
            ("forking is right", str(d.forked_rightly), str(d.under_forked)),
            ("forking is wrong", str(d.over_forked), str(d.held_rightly)),
        ]
    )


def curve_table(records: Sequence[Record]) -> str:
    """How often it forks, by what forking is expected to save."""
    rows = [("expected saving", "n", "forked", "95 %", "right to fork")]
    for point in decision_curve(records):
        low = "below" if point.low < -1 else f"{100 * point.low:.0f} %"
        high = f"{100 * point.high:.0f} %" if point.high <= 1 else "more"
        interval = f"{100 * point.forked_low:.0f}-{100 * point.forked_high:.0f}"
        rows.append((f"{low} to {high}", str(point.n), _share(point.forked), interval, _share(point.wanted)))
    return table(rows) if len(rows) > 1 else ""


def report(adaptive: Sequence[Record], twin: Sequence[Record] = ()) -> str:
    """All tables of one evaluation."""
    parts = [families_table(adaptive)]
    if twin:
        parts += [f"The twin:\n\n{families_table(twin)}", speedup_table(adaptive, twin)]
    parts += [decisions_table(adaptive), curve_table(adaptive)]
    return "\n\n".join(filter(None, parts))


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def seconds(value: float) -> str:
    """Seconds for people: `34 ms`, `1.2 s`."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
