"""Traces and the harness against verifiers' own classes: `pytest -m servers` where verifiers is installed."""

from __future__ import annotations

import asyncio
import json
import random
import tomllib
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("verifiers.v1.trace", reason="needs verifiers")
    from verifiers.v1.clients import EvalClientConfig, ModelContext
    from verifiers.v1.configs.agent import AgentConfig
    from verifiers.v1.configs.cli.eval import EvalConfig
    from verifiers.v1.state import State
    from verifiers.v1.task import TaskData
    from verifiers.v1.trace import AgentInfo, Trace, TraceTask, WireTrace
    from verifiers.v1.utils.loaders import harness_config_type, load_harness, load_taskset

    from plait.train.handoff.verifiers import PlaitHarness, PlaitHarnessConfig, write_trace

from handoff_data import FORMAT, gold_engine, grade, question
from plait.errors import UnsupportedJoin
from plait.tasks.vocabulary import TOKENIZER
from random_trees import random_tree

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("default")]


class Words:
    """The embedded vocabulary with the methods that the harness asks of a tokenizer."""

    eos_ids, bos_ids = TOKENIZER.eos_ids, TOKENIZER.bos_ids
    encode, decode, control_id = TOKENIZER.encode, TOKENIZER.decode, TOKENIZER.control_id

    def prompt_ids(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return (*self.bos_ids, *self.encode("".join(m["content"] for m in messages)))


def empty_trace(text: str = "") -> Trace:
    return Trace[TaskData, State, AgentConfig](
        task=TraceTask(type="Sums", data=TaskData(idx=0, prompt=text)), agent=AgentInfo(config=AgentConfig())
    )


@pytest.mark.parametrize("seed", range(40))
def test_the_branches_of_a_trace_hold_each_sampled_token_once(seed: int) -> None:
    tree = random_tree(seed, joins=("concat", "message"))
    trace = empty_trace()
    write_trace(tree, trace, tokenizer=TOKENIZER)
    trained = Counter[int]()
    logprobs = 0.0
    for branch in trace.branches:
        mask = branch.sampled_mask
        assert len(branch.token_ids) == len(mask) == len(branch.logprobs)
        trained.update(id for id, sampled in zip(branch.token_ids, mask, strict=True) if sampled)
        logprobs += sum(branch.logprobs)
    assert trained == Counter(id for s in tree.segments.values() for id in s.sampled_ids)
    assert logprobs == pytest.approx(-0.5 * tree.num_sampled)
    assert trace.usage is None or trace.usage.completion_tokens == tree.num_sampled


def test_a_trace_survives_its_own_record() -> None:
    tree = random_tree(3, joins=("concat",))
    trace = empty_trace()
    write_trace(tree, trace, tokenizer=TOKENIZER, model="m")
    again = WireTrace.model_validate(trace.to_record(float_decimals=None))
    assert [b.token_ids for b in again.branches] == [b.token_ids for b in trace.branches]
    assert [b.sampled_mask for b in again.branches] == [b.sampled_mask for b in trace.branches]
    assert again.root_reply == trace.root_reply


def harness(**options: Any) -> PlaitHarness:
    class Scripted(PlaitHarness):
        def open_tokenizer(self, model: str) -> Any:
            return Words()

        def open_engine(self, ctx: ModelContext) -> Any:
            return gold_engine()

    return Scripted(PlaitHarnessConfig(format=FORMAT, **options))


def test_a_session_of_the_harness_answers_a_task_with_threads() -> None:
    text, truth = question(1)
    trace = empty_trace(text)

    async def session() -> None:
        context = ModelContext(model="m", client=EvalClientConfig(base_url="http://127.0.0.1:1/v1", api_key_var="NONE"))
        seat = await harness().session(context, trace, None, "", "", {}, trace.task.data)  # pyright: ignore
        await seat.turn()

    asyncio.run(session())
    assert trace.root_reply is not None
    assert grade(trace.root_reply, truth)
    assert trace.num_branches > 2
    noted = trace.info["plait"]
    assert 0 < noted["critical_path_tokens"] < noted["sampled_tokens"]
    assert 0 < noted["token_latency"] < noted["response_tokens"]
    assert all(call.model == "m" and trace.nodes[call.node].sampled for call in trace.calls)


def test_a_budget_ends_a_run_and_the_calls_say_so() -> None:
    text, _ = question(random.Random(1).randrange(100))
    trace = empty_trace(text)

    async def session() -> None:
        context = ModelContext(model="m", client=EvalClientConfig(base_url="http://127.0.0.1:1/v1", api_key_var="NONE"))
        seat = await harness(max_tokens=7).session(context, trace, None, "", "", {}, trace.task.data)  # pyright: ignore
        await seat.turn()

    asyncio.run(session())
    assert trace.num_output_tokens == 7
    assert {call.finish_reason for call in trace.calls} >= {"length"}


def test_merging_formats_are_refused() -> None:
    with pytest.raises(UnsupportedJoin, match="joins by merge"):
        PlaitHarness(PlaitHarnessConfig(format="multiverse"))


def test_the_engine_is_at_the_seats_own_server() -> None:
    context = ModelContext(model="m", client=EvalClientConfig(base_url="http://127.0.0.1:9/v1", api_key_var="NONE"))
    pytest.importorskip("httpx2", reason="needs the http extra")
    engine = PlaitHarness(PlaitHarnessConfig()).open_engine(context)
    assert engine.urls == ("http://127.0.0.1:9",)


def test_verifiers_finds_the_harness_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "configs" / "verifiers"))
    found = load_harness(harness_config_type("plait-harness")(id="plait-harness", format="apr"))
    assert type(found) is PlaitHarness
    assert found.config.format == "apr"


def test_the_recipe_is_a_config_of_verifiers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = Path(__file__).parent.parent / "configs" / "verifiers"
    monkeypatch.syspath_prepend(str(folder))
    (source,) = tomllib.loads((folder / "prime_rl_8gpu.toml").read_text())["orchestrator"]["train"]["source"]
    assert source.pop("name") == "plait"
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps({"prompt": "1+1?", "answer": "2"}) + "\n")
    source["env"]["taskset"]["path"] = str(data)
    config = EvalConfig.model_validate({**source, "model": "m"})
    assert config.env.agent.harness == PlaitHarnessConfig(
        id="plait-harness", format="threadweaver", max_tokens=16384, max_threads=32
    )
    assert type(load_harness(config.env.agent.harness)) is PlaitHarness
    (task,) = load_taskset(config.env.taskset)
    assert (task.data.prompt, task.data.answer) == ("1+1?", "2")
    # Half of the tokens beside others: the paper's acceleration pays 0.5 * rho, up to its bound.
    trace = empty_trace("1+1?")
    trace.root_reply, trace.info["plait"] = "It is \\boxed{2}", {"response_tokens": 100, "token_latency": 50}
    asyncio.run(task.score(trace, None))  # pyright: ignore
    assert {name: r.value for name, r in trace.rewards.items() if r} == {"right": 1.0, "fast": pytest.approx(0.2)}
