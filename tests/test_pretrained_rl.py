"""Reinforcement learning of models of transformers: the same trainer over another learner."""

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft", reason="needs the hf extra")
    pytest.importorskip("safetensors")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

import tiny_pretrained  # noqa: E402
from plait.commands.trace import show  # noqa: E402
from plait.commands.train import train_rl  # noqa: E402
from plait.errors import ModelError, RequestError  # noqa: E402
from plait.train import rl, sft  # noqa: E402
from plait.train.config import to_toml  # noqa: E402
from plait.train.learners.pretrained import PretrainedLearner  # noqa: E402
from plait.train.packing import Bucket, PackedBatch, Packer  # noqa: E402
from plait.train.pretrained.config import BaseConfig  # noqa: E402
from plait.train.pretrained.model import load  # noqa: E402
from plait.train.ranks import Ranks  # noqa: E402
from plait.train.rl import rl_config_from, train  # noqa: E402
from plait.train.trie import flatten  # noqa: E402
from random_trees import random_tree  # noqa: E402

FORMAT = "multiverse"


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pretrained.write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pretrained.write(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=False)


def questions(path: Path) -> Path:
    """Prompts whose answer is the letter a, as plain text."""
    lines = [json.dumps({"prompt": f"say {c}", "answer": "a", "baseline_tokens": 3}) for c in "abcdefgh"]
    path.write_text("\n".join(lines) + "\n")
    return path


def starts_with_a(response: str, answer: str) -> bool:
    """A grader by name: rewards what a random model sometimes says."""
    return response.startswith(answer)


def config(folder: Path, tmp_path: Path, **more: Any) -> rl.RLConfig:
    values: dict[str, Any] = {
        "seed": 1,
        "base": {"path": str(folder), "device": "cpu"},
        "data": {
            "format": FORMAT,
            "path": str(questions(tmp_path / "questions.jsonl")),
            "grader": "test_pretrained_rl:starts_with_a",
        },
        "rollout": {"prompts": 2, "group_size": 4, "concurrency": 4, "max_tokens": 8, "cells": 2048},
        "reward": {"correctness": {}},
        "schedule": {"steps": 4, "warmup_steps": 0},
        "optimiser": {"lr": 0.003},
        "buckets": [[8, 64]],
        "threads": 1,
        "log": {"samples_every": 0},
    }
    for name, value in more.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return rl_config_from(values)


def run(own: rl.RLConfig, out: Path, **more: Any) -> Any:
    return train(own, out=out, say=lambda line: None, **more)


def column(out: Path, name: str) -> list[Any]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in records if name in record]


def talkative(folder: Path, out: Path) -> Path:
    """A model that says a, b, c or d, and ends there."""
    data = out.parent / f"{out.name}.jsonl"
    lines = [json.dumps({"prompt": f"say {c}", "response": a}) for c in "abcdefgh" for a in "abcd"]
    data.write_text("\n".join(lines) + "\n")
    values = {
        "seed": 1,
        "precision": "fp32",
        "base": {"path": str(folder), "device": "cpu"},
        "data": {"format": FORMAT, "path": str(data), "buckets": [[16, 32]]},
        "schedule": {"steps": 30, "warmup_steps": 2},
        "optimiser": {"lr": 0.01},
        "threads": 1,
    }
    return sft.train(sft.config_from(values), out=out, say=lambda line: None).model


@pytest.fixture(scope="module")
def talker(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkative(folder, tmp_path_factory.mktemp("sft") / "run")


@pytest.mark.parametrize("lora", [0, 8])
def test_reward_goes_up_and_the_engine_has_the_live_weights(talker: Path, tmp_path: Path, lora: int) -> None:
    own = config(
        talker,
        tmp_path,
        base={"lora_rank": lora, "gradient_checkpointing": True},
        rollout={"prompts": 4, "group_size": 8, "concurrency": 32, "cells": 4096},
        schedule={"steps": 8},
        optimiser={"lr": 0.03 if lora else 0.003},
        data={"held_out": 0.2},
        eval={"times": 1, "problems": 2},
    )
    result = run(own, tmp_path / "out")
    rewards = column(tmp_path / "out", "reward")
    assert sum(rewards[:2]) / 2 < 0.6
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + (0.05 if lora else 0.2)
    # The engine samples from what is trained: float32 on both sides differ by rounding, adapters or none.
    assert max(column(tmp_path / "out", "mismatch")) < 1e-4
    assert set(column(tmp_path / "out", "age")) == {0.0}
    assert result.scores["all"]["n"] > 0
    assert (result.model / "config.json").exists()


@pytest.mark.parametrize(("lora", "mode"), [(0, "sync"), (4, "sync"), (0, "one_step_off")])
def test_an_interrupted_run_ends_in_the_same_weights_to_the_bit(
    qwen3: Path, tmp_path: Path, lora: int, mode: str
) -> None:
    rollout = {"mode": mode, "concurrency": 1}
    own = config(qwen3, tmp_path, base={"lora_rank": lora}, rollout=rollout, loss={"kl": 0.1, "minibatches": 2})
    whole = run(own, tmp_path / "whole")
    assert not run(own, tmp_path / "parts", stop_after_steps=2).finished
    parts = run(own, tmp_path / "parts")
    assert parts.finished
    ours, theirs = (torch.load(r.checkpoint, weights_only=True)["model"] for r in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("step", "reward", "loss", "entropy"):
        assert column(tmp_path / "whole", name) == column(tmp_path / "parts", name)
    with pytest.raises(ModelError, match=r"another run: loss\.kl"):
        run(
            config(qwen3, tmp_path, base={"lora_rank": lora}, rollout=rollout, loss={"minibatches": 2}),
            tmp_path / "parts",
        )


def batch(seed: int = 11) -> PackedBatch:
    tree = flatten(random_tree(seed, joins=("concat",)))
    packer = Packer([Bucket(rows=1, length=len(tree))], num_spans=tree.hide_lo.shape[1])
    packer.add(tree)
    return packer.flush()[0]


@pytest.mark.parametrize("lora", [0, 4])
def test_the_start_is_remembered_whatever_is_learned(qwen3: Path, lora: int) -> None:
    base = BaseConfig(path=str(qwen3), device="cpu", lora_rank=lora)
    learner = PretrainedLearner(
        base,
        rl.RLConfig.__dataclass_fields__["optimiser"].default,
        format=FORMAT,
        bf16=False,
        ranks=Ranks(),
        saved=None,
        start=True,
    )
    before = learner.losses(batch()).detach()
    trained = set(learner.pretrained.trained_state())
    assert torch.allclose(learner.start_losses(batch()), before, atol=1e-6)
    assert set(learner.pretrained.trained_state()) == trained
    learner.losses(batch()).sum().backward()
    learner.update(100.0)
    assert not torch.allclose(learner.losses(batch()), before, atol=1e-3)
    assert torch.allclose(learner.start_losses(batch()), before, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_served_weights_are_those_of_the_merged_model(tmp_path: Path, tied: bool) -> None:
    path = tiny_pretrained.write(tmp_path, "llama", tied=tied)
    model = load(BaseConfig(path=str(path), device="cpu", lora_rank=4), tags=["<Goal>", "</Goal>"])
    trained = model.trained_state()
    assert any("lm_head" in name for name in trained) is not tied, "a head of its own learns the tags"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    ours, about = model.exported()
    theirs = model.merged().state_dict()
    if tied:
        theirs.pop("lm_head.weight")
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-6) for name in ours)
    assert about["vocab_size"] == ours["model.embed_tokens.weight"].shape[0]


def test_sample_trees_are_readable_without_the_model(
    qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(qwen3, tmp_path, log={"samples_every": 1}, schedule={"steps": 1}), tmp_path / "out")
    sample = min((tmp_path / "out" / "samples").iterdir())
    assert show(str(sample)) == 0
    shown = capsys.readouterr().out
    assert "say " in shown
    assert "at step 0" in shown


def test_the_tasks_are_learned_by_reward_too(qwen3: Path, tmp_path: Path) -> None:
    data = {"path": "", "grader": "", "mixture": {"control": 1.0}}
    result = run(config(qwen3, tmp_path, data=data, schedule={"steps": 1}, buckets=[[8, 128]]), tmp_path / "out")
    assert json.loads((result.model / "config.json").read_text())["plait"]["format"] == FORMAT


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rollout": {"engine": "llamacpp"}}, "is sampled by 'torch'"),
        ({"init": "x.pt"}, "leave out"),
        ({"data": {"mixture": {"control": 1}}}, "either a path"),
        ({"data": {"held_out": 1.0}}, "held_out is 1.0"),
        ({"eval": {"times": 2}}, "no line is kept"),
        ({"base": {"lora_rnk": 3}}, "did you mean 'lora_rank'"),
    ],
)
def test_a_wrong_config_says_what_is_allowed(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        config(tmp_path, tmp_path, **more)


def test_a_grader_that_is_not_there_is_named(qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no function 'nowhere:at_all'"):
        run(config(qwen3, tmp_path, data={"grader": "nowhere:at_all"}), tmp_path / "out")


def test_the_command_trains_a_config_that_has_a_base(qwen3: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config(qwen3, tmp_path)))
    assert train_rl(str(path), out=str(tmp_path / "out"), settings=["schedule.steps=1"]) == 0
    assert column(tmp_path / "out", "step") == [1]


def test_the_config_that_ships_is_one() -> None:
    own = rl.load_rl_config(Path(__file__).parent.parent / "configs" / "hf_rl.toml")
    assert own.base is not None
    assert own.rollout.engine == "torch"


def start(kind: str, path: Path, out: Path, *, processes: int) -> None:
    """The command in processes of its own, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-m", "plait.cli", "train", kind, str(path), "--out", str(out)]
    started = [
        subprocess.Popen(
            command, env={**os.environ, **more, "RANK": str(n), "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
        )
        for n in range(processes)
    ]
    ends = [(process.communicate(timeout=200)[1], process.returncode) for process in started]
    assert all(code == 0 for _, code in ends), "\n".join(said[-2000:] for said, _ in ends)


@pytest.mark.parametrize("lora", [0, 4])
def test_two_processes_learn_what_one_learns(qwen3: Path, tmp_path: Path, lora: int) -> None:
    own = config(
        qwen3, tmp_path, base={"lora_rank": lora}, rollout={"concurrency": 1}, loss={"kl": 0.1}, schedule={"steps": 2},
        buckets=[[2, 64]],
    )  # fmt: skip
    path = tmp_path / "run.toml"
    path.write_text(to_toml(own))
    start("rl", path, tmp_path / "two", processes=2)
    one = run(own, tmp_path / "one")
    for name in ("reward", "trained_tokens", "loss", "norm"):
        assert column(tmp_path / "two", name) == pytest.approx(column(tmp_path / "one", name), abs=1e-4)
    ours, theirs = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in ("one", "two"))
    # Adam divides by the gradient's size, so where that is nothing but rounding two steps of 0.003 may differ.
    apart = [(ours[name] - theirs[name]).abs().mean().item() for name in ours]
    assert max(apart) < 3e-4
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model").config.vocab_size
    assert one.finished
