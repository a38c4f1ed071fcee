"""A training that is killed without warning goes on as if nothing had happened."""

import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytestmark = [pytest.mark.torch, pytest.mark.timeout(900)]

import test_sft  # noqa: E402
import toy_rl  # noqa: E402
from plait.train import rl  # noqa: E402

# Every run is a process of its own, forked from one that has imported all this and done nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_killed_runs"])
TIMES = {"seconds", "step_s", "data_s", "rollout_s", "eval_s"}
"""What a clock says, and no two runs share."""


def sft(out: str) -> None:
    config = test_sft.config_from(test_sft.TINY | {"checkpoint_every_s": 0.0, "schedule": {"steps": 40}})
    test_sft.train(config, out=out, source=test_sft.draw, say=lambda line: None)


def sync(out: str, mode: str = "sync") -> None:
    config = rl.rl_config_from(
        {
            "seed": 5,
            "compile": False,
            "model": toy_rl.MODEL,
            "checkpoint_every_s": 0.0,
            "data": {"format": "multiverse", "mixture": {"copy": 1}},
            "buckets": [[16, 32]],
            # One call at a time: batches of other sizes round otherwise.
            "rollout": {"prompts": 4, "group_size": 4, "concurrency": 1, "max_tokens": 12, "mode": mode},
            "schedule": {"steps": 24},
            "eval": {"times": 2, "problems": 2},
            "log": {"samples_every": 0},
        }
    )
    rl.train(config, out=out, source=toy_rl.copies, say=lambda line: None)


def one_step_off(out: str) -> None:
    sync(out, "one_step_off")


def curve(out: Path) -> list[dict]:
    """The numbers of a run, without what clocks said."""

    def bare(record: dict) -> dict:
        return {k: bare(v) if isinstance(v, dict) else v for k, v in record.items() if k not in TIMES}

    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [bare(json.loads(line)) for line in lines if line.endswith("\n")]


@pytest.mark.parametrize("train", [sft, sync, one_step_off])
def test_a_run_that_is_killed_at_any_moment_has_the_curve_of_one_that_is_not(
    tmp_path: Path, train: Callable[[str], None]
) -> None:
    def start(out: Path) -> "multiprocessing.process.BaseProcess":
        process = PROCESSES.Process(target=train, args=(str(out),))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    rng, kills, out = random.Random(2), 0, tmp_path / "killed"
    while True:
        lines = len(curve(out)) + rng.randrange(2, 9)
        process = start(out)
        # At any moment after some lines: in a step, in a write, in a checkpoint.
        while process.is_alive() and len(curve(out)) < lines:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        if kills < 5:
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        kills += 1
    assert kills > 1, "the run was too short to be killed"
    assert curve(out) == curve(tmp_path / "whole")
    assert (out / "model.gguf").read_bytes()[:4] == b"GGUF"
