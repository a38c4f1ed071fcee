"""Data sets of trajectories: checked with line and column, and written in other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from plait.cli import main
from plait.errors import RequestError
from plait.formats import Block, Return, text_format
from plait.formats.convert import convert

BLOCK = Block(outlines=("a", "b"), threads=(("x",), ("y",)))
NESTED = Block(outlines=("a",), threads=((BLOCK, "z", Return("r")),))


def plait(*args: str) -> Any:
    return CliRunner().invoke(main, list(args))


def rows(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


GOOD = text_format("threadweaver").write(("go\n", BLOCK, "\nend"))


def test_validate_says_line_and_column(tmp_path: Path) -> None:
    broken = GOOD.replace("2: b", "3: b")
    path = rows(tmp_path, {"text": GOOD}, {"text": broken, "format": "threadweaver"}, "{not json", {"txt": ""})
    result = plait("validate", path, "--format", "threadweaver")
    assert result.exit_code == 1
    told = result.output.splitlines()
    assert told[0] == f"{path}:2: line 5, column 10: outline 3 stands where 2 belongs"
    assert told[1].startswith(f"{path}:3: line 1, column 2: not JSON")
    assert told[2] == f"{path}:4: line 1, column 1: a trace is a JSON object with a string `text`"
    assert told[3] == "4 traces, 3 broken"
    answer = json.loads(plait("validate", path, "--format", "threadweaver", "--json").output)
    assert (answer["traces"], answer["broken"], answer["problems"][0]["row"]) == (4, 3, 2)


def test_validate_passes_what_is_right_and_refuses_what_it_cannot_know(tmp_path: Path) -> None:
    path = rows(tmp_path, {"text": GOOD})
    assert plait("validate", path, "--format", "plait").exit_code == 0
    assert "names no format" in plait("validate", path).output
    assert "did you mean 'threadweaver'" in plait("validate", path, "--format", "threadweavr").output
    older = GOOD.replace("</Thread>\n</Parallel>", "</Thread>\n<Conclusion>\nc\n</Conclusion>\n</Parallel>")
    path = rows(tmp_path, {"text": older})
    assert plait("validate", path, "--format", "threadweaver").exit_code == 1
    assert plait("validate", path, "--format", "threadweaver", "--conclusion").exit_code == 0


def test_convert_keeps_the_rest_of_a_line_and_names_what_has_no_form(tmp_path: Path) -> None:
    nested = text_format("plait").write((NESTED,))
    path = rows(tmp_path, {"text": GOOD, "id": 7}, {"text": nested})
    out = tmp_path / "out.jsonl"
    result = plait("convert", path, "--format", "plait", "--to", "multiverse", "--out", str(out))
    assert result.exit_code == 1
    assert f"{path}:2: the multiverse format has no form for a block inside a thread" in result.output
    (row,) = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert (row["id"], row["format"]) == (7, "multiverse")
    assert text_format("multiverse").read(row["text"]) == ("go\n", BLOCK, "\nend")


def test_what_a_thread_returns_is_its_last_line_where_a_parent_reads_it_all() -> None:
    returned = Block(outlines=("a",), threads=(("x", Return("r")),))
    assert convert((returned,), to=text_format("threadweaver")) == (Block(outlines=("a",), threads=(("x\nr",),)),)
    assert convert((returned,), to=text_format("plait")) == (returned,)


def test_one_line_of_reasoning_thinks_what_a_run_would_have_read() -> None:
    needs = Block(outlines=("a", "b"), threads=(("x",), ("y",)), needs=((1,), ()))
    race = Block(outlines=("a", "b", "c"), threads=(("no",), ("yes", Return("r")), ("late", Return("s"))), race=True)
    sequential = text_format("sequential")
    assert convert(("go", needs, "end"), to=sequential) == ("go\ny\nx\nend",)
    assert convert((race,), to=sequential) == ("\nno\nyes\nr\n",)


@pytest.mark.parametrize("name", ["threadweaver", "multiverse", "npr"])
def test_races_and_dependencies_have_no_other_form(name: str) -> None:
    for block, what in (
        (Block(outlines=("a", "b"), threads=(("x",), ("y",)), needs=((), (0,))), "need others"),
        (Block(outlines=("a",), threads=(("x",),), race=True), "a race"),
    ):
        with pytest.raises(RequestError, match=what):
            convert((block,), to=text_format(name))
