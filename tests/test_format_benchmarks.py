"""The comparisons of formats go on where they were stopped, and compare what they say."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_countdown
import bench_formats
from bench_countdown import FirstSuccess, Outcome, Outcomes, Setting, WaitForAll

from plait import tasks
from plait.formats import Fork, ThreadOutcome, open_format
from plait.models import load_model
from plait.tasks.vocabulary import SEARCH
from plait.types import StopReason

OUTCOME = Outcome(
    right=True,
    longest=700,
    longest_llama=1500,
    total=4000,
    critical=900,
    dropped=0,
    threads=8,
    declined=0,
    end="right",
    reread=10,
    prompt_of_threads=100,
    wall_s=0.0,
)


def test_outcomes_are_read_back_and_those_of_other_weights_are_refused(tmp_path: Path) -> None:
    file, outcomes, model = tmp_path / "outcomes.jsonl", Outcomes(), load_model()
    setting = Setting(name="message, 8 children", model=model, format=model.format, children=8)
    first, second = bench_countdown.held_out(2, seed=7)
    outcomes.record(file, setting, first, OUTCOME, alone=False)
    outcomes.record(file, setting, second, replace(OUTCOME, wall_s=0.5), alone=True)
    with file.open("a") as half:
        half.write('{"setting": "message, 8 chi')
    again = Outcomes(file)
    assert (again.of, again.alone) == (outcomes.of, outcomes.alone)
    assert again.of[setting.name] == {first.prompt: OUTCOME}
    other = replace(setting, model=replace(model, digest="other"))
    with pytest.raises(SystemExit, match="outcomes of other weights"):
        again.record(None, other, second, OUTCOME, alone=False)


def test_what_a_race_saves_is_counted_on_the_problems_that_both_have() -> None:
    raced = replace(OUTCOME, critical=600, total=3000, dropped=30)
    rows = {
        "message, 8 children": {"a": OUTCOME, "b": OUTCOME, "c": replace(OUTCOME, critical=10**6)},
        "message, 8 children, first success": {"a": raced, "b": OUTCOME},
    }
    last = bench_countdown.first_success(rows).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[2:-1]] == [
        "2",
        "100.0 (34-100)",
        "750",
        "3500",
        "16.7 %",
        "12.5 %",
        "15.0",
    ]


def test_gold_searches_cost_no_more_if_the_first_success_ends_them() -> None:
    outcomes = bench_countdown.gold(argparse.Namespace(problems=4, seed=7)).of
    for name in ("message, 4 children", "message, 8 children"):
        pairs = [(all_awaited, outcomes[f"{name}, first success"][key]) for key, all_awaited in outcomes[name].items()]
        assert all(raced.total <= whole.total and raced.critical <= whole.critical for whole, raced in pairs)
        assert any(raced.total < whole.total for whole, raced in pairs)


def outcome(header: str, text: str) -> ThreadOutcome:
    header_ids, token_ids = (tuple(SEARCH.encode(said, special=True)) for said in (header, text))
    return ThreadOutcome(header_ids=header_ids, token_ids=token_ids, stop=StopReason.STOP)


def test_a_block_that_is_awaited_is_read_as_its_race_would_be() -> None:
    race, awaited = open_format("plait", SEARCH), WaitForAll(SEARCH)

    def thread(number: int, text: str) -> ThreadOutcome:
        return outcome(f"\n<Thread>\n{number}:", f" {text}\n</Thread>")

    threads = [thread(1, "12"), thread(2, "3, 4, 5<Conclusion>9</Conclusion>"), thread(3, "<Conclusion>7</Conclusion>")]
    won = [replace(t, won=i == 2) for i, t in enumerate(threads)]
    assert awaited.join(threads) == race.join(won)
    block = SEARCH.encode("<Outlines>?\n<Outline>1: 2</Outline>\n</Outlines>", special=True)
    forks = [format.parse(block, 0) for format in (race, awaited)]
    assert [isinstance(fork, Fork) and fork.race for fork in forks] == [True, False]


def test_children_that_race_succeed_by_reaching_the_goal() -> None:
    format = FirstSuccess(SEARCH)
    ends = ["50,50 equal: Goal Reached", "50,7 unequal: No Solution"]
    assert [format.succeeded(outcome("", f"\n{end}")) for end in ends] == [True, False]


def test_records_of_formats_are_kept_and_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = load_model(), tmp_path / "records.jsonl"
    args = argparse.Namespace(json=file, concurrency=2, timed=1, only_timed=False)
    drawn = [tasks.parse(f"What is {a} * {b}?") for a, b in ((12, 34), (56, 78))]
    records = bench_formats.run(drawn, [model], args)
    assert [r.concurrency for r in records] == [2, 2, 1]
    written = file.read_bytes()
    assert bench_formats.run(drawn, [model], args) == records
    assert file.read_bytes() == written
    shown = bench_formats.measured(records, [model], drawn)
    assert shown.splitlines()[-1].split("|")[2].strip() == "2"
