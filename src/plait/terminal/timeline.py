"""When each thread worked, in token steps: lanes from the tree alone, and how they are drawn.

A step is one token on an engine with room for every thread, so the length is the critical path. Knows nothing of
seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from plait.tree import Span, Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A thread: its spans, from the step at which it was forked to the one at which it was joined."""

    thread: str
    label: str
    lane: int
    """0 is the root; threads that follow each other share a lane."""
    spans: tuple[Span, ...]
    joined: int | None
    """Step at which the parent went on; None for the root and for threads never joined."""
    last: bool
    """Of its block."""

    @property
    def start(self) -> int:
        return self.spans[0].start

    @property
    def end(self) -> int:
        return self.spans[-1].end

    @property
    def critical(self) -> bool:
        return any(span.critical for span in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    length: int
    """Token steps of the whole run."""
    bars: tuple[Bar, ...]

    @property
    def num_lanes(self) -> int:
        return max((bar.lane for bar in self.bars), default=-1) + 1


def timeline(tree: Tree) -> Timeline:
    """The lanes of a run, finished or not."""
    spans = tree.spans()
    own: dict[str, list[Span]] = {}
    for id, span in spans.items():
        own.setdefault(tree.segments[id].thread, []).append(span)
    joined = {tree.segments[j].thread: spans[s.id].start for s in tree.segments.values() for j in s.joins}
    length = max((span.end for span in spans.values()), default=0)
    taken: list[list[tuple[int, int]]] = []
    lanes: dict[str, int] = {}
    bars: list[Bar] = []
    names = [name for name in ("0", *tree.labels) if name in own]
    for name in names:
        block = name.rpartition(".")[0]
        start, end = own[name][0].start, joined.get(name, length)
        lane = lanes.get(block.rpartition("/")[0], -1) + 1
        while lane < len(taken) and any(a < end and start < b for a, b in taken[lane]):
            lane += 1
        taken += [[] for _ in range(lane + 1 - len(taken))]
        taken[lane].append((start, end))
        lanes[name] = lane
        siblings = [n for n in names if block and n.rpartition(".")[0] == block]
        bars.append(
            Bar(
                thread=name,
                label=tree.labels.get(name, ""),
                lane=lane,
                spans=tuple(own[name]),
                joined=joined.get(name),
                last=not block or name == siblings[-1],
            )
        )
    return Timeline(length=length, bars=tuple(bars))


@dataclass(frozen=True, slots=True)
class Cell:
    """One character of a drawing."""

    glyph: str
    critical: bool = False
    waiting: bool = False


def draw(plan: Timeline, *, width: int, scale: int | None = None) -> list[list[Cell]]:
    """The lanes as rows of cells: heavy lines are the critical path, dots wait.

    Args:
        width: Cells of a row, at least 8.
        scale: Steps that the width stands for; default: the timeline's own length.
    """
    steps = max(1, scale or plan.length)
    rows = [[Cell(" ")] * (width + 1) for _ in range(plan.num_lanes)]

    def cell(step: int) -> int:
        return round(step * width / steps)

    for bar in plan.bars:
        row = rows[bar.lane]
        first, end = cell(bar.start), cell(bar.joined if bar.joined is not None else bar.end)
        for i in range(first, end):
            row[i] = Cell("╌", waiting=True)
        for i, critical in _filled(bar, cell):
            row[i] = Cell("━" if critical else "─", critical)
    for bar in plan.bars:
        if bar.lane:
            _connect(rows, plan, bar, cell(bar.start) - 1, None if bar.joined is None else cell(bar.joined))
    return rows


def _filled(bar: Bar, cell: Callable[[int], int]) -> Iterator[tuple[int, bool]]:
    for span in bar.spans:
        if span.end > span.start:
            first = cell(span.start)
            for i in range(first, max(first + 1, cell(span.end))):
                yield i, span.critical


def _connect(rows: list[list[Cell]], plan: Timeline, bar: Bar, fork: int, join: int | None) -> None:
    """Lines from the parent's lane down to a thread, and back up at the join."""
    parent = bar.thread.rpartition("/")[0]
    above = next(b.lane for b in plan.bars if b.thread == parent)
    fork = max(fork, 0)
    for column, glyphs in ((fork, "├┝└┕┯┬"), (join, "┤┥┘┙┯┬")):
        if column is None or column >= len(rows[0]):
            continue
        for lane in range(above + 1, bar.lane):
            if rows[lane][column].glyph == " ":
                rows[lane][column] = Cell("│")
        corner = glyphs[(2 if bar.last else 0) + bar.critical]
        rows[bar.lane][column] = Cell(corner, bar.critical)
        top = rows[above][column]
        rows[above][column] = Cell(glyphs[4] if top.critical or top.glyph == " " else glyphs[5], top.critical)
