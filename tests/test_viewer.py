"""The viewer's page says what the tree says, lets nothing hostile in, and other tools can read its exports."""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings

from plait import viewer
from plait.bench import Record
from plait.cli import main
from plait.events import SCHEMA_VERSION
from plait.log import read_log, split_runs, write_log
from plait.testing.strategies import Program, formats, programs
from plait.tree import Tree
from plait.types import StopReason
from plait.viewer import chrome_trace, describe_run, document, inspect_log, otlp, read_views
from plait.viewer.serve import ViewServer
from wide_runs import HOSTILE, wide_run

QUESTION = "What is 347 * 52, 88 + 977 and 612 * 34?"


def plait(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="plait")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("viewer") / "run.jsonl"
    assert plait("solve", QUESTION, "--engine", "scripted", "--trace", str(path)).exit_code == 0
    return path


def described(log: Path) -> dict[str, Any]:
    return read_views([log]).runs[0]


def embedded(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])["data"]


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        **{"model": "tiny@1", "family": "product", "prompt": "3*4?", "question": "What is 3 * 4?", "answer": "12"},
        **{"right": True, "forked": True, "forks": True, "decision_right": True, "threads": 3, "num_forks": 1},
        **{"total_tokens": 100, "critical_path_tokens": 40, "token_latency": 44, "longest_context_tokens": 60},
        **{"reread_tokens": 0, "wall_s": 0.1, "stop": "eos", "serial_cost": 90, "parallel_cost": 40},
        **{"concurrency": 1, "seed": 0},
    }
    return Record(**values | changes)


# What the page is told -----------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(programs() | programs(format=formats()))
def test_critical_path_and_tokens_are_the_trees_own(program: Program) -> None:
    tree, events, _ = program.run()
    run = describe_run(events)
    assert run["usage"] == asdict(tree.usage())
    assert sum(len(s["sampled"]) for s in run["segments"] if s["critical"]) == tree.critical_path()
    assert max(s["steps"][1] for s in run["segments"]) == tree.critical_path()
    assert max(s["positions"][1] for s in run["segments"]) == tree.longest_context()
    for s in run["segments"]:
        assert sum(n for n, _ in s["chunks"]) == len(s["sampled"]) == len(s["logprobs"])
        assert s["steps"][1] - s["steps"][0] == len(s["sampled"])
        assert s["positions"][1] - s["positions"][0] == len(s["forced"]) + len(s["sampled"])


@settings(max_examples=12)
@given(programs() | programs(format=formats()))
def test_critical_segments_are_a_chain_from_the_root_to_the_last_step(program: Program) -> None:
    tree, _, _ = program.run()
    spans = tree.spans()
    critical = [id for id, span in spans.items() if span.critical]
    for before, after in itertools.pairwise(critical):
        segment = tree.segments[after]
        assert before in (segment.parent, *segment.joins)
        assert spans[before].end == spans[after].start


def test_a_run_is_shown_as_far_as_it_came(log: Path) -> None:
    events = read_log(log)
    for n in range(1, len(events), 7):
        run = describe_run(events[:n])
        assert run["stop"] is None or n == len(events) - 1
        assert run["cut"]
    assert describe_run(events)["cut"] == ""


def test_text_and_answer_come_with_the_run(log: Path) -> None:
    result = plait("view", str(log), "--html", str(log.with_suffix(".html")))
    assert result.exit_code == 0
    run = embedded(log.with_suffix(".html").read_text())["runs"][0]
    texts = run["pieces"]["texts"]
    said = "".join(texts[str(id)] for id in run["segments"][0]["sampled"])
    assert said == "<Parallel><Goal><Outline>1: 347</Outline><Outline>2: 88</Outline><Outline>3: 612</Outline></Goal>"
    assert {texts[str(id)] for id in run["pieces"]["control"]} >= {"<Parallel>", "</Path>"}
    assert (run["answer"], run["right"]) == ("18044;1065;20808", True)
    assert "tokenizer" not in run["meta"]


def test_a_log_of_several_runs_and_results_make_one_table(log: Path, tmp_path: Path) -> None:
    events = read_log(log)
    both = tmp_path / "both.jsonl"
    write_log([*events, *events[:9]], both)
    results = tmp_path / "results.jsonl"
    rows = [record(), record(right=False), record(model="twin@2", threads=0, critical_path_tokens=100)]
    rows.append(record(model="twin@2", method="majority@8", samples=8))
    results.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    data = read_views([both, results])
    assert [run["name"] for run in data.runs] == ["both 1", "both 2"]
    assert [bool(run["cut"]) for run in data.runs] == [False, True]
    assert [row["critical_path_tokens"] for row in data.records] == [40, 40, 100, 40]
    groups = {group["model"]: group for group in data.values()["groups"]}
    assert groups["tiny"]["accuracy"] == 0.5
    assert groups["tiny"]["accuracy_low"] < 0.5 < groups["tiny"]["accuracy_high"]
    assert groups["twin"]["n"] == groups["twin, majority@8"]["n"] == 1


def test_a_comparison_logs_both_runs(tmp_path: Path) -> None:
    log = tmp_path / "both.jsonl"
    twins = ["--engine", "scripted"]
    assert plait("solve", QUESTION, "--compare", "--trace", str(log), "--plain", *twins).exit_code == 0
    data = read_views([log])
    assert [run["usage"]["threads"] for run in data.runs] == [3, 0]
    shown = [json.loads(line) for line in plait("trace", "show", str(log), "--json").stdout.splitlines()]
    assert [run["threads"] for run in shown] == [3, 0]
    assert plait("trace", "show", str(log)).stdout.count(QUESTION) == 2


def test_an_evaluation_logs_its_runs_and_goes_on_with_them(tmp_path: Path) -> None:
    log, out = str(tmp_path / "runs.jsonl"), str(tmp_path / "results.jsonl")
    command = ["eval", "--engine", "scripted", "--family", "product,control", "--out", out, "--trace", log, "--json"]
    assert plait(*command, "-n", "2").exit_code == 0
    with open(log, "a") as file:
        file.write('{"event":"RunSt')
    assert plait(*command, "-n", "3").exit_code == 0
    page = tmp_path / "page.html"
    assert plait("view", log, "--html", str(page)).exit_code == 0
    data = embedded(page.read_text())
    assert len(data["runs"]) == 6
    assert all(run["right"] and run["meta"]["question"] and not run["cut"] for run in data["runs"])
    assert {group["family"]: group["n"] for group in data["groups"]} == {"product": 3, "control": 3}
    assert {run["usage"]["threads"] > 0 for run in data["runs"]} == {True, False}


def test_runs_are_split_where_they_start(log: Path) -> None:
    events = read_log(log)
    assert split_runs([]) == []
    assert split_runs([*events, *events]) == [events, events]
    assert [Tree.from_events(run).stop for run in split_runs(events * 3)] == [StopReason.EOS] * 3


# The page ------------------------------------------------------------------------------------------------------------


def hashes(html: str, tag: str) -> set[str]:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return {f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies}


@pytest.mark.parametrize("live", [False, True])
def test_the_policy_names_exactly_the_scripts_and_styles_of_the_page(live: bool) -> None:
    page = document(read_views([]).values(), live=live)
    rules = dict(rule.split(" ", 1) for rule in page.policy.split("; "))
    assert {rules["script-src"]} == hashes(page.html, "script")
    assert {rules["style-src"]} == hashes(page.html, "style")
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == ("'self'" if live else "'none'")
    assert rules["require-trusted-types-for"] == "'script'"
    assert page.policy.partition("; frame-ancestors")[0] in page.html


def test_hostile_text_reaches_the_page_as_data_only() -> None:
    events = wide_run(60, question=HOSTILE[2])
    html = document(
        {"runs": [describe_run(events, name=HOSTILE[0])], "records": [], "groups": []}, title=HOSTILE[2]
    ).html
    plain = document({"runs": [], "records": [], "groups": []}).html
    for tag in ("<script", "</script", "<img", "<svg onload", "<!--"):
        assert html.lower().count(tag) == plain.lower().count(tag)
    run = embedded(html)["runs"][0]
    assert run["meta"]["question"] == HOSTILE[2]
    assert set(run["pieces"]["texts"].values()) >= set(HOSTILE)
    html.encode()


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = document().html
    assert not re.search(r"(src|href|action)=[\"'](?!data:|#)", html)
    assert set(re.findall(r"https?://[\w.]+", html)) == {"http://www.w3.org"}
    assert "@import" not in html
    assert "url(" not in html


def test_a_server_is_given_the_live_page_and_its_policy() -> None:
    assert viewer.page().decode().startswith("<!doctype html>")
    assert json.loads(re.findall(r'id="data">(.*?)</script>', viewer.page().decode())[0])["live"] is True
    assert viewer.HEADERS["Content-Security-Policy"] == viewer.CSP


# Serving -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(log: Path) -> Iterator[ViewServer]:
    with ViewServer(lambda: document(read_views([log]).values())) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def answer(server: ViewServer, method: str = "GET", path: str = "/", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=40)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    reply = connection.getresponse()
    body = reply.read().decode()
    connection.close()
    return reply.status, dict(reply.getheaders()), body


def test_the_page_is_served_on_loopback_with_its_policy(server: ViewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, headers, body = answer(server)
    assert status == 200
    assert embedded(body)["runs"][0]["meta"]["question"] == QUESTION
    assert headers["Content-Security-Policy"].endswith("frame-ancestors 'none'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert answer(server, "HEAD")[2] == ""


def test_a_request_for_another_host_or_path_is_refused(server: ViewServer) -> None:
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
        assert answer(server, Host=host)[0] == 421
    assert answer(server, Host=f"localhost:{server.server_port}")[0] == 200
    for path in ("/run.jsonl", "/../../etc/passwd", "/%2e%2e"):
        assert answer(server, path=path)[0] == 404
    assert answer(server, "POST")[0] == 501


def test_a_log_that_breaks_while_it_is_watched_is_said_in_the_browser(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    log.write_text("{}\n")
    with ViewServer(lambda: document(read_views([log]).values())) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        status, _, body = answer(server)
        thread.join()
    assert status == 500
    assert "line 1" in body


# Exports -------------------------------------------------------------------------------------------------------------


def slices(trace: dict[str, Any]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    return tracks


@settings(max_examples=12)
@given(programs() | programs(format=formats()))
def test_slices_of_a_chrome_track_nest_and_arrows_match(program: Program) -> None:
    _, events, _ = program.run(delay_s=0.01)
    trace = chrome_trace([describe_run(events)])
    assert json.loads(json.dumps(trace)) == trace
    tracks = slices(trace)
    for track in tracks.values():
        for a in track:
            for b in track:
                assert (
                    a[1] <= b[0] or b[1] <= a[0] or (a[0] <= b[0] and b[1] <= a[1]) or (b[0] <= a[0] and a[1] <= b[1])
                )
    arrows = [event for event in trace["traceEvents"] if event["ph"] in "sf"]
    assert sorted(e["id"] for e in arrows if e["ph"] == "s") == sorted(e["id"] for e in arrows if e["ph"] == "f")
    for arrow in arrows:
        track = tracks[arrow["pid"], arrow["tid"]]
        assert any(start <= arrow["ts"] <= end for start, end in track)
    tree = Tree.from_events(events)
    joins = sum(len(s.joins) for s in tree.segments.values())
    assert sum(e["ph"] == "f" for e in arrows) == tree.num_threads + joins
    counters = [event["args"]["threads"] for event in trace["traceEvents"] if event["ph"] == "C"]
    assert counters[-1] == 0
    assert min(counters) >= 0


@settings(max_examples=12)
@given(programs() | programs(format=formats()))
def test_otlp_spans_form_a_tree_and_joins_are_links(program: Program) -> None:
    _, events, _ = program.run()
    tree = Tree.from_events(events)
    spans = otlp([describe_run(events)], epochs=[1.7e9])["resourceSpans"][0]["scopeSpans"][0]["spans"]
    ids = [span["spanId"] for span in spans]
    assert len(set(ids)) == len(ids) == 1 + len(tree.threads()) + len(tree.segments)
    assert all(re.fullmatch("[0-9a-f]{16}", id) for id in ids)
    assert all(re.fullmatch("[0-9a-f]{32}", span["traceId"]) for span in spans)
    roots = [span for span in spans if "parentSpanId" not in span]
    assert [root["name"] for root in roots] == ["plait.run"]
    assert {span["parentSpanId"] for span in spans if "parentSpanId" in span} <= set(ids)
    assert all(int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"]) for span in spans)
    by_name = {span["name"]: span for span in spans}
    for s in tree.segments.values():
        links = [link["spanId"] for link in by_name[f"segment {s.id}"].get("links", [])]
        assert links == [by_name[f"segment {j}"]["spanId"] for j in s.joins]


@settings(max_examples=12)
@given(programs() | programs(format=formats()))
def test_spans_of_an_inspect_log_nest_and_every_call_is_in_its_threads_span(program: Program) -> None:
    tree, events, _ = program.run(delay_s=0.01)
    (sample,) = inspect_log([describe_run(events)], epochs=[1.7e9])["samples"]
    open_spans: list[str] = []
    calls: list[str] = []
    for event in sample["events"]:
        match event["event"]:
            case "span_begin":
                assert event["parent_id"] is None or event["parent_id"] in open_spans
                open_spans.append(event["id"])
            case "span_end":
                open_spans.remove(event["id"])
                assert not any(other.startswith(f"{event['id']}/") for other in open_spans)
            case _:
                assert event["span_id"] in open_spans
                calls.append(event["metadata"]["segment"])
    assert open_spans == []
    assert sorted(calls) == sorted(tree.segments)
    assert [e["timestamp"] for e in sample["events"]] == sorted(e["timestamp"] for e in sample["events"])


def test_an_inspect_log_is_read_by_inspect(log: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("inspect_ai.log", reason="inspect-ai is not installed")
    path = tmp_path / "log.json"
    assert plait("view", str(log), "--export", "inspect", "--out", str(path)).exit_code == 0
    read = reader.read_eval_log(str(path))
    assert read.samples[0].input == QUESTION
    assert read.samples[0].scores["right"].answer == "18044;1065;20808"
    assert read.results.scores[0].metrics["accuracy"].value == 1.0
    assert read.samples[0].output.completion == "Answer: 18044;1065;20808"
    assert len([event for event in read.samples[0].events if event.event == "model"]) == 5


def test_exports_hold_no_text_of_the_run(log: Path) -> None:
    run = described(log)
    run["meta"].pop("question")
    for export in (chrome_trace([run]), otlp([run], epochs=[0.0])):
        assert "347*2" not in json.dumps(export)
        assert "Answer" not in json.dumps(export)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["view", "eval"])
def test_help_fits_a_screen(command: str) -> None:
    lines = CliRunner().invoke(main, [command, "--help"], prog_name="plait", terminal_width=80).stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_view_writes_files_and_names_them(log: Path, tmp_path: Path) -> None:
    page, trace = tmp_path / "run.html", tmp_path / "trace.json"
    assert plait("view", str(log), "--html", str(page)).stdout == f"{page}\n"
    assert embedded(page.read_text())["runs"][0]["usage"]["threads"] == 3
    assert plait("view", str(log), "--export", "chrome-trace", "--out", str(trace)).exit_code == 0
    assert json.loads(trace.read_text())["traceEvents"]
    spans = json.loads(plait("view", str(log), "--export", "otlp").stdout)
    assert spans["resourceSpans"]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["view"], 2, "FILES"),
        (["view", "no.jsonl"], 1, "cannot read no.jsonl"),
        (["view", "LOG", "--html", "a.html", "--export", "otlp"], 2, "one of them"),
        (["view", "LOG", "--out", "a.json"], 2, "--export"),
        (["view", "LOG", "--html", "no/such/folder.html"], 1, "cannot write no/such/folder.html"),
        (["view", "BAD"], 1, "line 1"),
        (["view", "EMPTY"], 1, "no whole event"),
        (["view", "RESULTS", "--export", "otlp"], 2, "results without logged runs"),
    ],
)
def test_what_cannot_be_shown_is_said(log: Path, tmp_path: Path, args: list[str], code: int, says: str) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("BAD", "EMPTY", "RESULTS")}
    files["BAD"].write_text(f'{{"event":"RunStarted","schema":{SCHEMA_VERSION + 1},"meta":{{}}}}\n')
    files["EMPTY"].write_text("")
    files["RESULTS"].write_text(json.dumps(asdict(record())) + "\n")
    given = [str({"LOG": log, **files}.get(arg, arg)) for arg in args]
    result = plait(*given)
    assert result.exit_code == code
    assert says in result.stderr
    assert "Traceback" not in result.stderr
