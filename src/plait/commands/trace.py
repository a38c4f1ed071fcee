"""`plait trace show`: a log's runs as people read them, also one that was cut off."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plait.errors import TreeError
from plait.events import Event
from plait.log import read_log, split_runs
from plait.spelling import readable
from plait.terminal.plain import plain_lines
from plait.terminal.reading import Reader, reader_of, seconds
from plait.terminal.truth import Cost, truth
from plait.tree import Tree
from plait.types import StopReason


def show(path: str, *, as_json: bool = False, wire: bool = False, lanes: bool | None = None) -> int:
    """Print the trees of a log; with JSON one line for each run.

    Args:
        path: What `plait solve --trace` wrote.
        wire: Show what was written to the token, control tokens and what the runtime wrote included.
        lanes: True draws the timeline; None where standard output is a terminal.

    Raises:
        LogError: The file cannot be read.
        TreeError: It is not a log, or contradicts itself.
    """
    runs = [readable(run) for run in split_runs(read_log(path))]
    if not runs:
        raise TreeError(f"{path} holds no whole event; is it a log that `plait solve --trace` wrote?")
    for number, events in enumerate(runs):
        if number and not as_json:
            print()
        _show(path, events, as_json=as_json, wire=wire, lanes=lanes)
    return 0


def _show(path: str, events: list[Event], *, as_json: bool, wire: bool, lanes: bool | None) -> None:
    tree = Tree.from_events(events)
    reader = reader_of(tree.meta)
    cut = _cut(path, tree)
    if as_json:
        print(json.dumps(_data(tree, reader, seconds(events), cut)))
        return
    _head(tree)
    if wire:
        _wire(tree, reader)
    else:
        for line in plain_lines(tree, reader):
            print(line)
    _lanes(tree, reader, lanes)
    print()
    if cut:
        print(cut)
    print(truth(Cost(name="", usage=tree.usage(), wall_s=seconds(events))))


def _cut(path: str, tree: Tree) -> str:
    if tree.stop is not None:
        return ""
    open_ = [s for s in tree.segments.values() if s.stop is None]
    left = [s for s in tree.segments.values() if s.stop is StopReason.CANCELLED]
    partial = not Path(path).read_bytes().endswith(b"\n")
    where = " in the middle of a line" if partial else ""
    if left:
        return f"the run was left before its end, {len(left)} threads were cancelled"
    return f"the log ends before the run does{where}; {len(open_)} threads were still at work"


def _head(tree: Tree) -> None:
    meta = tree.meta
    if question := meta.get("question"):
        print(question)
    known = [str(meta[key]) for key in ("model", "engine", "format") if meta.get(key)]
    if known:
        print(f"({', '.join(known)})")
    print()


def _wire(tree: Tree, reader: Reader) -> None:
    for segment in tree.walk():
        depth = segment.thread.count("/")
        reads = f" reads {', '.join(segment.joins)} by {segment.join}" if segment.joins else ""
        why = f" ({segment.note})" if segment.note else ""
        print(f"{'  ' * depth}{segment.id}{reads}")
        print(f"{'  ' * depth}  given   {reader.wire(segment.forced_ids)!r}")
        print(f"{'  ' * depth}  sampled {reader.wire(segment.sampled_ids)!r} -> {segment.stop}{why}")


def _lanes(tree: Tree, reader: Reader, lanes: bool | None) -> None:
    if lanes is False:
        return
    from rich.console import Console

    console = Console(highlight=False)
    if lanes or console.is_terminal:
        from plait.terminal.view import View

        console.print()
        console.print(View(console, reader, "").lanes(tree))


def _data(tree: Tree, reader: Reader, wall_s: float, cut: str) -> dict[str, Any]:
    def texts(thread: str) -> str:
        return "".join(reader.text(tree.segments[id].sampled_ids) for id in info[thread].segments)

    info = {thread.name: thread for thread in tree.threads()}
    return {
        "meta": {key: value for key, value in tree.meta.items() if key != "tokenizer"},
        "stop": tree.stop,
        "note": tree.note,
        "complete": not cut,
        "cut": cut,
        "wall_s": wall_s,
        **asdict(tree.usage()),
        "tree": [
            {
                "thread": thread.name,
                "label": thread.label,
                "stop": thread.stop,
                "note": thread.note,
                "num_sampled": thread.num_sampled,
                "context_tokens": thread.context_tokens,
                "text": texts(thread.name),
            }
            for thread in info.values()
        ],
    }
