"""`plait view`: logs of runs and results of `plait eval` as a page, as one file to share, or for other tools."""

from __future__ import annotations

import json
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from plait import tasks
from plait.errors import LogError, RequestError
from plait.models import response_text
from plait.terminal.reading import Reader
from plait.tree import Tree
from plait.types import StopReason
from plait.viewer import chrome_trace, document, inspect_log, otlp, read_views
from plait.viewer.data import ViewData
from plait.viewer.serve import ViewServer

Export = Literal["chrome-trace", "otlp", "inspect"]


def view(
    files: Sequence[str],
    *,
    html: str | None = None,
    export: Export | None = None,
    out: str | None = None,
    port: int = 0,
    browser: bool = True,
) -> int:
    """Show files in the browser until Ctrl-C, or write them in another form.

    Args:
        files: Logs of `plait solve --trace`, results of `plait eval --out`.
        html: Write the page to this file and end.
        export: Write the runs for another tool and end.
        out: Where the export goes; None is standard output.
        port: To serve on; 0 takes any that is free.
        browser: Whether to open a browser.

    Raises:
        LogError: A file cannot be read or written.
        TreeError: A file is neither a log nor results.
        RequestError: Options that exclude each other; a port that cannot be used.
    """
    if html and export:
        raise RequestError("--html and --export write different files; give one of them")
    if out and not export:
        raise RequestError("--out says where an export goes; give --export, or --html FILE for a page")
    title = ", ".join(Path(file).name for file in files)

    def data() -> ViewData:
        return read_views(files, judge=judge)

    if export:
        return _export(data(), files, export, out)
    if html:
        _write(html, document(data().values(), title=title).html)
        print(html)
        return 0
    data()  # What cannot be shown is said here, not in the browser.
    return _serve(ViewServer(lambda: document(data().values(), title=title), port=port), browser)


def judge(tree: Tree, reader: Reader) -> tuple[str | None, bool | None]:
    """The answer that a run gives, and whether it is right: None where its question is not one of the families'."""
    if reader.tokenizer is None or not tree.segments:
        return None, None
    text = response_text(tree, reader.tokenizer)
    answer = tasks.answer_of(text)
    try:
        problem = tasks.parse(str(tree.meta["prompt"]))
    except (RequestError, KeyError):
        return answer, None
    return answer, tree.stop is StopReason.EOS and tasks.grade(problem, text)


def _serve(server: ViewServer, browser: bool) -> int:
    with server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        if browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return 0


def _export(data: ViewData, files: Sequence[str], export: Export, out: str | None) -> int:
    if not data.runs:
        raise RequestError(f"{', '.join(files)}: results without logged runs; export what `plait solve --trace` wrote")
    epochs = [_epoch(run, files) for run in data.runs]
    values: dict[str, Any]
    match export:
        case "otlp":
            values = otlp(data.runs, epochs=epochs)
        case "inspect":
            values = inspect_log(data.runs, epochs=epochs)
        case "chrome-trace":
            values = chrome_trace(data.runs)
    text = json.dumps(values, separators=(",", ":")) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        _write(out, text)
    return 0


def _epoch(run: dict[str, Any], files: Sequence[str]) -> float:
    """Unix time at which a run started: as its log says, else from when its file was last written."""
    said = run["meta"].get("started_unix_s")
    if isinstance(said, int | float):
        return float(said)
    return max(0.0, max(Path(file).stat().st_mtime for file in files) - run["wall_s"])


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as exc:
        raise LogError(f"cannot write {path}: {exc.strerror}") from exc
