"""The rollout worker against TRL's own classes: `pytest -m servers` where TRL is installed."""

from __future__ import annotations

import importlib.util
import inspect
import time
import warnings
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl.experimental.async_grpo.async_rollout_worker", reason="needs trl")
    from trl.experimental.async_grpo import async_grpo_trainer
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    from plait.train.handoff.trl import PlaitRolloutWorker

from handoff_data import FORMAT, gold_engine, grade, pretrained_tokenizer, question
from plait.engines.scripted import ScriptedEngine
from plait.errors import EngineError, RequestError, UnsupportedJoin
from plait.tokenizer.fast import FastTokenizer
from plait.train.prompts import Prompt

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("default")]
TOKENIZER = FastTokenizer.of_fast(pretrained_tokenizer())


def prompt(number: int) -> Prompt:
    text, truth = question(number)
    return Prompt(
        family="long_multiplication",
        question=text,
        prompt_ids=TOKENIZER.prompt_ids(text),
        # Every fourth is never right, so that a group differs.
        grade=lambda response: grade(response, truth) and number % 4 != 3,
        baseline_tokens=400.0,
    )


def worker(**options: Any) -> PlaitRolloutWorker:
    settings = {"engine": gold_engine, "format": FORMAT, "tokenizer": TOKENIZER, "group_size": 2, "groups": 2}
    return PlaitRolloutWorker(prompt, **settings | options)


def test_it_has_what_the_protocol_asks_for() -> None:
    protocol = async_grpo_trainer.RolloutWorkerProtocol
    for name, method in inspect.getmembers(protocol, inspect.isfunction):
        if name.startswith("_"):
            continue
        ours = inspect.signature(getattr(PlaitRolloutWorker, name))
        assert list(ours.parameters) == list(inspect.signature(method).parameters), name
    made = worker()
    assert all(hasattr(made, name) for name in protocol.__annotations__)


def test_trls_own_dataset_drains_rows_that_train_each_sampled_token_once() -> None:
    made = worker(waiting=64)
    made.update_model_version(2)
    made.start()
    try:
        metrics: dict[str, list[float]] = defaultdict(list)
        dataset = async_grpo_trainer.RolloutQueueDataset(
            made.rollout_buffer, lambda: 2, made.check_health, 30.0, metrics, poll_interval_s=0.5
        )
        rows = list(islice(dataset, 24))
    finally:
        made.stop()
    assert metrics["sample/staleness_max"] == [0.0] * 24
    groups: dict[int, list[Any]] = defaultdict(list)
    for row in rows:
        assert row["input_ids"].dtype == np.int64
        assert row["input_ids"].shape == row["completion_mask"].shape == row["old_log_probs"].shape
        assert not row["old_log_probs"][row["completion_mask"] == 0].any()
        assert not row["completion_mask"][: len(prompt(row["group_id"]).prompt_ids)].any()
        groups[row["group_id"]].append(row)
    whole = [g for g in groups.values() if len({r["metrics"]["reward"] for r in g}) == 1]
    assert whole
    for group in whole:
        assert {row["advantage"] for row in group} == {0.0}, "the gold trace is as good as itself"


def test_a_rows_advantage_is_its_rollouts_against_its_group() -> None:
    verdicts = iter((True, False))
    text, _ = question(0)
    asked = Prompt(
        family="f", question=text, prompt_ids=TOKENIZER.prompt_ids(text), grade=lambda response: next(verdicts)
    )
    settings = {"engine": gold_engine, "format": FORMAT, "tokenizer": TOKENIZER, "group_size": 2, "groups": 1}
    made = PlaitRolloutWorker(lambda number: asked, reward={"correctness": {}}, **settings)
    made.start()
    try:
        rows: list[RolloutSample] = [made.rollout_buffer.get(timeout=20)]
        while made._failure is None and made._thread is not None and made._thread.is_alive():
            time.sleep(0.01)
        while not made.rollout_buffer.empty():
            rows.append(made.rollout_buffer.get())
    finally:
        made.stop()
    assert {(row.metrics["reward"], row.advantage) for row in rows} == {(1.0, 0.5), (0.0, -0.5)}
    assert {row.group_id for row in rows} == {0}
    # The third grading had no verdict: what the worker died of is what the trainer is told.
    with pytest.raises(EngineError, match="the rollout worker failed"):
        made.check_health(1000.0)


def test_a_full_buffer_pauses_the_sampling_and_a_stop_ends_it() -> None:
    made = worker(waiting=3)
    made.start()
    while not made.rollout_buffer.full():
        time.sleep(0.01)
    time.sleep(0.2)
    made.check_health(5.0)
    made.stop()
    assert made.rollout_buffer.qsize() == 3
    assert made._next <= 4
    with pytest.raises(RequestError, match="started once"):
        made.start()


def test_a_failing_engine_reaches_the_trainer() -> None:
    def broken(context: Any) -> list[int]:
        raise ValueError("no such prompt")

    made = worker(engine=lambda: ScriptedEngine(script=broken))
    made.start()
    assert made._thread is not None
    made._thread.join(20)
    with pytest.raises(EngineError, match=r"rollout worker failed.*every rollout of prompt"):
        made.check_health(1000.0)
    made.stop()


def test_silence_is_reported() -> None:
    made = worker()
    time.sleep(0.02)
    with pytest.raises(EngineError, match="finished no group"):
        made.check_health(0.01)


def test_merging_formats_are_refused() -> None:
    with pytest.raises(UnsupportedJoin, match="joins by merge"):
        worker(format="multiverse")


def test_the_recipe_is_a_config_of_trls_trainer(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "configs" / "trl" / "pgrpo_8gpu.py"
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    # TRL asks for the GPU that the recipe is for, unless it is told that there is none.
    config = recipe.config(str(tmp_path), use_cpu=True)
    assert (config.num_generations, config.epsilon_high) == (8, 0.28)
