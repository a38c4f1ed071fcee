"""Pictures of results as SVG, panels side by side: curves of training runs, a line for each name and the range of its
runs as a band; points with their intervals, what belongs together joined by a line.

Readable on light and dark pages. Knows nothing of where the numbers come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#3b7dd8", "#e0822f", "#2a9d6f", "#c94f7c", "#8a63d2", "#9a8a1f", "#7a7f87")
"""Each has a contrast of 3 or more with white and with black."""
WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 190, 44, 30, 56
_Panel = Callable[[Mapping[str, str], float], list[str]]
"""Draws from the colours of names and its left edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    name: str
    runs: Sequence[Sequence[float]]
    """A share for each step of each run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    x: float
    """Above 0."""
    y: float
    """A share."""
    half: float = 0.0
    """Half of its interval."""
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    name: str
    points: Sequence[Point]
    joined: bool = True
    """Whether a line goes through them, in their order."""


def draw(panels: Mapping[str, Sequence[Curve]], *, xlabel: str, smooth: int = 5) -> str:
    """An SVG picture.

    Args:
        panels: By title; names have the same colour in all of them.
        smooth: Values are means over so many steps that end there.
    """
    names = dict.fromkeys(curve.name for curves in panels.values() for curve in curves)
    return _picture(list(names), [_curves(title, curves, smooth, xlabel) for title, curves in panels.items()])


def scatter(panels: Mapping[str, Sequence[Series]], *, xlabel: str) -> str:
    """An SVG picture of points, x on a logarithmic scale; names have the same colour in all panels.

    Args:
        panels: By title; all have the same y axis.
    """
    names = dict.fromkeys(series.name for some in panels.values() for series in some)
    points = [point for some in panels.values() for series in some for point in series.points]
    bounds = _nice(max(0.0, min(p.y - p.half for p in points)), min(1.0, max(p.y + p.half for p in points)))
    drawn = [_points(title, some, bounds, xlabel) for title, some in panels.items()]
    return _picture(list(names), drawn, width=360, height=280)


def _picture(names: Sequence[str], panels: Sequence[_Panel], width: int = WIDTH, height: int = HEIGHT) -> str:
    """Panels beside each other, and below them what the colours mean."""
    colours = dict(zip(names, COLOURS, strict=False))
    if len(colours) < len(names):
        raise ValueError(f"{len(names)} names, and colours for {len(COLOURS)}")
    right = LEFT + len(panels) * (width + GAP)
    places: list[tuple[float, int]] = []
    x, line = float(LEFT), 0
    for name in names:
        wide = 45 + 7 * len(name)
        if x > LEFT and x + wide > right:
            x, line = float(LEFT), line + 1
        places.append((x, line))
        x += wide
    bottom = TOP + height + 70 + 18 * line
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom}" width="{right}" height="{bottom}">',
        "<style>text { font: 12px sans-serif; fill: #24292f } .axis { stroke: #8b949e; stroke-opacity: .5 }",
        "@media (prefers-color-scheme: dark) { text { fill: #d0d7de } }</style>",
    ]
    for place, panel in enumerate(panels):
        parts += panel(colours, LEFT + place * (width + GAP))
    for name, (x, line) in zip(names, places, strict=True):
        y = TOP + height + 52 + 18 * line
        parts.append(f'<rect x="{x:.0f}" y="{y - 9}" width="14" height="4" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 19:.0f}" y="{y - 2}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _axis(title: str, left: float, low: float, high: float, width: int, height: int) -> list[str]:
    """A panel's title, and its y axis in quarters."""
    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{escape(title)}</text>']
    for k in range(5):
        value = low + (high - low) * k / 4
        y = TOP + height * (1 - k / 4)
        parts.append(f'<line class="axis" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{100 * value:.0f}%</text>')
    return parts


def _points(title: str, some: Sequence[Series], bounds: tuple[float, float], xlabel: str) -> _Panel:
    (low, high), width, height = bounds, 360, 280
    values = [point.x for series in some for point in series.points]
    first, last = math.log2(min(values)) - 0.2, math.log2(max(values)) + 0.3

    def panel(colours: Mapping[str, str], left: float) -> list[str]:
        def x(value: float) -> float:
            return left + width * (math.log2(value) - first) / (last - first)

        def y(value: float) -> float:
            return TOP + height * (high - min(max(value, low), high)) / (high - low)

        parts = _axis(title, left, low, high, width, height)
        for tick in _ticks(2**first, 2**last):
            at = x(tick)
            parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{TOP + height}"/>')
            parts.append(f'<text x="{at:.1f}" y="{TOP + height + 17}" text-anchor="middle">{tick:,g}</text>')
        parts.append(f'<text x="{left + width}" y="{TOP + height + 33}" text-anchor="end">{escape(xlabel)}</text>')
        for number, series in enumerate(some):
            colour, below = colours[series.name], 16 * (number % 2)
            if series.joined and len(series.points) > 1:
                line = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in series.points)
                parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
            for p in series.points:
                bar = f'x1="{x(p.x):.1f}" x2="{x(p.x):.1f}" y1="{y(p.y - p.half):.1f}" y2="{y(p.y + p.half):.1f}"'
                parts.append(f'<line {bar} stroke="{colour}" stroke-opacity=".45"/>')
                parts.append(f'<circle cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="3.5" fill="{colour}"/>')
                if p.label:
                    parts.append(f'<text x="{x(p.x) + 6:.1f}" y="{y(p.y) - 5 + below:.1f}">{escape(p.label)}</text>')
        return parts

    return panel


def _curves(title: str, curves: Sequence[Curve], smooth: int, xlabel: str) -> _Panel:
    lines = {curve.name: [_smoothed(run, smooth) for run in curve.runs] for curve in curves}
    values = [v for runs in lines.values() for run in runs for v in run]
    low, high = _nice(min(values), max(values))
    steps = max(len(run) for runs in lines.values() for run in runs)

    def panel(colours: Mapping[str, str], left: float) -> list[str]:
        def at(step: int, value: float) -> str:
            x = left + WIDTH * step / max(1, steps - 1)
            return f"{x:.1f},{TOP + HEIGHT * (high - value) / (high - low):.1f}"

        parts = _axis(title, left, low, high, WIDTH, HEIGHT)
        for share in (0.0, 0.5, 1.0):
            x, anchor = left + WIDTH * share, {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
            label = f"{1 + round((steps - 1) * share)}" + (f" {xlabel}" if share == 1 else "")
            parts.append(f'<text x="{x:.0f}" y="{TOP + HEIGHT + 17}" text-anchor="{anchor}">{label}</text>')
        for name, runs in lines.items():
            columns = [[run[i] for run in runs if i < len(run)] for i in range(max(map(len, runs)))]
            band = [at(i, max(c)) for i, c in enumerate(columns)] + [at(i, min(c)) for i, c in enumerate(columns)][::-1]
            line = [at(i, sum(c) / len(c)) for i, c in enumerate(columns)]
            colour = colours[name]
            parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" fill-opacity=".18"/>')
            parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        return parts

    return panel


def _ticks(low: float, high: float) -> list[float]:
    """Round values of a logarithmic axis: at most eight, and at least two unless it is very short."""
    tens = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [step * ten for ten in tens for step in steps if low <= step * ten <= high]
        if len(ticks) <= 8:
            break
    return ticks


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
