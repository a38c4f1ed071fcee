import json
import os
import random
import shutil
import signal
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
pytestmark = pytest.mark.torch

import toy_rl  # noqa: E402
from plait.commands.trace import show  # noqa: E402
from plait.commands.view import view  # noqa: E402
from plait.engines.scripted import ScriptedEngine  # noqa: E402
from plait.errors import EngineError, ModelError, RequestError  # noqa: E402
from plait.tasks.vocabulary import TOKENIZER, WIDE  # noqa: E402
from plait.train import checkpoint  # noqa: E402
from plait.train.policy import Judged, experiences  # noqa: E402
from plait.train.rewards import Outcome  # noqa: E402
from plait.train.rl import RLConfig, load_rl_config, rl_config_from, to_toml, train  # noqa: E402
from plait.train.rollouts import Rollout  # noqa: E402
from plait.train.serving import Served  # noqa: E402

CONFIGS = Path(__file__).parents[1] / "configs"


def config(**more: Any) -> RLConfig:
    base: dict[str, Any] = {
        "seed": 1,
        "compile": False,
        "model": toy_rl.MODEL,
        "data": {"format": "multiverse", "mixture": {"toy": 1}},
        "schedule": {"steps": 4, "warmup_steps": 0, "decay": 1.0, "floor": 1.0},
        "rollout": {"prompts": 2, "group_size": 4, "concurrency": 1, "engine": "llamacpp", "max_tokens": 4},
        "optimiser": {"name": "muon", "lr": 0.005},
        "eval": {"times": 0},
        "buckets": [[16, 64]],
        "log": {"samples_every": 0},
    }
    for name, value in more.items():
        both = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        base[name] = {**base[name], **value} if both else value
    return rl_config_from(base)


def run(config: RLConfig, out: Path, **more: Any):
    lines: list[str] = []
    more.setdefault("source", toy_rl.copies)
    return train(config, out=out, say=lines.append, **more), lines


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(out: Path, name: str) -> list[Any]:
    return [record[name] for record in records(out) if name in record]


def weights(path: Path) -> dict[str, "torch.Tensor"]:
    return checkpoint.load(path)["model"]


def same(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_reward_goes_up_on_a_bandit_that_is_to_copy_its_prompt(tmp_path: Path) -> None:
    init = toy_rl.sft(tmp_path / "sft", toy_rl.guess, steps=120, bucket=(6, 16))
    more = config(
        init=str(init), schedule={"steps": 12}, rollout={"prompts": 16, "group_size": 8, "concurrency": 16}, model=None
    )
    run(more, tmp_path / "rl")
    rewards = steps(tmp_path / "rl", "reward")
    assert sum(rewards[:3]) / 3 < 0.7
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    assert max(steps(tmp_path / "rl", "mismatch")) < 1e-3


@pytest.fixture(scope="module")
def either(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_rl.sft(tmp_path_factory.mktemp("sft"), toy_rl.either, steps=150, bucket=(8, 64))


@pytest.mark.parametrize("mode", ["sync", "one_step_off"])
def test_a_policy_stops_forking_where_it_does_not_pay(tmp_path: Path, either: Path, mode: str) -> None:
    more = config(
        init=str(either),
        schedule={"steps": 7},
        rollout={"prompts": 8, "group_size": 8, "concurrency": 16, "max_tokens": 100, "engine": "torch", "mode": mode},
        optimiser={"lr": 0.003},
        eval={"times": 1, "problems": 4},
        model=None,
    )
    outcome, lines = run(more, tmp_path / "rl", source=toy_rl.finishes)
    parallel = steps(tmp_path / "rl", "parallel")
    assert parallel[0] > 0.3
    assert parallel[-1] < parallel[0] - 0.2
    start, end = outcome.scores["start"]["all"], outcome.scores["all"]
    assert end["critical_path_tokens"] <= start["critical_path_tokens"]
    assert end["correct"] >= start["correct"] - 0.25
    assert steps(tmp_path / "rl", "age") == [0.0] + [float(mode == "one_step_off")] * 6
    if mode == "sync":
        assert max(steps(tmp_path / "rl", "mismatch")) < 1e-3
    (said,) = [line for line in lines if line.startswith("step 7  held out, greedy: ")]
    assert f"right {end['correct']:.1%}" in said
    assert lines[0].endswith(f"in {more.data.format} from {more.init}")


@pytest.mark.parametrize("mode", ["sync", "one_step_off"])
def test_an_interrupted_run_ends_in_the_same_weights_to_the_bit(tmp_path: Path, mode: str) -> None:
    own = config(rollout={"mode": mode}, loss={"kl": 0.1, "minibatches": 2})
    whole, _ = run(own, tmp_path / "whole")
    for stop in (1, 3):
        part, lines = run(own, tmp_path / "parts", stop_after_steps=stop)
        assert not part.finished
        assert f"stopped at step {stop}" in lines[-1]
    parts, _ = run(own, tmp_path / "parts")
    assert parts.finished
    assert same(whole.checkpoint, parts.checkpoint)
    assert steps(tmp_path / "parts", "step") == [1, 2, 3, 4]
    for name in ("reward", "loss", "entropy"):
        assert steps(tmp_path / "parts", name) == steps(tmp_path / "whole", name)


def test_a_run_that_was_killed_does_again_what_it_had_not_saved(tmp_path: Path) -> None:
    run(config(), tmp_path / "a", stop_after_steps=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole, _ = run(config(), tmp_path / "a")
    # Killed in step 4: the checkpoint is of step 2, the metrics are ahead of it and cut off.
    ahead = (tmp_path / "a" / "metrics.jsonl").read_text()
    (tmp_path / "b" / "metrics.jsonl").write_text(ahead[:-20])
    again, _ = run(config(), tmp_path / "b")
    assert same(whole.checkpoint, again.checkpoint)
    assert steps(tmp_path / "b", "step") == [1, 2, 3, 4]
    assert steps(tmp_path / "b", "reward") == steps(tmp_path / "a", "reward")


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    drawn = 0

    def impatient(family: str, rng: Any, split: str) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return toy_rl.copies(family, rng, split)

    outcome, _ = run(config(), tmp_path, source=impatient)
    assert not outcome.finished
    assert 0 < outcome.progress.step < 4
    again, lines = run(config(), tmp_path)
    assert again.finished
    assert f"on from step {outcome.progress.step}" in lines[0]


class Scripted:
    """Serves an engine that says the same whatever the weights are."""

    def __init__(self, say: Callable[..., Sequence[int]], fail: Any = None) -> None:
        self.say, self.fail = say, fail

    async def __aenter__(self) -> "Scripted":
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    @asynccontextmanager
    async def at(self, model: Any, version: int) -> AsyncGenerator[Served, None]:
        yield Served(engine=ScriptedEngine(script=self.say, fail=self.fail), version=lambda: version)


def answer(context: Any) -> list[int]:
    return [context[0][1], *TOKENIZER.eos_ids]


def test_rollouts_that_fail_are_left_out_and_training_goes_on(tmp_path: Path) -> None:
    calls = 0

    def fail(context: Any, said: Sequence[int]) -> Exception | None:
        nonlocal calls
        calls += not said
        return RuntimeError("flaky") if not said and calls % 3 == 0 else None

    outcome, _ = run(config(), tmp_path, serving=Scripted(answer, fail))
    assert outcome.finished
    assert 0 < sum(steps(tmp_path, "errors")) < 4
    assert set(steps(tmp_path, "correct")) == {1.0}


def test_an_engine_that_fails_every_rollout_ends_the_run_at_its_checkpoint(tmp_path: Path) -> None:
    run(config(), tmp_path, stop_after_steps=2)
    with pytest.raises(EngineError, match=r"every rollout of step 3 failed.*gone"):
        run(config(), tmp_path, serving=Scripted(answer, lambda context, said: RuntimeError("gone")))
    assert checkpoint.load(tmp_path / "checkpoint.pt")["progress"]["step"] == 2


def judged(id: str, reward: float, tree: Any, error: str = "") -> Judged:
    class Kept(Rollout):
        tree: Any

    rollout = Kept(id=id, prompt=toy_rl.copies("toy", random.Random(0), "train"), events=(), error=error)
    rollout.__dict__["tree"] = tree
    return Judged(rollout=rollout, outcome=Outcome(correct=reward > 0, error=error), parts={"r": reward})


def test_an_advantage_reaches_every_sampled_token_of_its_rollout_and_no_other() -> None:
    forked, serial = toy_rl.written((toy_rl.BLOCK,), 1), toy_rl.written((toy_rl.SERIAL,), 1)
    group = [judged("0/0", 1.1, forked), judged("0/1", 1.0, serial), judged("0/2", 0.0, serial, error="gone")]
    even = [judged("1/0", 1.0, serial), judged("1/1", 1.0, serial)]
    (batch,) = experiences([group, even], config())
    # The group of equals is not computed, but weighs; the failed one does neither.
    assert sorted(e.advantage for e in batch) == pytest.approx([-0.05, 0.05])
    assert {e.weight for e in batch} == {1 / (forked.num_sampled + 3 * serial.num_sampled)}
    assert sorted(int(e.trie.loss_mask.sum()) for e in batch) == sorted([forked.num_sampled, serial.num_sampled])
    (wrong,) = experiences([group], config(rollout={"errors": "wrong"}))
    assert sorted(e.advantage for e in wrong) == pytest.approx([-0.7, 0.3, 0.4])


def test_minibatches_hold_every_rollout_once() -> None:
    serial = toy_rl.written((toy_rl.SERIAL,), 1)
    group = [judged(f"0/{k}", float(k), serial) for k in range(8)]
    parts = experiences([group], config(loss={"minibatches": 3}))
    assert sorted(len(part) for part in parts) == [2, 3, 3]
    assert sorted(e.advantage for part in parts for e in part) == pytest.approx([k - 3.5 for k in range(8)])
    assert parts[0][0].weight == 1 / (len(parts[0]) * serial.num_sampled)


def forking(context: Any) -> list[int]:
    """A fork into two threads, and an answer."""
    last = context[-1]
    if len(context) == 1 and len(last) == 2:
        return TOKENIZER.encode(toy_rl.FORMAT.open_text(toy_rl.BLOCK), special=True)
    said = "7</Conclusion></Parallel><eos>" if last[-1] == TOKENIZER.control_id("<Conclusion>") else " 5</Path>"
    return TOKENIZER.encode(said, special=True)


def test_sample_trees_are_logs_that_trace_show_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config(log={"samples_every": 2}, rollout={"max_tokens": 100}), tmp_path, serving=Scripted(forking))
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"step{s:06d}_{p}_0.jsonl" for s, p in ((0, 0), (0, 1), (2, 4), (2, 5))]
    capsys.readouterr()
    assert show(str(tmp_path / "samples" / names[0])) == 0
    shown = capsys.readouterr().out
    assert "copy " in shown
    assert "at step 0" in shown
    assert "2 threads in 1 fork" in shown
    page = tmp_path / "samples.html"
    assert view([str(tmp_path / "samples" / name) for name in names], html=str(page)) == 0
    assert "at step 2" in page.read_text()


def test_a_collapse_is_warned_of(tmp_path: Path) -> None:
    class Collapsing(Scripted):
        @asynccontextmanager
        async def at(self, model: Any, version: int) -> AsyncGenerator[Served, None]:
            self.say = forking if version < 12 else answer
            async with super().at(model, version) as served:
                yield served

    own = config(schedule={"steps": 30}, rollout={"max_tokens": 100})
    _, lines = run(own, tmp_path, serving=Collapsing(answer))
    warnings = [line for line in lines if "warning" in line]
    assert len(warnings) == 1
    assert "share of rollouts that fork fell from 1.000" in warnings[0]
    assert any("warnings" in record for record in records(tmp_path))


def test_a_folder_with_another_run_and_weights_of_another_format_are_refused(tmp_path: Path) -> None:
    first, _ = run(config(), tmp_path / "a", stop_after_steps=1)
    with pytest.raises(ModelError, match=r"loss.advantage is 'mean' there and 'group_std' here"):
        run(config(loss={"advantage": "group_std"}), tmp_path / "a")
    with pytest.raises(RequestError, match="holds a run already"):
        run(config(), tmp_path / "a", resume=False)
    with pytest.raises(ModelError, match="trained in the multiverse format"):
        run(config(init=str(first.checkpoint), data={"format": "threadweaver"}), tmp_path / "b")


def test_a_config_reads_back_what_was_written(tmp_path: Path) -> None:
    own = config(reward={"correctness": {"wrong": -1}, "acceleration": {"variant": "code"}})
    (tmp_path / "c.toml").write_text(to_toml(own))
    assert load_rl_config(tmp_path / "c.toml") == own
    more = load_rl_config(tmp_path / "c.toml", {"rollout.group_size": 2, "reward.correctness.wrong": 0})
    assert more.rollout.group_size == 2
    assert more.reward["correctness"] == {"wrong": 0}


def test_a_model_that_starts_from_nothing_has_the_vocabulary_of_its_data() -> None:
    sizes = [own.model.vocab_size for own in (config(), config(data={"vocabulary": "wide"})) if own.model is not None]
    assert sizes == [len(TOKENIZER.tokens), len(WIDE.tokens)]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("rollout", {"mode": "asynk"}, "known: one_step_off, sync"),
        ("rollout", {"engine": "lamacpp"}, "did you mean 'llamacpp'"),
        ("rollout", {"group_size": 0}, "at least 1"),
        ("rollout", {"max_tokens": 0}, "at least 1"),
        ("loss", {"advantage": "men"}, "did you mean 'mean'"),
        ("loss", {"clip_low": 1.0}, "clip_low is 1.0"),
        ("loss", {"cap": 0}, "cap=0"),
        ("reward", {"speed": {}}, "unknown reward term"),
        ("schedule", {"tokens": 5, "steps": None}, "set schedule.steps"),
        ("log", {"sinks": ["wandbb"]}, "did you mean 'wandb'"),
        ("data", {"vocabulary": "wid"}, "did you mean 'wide'"),
        ("model", None, "needs `init`"),
    ],
)
def test_a_wrong_config_says_what_is_allowed(section: str, values: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        config(**{section: values})


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("rl_*.toml")))
def test_every_config_in_the_repository_is_valid(name: str) -> None:
    assert load_rl_config(CONFIGS / name).init
