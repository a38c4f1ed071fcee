"""Formats, engines and families of installed packages: found by their entry points, in commands and in Python.

What is installed here is what pip leaves behind: modules on the path, and a `.dist-info` folder beside them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from click.testing import CliRunner, Result

from plait.cli import main
from plait.commands.choosing import understand
from plait.engines import ENGINES, Engine, open_engine
from plait.errors import RequestError
from plait.formats import FORMATS, CharTokenizer, format_class, open_format, text_format
from plait.models import gold_tree, load_model
from plait.registry import Registry
from plait.tasks import TASKS, Problem, family, parse
from plait.tasks.vocabulary import TOKENIZER, tokenizer_for
from plait.testing import check_format
from plait.train.rollouts import faults

EXAMPLES = Path(__file__).parent.parent / "examples"

WOVEN = """
from plait.engines.llamacpp import LlamaCppEngine
from plait.formats.threadweaver import ThreadWeaver

class Woven(ThreadWeaver):
    \"\"\"ThreadWeaver by another name.\"\"\"
    name, paper = "woven", "-"

class Slow(LlamaCppEngine):
    \"\"\"llama.cpp, and no hurry.\"\"\"
    name = "slow"
    def __init__(self, path: str, *, minutes: int = 0, **options):
        assert isinstance(path, str)
        super().__init__(path, **options)
        self.minutes = minutes

class Half:
    name, paper, join_kind = "half", "-", "concat"
    def parse(self, sampled_ids, depth): ...

class Untagged(Woven):
    name = "half"
    def tags(self): ...

class Joined(Woven):
    name, join_kind = "half", "glue"

def function(): ...
"""

Install: TypeAlias = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package: its name, and its entry points by group as `name="module:object"`."""
    (tmp_path / "woven.py").write_text(WOVEN, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "woven", raising=False)

    def written(package: str, **groups: dict[str, str]) -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
        lines = [f"[plait.{group}]\n{name} = {value}\n" for group in groups for name, value in groups[group].items()]
        (info / "entry_points.txt").write_text("".join(lines), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    return written


def plait(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="plait")


def listed(command: str) -> dict[str, dict[str, Any]]:
    result = plait(command, "--json")
    assert result.exit_code == 0, result.stderr
    return {row["name"]: row for row in json.loads(result.stdout) if row["source"] != "plait"}


# What a package brings -----------------------------------------------------------------------------------------------


def test_the_examples_install_as_a_package(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((EXAMPLES / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    monkeypatch.syspath_prepend(EXAMPLES)
    install(project["name"], **{g.removeprefix("plait."): e for g, e in project["entry-points"].items()})
    source = f"{project['name']} 1.0"
    for command, name in (("formats", "todo"), ("engines", "ngrams"), ("tasks", "largest")):
        assert listed(command)[name]["source"] == source
        assert f"[{source}]" in plait(command).stdout
    assert "--set largest.rows=[1, 5]" in plait("tasks", "largest", "--sample", "1").stdout
    assert check_format(FORMATS["todo"], examples=2, mutations=5) == ["F1", "F3", "F4", "F5", "F7", "F8", "F9"]
    assert open_engine("ngrams").max_context == 1024
    asked = parse("What is the largest number of 17,25,22,31;40,18,11,52;31,12,90,44?")
    graded = plait("eval", "--engine", "scripted", "--family", "largest", "-n", "3", "--json")
    assert json.loads(graded.stdout)["accuracy"] == 1.0
    assert (asked.family, asked.answer, asked.forks) == ("largest", "90", True)
    tokenizer = tokenizer_for("compact", "todo")
    format = open_format("todo", tokenizer)
    tree = gold_tree(asked, format=format, tokenizer=tokenizer)
    assert (tree.num_threads, faults(tree, format)) == (3, ())
    assert family("largest", {"rows": [2, 9]}).rows == (2, 9)  # type: ignore[attr-defined]


def test_a_format_is_named_in_commands(install: Install, tmp_path: Path) -> None:
    install("woven", formats={"woven": "woven:Woven"})
    solved = plait("solve", "What is 347 * 526?", "--engine", "scripted", "--format", "woven", "--check", "--json")
    assert solved.exit_code == 0, solved.stderr
    assert json.loads(solved.stdout)["answer"] == str(347 * 526)
    traces = tmp_path / "traces.jsonl"
    traces.write_text(json.dumps({"text": "one line", "format": "threadweaver"}), encoding="utf-8")
    converted = plait("convert", str(traces), "--to", "woven")
    assert json.loads(converted.stdout)["format"] == "woven"
    assert plait("validate", str(traces), "--format", "woven").exit_code == 0
    assert "was trained in the multiverse format" in plait("solve", "2*3", "--format", "woven").stderr


def test_an_engine_runs_the_weights_that_are_named(install: Install) -> None:
    install("woven", engines={"slow": "woven:Slow"})
    for args in (["--engine", "slow"], ["--engine", f"slow:{load_model().path}", "--engine-option", "cells=2048"]):
        solved = plait("solve", "What is 34 * 27?", "--check", *args)
        assert solved.exit_code == 0, solved.stderr
    refused = plait("solve", "What is 34 * 27?", "--engine", "slow", "--engine-option", "minutes=long")
    assert "minutes of the slow engine is 'long'; it must be a whole number" in refused.stderr
    refused = plait("solve", "What is 34 * 27?", "--engine", "slow", "--engine-option", "cellz=9")
    assert "the slow engine does not take these options: " in refused.stderr
    said = plait("engines", "slow").stdout
    assert said.splitlines()[1:] == [
        "--engine-option minutes=0                a whole number",
        "--engine-option NAME                     anything",
    ]


def test_a_model_s_own_family_is_asked_before_others_of_the_same_notation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TASKS, "_added", {})

    @dataclass(frozen=True)
    class Sums(TASKS["expression"]):
        name = "sums"

        def parse(self, text: str) -> Problem | None:
            return Problem(family="sums", prompt=text, question=text, answer="7", forks=False) if "+" in text else None

    TASKS.add("sums", Sums)
    assert parse("3 + 4").family == "control"
    assert parse("3 + 4", ["control", "sums"]).family == "sums"
    assert parse("3 * 14", ["control", "sums"]).family != "sums"
    model = replace(load_model(), train={"data": {"mixture": {"sums": 1}}})
    assert understand("3 + 4", model).family == "sums"
    assert model.tokenizer.decode(model.request("3 + 4").prompt_ids[1:]) == "3 + 4"
    with pytest.raises(RequestError, match="unknown family 'sum'; did you mean 'sums'"):
        understand("3 + 4", replace(model, train={"data": {"mixture": {"sum": 1}}}))


def test_what_this_process_adds_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMATS, "_added", {})

    class Mine(format_class("threadweaver")):
        name = "mine"

    FORMATS.add("mine", Mine)
    assert isinstance(text_format("mine"), Mine)
    assert ("mine", "this process", Mine) in FORMATS.listed()
    with pytest.raises(RequestError, match="Plait has a format 'plait'"):
        FORMATS.add("plait", Mine)
    with pytest.raises(RequestError, match="the format 'other' calls itself 'mine'; both names must be the same"):
        FORMATS.add("other", Mine)


# What is broken ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("absent:Woven", "cannot be imported: ModuleNotFoundError: No module named 'absent'"),
        ("torn:Woven", "cannot be imported: ZeroDivisionError: division by zero"),
        ("woven:Wove", "cannot be imported: AttributeError: module 'woven' has no attribute 'Wove'"),
        ("woven:function", "is of type function; it must be a class with the methods of plait.formats.base.Traj"),
        ("woven:Half", "lacks stop_ids, eos_ids, begin, opening, "),
        ("woven:Untagged", "is of no use: TypeError: Untagged.tags() missing 1 required positional argument: 'self'"),
        ("woven:Joined", "is of no use: RequestError: unknown join_kind 'glue' (known: concat, merge, message, none)"),
        ("woven:Woven", "calls itself 'woven'; both names must be the same"),
    ],
)
def test_a_broken_package_is_named_and_stops_nothing_else(
    install: Install, tmp_path: Path, value: str, fault: str
) -> None:
    (tmp_path / "torn.py").write_text("1 / 0\n", encoding="utf-8")
    install("torn-out", formats={"half": value, "woven": "woven:Woven"}, tasks={"half": value}, engines={"half": value})
    with pytest.raises(RequestError) as failed:
        open_format("half", CharTokenizer(()))
    assert str(failed.value).startswith(f"the format 'half' of torn-out 1.0 ({value}) {fault}")
    assert str(failed.value).endswith("; mend or uninstall torn-out 1.0")
    solved = plait("solve", "What is 2 * 3?", "--engine", "scripted", "--format", "half")
    assert (solved.exit_code, solved.stderr) == (2, f"plait: {failed.value}\n")
    for command in ("formats", "engines", "tasks"):
        assert "mend or uninstall torn-out 1.0" in listed(command)["half"]["error"]
        assert "cannot be used: the " in plait(command).stdout
    assert listed("formats")["woven"]["about"] == "ThreadWeaver by another name."
    assert plait("solve", "What is 34 * 27?", "--engine", "scripted", "--format", "woven", "--check").exit_code == 0
    unknown = plait("solve", "Who wrote Faust?", "--engine", "scripted")
    assert "the family 'half' of torn-out 1.0" in unknown.stderr


def test_a_family_that_needs_knobs_is_listed_as_broken(install: Install, tmp_path: Path) -> None:
    code = (
        (EXAMPLES / "your_own_task.py")
        .read_text(encoding="utf-8")
        .replace("rows: tuple[int, int] = (1, 5)", "rows: int")
    )
    (tmp_path / "needy.py").write_text(code, encoding="utf-8")
    install("needy", tasks={"largest": "needy:Largest"})
    error = "is of no use: TypeError: Largest.__init__() missing 1 required keyword-only argument: 'rows'"
    assert error in listed("tasks")["largest"]["error"]
    with pytest.raises(RequestError, match=r"mend or uninstall needy 1\.0"):
        parse("What is the largest number of 17,25,22,31?")


def test_a_name_of_plait_s_own_stays_its_own(install: Install) -> None:
    install("usurper", formats={"plait": "woven:Woven"}, tasks={"product": "woven:Half"}, engines={"torch": "x:Y"})
    assert format_class("plait").__module__ == "plait.formats.plait"
    assert family("product").about.startswith("a product of three")
    for command, name in (("formats", "plait"), ("tasks", "product"), ("engines", "torch")):
        assert listed(command)[name]["error"].endswith("of this name, which is used; usurper 1.0 must rename its own")
    assert list(FORMATS).count("plait") == 1


def test_two_packages_with_one_name_are_both_named(install: Install) -> None:
    for package in ("one", "other"):
        install(package, formats={"woven": "woven:Woven"})
    with pytest.raises(RequestError, match=r"in several packages \(one 1.0, other 1.0\): uninstall all but one"):
        format_class("woven")


@pytest.mark.parametrize(
    "error", ["ImportError('no kernels')", "EngineUnavailable('no kernels')", "OSError('no kernels')"]
)
def test_what_plait_has_and_lacks_a_library_is_listed(install: Install, tmp_path: Path, error: str) -> None:
    code = f"from plait.errors import EngineUnavailable\nraise {error}\n"
    (tmp_path / "lacking.py").write_text(code, encoding="utf-8")
    install("nothing")
    registry = Registry("plait.nothing", "engine", {"lacking": "lacking:Engine", "plain": Engine}, of=Engine)
    lacking, plain = registry.listed()
    assert (lacking[:2], str(lacking[2]), plain) == (("lacking", ""), "no kernels", ("plain", "", Engine))


def test_lost_and_torn_metadata_are_said(install: Install, tmp_path: Path) -> None:
    install("lost", formats={"half": "woven:Half"})
    (tmp_path / "lost-1.0.dist-info" / "METADATA").unlink()
    assert "mend or uninstall woven:Half" in listed("formats")["half"]["error"]
    (tmp_path / "lost-1.0.dist-info" / "entry_points.txt").write_text("[plait.engines]\ntorn", encoding="utf-8")
    assert "an installed package has an entry_points.txt that cannot be read" in plait("engines").stderr


def test_an_unknown_name_is_held_against_those_of_packages_too(install: Install) -> None:
    install("woven", formats={"woven": "woven:Woven"}, engines={"slow": "woven:Slow"}, tasks={"halves": "woven:Half"})
    with pytest.raises(RequestError, match="unknown format 'wowen'; did you mean 'woven'"):
        format_class("wowen")
    assert "did you mean 'slow'" in plait("solve", "2*3", "--engine", "slwo").stderr
    assert "did you mean 'halves'" in plait("eval", "--family", "halvs").stderr


def test_packages_are_not_looked_at_while_plait_s_own_names_are_used() -> None:
    script = (
        "import sys, plait; from plait.tasks import family; before = set(sys.modules)\n"
        "plait.open_format('plait', plait.load_model().tokenizer); plait.open_engine('scripted'); family('product')\n"
        "print('importlib.metadata' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )


# What engines of others look like ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["path", "path: Path", "path: str | 'Unseen'", "path: 'Unseen'", "*, path: Sized"])
def test_an_engine_s_annotations_need_not_be_plait_s(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(ENGINES, "_added", {})
    scope: dict[str, Any] = {}
    code = f"""
from __future__ import annotations
from pathlib import Path
from typing import Protocol
from plait.engines.scripted import ScriptedEngine

class Sized(Protocol):
    size: int

class Own(ScriptedEngine):
    name = "own"
    def __init__(self, {source}, **more):
        super().__init__()
        self.given = path, more
"""
    exec(code, scope)
    ENGINES.add("own", scope["Own"])
    path = load_model().path
    assert path is not None
    assert load_model().open_engine("own", dials=3).given == (path, {"dials": 3})  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="the own engine needs path"):
        open_engine("own", dials=3)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_what_a_package_brings_can_be_trained(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    install("todo", formats={"todo": "your_own_format:Todo"}, tasks={"largest": "your_own_task:Largest"})
    config, out = tmp_path / "todo.toml", tmp_path / "run"
    config.write_text(TRAINED, encoding="utf-8")
    trained = plait("train", "sft", str(config), "--out", str(out), "--decode", "1")
    assert trained.exit_code == 0, trained.stderr
    model = load_model(str(out / "model.gguf"))
    assert (model.format_name, model.join, model.families) == ("todo", "concat", ("largest",))
    assert "<Do>" in model.tokenizer.tokens
    asked = plait(
        "solve", "What is the largest number of 17,25,22,31;40,18,11,52?", "--model", str(out / "model.gguf"), "--json"
    )
    assert json.loads(asked.stdout)["format"] == "todo"
    other = plait("train", "sft", str(config), "--set", "data.format=tdo", "--dry-run")
    assert "did you mean 'todo'" in other.stderr


TRAINED = """
compile = false

[data]
format = "todo"
mixture = { largest = 1 }
buckets = [[4, 512]]

[model]
width = 32
layers = 1
heads = 1

[schedule]
steps = 1

[eval]
times = 1
problems = 1
"""


def test_a_vocabulary_is_named_and_takes_in_the_tags_of_a_format(install: Install, tmp_path: Path) -> None:
    code = "FixedTokenizer(['<bos>', '<eos>', '<Goal>', 'x'], control=['<bos>', '<eos>'], bos='<bos>', eos='<eos>')"
    (tmp_path / "letters.py").write_text(
        f"from plait.tokenizer import FixedTokenizer\nown = {code}\n", encoding="utf-8"
    )
    install("letters", vocabularies={"letters": "letters:own"})
    assert tokenizer_for("letters", "sequential").tokens == ("<bos>", "<eos>", "<Goal>", "x")
    woven = tokenizer_for("letters", "threadweaver")
    assert woven.tokens[:4] == ("<bos>", "<eos>", "<Goal>", "x")
    assert set(woven.tokens[4:]) == set(format_class("threadweaver").tags()) == woven.control - {"<bos>", "<eos>"}
    # A word of its own is none that only the runtime may write: the format refuses the vocabulary.
    assert tokenizer_for("letters", "multiverse").control_id("<Goal>") is None
    assert tokenizer_for("compact", "multiverse") is TOKENIZER


def test_rewards_advantages_and_dashboards_are_named_too(install: Install, tmp_path: Path) -> None:
    from plait.train.advantages import advantages
    from plait.train.metrics import open_sinks
    from plait.train.rewards import Group, Outcome, Reward

    (tmp_path / "scores.py").write_text(SCORES, encoding="utf-8")
    groups = {"rewards": "brief", "advantages": "ranked", "dashboards": "printed"}
    install("scores", **{group: {name: f"scores:{name}"} for group, name in groups.items()})
    outcome = Outcome(correct=True, response_tokens=30)
    assert Reward({"correctness": {}, "brief": {"most": 20}})(outcome, Group(outcomes=(outcome,))) == 0.5
    for options, fault in (({}, "the reward term brief needs most"), ({"most": "no"}, "it must be a whole number")):
        with pytest.raises(RequestError, match=fault):
            Reward({"brief": options})
    assert advantages("ranked", {"p": {"0": 5.0, "1": 7.0}}) == {"0": 0.0, "1": 1.0}
    (sink,) = open_sinks(["printed"], out=tmp_path, config={})
    sink.write(3, {"loss": 1.0})
    assert sink.written == [3]  # type: ignore[attr-defined]


SCORES = """
from __future__ import annotations
import numpy as np

def brief(outcome, group, *, most: int, weight: float = 0.5):
    return -weight * (outcome.response_tokens > most)

def ranked(groups):
    return [np.argsort(np.argsort(group)).astype(float) for group in groups]

class printed:
    def __init__(self, out, config):
        self.written = []
    def write(self, step, values):
        self.written.append(step)
    def close(self): ...
"""
