import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from plait.errors import RequestError
from plait.train.metrics import MetricsFile, open_sinks
from plait.train.watch import Watch


def test_a_metrics_file_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, size=0)
    sizes = [file.size]
    for step in range(1, 5):
        file.write({"step": step, "loss": 1 / step})
        sizes.append(file.size)
    path.write_text(path.read_text() + '{"step": 5, "lo')
    MetricsFile(path, size=sizes[2]).write({"step": 3, "loss": 0.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert MetricsFile(path, size=0).size == 0, "a run that begins has no past"


class FakeDashboard(ModuleType):
    """A module with the `init`, `log` and `finish` that wandb and trackio share."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.opened: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def init(self, **options: Any) -> "FakeDashboard":
        self.opened = options
        return self

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self.logged.append((step, dict(values)))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_reach_a_dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake = FakeDashboard(name)
    monkeypatch.setitem(sys.modules, name, fake)
    (sink,) = open_sinks([name], out=tmp_path / "mine", config={"seed": 3})
    sink.write(7, {"reward": 0.5})
    sink.close()
    assert fake.opened == {"project": "plait", "name": "mine", "config": {"seed": 3}}
    assert fake.logged == [(7, {"reward": 0.5})]
    assert fake.finished


@pytest.mark.torch
def test_numbers_reach_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tensorboard")
    (sink,) = open_sinks(["tensorboard"], out=tmp_path, config={})
    sink.write(7, {"reward": 0.5})
    sink.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("reward")
    assert (event.step, event.value) == (7, 0.5)


def test_a_dashboard_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="did you mean 'trackio'"):
        open_sinks(["trakio"], out=tmp_path, config={})
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(RequestError, match="pip install trackio"):
        open_sinks(["trackio"], out=tmp_path, config={})


def test_a_watch_warns_once_when_a_number_has_halved_and_again_after_it_recovered() -> None:
    watch = Watch(steps=4)
    said = [watch.add({"parallel": p, "valid": 1.0}) for p in [0.8] * 4 + [0.0] * 6 + [1.0] * 12 + [0.0] * 6]
    assert [at for at, warnings in enumerate(said) if warnings] == [6, 25]
    assert said[6] == ["share of rollouts that fork fell from 0.800 to 0.338"]


def test_a_watch_goes_on_from_its_state_and_ignores_what_is_no_number() -> None:
    whole = Watch(steps=3)
    values = [{"entropy": e} for e in (1.0, 0.8, float("nan"), 0.9, 0.1, 0.1, 0.1)]
    said = [whole.add(v) for v in values]
    part = Watch(steps=3)
    for v in values[:4]:
        part.add(v)
    again = Watch(**json.loads(json.dumps(part.state())))
    assert [again.add(v) for v in values[4:]] == said[4:]
    assert again.state() == whole.state()
