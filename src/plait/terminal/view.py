"""A run on a terminal: threads side by side in panes while they work, then a timeline over token steps.

Draws trees with rich; knows nothing of engines and does not run anything. Meaning is never in colour alone: the
critical path is a heavy line, what waits is dotted, a thread that did not close says why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from plait.terminal.reading import Block, Column, Plan, Reader, Said
from plait.terminal.timeline import Cell, Timeline, draw, timeline
from plait.tree import Tree

ACCENT = "cyan"
QUIET = "bright_black"
NARROWEST = 22
"""Columns of a pane; where threads get less, they become rows."""
WIDEST = 120
"""Columns of the whole picture: long lines are hard to follow."""


class View:
    """Draws one run as far as it is.

    Args:
        console: Where it will be shown; gives the size.
        reader: Of the run's tokenizer and format.
        title: The question.
        final: The finished tree, where it is known (a replay): panes then have their final height from the start.
    """

    def __init__(self, console: Console, reader: Reader, title: str, *, final: Tree | None = None) -> None:
        self._console, self._reader, self._title = console, reader, title
        self._final = final
        self._fits = final is not None and self._height(final) < console.height

    @property
    def width(self) -> int:
        return max(30, min(self._console.width, WIDEST) - 4)

    def running(self, tree: Tree) -> RenderableType:
        """The picture while it runs: where the screen is too low for all of it, earlier blocks are folded to a line."""
        parts = self._reader.parts(tree)
        blocks = [i for i, part in enumerate(parts) if isinstance(part, Block)]
        open_at = blocks[-1] if blocks else -1
        rows = max(3, self._console.height - 8 - 2 * len(parts))
        limit = None if self._fits else rows
        drawn = [
            self._part(tree, part, rows=limit, folded=not self._fits and i != open_at) for i, part in enumerate(parts)
        ]
        return self._framed(drawn)

    def finished(self, tree: Tree) -> RenderableType:
        """The whole picture, every text in full."""
        parts = self._reader.parts(tree)
        return self._framed([self._part(tree, part, rows=None, folded=False) for part in parts])

    def lanes(self, tree: Tree, *, twin: Tree | None = None) -> RenderableType:
        """The timeline, the twin's under it on the same scale."""
        plan = timeline(tree)
        other = timeline(twin) if twin is not None else None
        length = max(plan.length, other.length if other else 0)
        names = lane_names(plan)
        labels = [*names, *(["one line"] if other else [])]
        gutter = min(14, max((len(label) for label in labels), default=0))
        width = max(8, self.width - gutter - 3)
        lines = [
            self._lane(name, gutter, row)
            for name, row in zip(names, draw(plan, width=width, scale=length), strict=True)
        ]
        if other is not None:
            lines += [Text(), *(self._lane("one line", gutter, row) for row in draw(other, width=width, scale=length))]
        lines.append(self._ruler(gutter, width, [plan.length, *([other.length] if other else [])]))
        return Padding(Group(*lines), (0, 2))

    def _height(self, tree: Tree) -> int:
        """Lines of the whole picture, about."""
        lines = 2
        for part in self._reader.parts(tree):
            if isinstance(part, Block):
                columns = self._reader.columns(tree, part)
                _, inner, num_rows = self._grid(len(columns))
                lines += num_rows * (2 + max(len(wrap(c.text, inner)) for c in columns))
            else:
                lines += sum(len(wrap(line, self.width)) for line in part.text.split("\n"))
        return lines

    def _grid(self, n: int) -> tuple[int, int, int]:
        """Panes of a row, columns of text in each, rows."""
        per_row = max(1, min(n, self.width // NARROWEST))
        num_rows = (n + per_row - 1) // per_row
        per_row = (n + num_rows - 1) // num_rows
        return per_row, (self.width + 1) // per_row - 5, num_rows

    def _framed(self, drawn: Sequence[RenderableType]) -> RenderableType:
        return Padding(Group(Text(self._title, style="bold"), Text(), *drawn), (0, 2))

    def _part(self, tree: Tree, part: Said | Plan | Block, *, rows: int | None, folded: bool) -> RenderableType:
        if isinstance(part, Plan):
            return Text.assemble(("splitting into  ", QUIET), part.text)
        if isinstance(part, Block):
            columns = self._reader.columns(tree, part)
            return self._folded(columns) if folded else self._panes(columns, self._final_columns(part), rows)
        return self._said(part, rows)

    def _said(self, said: Said, rows: int | None) -> Text:
        text = Text(said.text.strip("\n"), overflow="fold")
        if rows is not None:
            text = Text("\n").join(_tail(said.text.strip("\n"), self.width, 4))
        if said.note:
            text.append(f"  ({said.note})", style="yellow")
        return text

    def _folded(self, columns: Sequence[Column]) -> Text:
        tokens = sum(c.num_sampled for c in columns)
        names = ", ".join(c.label or str(c.number) for c in columns)
        return Text(f"{len(columns)} threads joined: {names} ({tokens} tokens)", style=QUIET)

    def _final_columns(self, block: Block) -> list[Column] | None:
        return self._reader.columns(self._final, block) if self._final is not None else None

    def _panes(self, columns: Sequence[Column], final: Sequence[Column] | None, rows: int | None) -> RenderableType:
        per_row, inner, num_rows = self._grid(len(columns))
        if rows is not None and num_rows * 5 > rows + 2:
            return Group(*(self._row(column) for column in columns))
        high = max(len(wrap(c.text, inner)) for c in final or columns)
        most = high if rows is None else min(high, max(2, rows // num_rows - 2))
        grid = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(per_row):
            grid.add_column(width=inner + 4)
        for i in range(0, len(columns), per_row):
            grid.add_row(*(self._pane(column, inner, most) for column in columns[i : i + per_row]))
        return grid

    def _pane(self, column: Column, inner: int, high: int) -> Panel:
        lines = _tail(column.text, inner, high)
        if not column.ended and lines:
            lines[-1].append("▏", style=ACCENT)
        style = QUIET if column.ended else ACCENT
        title = Text.assemble((f"{column.number}", "bold"), ("  " if column.label else ""), column.label)
        title.truncate(max(4, inner - 2), overflow="ellipsis")
        count = Text(f"{column.num_sampled}", style=QUIET)
        if column.unusual:
            count = Text(_cut(column.unusual, inner - 2), style="yellow")
        return Panel(
            Text("\n").join(lines),
            title=title,
            title_align="left",
            subtitle=count,
            subtitle_align="right",
            box=box.ROUNDED,
            border_style=style,
            height=high + 2,
        )

    def _row(self, column: Column) -> Text:
        name = _cut(column.label or str(column.number), 10)
        room = self.width - 20
        text = column.text if len(column.text) <= room else f"…{column.text[-room + 1 :]}"
        end = "▏" if not column.ended else ""
        unusual = (f"  {column.unusual}", "yellow")
        count = (f"{column.num_sampled:>4} ", QUIET)
        return Text.assemble(
            (f"{name:>10} ", "bold"), count, text, (end, ACCENT), unusual, overflow="ellipsis", no_wrap=True
        )

    def _lane(self, name: str, gutter: int, row: Sequence[Cell]) -> Text:
        line = Text(f"{_cut(name, gutter):>{gutter}}  ", style=QUIET, no_wrap=True)
        for cell in row:
            style = f"bold {ACCENT}" if cell.critical else QUIET if cell.waiting else ""
            line.append(cell.glyph, style=style)
        return line

    def _ruler(self, gutter: int, width: int, lengths: Sequence[int]) -> Text:
        """Steps from 0, a number at the end of each run."""
        scale = max(1, *lengths)
        marks = [" "] * (width + 1)
        last = f"{scale} token steps"
        ends = [(str(n), round(n * width / scale)) for n in lengths if n < scale]
        for number, end in [("0", 1), (last, width), *ends]:
            start = max(0, end - len(number))
            if not "".join(marks[max(0, start - 2) : end + 2]).strip():
                marks[start:end] = number
        return Text(f"{'':>{gutter}}  {''.join(marks)}", style=QUIET, no_wrap=True)


def lane_names(plan: Timeline) -> list[str]:
    """What stands before each lane: a thread's label where a lane has one thread, else its number."""
    names: list[str] = []
    for lane in range(plan.num_lanes):
        bars = [bar for bar in plan.bars if bar.lane == lane]
        names.append("" if lane == 0 else bars[0].label if len(bars) == 1 else str(lane))
    return names


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most so many characters, broken at spaces; a longer word is broken after the sign of a step."""
    lines = [""]
    for word in text.split(" "):
        pieces = [word] if len(word) <= width else _pieces(word, max(2, width) - 1)
        for i, piece in enumerate(pieces):
            glue = " " if lines[-1] and i == 0 else ""
            if len(lines[-1]) + len(glue) + len(piece) > width and lines[-1]:
                lines.append(piece)
            else:
                lines[-1] += glue + piece
    return lines


def _pieces(word: str, most: int) -> list[str]:
    return re.findall(rf"[^;:,]{{0,{most}}}[;:,]|[^;:,]{{1,{most}}}", word)


def _tail(text: str, width: int, rows: int) -> list[Text]:
    """The last rows of a text, its words whole; what is above them is cut off."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += wrap(paragraph, width)
    if len(lines) > rows:
        lines = lines[-rows:]
        lines[0] = f"…{lines[0][1:]}"
    return [Text(line) for line in lines]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"
