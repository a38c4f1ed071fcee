"""The examples run, each as a person would start it, and say what they promise."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from plait import tasks

ROOT = Path(__file__).parent.parent / "examples"
Output: TypeAlias = Callable[..., str]
EXAMPLES = sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Output:
    def run(name: str, *args: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *args])
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_run_is_told_event_by_event(output: Output) -> None:
    said = output("solve_in_python")
    assert "0:0 forks 0/0.0 (347), 0/0.1 (88), 0/0.2 (612)" in said
    assert "0:1 starts after a merge of 3 threads" in said
    assert f"{347 * 52};{88 + 977};{612 * 34}\n" in said
    tokens, longest = map(int, re.findall(r"^(\d+) tokens, (\d+) of them", said, re.MULTILINE)[0])
    assert longest < 0.7 * tokens


def test_many_runs_keep_their_budgets_and_are_counted(output: Output) -> None:
    said = output("many_runs", "9")
    rows = re.findall(r"^ *(.+): 3 runs, (\d) right, (\d) met their limit, (\d+) tokens$", said, re.MULTILINE)
    assert len(rows) == 3
    (_, right, cut, _), (_, _, few_cut, few_tokens), (_, _, short_cut, _) = rows
    assert (right, cut) == ("3", "0")
    assert int(few_cut) > 0
    assert int(few_tokens) <= 3 * 400
    assert int(short_cut) > 0
    assert re.search(r"^\d+ runs and \d+ tokens a second, \d+\.\d tokens a step$", said, re.MULTILINE)


def test_openai_s_client_shows_threads_and_answer(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pytest.importorskip("openai", reason="needs the client")
    pytest.importorskip("fastapi", reason="needs the serve extra")
    import plait
    from plait.server import Served
    from test_server import serving

    with serving(Served(model=plait.load_model(), engine_name="llamacpp")) as running:
        said = output("openai_client", f"{running.url}/v1")
    assert "thread 0/0.3 of 0 is told '8000'" in said
    assert len(re.findall(r"^thread 0/0\.\d said <Path>", said, re.MULTILINE)) == 4
    assert f"answer: {4631 * 8274}" in said
    assert re.search(r"^\d+ tokens, \d+ on the critical path$", said, re.MULTILINE)


def test_a_format_of_one_s_own_keeps_the_contract(output: Output) -> None:
    assert output("your_own_format") == "the contract holds: F1 F3 F4 F5 F7 F8 F9\n"


def test_an_engine_of_one_s_own_keeps_the_contract_and_forks(output: Output) -> None:
    said = output("your_own_engine")
    assert said.startswith("the contract holds: C1 C2 C3 C4 C5 C6 C7 C8 C9 M0 C10\n")
    assert "0/0.0:0 (none): ' 12 * 3 = 36\\n</Thread>'" in said
    assert "0:1 (concat): '</Parallel>\\nIn all 84.<eos>'" in said


def test_a_task_of_one_s_own_has_gold_solutions_that_hold(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.TASKS, "_added", {})
    rows = re.findall(r"^(\w+): (\d+) of 40 fork, (\d\.\d\d)x fewer steps$", output("your_own_task"), re.MULTILINE)
    assert [name for name, *_ in rows] == ["multiverse", "threadweaver"]
    assert all(0 < int(forks) < 40 and float(fewer) > 1.2 for _, forks, fewer in rows)


def test_the_page_lists_every_example() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((\w+)\.py\)", page)) == EXAMPLES
    for name in EXAMPLES:
        assert f"python examples/{name}.py" in (ROOT / f"{name}.py").read_text(encoding="utf-8")
