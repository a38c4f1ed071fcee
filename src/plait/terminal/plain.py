"""A run as plain lines: for pipes, logs and screens without box characters. No control characters, no clock.

Lines come in the order of the program, a block when it has been joined, so they are the same whatever the timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from plait.events import Event, SegmentEnded, SegmentStarted
from plait.terminal.reading import Block, Plan, Reader, Said
from plait.tree import Tree


class PlainView:
    """Writes a run as it goes.

    Args:
        reader: Of the run's tokenizer and format.
        write: Takes a line without its newline.
    """

    def __init__(self, reader: Reader, write: Callable[[str], None]) -> None:
        self._reader, self._write = reader, write
        self._num_written = 0

    def on(self, tree: Tree, event: Event) -> None:
        """Write what this event completed; the tree holds it already."""
        match event:
            case SegmentEnded(id=id) if id.rpartition(":")[0] == "0":
                self._flush(tree)
            case SegmentStarted(id=id, joins=joins) if joins and id.rpartition(":")[0] == "0":
                self._flush(tree)

    def finish(self, tree: Tree) -> None:
        """Write the rest, finished or not."""
        self._flush(tree, all=True)

    def _flush(self, tree: Tree, *, all: bool = False) -> None:
        parts = self._reader.parts(tree)
        for part in parts[self._num_written :]:
            if not all and (isinstance(part, Plan) or (isinstance(part, Block) and not part.joined)):
                return
            for line in _lines(self._reader, tree, part, ""):
                self._write(line)
            self._num_written += 1


def plain_lines(tree: Tree, reader: Reader, *, thread: str = "0", indent: str = "") -> Iterator[str]:
    """A thread and all that it forked."""
    for part in reader.parts(tree, thread):
        yield from _lines(reader, tree, part, indent)


def _lines(reader: Reader, tree: Tree, part: Said | Plan | Block, indent: str) -> Iterator[str]:
    match part:
        case Said(text=text, note=note):
            for line in text.strip("\n").split("\n"):
                if line:
                    yield f"{indent}{line}"
            if note:
                yield f"{indent}({note})"
        case Plan(text=text):
            yield f"{indent}splitting into: {text}"
        case Block():
            columns = reader.columns(tree, part)
            yield f"{indent}{len(columns)} threads:"
            for column in columns:
                label = f" {column.label}" if column.label else ""
                unusual = f" ({column.unusual})" if column.unusual else "" if column.ended else " (not finished)"
                yield f"{indent}  [{column.number}{label}] {' '.join(column.text.split())}{unusual}"
                for inner in reader.parts(tree, column.name):
                    if isinstance(inner, Block):
                        yield from _lines(reader, tree, inner, f"{indent}    ")
