"""Runs for other tools: Chrome's trace format, which Perfetto opens, and OpenTelemetry's JSON, joins as links.

Reads the values of `describe_run`; writes plain values. Texts of runs are left out unless they are asked for.

Sources: "Trace Event Format" (Chromium); OpenTelemetry protocol 1.x, JSON encoding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from plait.types import StopReason

_INTERNAL, _ERROR = 1, 2
_BROKEN = {StopReason.CANCELLED, StopReason.MALFORMED}


def chrome_trace(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A process for each run, a track for each thread, arrows for forks and joins, a counter of threads at work.

    Args:
        runs: As `describe_run` says them.
    """
    events: list[dict[str, Any]] = []
    for pid, run in enumerate(runs, 1):
        events += _chrome_run(pid, run)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _chrome_run(pid: int, run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    title = run["meta"].get("question") or run["name"] or f"run {pid}"
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"{title} ({_model(run)})"}}
    tids = {thread["name"]: tid for tid, thread in enumerate(run["threads"], 1)}
    for thread in run["threads"]:
        tid = tids[thread["name"]]
        label = f"{thread['name']} {thread['label']}".strip()
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": label}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
    segments = {s["id"]: s for s in run["segments"]}
    arrows = 0
    for s in segments.values():
        at = {"pid": pid, "tid": tids[_thread(s["id"])]}
        start, end = (_us(t) for t in s["t"])
        yield {
            **at,
            "ph": "X",
            "cat": "segment,critical" if s["critical"] else "segment",
            "name": s["id"],
            "ts": start,
            "dur": end - start,
            "args": _facts(s),
        }
        if s["chunks"]:
            first = _us(s["chunks"][0][1])
            yield {**at, "ph": "X", "cat": "wait", "name": "first tokens", "ts": start, "dur": first - start}
        parent = segments.get(s["parent"] or "")
        if s["joins"] and parent:
            waited = _us(parent["t"][1])
            name = f"waits for {len(s['joins'])} threads"
            yield {**at, "ph": "X", "cat": "wait", "name": name, "ts": waited, "dur": max(0, start - waited)}
        arrived = [("join", segments[j]) for j in s["joins"]]
        if parent and _thread(parent["id"]) != _thread(s["id"]):
            arrived.append(("fork", parent))
        for kind, other in arrived:
            arrows += 1
            tail = {"pid": pid, "tid": tids[_thread(other["id"])], "ts": _inside(other)}
            yield {**tail, "ph": "s", "cat": kind, "name": kind, "id": f"{pid}.{arrows}"}
            yield {**at, "ph": "f", "bp": "e", "cat": kind, "name": kind, "id": f"{pid}.{arrows}", "ts": start}
    for t, num in _at_work(segments.values()):
        yield {"ph": "C", "name": "threads at work", "pid": pid, "ts": _us(t), "args": {"threads": num}}


def _inside(segment: dict[str, Any]) -> int:
    """The last microsecond of a segment: an arrow starts inside of what it is bound to."""
    start, end = (_us(t) for t in segment["t"])
    return max(start, end - 1)


def _at_work(segments: Iterable[dict[str, Any]]) -> Iterator[tuple[float, int]]:
    changes: dict[float, int] = {}
    for s in segments:
        changes[s["t"][0]] = changes.get(s["t"][0], 0) + 1
        changes[s["t"][1]] = changes.get(s["t"][1], 0) - 1
    num = 0
    for t in sorted(changes):
        num += changes[t]
        yield t, num


def _facts(s: dict[str, Any]) -> dict[str, Any]:
    facts = {
        "sampled tokens": len(s["sampled"]),
        "inserted tokens": len(s["forced"]),
        "steps": s["steps"],
        "positions": s["positions"],
        "critical": s["critical"],
        "stop": s["stop"],
        "note": s["note"],
    }
    return {key: value for key, value in facts.items() if value not in ("", None)}


def otlp(runs: Sequence[dict[str, Any]], *, epochs: Sequence[float]) -> dict[str, Any]:
    """A trace for each run: a span for the run, under it one for each thread, under it one for each engine call.

    A forked thread's span is a child of the call that forked it. A call that joins links to the last calls of its
    threads, for a span has one parent only.

    Args:
        runs: As `describe_run` says them.
        epochs: When each run started, in seconds of Unix time.
    """
    spans = [
        {"resource": {"attributes": _attributes({"service.name": "plait"})}, "scopeSpans": [_scope(run, epoch)]}
        for run, epoch in zip(runs, epochs, strict=True)
    ]
    return {"resourceSpans": spans}


def _scope(run: dict[str, Any], epoch: float) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([run, epoch], sort_keys=True).encode()).hexdigest()
    return {"scope": {"name": "plait"}, "spans": list(_spans(run, digest[:32], round(epoch * 1e9)))}


def _spans(run: dict[str, Any], trace: str, epoch_ns: int) -> Iterator[dict[str, Any]]:
    def span_id(name: str) -> str:
        return hashlib.sha256(f"{trace} {name}".encode()).hexdigest()[:16]

    def span(name: str, key: str, parent: str | None, t: Sequence[float], **more: Any) -> dict[str, Any]:
        attributes = {key: value for key, value in more.pop("attributes").items() if value is not None}
        return {
            "traceId": trace,
            "spanId": span_id(key),
            **({} if parent is None else {"parentSpanId": span_id(parent)}),
            "name": name,
            "kind": _INTERNAL,
            "startTimeUnixNano": str(epoch_ns + round(t[0] * 1e9)),
            "endTimeUnixNano": str(epoch_ns + round(t[1] * 1e9)),
            "attributes": _attributes(attributes),
            **more,
        }

    usage = run["usage"]
    about = {
        "gen_ai.operation.name": "generate",
        "gen_ai.request.model": _model(run),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["sampled_tokens"],
        **{f"plait.{key}": value for key, value in usage.items()},
        "plait.format": run["meta"].get("format"),
        "plait.engine": run["meta"].get("engine"),
        "plait.stop": run["stop"],
    }
    yield span("plait.run", "run", None, (0.0, run["wall_s"]), attributes=about, status=_status(run["stop"]))
    own: dict[str, list[dict[str, Any]]] = {}
    for s in run["segments"]:
        own.setdefault(_thread(s["id"]), []).append(s)
    for thread in run["threads"]:
        name, segments = thread["name"], own[thread["name"]]
        forker = segments[0]["parent"]
        t = segments[0]["t"][0], segments[-1]["t"][1]
        facts = {"plait.thread": name, "plait.stop": thread["stop"], "plait.sampled_tokens": thread["num_sampled"]}
        yield span(f"thread {name}", f"thread {name}", forker or "run", t, attributes=facts)
        for s in segments:
            facts = {
                "plait.segment": s["id"],
                "plait.sampled_tokens": len(s["sampled"]),
                "plait.inserted_tokens": len(s["forced"]),
                "plait.critical": s["critical"],
                "plait.join": s["join"],
                "plait.stop": s["stop"],
            }
            links = [
                {"traceId": trace, "spanId": span_id(j), "attributes": _attributes({"plait.link": "join"})}
                for j in s["joins"]
            ]
            more = {"links": links} if links else {}
            yield span(
                f"segment {s['id']}",
                s["id"],
                f"thread {name}",
                s["t"],
                attributes=facts,
                status=_status(s["stop"]),
                **more,
            )


def _status(stop: str | None) -> dict[str, Any]:
    return {"code": _ERROR, "message": stop or "not ended"} if stop is None or stop in _BROKEN else {}


def _attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    def typed(value: Any) -> dict[str, Any]:
        if isinstance(value, bool):
            return {"boolValue": value}
        if isinstance(value, int):
            return {"intValue": str(value)}
        return {"stringValue": str(value)}

    return [{"key": key, "value": typed(value)} for key, value in values.items() if value is not None]


def _model(run: dict[str, Any]) -> str:
    return str(run["meta"].get("model") or "unknown model")


def _thread(segment: str) -> str:
    return segment.rpartition(":")[0]


def _us(t: float) -> int:
    return round(t * 1e6)
