"""The `plait` command: what each command prints, its exit codes, and how it ends when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from plait import __version__, tasks
from plait import train as plait_train
from plait.bench import read_records
from plait.cli import main
from plait.commands.train import overrides
from plait.errors import RequestError
from plait.log import read_log, read_tree
from plait.types import StopReason
from tiny_gguf import write_model, write_random_weights

QUESTION = "What is 347 * 526?"
GOLD = ["--engine", "scripted"]


def plait(*args: str, **more: Any) -> Result:
    return CliRunner().invoke(main, list(args), prog_name="plait", **more)


def started(*args: str, **more: Any) -> subprocess.Popen[str]:
    src = str(Path(__file__).parent.parent / "src")
    env = {**os.environ, "PYTHONPATH": src, "TERM": "xterm"}
    command = [sys.executable, "-m", "plait", *args]
    # A shell's background jobs ignore Ctrl-C, and so would all that they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, **more)
    finally:
        signal.signal(signal.SIGINT, before)


# Help and usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "",
        "solve",
        "eval",
        "trace",
        "trace show",
        "serve",
        "bench load",
        "view",
        "doctor",
        "train",
        "train sft",
        "train rl",
        "models",
        "formats",
        "engines",
        "tasks",
        "validate",
        "convert",
    ],
)
def test_help_fits_a_screen(command: str) -> None:
    result = plait(*command.split(), "--help", terminal_width=80)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["solve", "--compar", QUESTION], "--compare"),
        (["slove", QUESTION], "solve"),
        (["solve", QUESTION, "--engine", "llamacp"], "did you mean 'llamacpp'"),
        (["solve", QUESTION, "--model", "plait-tyni"], "did you mean 'plait-tiny'"),
        (["solve", QUESTION, *GOLD, "--format", "multivers"], "did you mean 'multiverse'"),
        (["solve", QUESTION, *GOLD, "--model", "plait-tiny"], "has no weights"),
        (["solve", QUESTION, *GOLD, "--max-tokens", "0"], "max_tokens is 0"),
        (["solve", QUESTION, *GOLD, "--temperature", "-1"], "-1.0 is not in the range"),
        (["eval", *GOLD, "--family", "contdown"], "did you mean 'countdown'"),
        (["eval", *GOLD, "--compare", "--concurrency", "4"], "leave out --concurrency"),
        (["eval", *GOLD, "--against", "pass@2", "--concurrency", "4"], "--against measures wall time"),
        (["eval", *GOLD, "--against", "majorty@8"], "did you mean 'majority@N'"),
        (["eval", *GOLD, "--against", "best@8"], "those of long_multiplication, product, expression, bundle, control"),
        (["eval", *GOLD, "--against", "pass@2", "--temperature", "0"], "needs samples that differ"),
        (["eval", *GOLD, "--temperature", "0.5"], "methods that sample"),
        (["eval", *GOLD, "--twin", "plait-tiny-sequential"], "add --compare"),
        (["solve", QUESTION, *GOLD, "--twin", "plait-tiny-sequential"], "add --compare"),
        (["tasks", "bundel"], "did you mean 'bundle'"),
        (["tasks", "product", "--set", "product.factor=3"], "did you mean 'factors'"),
        (["tasks", "product", "--set", "factors=3"], "use FAMILY.KNOB=VALUE"),
    ],
)
def test_what_cannot_be_asked_names_what_can(args: list[str], says: str) -> None:
    result = plait(*args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not result.stdout


def test_version() -> None:
    assert plait("--version").stdout == f"plait {__version__}\n"


# plait solve --------------------------------------------------------------------------------------------------------


def test_solve_prints_threads_answer_and_one_line_of_truth() -> None:
    result = plait("solve", QUESTION, *GOLD)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[:2] == [QUESTION, "3 threads:"]
    assert lines[2].startswith("  [1 6] 347*6: a7*6=42")
    assert lines[-2] == "answer: 182522"
    assert lines[-1].startswith("3 threads in 1 fork, 249 tokens, 120 on the critical path, ")
    assert all(line.isprintable() for line in lines)


def test_solve_json_is_one_object_with_the_keys_that_were_promised() -> None:
    result = plait("solve", QUESTION, *GOLD, "--json", "--check")
    (line,) = result.stdout.splitlines()
    data = json.loads(line)
    promised = "answer threads forks total_tokens critical_path_tokens longest_context_tokens wall_s stop"
    assert set(promised.split()) <= set(data)
    assert (data["answer"], data["threads"], data["forks"], data["stop"]) == ("182522", 3, 1, "eos")
    assert (data["total_tokens"], data["critical_path_tokens"], data["right"]) == (249, 120, True)


def test_solve_compare_shows_the_twin_and_the_ratio() -> None:
    lines = plait("solve", QUESTION, *GOLD, "--compare").stdout.splitlines()
    assert lines[-3].startswith("gold-multiverse")
    assert lines[-2].startswith("gold-sequential")
    assert lines[-1].startswith("1.86x fewer token steps than in one line, ")
    data = json.loads(plait("solve", QUESTION, *GOLD, "--compare", "--json").stdout)
    assert data["compare"]["speedup_tokens"] == pytest.approx(223 / 120, abs=1e-3)
    assert data["compare"]["answer"] == "182522"


def test_solve_reads_the_question_from_standard_input() -> None:
    result = plait("solve", "-", *GOLD, input="34 * 27 + 58 * 16\n")
    assert result.exit_code == 0
    assert "answer: 1846" in result.stdout


@pytest.mark.parametrize("question", ["Who wrote Faust?", "What is 3 * 123456789?", "", "What is 4 - 7?"])
def test_an_unknown_question_lists_what_is_known(question: str) -> None:
    result = plait("solve", question, *GOLD)
    assert result.exit_code == 2
    assert not result.stdout
    for family in tasks.FAMILIES.values():
        assert family.about.rpartition(": ")[2] in result.stderr
    assert "--model" in result.stderr


def test_without_an_answer_the_exit_code_says_so() -> None:
    result = plait("solve", QUESTION, *GOLD, "--max-tokens", "10")
    assert result.exit_code == 1
    assert "no answer: the run ended with budget (its share of max_tokens=10 is used up)" in result.stdout
    data = json.loads(plait("solve", QUESTION, *GOLD, "--max-threads", "0", "--json").stdout)
    assert (data["answer"], data["threads"]) == (None, 0)


def test_weights_are_run_by_the_embedded_engine(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = write_random_weights(tmp_path / "m.gguf")
    result = plait("solve", QUESTION, "--model", str(path), "--max-tokens", "40", "--json")
    data = json.loads(result.stdout)
    assert (data["engine"], data["model"].split("@")[0]) == ("llamacpp", "m")
    assert 0 < data["total_tokens"] <= 40
    assert result.exit_code == (0 if data["answer"] is not None else 1)
    refused = plait("solve", QUESTION, "--model", str(path), "--format", "threadweaver")
    assert refused.exit_code == 2
    assert "trained in the multiverse format" in refused.stderr


def test_panes_can_be_asked_for_where_the_output_is_no_terminal() -> None:
    result = plait("solve", QUESTION, *GOLD, "--lanes", "--pace", "real")
    assert result.exit_code == 0
    assert "╭─ 1  6 " in result.stdout
    assert "┕━━" in result.stdout
    assert "shown" not in result.stdout


# plait trace --------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    assert plait("solve", QUESTION, *GOLD, "--trace", str(path)).exit_code == 0
    return path


def test_a_trace_is_shown_as_it_ran(log: Path) -> None:
    result = plait("trace", "show", str(log))
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{QUESTION}\n(gold-multiverse, scripted, multiverse)\n")
    assert "\n  [3 500] 347*500: c7*5=35" in result.stdout
    assert "182522" in result.stdout
    wire = plait("trace", "show", str(log), "--wire").stdout
    assert "0:1 reads 0/0.0:0, 0/0.1:0, 0/0.2:0 by merge" in wire
    assert "given   '<Conclusion>'" in wire
    data = json.loads(plait("trace", "show", str(log), "--json").stdout)
    assert data["complete"]
    assert [thread["label"] for thread in data["tree"]] == ["", "6", "20", "500"]
    assert data["critical_path_tokens"] == 120


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 0.99])
def test_a_trace_that_was_cut_off_is_shown_as_far_as_it_goes(log: Path, share: float) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole[: int(share * len(whole))])
    result = plait("trace", "show", str(log))
    assert result.exit_code == 0
    assert "the log ends before the run does" in result.stdout
    assert not json.loads(plait("trace", "show", str(log), "--json").stdout)["complete"]


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"a": 1}\n')
    for path, says in ((other, "line 1"), (tmp_path / "none", "No such file")):
        result = plait("trace", "show", str(path))
        assert result.exit_code == 1
        assert says in result.stderr


# plait eval ---------------------------------------------------------------------------------------------------------


def test_eval_ends_in_one_object() -> None:
    result = plait("eval", *GOLD, "--family", "long_multiplication,control", "-n", "3", "--compare", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout.splitlines()[-1])
    assert (data["accuracy"], data["twin_accuracy"], data["fork_right"]) == (1.0, 1.0, 1.0)
    assert data["speedup_tokens"] > 1.2
    assert data["speedup_wall"] > 0
    assert set(data["families"]) == {"long_multiplication", "control"}
    assert data["families"]["control"]["all_speedup_tokens"] == 1.0


def test_eval_prints_tables() -> None:
    result = plait("eval", *GOLD, "-n", "2")
    assert result.exit_code == 0
    for family in (*tasks.FAMILIES, "all"):
        assert f"| {family} " in result.stdout
    assert "fork decisions" in result.stdout


def test_eval_compares_with_methods_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    names = "sequential,always-fork,majority@3,pass@3"
    args = ["eval", *GOLD, "--family", "product", "-n", "2", "--against", names, "--out", str(out)]
    text = plait(*args).stdout
    for word in ("against the twin", "| greedy", "| always-fork", "| majority@3", "| pass@3", "adaptive less it"):
        assert word in text
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 5
    out.write_text("".join(lines[:7]))
    again = plait(*args, "--json")
    assert "7 of 10 are there already" in again.stderr
    data = json.loads(again.stdout)
    of = {row["method"]: row for row in data["methods"]}
    assert of["majority@3"]["accuracy"] == of["pass@3"]["accuracy"] == 1.0
    assert of["majority@3"]["total_tokens"] == 3 * of["majority@3"]["critical_path_tokens"]
    assert of["majority@3"]["difference"]["n"] == 2
    assert data["speedup_tokens"] > 1
    assert len(read_records(out)) == 10


def test_eval_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    args = ["eval", *GOLD, "--family", "product", "-n", "4", "--out", str(out), "--json"]
    first = plait(*args)
    whole = out.read_bytes()
    assert len(read_records(out)) == 4
    out.write_bytes(whole[: len(whole) // 2])
    kept = len(read_records(out))
    assert kept in (1, 2)
    second = plait(*args)
    assert f"{kept} of 4 are there already" in second.stderr
    assert json.loads(second.stdout)["accuracy"] == json.loads(first.stdout)["accuracy"] == 1.0
    assert len(read_records(out)) == 4
    assert "4 of 4 are there already" in plait(*args).stderr
    assert len(read_records(out)) == 4


# Lists --------------------------------------------------------------------------------------------------------------


def test_lists_name_everything(tmp_path: Path) -> None:
    assert [row["name"] for row in json.loads(plait("models", "--json").stdout)] == [
        "plait-tiny",
        "plait-tiny-sequential",
    ]
    joins = {row["name"]: row["join"] for row in json.loads(plait("formats", "--json").stdout)}
    assert joins == {
        "sequential": "none",
        "threadweaver": "concat",
        "multiverse": "merge",
        "plait": "concat",
        "npr": "merge",
        "medverse": "concat",
        "parallel_r1": "concat",
        "parathinker": "merge",
        "apr": "message",
        "asyncthink": "message",
    }
    assert [row["name"] for row in json.loads(plait("tasks", "--json").stdout)] == list(tasks.FAMILIES)
    for command in ("models", "formats", "engines", "tasks"):
        assert plait(command).exit_code == 0
    path = write_model(tmp_path / "mine.gguf")
    assert json.loads(plait("models", str(path), "--json").stdout)["format"] == "multiverse"


def test_tasks_show_examples_with_their_gold_traces() -> None:
    text = plait("tasks", "countdown", "--sample", "2").stdout
    assert text.count("Answer: ") == 2
    (row,) = json.loads(plait("tasks", "control", "--sample", "3", "--json").stdout)
    assert len(row["sample"]) == 3
    assert {"question", "answer", "forks"} <= set(row["sample"][0])


# plait train --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "rl"])
def test_training_without_torch_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    for module in ("torch", f"plait.train.{name}"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(plait_train, name, raising=False)
    (tmp_path / "config.toml").touch()
    result = plait("train", name, str(tmp_path / "config.toml"))
    assert result.exit_code == 2
    assert "pip install '.[train]' in a clone" in result.stderr


def test_settings_override_a_config_by_dotted_name() -> None:
    assert overrides(["a.b=1", "c.d=[1, 2]", "e.f=text", "g=true"]) == {
        "a.b": 1,
        "c.d": [1, 2],
        "e.f": "text",
        "g": True,
    }
    with pytest.raises(RequestError, match="NAME=VALUE"):
        overrides(["nothing"])


# How it ends --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_the_trace_and_not_the_answer() -> None:
    result = plait("solve", QUESTION, *GOLD, "--trace", "/dev/full")
    assert result.exit_code == 1
    assert "answer: 182522" in result.stdout
    assert "cannot write /dev/full: No space left on device" in result.stderr


def test_a_trace_that_cannot_be_opened_costs_no_answer_either(tmp_path: Path) -> None:
    result = plait("solve", QUESTION, *GOLD, "--trace", str(tmp_path / "no" / "run.jsonl"))
    assert result.exit_code == 1
    assert "answer: 182522" in result.stdout
    assert "cannot write" in result.stderr


def test_weights_that_are_corrupt_are_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "broken.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    result = plait("solve", QUESTION, "--model", str(path))
    assert result.exit_code == 1
    assert "broken.gguf is corrupt" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_closed_pipe_ends_quietly() -> None:
    # More than the pipe holds, or it could be over before anybody hangs up.
    process = started("tasks", "--sample", "12", pipesize=4096)
    assert process.stdout is not None
    assert process.stdout.readline() == "long_multiplication\n"
    process.stdout.close()
    assert process.wait(50) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_standard_output_is_said() -> None:
    with open("/dev/full", "w") as full:
        src = str(Path(__file__).parent.parent / "src")
        command = [sys.executable, "-m", "plait", "formats"]
        env = {**os.environ, "PYTHONPATH": src}
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env, timeout=50)
    assert result.returncode == 1
    assert result.stderr == "plait: standard output: No space left on device\n"


def test_ctrl_c_leaves_a_trace_that_can_be_read(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    process = started("solve", QUESTION, *GOLD, "--lanes", "--pace", "slow", "--trace", str(log))
    until = time.monotonic() + 40
    while not (log.exists() and log.read_bytes().count(b"\n") > 100) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=50)
    assert process.returncode == 130
    assert err.strip() == "plait: stopped"
    assert read_log(log)


@pytest.mark.parametrize("module", ["plait.cli", "click.core", "plait.errors", "anyio", "plait.tasks.countdown"])
def test_ctrl_c_is_quiet_whichever_module_is_being_imported(module: str) -> None:
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from plait.__main__ import main\n"
        "main()"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    command = [sys.executable, "-c", script, "tasks"]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=50)
    assert (result.returncode, result.stdout, result.stderr.strip()) == (130, "", "plait: stopped")


def test_a_run_that_is_left_says_in_its_log_what_was_cut_off(tmp_path: Path) -> None:
    """As on Ctrl-C: the events between the last that was read and the end are logged too."""
    from plait.commands import solve as module

    log = tmp_path / "run.jsonl"
    seen = 0

    def stop_soon(*args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > 150:
            raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(module.PlainView, "on", stop_soon)
        result = plait("solve", QUESTION, *GOLD, "--trace", str(log))
    assert result.exit_code == 130
    tree = read_tree(log)
    assert tree.stop is None
    assert any(segment.stop is StopReason.CANCELLED for segment in tree.segments.values())
    assert "the run was left before its end" in plait("trace", "show", str(log)).stdout
