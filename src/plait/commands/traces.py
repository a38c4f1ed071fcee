"""`plait validate` and `plait convert`: data sets of trajectories in text, one JSON object a line.

A line has `text`, the trajectory with every thread in its place, and perhaps `format`; whatever else it has is kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plait.errors import FormatError, RequestError
from plait.formats import Trajectory, text_format
from plait.formats.convert import convert as converted


def validate(file: str, *, format: str | None, conclusion: bool = False, as_json: bool = False) -> int:
    """Say of every line what is wrong with it.

    Args:
        file: JSON lines.
        format: Of lines that do not name one.
        conclusion: Whether ThreadWeaver's texts are of its older form, with a conclusion.

    Raises:
        RequestError: A format is not known, or a line names none.
    """
    total = 0
    problems: list[dict[str, Any]] = []
    for number, row in _rows(file):
        total += 1
        try:
            _read(row, number, format, conclusion)
        except FormatError as exc:
            problems.append({"row": number, "message": str(exc)})
            if not as_json:
                print(f"{file}:{number}: {exc}")
    if as_json:
        print(json.dumps({"file": file, "traces": total, "broken": len(problems), "problems": problems}))
    else:
        print(f"{total} traces, {len(problems)} broken")
    return 1 if problems else 0


def convert(file: str, *, to: str, format: str | None, conclusion: bool = False, out: str | None = None) -> int:
    """Write every line in another format; say which have no form in it.

    Raises:
        RequestError: A format is not known, or a line names none.
    """
    target = text_format(to)
    refused = 0
    lines: list[str] = []
    for number, row in _rows(file):
        try:
            text = target.write(converted(_read(row, number, format, conclusion), to=target))
            written = json.dumps({**row, "format": to, "text": text}, ensure_ascii=False)
        except _Usage:
            raise
        except (FormatError, RequestError) as exc:
            refused += 1
            print(f"{file}:{number}: {exc}", file=sys.stderr)
            continue
        lines.append(written)
    whole = "".join(f"{line}\n" for line in lines)
    if out is None:
        print(whole, end="")
    else:
        Path(out).write_text(whole, encoding="utf-8")
    return 1 if refused else 0


class _Usage(RequestError):
    """What was asked is wrong for all lines, not the data of one."""


def _rows(file: str) -> Iterator[tuple[int, Any]]:
    with Path(file).open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as exc:
                    yield number, exc


def _read(row: Any, number: int, format: str | None, conclusion: bool) -> Trajectory:
    if isinstance(row, json.JSONDecodeError):
        raise FormatError(f"line {row.lineno}, column {row.colno}: not JSON: {row.msg}")
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise FormatError("line 1, column 1: a trace is a JSON object with a string `text`")
    name = row.get("format", format)
    if not isinstance(name, str):
        raise _Usage(f"line {number} names no format; say which with --format")
    try:
        reader = text_format(name, **({"conclusion": True} if conclusion and name == "threadweaver" else {}))
    except RequestError as exc:
        raise _Usage(f"line {number}: {exc}") from exc
    return reader.read(row["text"])
