"""The experiments of reinforcement learning: tables and curves say what the runs say, and wrong orders are refused."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import rl_experiments
from curves import Curve, draw


def run(critical: float) -> dict:
    def scores(tokens: float) -> dict:
        return {"accuracy": 0.95, "forked": 0.5, "fork_right": 1.0, "total_tokens": 150, "critical_path_tokens": tokens}

    steps = [{"step": k + 1, "correct": 1.0, "parallel": k / 20, "saved": 0.25, "entropy": 0.01} for k in range(20)]
    return {"start": {"all": scores(100)}, "end": {"all": scores(critical)}, "steps": steps}


def test_the_table_gives_mean_and_range_of_the_change() -> None:
    start, end = rl_experiments._scores_table({"pgrpo": [run(80), run(70)]}).splitlines()[2:]
    assert "| 100 |" in start
    assert "75 (70 to 80)" in end
    assert "-25.0 % (-30.0 to -20.0)" in end


def test_steps_are_averaged_in_windows_over_all_seeds() -> None:
    lines = rl_experiments._steps_table({"pgrpo": [run(80), run(70)]}).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["1 to 10", "11 to 20"]
    assert [line.split("|")[4].strip() for line in lines] == ["22.5 %", "72.5 %"]


def test_an_arm_that_goes_on_from_another_needs_it_first(capsys: pytest.CaptureFixture[str]) -> None:
    for arms, message in (("unrewarded,pgrpo", "name that before it"), ("grpo", "no arm is called grpo")):
        with pytest.raises(SystemExit):
            rl_experiments.main(["--init", "x.pt", "--arms", arms])
        assert message in capsys.readouterr().err


def test_curves_have_a_line_and_the_range_of_their_runs_inside_the_panel() -> None:
    panels = {"forks": [Curve(name="a<b", runs=[[0.0, 0.5, 1.0], [0.5, 0.5]]), Curve(name="c", runs=[[1.0, 0.0]])]}
    picture = ElementTree.fromstring(draw(panels, xlabel="steps", smooth=1))
    space = "{http://www.w3.org/2000/svg}"
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    lines = [shape.attrib["points"].split() for shape in picture.iter(f"{space}polyline")]
    bands = [shape.attrib["points"].split() for shape in picture.iter(f"{space}polygon")]
    assert [len(line) for line in lines] == [3, 2]
    assert [len(band) for band in bands] == [6, 4]
    for point in (point for line in lines + bands for point in line):
        x, y = map(float, point.split(","))
        assert 0 <= x <= width
        assert 0 <= y <= height
    assert "a<b" in [text.text for text in picture.iter(f"{space}text")]


def test_a_smoothed_curve_is_the_mean_of_the_last_steps() -> None:
    flat, spiked = (draw({"x": [Curve(name="a", runs=[run])]}, xlabel="", smooth=2) for run in ([1, 1, 1], [1, 1, 3]))
    assert flat != spiked
    assert draw({"x": [Curve(name="a", runs=[[0, 0.5, 1]])]}, xlabel="", smooth=3) == draw(
        {"x": [Curve(name="a", runs=[[0, 0.25, 0.5]])]}, xlabel="", smooth=1
    )
