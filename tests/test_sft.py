import json
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
pytestmark = pytest.mark.torch

from plait.commands.train import train_rl, train_sft  # noqa: E402
from plait.errors import ModelError, RequestError  # noqa: E402
from plait.tasks.vocabulary import TOKENIZER  # noqa: E402
from plait.train import checkpoint  # noqa: E402
from plait.train.display import Lines  # noqa: E402
from plait.train.model import Decoder  # noqa: E402
from plait.train.optimiser import optimisers  # noqa: E402
from plait.train.sft import SFTConfig, config_from, load_config, to_toml, train  # noqa: E402
from plait.tree import Segment, Tree  # noqa: E402

TINY = {
    "seed": 3,
    "precision": "fp32",
    "compile": False,
    "model": {"width": 32, "layers": 1, "heads": 1, "ff": 32, "max_positions": 64},
    "data": {"format": "multiverse", "mixture": {"copy": 1, "double": 2}, "buckets": [[6, 16], [3, 32]]},
    "schedule": {"steps": 30, "warmup_steps": 3},
    "optimiser": {"lr": 0.02},
    "eval": {"times": 2, "problems": 4},
}


def draw(family: str, rng: random.Random, split: str) -> Tree:
    """A fork into two threads that each repeat a digit, and a merge that repeats both."""
    a, b = rng.randrange(4), rng.randrange(4)
    times = 3 if family == "double" else 1

    def segment(id: str, parent: str | None, forced: tuple[int, ...], sampled: list[int], **more) -> Segment:
        return Segment(
            id=id, parent=parent, forced_ids=forced, sampled_ids=sampled, logprobs=[0.0] * len(sampled), **more
        )

    parts = [
        segment("0:0", None, (20, a, b), [21]),
        segment("0/0.0:0", "0:0", (22,), [a] * times),
        segment("0/0.1:0", "0:0", (23,), [b] * times),
        segment("0:1", "0:0", (24,), [a, b, 25], joins=("0/0.0:0", "0/0.1:0"), join="merge"),
    ]
    return Tree({s.id: s for s in parts})


def run(config: SFTConfig, out: Path, **more):
    lines: list[str] = []
    more.setdefault("source", draw)
    return train(config, out=out, say=lines.append, **more), lines


def weights(path: Path) -> dict[str, "torch.Tensor"]:
    return checkpoint.load(path)["model"]


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "kinds"), [("muon", ["Muon", "AdamW"]), ("adamw", ["AdamW"])])
def test_the_optimisers_share_the_weights_between_them(name: str, kinds: list[str]) -> None:
    config = config_from({**TINY, "optimiser": {"name": name}})
    model = Decoder(config.model)
    built = optimisers(model, config.optimiser)
    assert [type(o).__name__ for o in built] == kinds
    held = [id(p) for o in built for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_an_unknown_optimiser_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="did you mean 'muon'"):
        config_from({**TINY, "optimiser": {"name": "moun"}})


def test_the_loss_falls_and_held_out_traces_become_exact(tmp_path):
    config = config_from({**TINY, "schedule": {"steps": 150}})
    outcome, lines = run(config, tmp_path)
    losses = [r["loss"] for r in records(tmp_path) if "loss" in r]
    assert losses[0] > 3 > 0.5 > losses[-1]
    assert outcome.scores["forced"]["copy"]["exact"] == 1.0
    assert outcome.finished
    assert "finished: 150 steps" in lines[-1]


def test_an_interrupted_run_ends_in_the_same_weights_to_the_bit(tmp_path):
    config = config_from(TINY)
    whole, _ = run(config, tmp_path / "whole")
    for steps in (7, 8, 20):
        part, lines = run(config, tmp_path / "parts", stop_after_steps=steps)
        assert not part.finished
        assert f"stopped at step {steps}" in lines[-1]
    parts, _ = run(config, tmp_path / "parts")
    ours, theirs = weights(whole.checkpoint), weights(parts.checkpoint)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole.progress.tokens == parts.progress.tokens
    steps = [r["step"] for r in records(tmp_path / "parts") if "loss" in r]
    assert steps == list(range(1, 31))


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, capfd):
    drawn = 0

    def impatient(family: str, rng: random.Random, split: str) -> Tree:
        nonlocal drawn
        drawn += 1
        if drawn == 60:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(family, rng, split)

    before = signal.getsignal(signal.SIGINT)
    outcome, _ = run(config_from(TINY), tmp_path, source=impatient)
    assert not outcome.finished
    assert "stopping after this step" in capfd.readouterr().err
    assert 0 < outcome.progress.step < 30
    assert signal.getsignal(signal.SIGINT) is before
    again, lines = run(config_from(TINY), tmp_path)
    assert again.finished
    assert f"on from step {outcome.progress.step}" in lines[0]


def test_steps_after_the_last_checkpoint_are_forgotten_and_done_again(tmp_path):
    run(config_from(TINY), tmp_path, stop_after_steps=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    run(config_from(TINY), tmp_path, stop_after_steps=6)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_true_decoding_is_scored_on_the_exported_file_and_kept_with_it(tmp_path):
    seen: list[tuple[bool, int]] = []

    scores = {"copy": 0.25, "sum": {"n": 8, "accuracy": 0.5, "fork_right": 0.75}}

    def on_eval(path: Path, step: int) -> dict[str, Any]:
        seen.append((path.read_bytes()[:4] == b"GGUF", step))
        return scores

    outcome, lines = run(config_from(TINY), tmp_path, on_eval=on_eval)
    assert seen == [(True, 15), (True, 30)]
    assert outcome.scores["decoded"] == scores
    assert "step 15  held out, solved: copy 0.25  sum 50.0% (fork decisions 75%)" in lines
    from gguf import GGUFReader

    about = json.loads(bytes(GGUFReader(outcome.model).fields["plait.config"].parts[-1]))
    assert about["format"] == "multiverse"
    assert about["join"] == "merge"
    assert about["tokenizer"]["tokens"] == list(TOKENIZER.tokens)
    assert about["scores"]["decoded"] == scores


def test_numbers_go_to_the_dashboards_that_are_asked_for(tmp_path, monkeypatch):
    logged: list[int] = []

    class Dashboard:
        def init(self, **options):
            return self

        def log(self, values, *, step):
            logged.append(step)
            assert values["loss"] > 0

        def finish(self):
            logged.append(-1)

    monkeypatch.setitem(sys.modules, "trackio", Dashboard())
    run(config_from({**TINY, "sinks": ["trackio"], "schedule": {"steps": 3}, "eval": {"times": 0}}), tmp_path)
    assert logged == [1, 2, 3, -1]


def test_weights_are_refused_under_another_format(tmp_path):
    outcome, _ = run(config_from(TINY), tmp_path, stop_after_steps=1)
    with pytest.raises(ModelError, match="trained in the multiverse format"):
        checkpoint.load_model(outcome.checkpoint, format="threadweaver")
    other = config_from({**TINY, "data": {**TINY["data"], "format": "threadweaver"}})
    with pytest.raises(ModelError, match="trained in the multiverse format"):
        run(other, tmp_path)
    assert checkpoint.load_model(outcome.checkpoint, format="multiverse").config.width == 32


def test_a_folder_with_another_run_is_refused(tmp_path):
    run(config_from(TINY), tmp_path, stop_after_steps=1)
    with pytest.raises(ModelError, match=r"seed is 3 there and 4 here"):
        run(config_from({**TINY, "seed": 4}), tmp_path)
    with pytest.raises(RequestError, match="holds a run already"):
        run(config_from(TINY), tmp_path, resume=False)
    shorter, _ = run(config_from({**TINY, "schedule": {"steps": 4}}), tmp_path)
    assert shorter.progress.step == 4


def test_a_corrupt_checkpoint_is_a_model_error(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="not a readable checkpoint") as caught:
        run(config_from(TINY), tmp_path)
    assert "arbitrary code" not in str(caught.value)
    with pytest.raises(ModelError, match=r"there is no checkpoint gone\.pt"):
        run(config_from({**TINY, "init": "gone.pt"}), tmp_path / "other")


def test_a_config_of_the_other_trainer_is_told_which_command_it_is_for():
    configs = Path(__file__).parents[1] / "configs"
    with pytest.raises(RequestError, match=r"\[loss\]: it is for `plait train rl`"):
        train_sft(str(configs / "rl_pgrpo.toml"), dry_run=True)
    with pytest.raises(RequestError, match="it is for `plait train sft`"):
        train_rl(str(configs / "sft_multiverse.toml"), dry_run=True)
    assert train_sft(str(configs / "sft_multiverse.toml"), dry_run=True) == 0
    assert train_rl(str(configs / "rl_pgrpo.toml"), dry_run=True) == 0


def test_a_run_starts_from_given_weights(tmp_path):
    first, _ = run(config_from(TINY), tmp_path / "a")
    started = config_from({**TINY, "init": str(first.checkpoint), "schedule": {"steps": 1}, "optimiser": {"lr": 0.0}})
    second, _ = run(started, tmp_path / "b")
    ours, theirs = weights(first.checkpoint), weights(second.checkpoint)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_with_a_larger_vocabulary_starts_from_what_the_smaller_one_learned(tmp_path):
    first, _ = run(config_from(TINY), tmp_path / "a")
    after = {"init": str(first.checkpoint), "schedule": {"steps": 1}, "optimiser": {"lr": 0.0}}
    larger = {**TINY, **after, "data": {**TINY["data"], "vocabulary": "joins"}}
    second, _ = run(config_from(larger), tmp_path / "b")
    had, have = weights(first.checkpoint)["embed.weight"], weights(second.checkpoint)["embed.weight"]
    assert len(have) > len(had)
    assert torch.equal(have[: len(had)], had)
    other = {**TINY, **after, "data": {**TINY["data"], "vocabulary": "search"}}
    with pytest.raises(ModelError, match="vocabulary 'compact', whose ids mean something else in 'search'"):
        run(config_from(other), tmp_path / "c")


def test_a_config_reads_back_what_was_written(tmp_path):
    budget = {"threads": [0, 4], "tokens": [256]}
    config = config_from({**TINY, "init": 'a "b"', "data": {**TINY["data"], "budget": budget}})
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "c.toml") == config
    longer = load_config(tmp_path / "c.toml", {"schedule.steps": 99, "data.mixture.copy": 7})
    assert longer.schedule.steps == 99
    assert longer.data.mixture == {"copy": 7, "double": 2}
    assert replace(longer, schedule=config.schedule, data=config.data) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schedule.token", 5, "did you mean 'tokens'"),
        ("schedule.tokens", 5, "exactly one of tokens, steps and problems"),
        ("precision", "bf61", "did you mean 'bf16'"),
        ("data.traces", "serail", "did you mean 'serial'"),
        ("data.format", "multivers", "did you mean 'multiverse'"),
        ("data.mixture", {}, "needs a family"),
        ("data.budget", {"thread": [1]}, "did you mean 'threads'"),
        ("data.budget", {}, "needs threads, tokens or both"),
        ("data.budget", {"tokens": [0]}, "tokens 1 or more"),
        ("data.budget", {"threads": [4]}, "no way to write a budget"),
    ],
)
def test_a_wrong_config_says_what_is_allowed(tmp_path, path, value, message):
    (tmp_path / "c.toml").write_text(to_toml(config_from(TINY)))
    with pytest.raises(RequestError, match=message):
        train(load_config(tmp_path / "c.toml", {path: value}), out=tmp_path)


def test_gold_traces_of_the_tasks_train(tmp_path):
    tiny = {**TINY, "eval": {"times": 0}, "schedule": {"steps": 2}}
    data = {"format": "multiverse", "mixture": {"control": 1, "long_multiplication": 1}, "buckets": [[2, 512]]}
    outcome, _ = run(
        config_from({**tiny, "data": data, "model": {**TINY["model"], "max_positions": 512}}), tmp_path, source=None
    )
    assert outcome.progress.step == 2


@pytest.mark.parametrize("name", sorted(p.name for p in (Path(__file__).parents[1] / "configs").glob("sft_*.toml")))
def test_every_config_in_the_repository_is_valid(name):
    config = load_config(Path(__file__).parents[1] / "configs" / name)
    assert max(length for _, length in config.data.buckets) <= config.model.max_positions


def test_no_speed_is_said_before_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of each shape compiles, and counts for none."""
    monkeypatch.setattr(Lines.__init__, "__defaults__", (0.0,))
    _, lines = run(config_from(TINY), tmp_path, stop_after_steps=8)
    said = [line for line in lines if "step" in line and "loss" in line]
    assert len(said) == 8
    assert ("tokens/s" in said[0], "left" in said[0], "nan" in "".join(said)) == (False, False, False)
    assert ("tokens/s" in said[-1], "left" in said[-1], " 0 tokens/s" in "".join(said)) == (True, True, False)


def test_progress_is_a_line_now_and_then():
    lines: list[str] = []
    every = Lines(lines.append, every_s=0)
    every.progress(0.5, lambda: "step 1")
    every.say("done")
    Lines(lines.append, every_s=60).progress(0.5, lambda: "never made")
    assert lines == [" 50.0%  step 1", "done"]
