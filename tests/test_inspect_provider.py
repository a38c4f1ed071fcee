"""Plait's models in inspect-ai's own evaluations: `pytest -m servers`. Skipped where inspect-ai is not installed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    # What inspect-ai's own dependencies complain of.
    warnings.simplefilter("ignore")
    pytest.importorskip("inspect_ai", reason="needs `pip install inspect-ai`")
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.log import EvalLog, read_eval_log
    from inspect_ai.model import ContentReasoning, GenerateConfig, Model, get_model
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

from plait.errors import RequestError
from plait.inspect_provider import PlaitAPI

pytestmark = [
    pytest.mark.servers,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def what_inspect_leaves_open() -> Iterator[None]:
    """Is found here, where its warnings are ignored, and not by the tests of another file."""
    yield
    gc.collect()


QUESTIONS = {"What is 347 * 526?": "182522", "What is 12 * 34?": "408"}


def evaluate(folder: Path, model: Model, **options: Any) -> EvalLog:
    task = Task(
        dataset=[Sample(input=question, target=answer) for question, answer in QUESTIONS.items()],
        solver=generate(),
        scorer=match(location="exact"),
    )
    (log,) = eval(task, model=model, log_dir=str(folder), display="none", **options)
    assert log.status == "success", log.error
    # As it lies on disk.
    return read_eval_log(log.location)


def check(log: EvalLog) -> None:
    assert log.results is not None
    assert log.results.scores[0].metrics["accuracy"].value == 1.0
    assert log.samples is not None
    for sample in log.samples:
        assert isinstance(sample.input, str)
        output = sample.output
        assert output.completion == QUESTIONS[sample.input]
        assert output.stop_reason == "stop"
        about = (output.metadata or {})["plait"]
        assert 0 < about["critical_path_tokens"] <= output.usage.output_tokens  # type: ignore[union-attr]
        parts = [part for part in output.message.content if isinstance(part, ContentReasoning)]
        named = [part.internal["thread"] for part in parts]  # type: ignore[index]
        assert named[0] == "0"
        assert len(named) == 1 + about["threads"]
        assert all(part.reasoning for part in parts)
    widest = max(log.samples, key=lambda sample: (sample.output.metadata or {})["plait"]["threads"])
    about = (widest.output.metadata or {})["plait"]
    assert about["threads"] > 1
    assert about["acceleration"] > 0
    assert about["critical_path_tokens"] < widest.output.usage.output_tokens  # type: ignore[union-attr]


TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate

@task
def arithmetic():
    samples = [Sample(input=question, target=answer) for question, answer in QUESTIONS.items()]
    return Task(dataset=samples, solver=generate(), scorer=match(location="exact"))
"""


def test_the_command_line_finds_the_provider_by_its_entry_point(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    # What installing a wheel leaves in site-packages, beside the package itself.
    installed = tmp_path / "site" / "plait-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: plait\nVersion: 0\n")
    points = [f"{name} = {value}" for name, value in project["entry-points"]["inspect_ai"].items()]
    (installed / "entry_points.txt").write_text("\n".join(["[inspect_ai]", *points, ""]))
    (tmp_path / "task.py").write_text(f"QUESTIONS = {QUESTIONS!r}\n{TASK}")
    options = ["--display", "none", "--log-dir", "logs", "-M", "max_threads=16"]
    code = "import sys; sys.argv[0] = 'inspect'; from inspect_ai._cli.main import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "eval", "task.py", "--model", "plait/plait-tiny", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed.parent), str(root / "src")])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    (location,) = (tmp_path / "logs").iterdir()
    log = read_eval_log(str(location))
    assert log.eval.model == "plait/plait-tiny"
    check(log)


def test_an_evaluation_runs_in_this_process(tmp_path: Path) -> None:
    model = get_model("plait/plait-tiny", max_threads=16)
    assert isinstance(model.api, PlaitAPI)
    check(evaluate(tmp_path, model))
    assert model.api._engine is None, "no engine stays open"
    # In another event loop, with the same model.
    check(evaluate(tmp_path, model, max_connections=1))


def test_an_evaluation_runs_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server_tests = pytest.importorskip("test_server", reason="needs the serve extra")
    import plait

    served = server_tests.Served(model=plait.load_model(), engine_name="llamacpp")
    key, entry = server_tests.new_key("alice")
    with server_tests.serving(served, api_keys=(entry,)) as server:
        model = get_model("plait/plait-tiny", base_url=f"{server.url}/v1", api_key=key, memoize=False)
        check(evaluate(tmp_path, model))
        monkeypatch.setenv("PLAIT_API_KEY", key)
        monkeypatch.setenv("PLAIT_BASE_URL", f"{server.url}/v1")
        line = get_model("plait/plait-tiny", max_threads=0, memoize=False)
        log = evaluate(tmp_path, line)
        assert log.samples is not None
        assert all((s.output.metadata or {})["plait"]["threads"] == 0 for s in log.samples)
        assert server.idle()


def test_limits_and_sampling_reach_the_run(tmp_path: Path) -> None:
    model = get_model("plait/plait-tiny", config=GenerateConfig(max_tokens=20), memoize=False)
    log = evaluate(tmp_path, model)
    assert log.samples is not None
    for sample in log.samples:
        assert sample.output.stop_reason == "max_tokens"
        assert sample.output.usage is not None
        assert sample.output.usage.output_tokens <= 20


def test_an_unknown_model_argument_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'max_threads'"):
        PlaitAPI("plait-tiny", max_thread=3)
    with pytest.raises(RequestError, match="unknown model 'plait-tony'"):
        PlaitAPI("plait-tony")
    with pytest.raises(RequestError, match="unknown model argument 'engine'"):
        PlaitAPI("plait-tiny", base_url="http://localhost:1/v1", engine="torch")
