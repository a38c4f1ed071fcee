"""Runs as plain values for the page: segments with their tokens and times, and all that is derived from their tree.

The page draws and computes nothing of its own: critical path, positions and usage are the tree's. Knows nothing of
HTML. Files are logs of runs (`plait solve --trace`) or results (`plait eval --out`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from plait.bench import GREEDY, Record, read_records
from plait.bench.metrics import wilson
from plait.errors import LogError, TreeError
from plait.events import Event, RunStarted, SegmentEnded, SegmentStarted, ThreadsCut, TokensSampled
from plait.log import read_log, split_runs
from plait.spelling import LogVocabulary, readable
from plait.terminal.reading import Reader, reader_of, seconds
from plait.tree import Tree
from plait.types import StopReason

VERSION = 1
"""Of the values that the page reads; a run says it too."""

Judge = Callable[[Tree, Reader], tuple["str | None", "bool | None"]]
"""The answer that a run gives and whether it is right; None where that is not known."""


@dataclass(slots=True, kw_only=True)
class ViewData:
    """Everything that one page shows."""

    runs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """As `describe_run` says them."""
    records: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Rows of results whose runs were not logged."""
    events: list[list[Event]] = field(default_factory=list[list[Event]])
    """Of each run."""

    def values(self) -> dict[str, Any]:
        """What is embedded in the page."""
        return {"version": VERSION, "runs": self.runs, "records": self.records, "groups": self._groups()}

    def _groups(self) -> list[dict[str, Any]]:
        """Accuracy with its interval and mean costs, for each model and family whose answers were graded."""
        graded: dict[tuple[str, str], list[tuple[bool, int, int]]] = {}
        for row in self.records:
            key = row["model"], row["family"]
            graded.setdefault(key, []).append((row["right"], row["critical_path_tokens"], row["total_tokens"]))
        for run in self.runs:
            if run["right"] is not None:
                key = _model(run["meta"]), str(run["meta"].get("family", ""))
                usage = run["usage"]
                costs = usage["critical_path_tokens"], usage["sampled_tokens"]
                graded.setdefault(key, []).append((run["right"], *costs))
        groups: list[dict[str, Any]] = []
        for (model, family), rows in graded.items():
            n, right = len(rows), sum(row[0] for row in rows)
            low, high = wilson(right, n)
            groups.append(
                {
                    "model": model,
                    "family": family,
                    "n": n,
                    "accuracy": right / n,
                    "accuracy_low": low,
                    "accuracy_high": high,
                    "critical_path_tokens": sum(row[1] for row in rows) / n,
                    "total_tokens": sum(row[2] for row in rows) / n,
                }
            )
        return groups


def describe_run(
    events: Sequence[Event], *, name: str = "", answer: str | None = None, right: bool | None = None
) -> dict[str, Any]:
    """One run, finished or not, as the page reads it.

    Args:
        events: Of one run, from its first.
        name: Where it comes from, for people.
        answer, right: What it answers, and whether that is known to be right.

    Raises:
        TreeError: The events contradict each other.
    """
    events = readable(events)
    return _described(events, Tree.from_events(events), name, answer, right)


def read_views(paths: Iterable[str | Path], *, judge: Judge | None = None) -> ViewData:
    """The runs and results of some files, in order.

    Raises:
        LogError: A file cannot be read.
        TreeError: A file is neither a log nor results, or a run contradicts itself.
        RequestError: A line of results is not a record.
    """
    data = ViewData()
    for path in paths:
        if _is_records(path):
            data.records += [_row(record) for record in read_records(path)]
            continue
        runs = [readable(run) for run in split_runs(read_log(path))]
        if not runs:
            raise TreeError(f"{path} holds no whole event; is it a log that `plait solve --trace` wrote?")
        for number, events in enumerate(runs, 1):
            try:
                tree = Tree.from_events(events)
            except TreeError as exc:
                raise TreeError(f"{path}, run {number}: {exc}") from exc
            answer, right = judge(tree, reader_of(tree.meta)) if judge else (None, None)
            name = Path(path).stem if len(runs) == 1 else f"{Path(path).stem} {number}"
            data.runs.append(_described(events, tree, name, answer, right))
            data.events.append(events)
    return data


def _is_records(path: str | Path) -> bool:
    try:
        with open(path, "rb") as file:
            first = json.loads(file.readline())
    except OSError as exc:
        raise LogError(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError:
        return False
    return isinstance(first, dict) and "event" not in first and "critical_path_tokens" in first


def _row(record: Record) -> dict[str, Any]:
    keys = "question family answer right threads total_tokens critical_path_tokens wall_s stop"
    name = record.model.partition("@")[0]
    name = name if record.method == GREEDY.name else f"{name}, {record.method}"
    return {key: getattr(record, key) for key in keys.split()} | {"model": name}


def _model(meta: dict[str, Any]) -> str:
    """Name of a run's model, without the hash of its weights."""
    return str(meta.get("model", "")).partition("@")[0]


def _described(
    events: Sequence[Event], tree: Tree, name: str, answer: str | None, right: bool | None
) -> dict[str, Any]:
    meta = {key: value for key, value in tree.meta.items() if key != "tokenizer"}
    return {
        "version": VERSION,
        "name": name,
        "meta": meta,
        "seed": next((event.seed for event in events if isinstance(event, RunStarted)), 0),
        "answer": answer,
        "right": right,
        "stop": tree.stop,
        "note": tree.note,
        "cut": _cut(tree),
        "wall_s": round(seconds(events), 6),
        "usage": asdict(tree.usage()),
        "acceleration": round(tree.acceleration(), 4),
        "threads": [_thread(info) for info in map(asdict, tree.threads())],
        "segments": _segments(events, tree),
        "pieces": _pieces(tree, reader_of(tree.meta)),
    }


def _cut(tree: Tree) -> str:
    """Why a run has no end, in plain words; empty where it has one."""
    if tree.stop is not None:
        return ""
    left = sum(s.stop is StopReason.CANCELLED for s in tree.segments.values())
    if left:
        return f"the run was left before its end, {left} threads were cancelled"
    open_ = sum(s.stop is None for s in tree.segments.values())
    return f"the log ends before the run does; {open_} threads were still at work"


def _thread(info: dict[str, Any]) -> dict[str, Any]:
    return {key: info[key] for key in ("name", "label", "num_sampled", "context_tokens", "stop", "note")}


def _segments(events: Sequence[Event], tree: Tree) -> list[dict[str, Any]]:
    """Segments in order of starting. Times of tokens are `[count, t]` of every chunk."""
    started: dict[str, float] = {}
    ended: dict[str, float] = {}
    chunks: dict[str, list[list[float]]] = {}
    for event in events:
        match event:
            case SegmentStarted():
                started[event.id] = event.t
            case SegmentEnded():
                ended[event.id] = event.t
            case TokensSampled():
                chunks.setdefault(event.id, []).append([len(event.token_ids), round(event.t, 6)])
            case ThreadsCut():
                for s in tree.segments.values():
                    if s.stop is StopReason.CANCELLED and started.get(s.id, event.t) < event.t:
                        ended[s.id] = min(ended.get(s.id, event.t), event.t)
            case _:
                pass
    spans, positions = tree.spans(), tree.positions()
    end = seconds(events)
    chunks = {s.id: _upto(chunks.get(s.id, []), len(s.sampled_ids)) for s in tree.segments.values()}
    for id, own in chunks.items():
        if own and id in ended:
            ended[id] = max(ended[id], own[-1][1])
    return [
        {
            "id": s.id,
            "parent": s.parent,
            "joins": list(s.joins),
            "join": s.join,
            "keep": s.keep,
            "forced": list(s.forced_ids),
            "sampled": list(s.sampled_ids),
            "logprobs": [round(p, 5) for p in s.logprobs],
            "chunks": chunks[s.id],
            "t": [round(started[s.id], 6), round(ended.get(s.id, end), 6)],
            "steps": [spans[s.id].start, spans[s.id].end],
            "positions": [positions[s.id] - len(s.forced_ids) - len(s.sampled_ids), positions[s.id]],
            "critical": spans[s.id].critical,
            "stop": s.stop,
            "note": s.note,
        }
        for s in tree.segments.values()
    ]


def _upto(chunks: list[list[float]], num_tokens: int) -> list[list[float]]:
    """The chunks of the tokens that stayed: a thread that lost a race is cut."""
    out: list[list[float]] = []
    for count, t in chunks:
        if num_tokens > 0:
            out.append([min(count, num_tokens), t])
        num_tokens -= int(count)
    return out


def _pieces(tree: Tree, reader: Reader) -> dict[str, Any] | None:
    """Text of every id that the run holds, and which ids are control tokens; None where the log does not say.

    Where a log's own vocabulary has numbers that are not ids, which they are.
    """
    if reader.tokenizer is None:
        return None
    ids = sorted({id for s in tree.segments.values() for id in s.token_ids})
    texts = {id: reader.wire((id,)) for id in ids}
    vocabulary = reader.tokenizer
    others = {str(n): id for n, id in vocabulary.ids.items()} if isinstance(vocabulary, LogVocabulary) else {}
    return {
        "texts": {str(id): text for id, text in texts.items()},
        "control": [id for id in ids if texts[id] and not reader.text((id,))],
        **({"ids": others} if others else {}),
    }
