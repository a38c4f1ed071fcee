"""Curves of training runs as SVG: panels side by side, a line for each name, the range of its runs as a band.

Readable on light and dark pages. Knows nothing of where the numbers come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#3b7dd8", "#e0822f", "#2a9d6f", "#c94f7c", "#8a63d2", "#9a8a1f", "#7a7f87")
"""Each has a contrast of 3 or more with white and with black."""
WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 190, 44, 30, 56


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    name: str
    runs: Sequence[Sequence[float]]
    """A share for each step of each run."""


def draw(panels: Mapping[str, Sequence[Curve]], *, xlabel: str, smooth: int = 5) -> str:
    """An SVG picture.

    Args:
        panels: By title; names have the same colour in all of them.
        smooth: Values are means over so many steps that end there.
    """
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))
    colours = dict(zip(names, COLOURS, strict=False))
    if len(colours) < len(names):
        raise ValueError(f"{len(names)} curves, and colours for {len(COLOURS)}")
    width, height = LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<style>text { font: 12px sans-serif; fill: #24292f } .axis { stroke: #8b949e; stroke-opacity: .5 }",
        "@media (prefers-color-scheme: dark) { text { fill: #d0d7de } }</style>",
    ]
    for place, (title, curves) in enumerate(panels.items()):
        parts += _panel(title, curves, colours, LEFT + place * (WIDTH + GAP), smooth, xlabel)
    x = float(LEFT)
    for name in names:
        y = TOP + HEIGHT + 52
        parts.append(f'<rect x="{x:.0f}" y="{y - 9}" width="14" height="4" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 19:.0f}" y="{y - 2}">{escape(name)}</text>')
        x += 45 + 7 * len(name)
    return "\n".join([*parts, "</svg>\n"])


def _panel(
    title: str, curves: Sequence[Curve], colours: Mapping[str, str], left: float, smooth: int, xlabel: str
) -> list[str]:
    lines = {curve.name: [_smoothed(run, smooth) for run in curve.runs] for curve in curves}
    values = [v for runs in lines.values() for run in runs for v in run]
    low, high = _nice(min(values), max(values))
    steps = max(len(run) for runs in lines.values() for run in runs)

    def at(step: int, value: float) -> str:
        x = left + WIDTH * step / max(1, steps - 1)
        return f"{x:.1f},{TOP + HEIGHT * (high - value) / (high - low):.1f}"

    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{escape(title)}</text>']
    for k in range(5):
        value = low + (high - low) * k / 4
        y = TOP + HEIGHT * (1 - k / 4)
        parts.append(f'<line class="axis" x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{100 * value:.0f}%</text>')
    for share in (0.0, 0.5, 1.0):
        x, anchor = left + WIDTH * share, {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        label = f"{1 + round((steps - 1) * share)}" + (f" {xlabel}" if share == 1 else "")
        parts.append(f'<text x="{x:.0f}" y="{TOP + HEIGHT + 17}" text-anchor="{anchor}">{label}</text>')
    for name, runs in lines.items():
        columns = [[run[i] for run in runs if i < len(run)] for i in range(max(map(len, runs)))]
        band = [at(i, max(c)) for i, c in enumerate(columns)] + [at(i, min(c)) for i, c in enumerate(columns)][::-1]
        line = [at(i, sum(c) / len(c)) for i, c in enumerate(columns)]
        parts.append(f'<polygon points="{" ".join(band)}" fill="{colours[name]}" fill-opacity=".18"/>')
        parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="{colours[name]}" stroke-width="1.8"/>')
    return parts


def _smoothed(values: Sequence[float], over: int) -> list[float]:
    windows = (values[max(0, i + 1 - over) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _nice(low: float, high: float) -> tuple[float, float]:
    """Bounds whose quarters are round, none above 1 where no value is."""
    for unit in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5):
        first = unit * math.floor(low / unit + 0.01)
        if high <= 1:
            first = min(first, 1 - 4 * unit)
        if first + 4 * unit >= high - 1e-9:
            return first, first + 4 * unit
    raise ValueError(f"shares are from -1 to 1, not from {low} to {high}")
