"""Exports as other tools read them: spans by OpenTelemetry's messages, traces by the rules of their format (Chromium's
"Trace Event Format").

What is inside of them is held against the run in `test_viewer`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

import plait
from plait.models import gold_model
from plait.viewer import chrome_trace, describe_run, otlp

QUESTION = "What is 347 * 52, 88 + 977 and 612 * 34?"
PHASES = {
    "X": {"name", "ts", "dur", "pid", "tid"},
    "M": {"name", "pid", "args"},
    "C": {"name", "ts", "pid", "args"},
    "s": {"name", "cat", "id", "ts", "pid", "tid"},
    "f": {"name", "cat", "id", "ts", "pid", "tid", "bp"},
}
"""What the format asks for in every kind of event that we write."""
METADATA = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    model = gold_model()

    async def main() -> list[plait.events.Event]:
        async with (
            model.open_engine(delay_s=0.001) as engine,
            plait.open_run(model.request(QUESTION), engine=engine, format=model.format) as running,
        ):
            return [event async for event in running]

    return describe_run(anyio.run(main))


def test_spans_are_read_by_the_messages_of_opentelemetry(run: dict[str, Any]) -> None:
    service = pytest.importorskip(
        "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="needs opentelemetry-proto"
    )
    json_format = pytest.importorskip("google.protobuf.json_format")
    written = json.loads(json.dumps(otlp([run], epochs=[1.7e9])))
    for span in _spans(written):
        # OTLP's JSON writes ids in hexadecimal, where JSON of other protobuf messages has base64.
        for part in (span, *span.get("links", [])):
            for name in ("traceId", "spanId", "parentSpanId"):
                if name in part:
                    part[name] = base64.b64encode(bytes.fromhex(part[name])).decode()
    # A field or value that the protocol does not know is an error here.
    request = json_format.ParseDict(written, service.ExportTraceServiceRequest())
    spans = [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]
    assert len(spans) == len(list(_spans(written))) >= 10
    assert {len(span.trace_id) for span in spans} == {16}
    assert {len(span.span_id) for span in spans} == {8}
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in spans)
    ids = {span.span_id for span in spans}
    links = [link for span in spans for link in span.links]
    assert links
    assert all(link.span_id in ids and link.trace_id == spans[0].trace_id for link in links)
    assert {attribute.value.WhichOneof("value") for span in spans for attribute in span.attributes} >= {
        "string_value",
        "int_value",
        "bool_value",
    }


def test_a_chrome_trace_keeps_the_rules_of_its_format(run: dict[str, Any]) -> None:
    trace = json.loads(json.dumps(chrome_trace([run, run])))
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    flows: dict[str, list[dict[str, Any]]] = {}
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    named: set[tuple[int, int | None]] = set()
    for event in trace["traceEvents"]:
        needed = PHASES[event["ph"]]
        assert needed <= set(event), f"{event['ph']} has no {needed - set(event)}"
        assert all(isinstance(event[key], int) for key in ("pid", "tid", "ts", "dur") if key in event)
        assert event.get("ts", 0) >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
        elif event["ph"] == "M":
            assert METADATA[event["name"]] in event["args"]
            named.add((event["pid"], event.get("tid")))
        elif event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        else:
            flows.setdefault(event["id"], []).append(event)
    for start, end in flows.values():
        assert (start["ph"], end["ph"], end["bp"]) == ("s", "f", "e")
        assert (start["cat"], start["name"]) == (end["cat"], end["name"])
        assert start["ts"] <= end["ts"]
        for arrow in (start, end):
            # Perfetto binds an arrow to the slice around it, and drops it where there is none.
            slices = tracks[arrow["pid"], arrow["tid"]]
            assert any(s["ts"] <= arrow["ts"] <= s["ts"] + s["dur"] for s in slices)
    assert set(tracks) <= named, "every track has a name"
    for slices in tracks.values():
        open_until: list[int] = []
        for s in sorted(slices, key=lambda s: (s["ts"], -s["dur"])):
            while open_until and open_until[-1] <= s["ts"]:
                open_until.pop()
            assert not open_until or s["ts"] + s["dur"] <= open_until[-1], "slices of a track nest"
            open_until.append(s["ts"] + s["dur"])


def _spans(written: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for resource in written["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            yield from scope["spans"]
