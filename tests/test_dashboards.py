"""The dashboards that numbers may go to, for real: `pytest -m servers` where trackio and wandb are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plait.train.metrics import open_sinks

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("default"), pytest.mark.timeout(180)]
BLOCK = 1 << 15
CONFIG = {"seed": 3, "optimiser": {"lr": 0.1}}


def write(name: str, out: Path) -> None:
    (sink,) = open_sinks([name], out=out, config=CONFIG)
    for step in range(1, 6):
        sink.write(step, {"loss": 1 / step, "reward/correctness": step / 5})
    sink.close()


def stored(file: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log, after a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(file):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", file, at)
        if not kind:
            return
        whole += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def test_wandb_offline_keeps_every_step_and_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("wandb", reason="needs wandb")
        from wandb.proto import wandb_internal_pb2
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    write("wandb", tmp_path / "pgrpo")
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows: list[dict[str, Any]] = []
    names: set[str] = set()
    for data in stored(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        if record.WhichOneof("record_type") == "run":
            names.add(record.run.display_name)
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows] == [1 / step for step in range(1, 6)]
    assert rows[-1]["reward/correctness"] == 1.0
    assert names == {"pgrpo"}


TRACKIO = """
import json, sys
from pathlib import Path
from test_dashboards import write
from trackio.sqlite_storage import SQLiteStorage
write("trackio", Path(sys.argv[1]))
print("ROWS", json.dumps(SQLiteStorage.get_logs("plait", "pgrpo"), default=str))
"""


def test_trackio_keeps_every_step(tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("needs trackio")
    # It reads where its files lie when it is imported, so in a process of its own.
    path = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRACKIO, str(tmp_path / "pgrpo")],
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "db"), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.rpartition("ROWS ")[2].splitlines()[0])
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows] == [1 / step for step in range(1, 6)]
    assert rows[-1]["reward/correctness"] == 1.0
