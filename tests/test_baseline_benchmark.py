"""The benchmark of baselines: windows, first success, groups of samples, its tables and its picture."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_baselines
from bench_countdown import held_out
from curves import Point, Series, scatter

from plait.bench import Record, RecordFile

PROBLEMS = {problem.prompt: problem for problem in held_out(6, 7)}


def run(prompt: str, *, right: bool = True, critical: int = 100, **changes: object) -> Record:
    base = Record(
        model="serial | m@1",
        family="countdown_search",
        prompt=prompt,
        question=PROBLEMS[prompt].question,
        answer=PROBLEMS[prompt].answer if right else None,
        right=right,
        forked=False,
        forks=True,
        decision_right=False,
        threads=0,
        num_forks=0,
        total_tokens=critical,
        critical_path_tokens=critical,
        token_latency=critical,
        longest_context_tokens=critical + 10,
        reread_tokens=0,
        wall_s=0.5,
        stop="eos",
        serial_cost=None,
        parallel_cost=None,
        concurrency=2,
        seed=0,
    )
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def records() -> list[Record]:
    """Of six problems greedy runs, four samples of which one is right, and greedy runs of a parallel model."""
    out: list[Record] = []
    for number, prompt in enumerate(PROBLEMS):
        out.append(run(prompt, right=number % 2 == 0, critical=700))
        out += [
            run(prompt, right=seed == 1, critical=600 + 100 * seed, seed=seed, temperature=1.0, method="sample")
            for seed in range(4)
        ]
        out.append(run(prompt, critical=900, total_tokens=2000, model="message 8 | p@1"))
    out.append(run(next(iter(PROBLEMS)), concurrency=1, wall_s=0.25))
    return out


def test_a_run_with_a_sequence_longer_than_the_window_gives_no_answer() -> None:
    one = run(next(iter(PROBLEMS)), critical=1000)
    assert bench_baselines.within(one, 1010) is one
    cut = bench_baselines.within(one, 1009)
    assert (cut.right, cut.answer, cut.total_tokens) == (False, None, 1000)


def test_samples_that_advance_together_stop_with_the_first_right_one() -> None:
    prompt = next(iter(PROBLEMS))
    samples = [run(prompt, right=False, critical=300), run(prompt, critical=200), run(prompt, critical=250)]
    samples.append(run(prompt, right=False, critical=100))
    whole = replace(samples[0], total_tokens=850, critical_path_tokens=300)
    cut = bench_baselines.stopped(samples, whole)
    assert (cut.critical_path_tokens, cut.total_tokens) == (200, 200 + 200 + 200 + 100)
    wrong = [replace(s, right=False) for s in samples]
    assert bench_baselines.stopped(wrong, whole) is whole


def test_samples_are_counted_in_groups_of_n() -> None:
    rows = {
        (row.setting, row.kind, row.n, row.first): row for row in bench_baselines.measured(records(), PROBLEMS, 1024)
    }
    one, two, four = (rows["serial", "best", n, False] for n in (1, 2, 4))
    assert [row.accuracy for row in (one, two, four)] == [0.25, 0.5, 1.0]
    assert [row.total for row in (one, two, four)] == [750, 1500, 3000]
    assert [row.critical for row in (one, two, four)] == [750, 800, 900]
    first = rows["serial", "best", 4, True]
    assert (first.critical, first.total) == (700, 600 + 3 * 700)
    greedy = rows["serial", "greedy", 1, False]
    assert (greedy.accuracy, greedy.total, list(greedy.wall)) == (0.5, 700, [0.25])
    assert rows["message 8", "greedy", 1, False].total == 2000


def test_a_parallel_setting_meets_the_baselines_that_cost_just_less_and_just_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, svg = tmp_path / "r.jsonl", tmp_path / "b.svg"
    with RecordFile(path) as file:
        for record in records():
            file.write(record)
    bench_baselines.main(["report", str(path), "--problems", "6", "--svg", str(svg), "--json"])
    text = capsys.readouterr().out
    compared = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| message 8, greedy ") and "x |" in line
    ]
    assert [row[1] for row in compared] == [
        "greedy",
        "best@2, temperature 1",
        "best@4, temperature 1",
        "best@2, first success, temperature 1",
        "best@4, first success, temperature 1",
    ]
    assert compared[0][2:] == ["6", "+50.0 ± 43.8", "2.86x", "1.29x"]
    assert compared[1][3:] == ["+50.0 ± 0.0", "1.33x", "1.12x"]
    assert compared[2][3:] == ["+0.0 ± 0.0", "0.67x", "1.00x"]
    names = [text.text for text in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"serial, best@n", "message, by children", "right, by critical path"} <= set(names)


def test_a_benchmark_without_weights_says_which_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_baselines.parsed(["run", "--json", "x.jsonl"])
    assert "--serial, --message or --race" in capsys.readouterr().err


def test_points_stay_inside_their_panel_and_doubling_is_a_step() -> None:
    points = [Point(x=x, y=y, half=0.1, label=str(x)) for x, y in ((100, 0.2), (200, 0.5), (400, 0.95))]
    series = [Series(name="a<b", points=points), Series(name="alone", points=points[:2], joined=False)]
    picture = ElementTree.fromstring(scatter({"one": series, "two": series}, xlabel="tokens"))
    space = "{http://www.w3.org/2000/svg}"
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in picture.iter(f"{space}circle")]
    assert len(circles) == 2 * 5
    assert all(0 < x < width and 0 < y < height for x, y in circles)
    (a, _), (b, _), (c, _) = circles[:3]
    assert b - a == pytest.approx(c - b, abs=0.11)
    assert len(list(picture.iter(f"{space}polyline"))) == 2
    assert "a<b" in [text.text for text in picture.iter(f"{space}text")]
