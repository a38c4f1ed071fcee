import random
from collections.abc import Sequence
from dataclasses import replace

import anyio
import pytest

from plait.engines.scripted import ScriptedEngine
from plait.events import decode
from plait.formats import FORMATS, CharTokenizer, format_class, open_format, text_format
from plait.models import gold_model
from plait.tasks.vocabulary import TOKENIZER
from plait.testing.trajectories import Trajectories
from plait.tokenizer import FixedTokenizer
from plait.train.handoff.scoring import exact
from plait.train.prompts import Prompt, Prompts, task_source
from plait.train.rewards import Group, Reward
from plait.train.rollouts import Rollout, collect, faults, outcome_of
from plait.types import Budget, Context

pytestmark = pytest.mark.anyio
FORMAT = open_format("multiverse", TOKENIZER)
SOURCE = task_source("multiverse", tokenizer=TOKENIZER)
PROMPTS = Prompts(SOURCE, weights={"long_multiplication": 1.0, "control": 1.0}, seed=4)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, special=True)


def says(*texts: str) -> ScriptedEngine:
    """An engine whose call says the first text whose beginning the context ends in, `END=>TEXT`."""
    lines = [(ids(end), ids(text)) for end, _, text in (t.partition("=>") for t in texts)]

    def script(context: Context) -> Sequence[int]:
        last = context[-1]
        assert isinstance(last, tuple)
        return next(text for end, text in lines if list(last[len(last) - len(end) :]) == end)

    return ScriptedEngine(script=script)


def prompt(text: str = "1+1?", answer: str = "2") -> Prompt:
    from plait import tasks

    return Prompt(
        family="toy",
        question=text,
        prompt_ids=(*TOKENIZER.bos_ids, *ids(text)),
        grade=lambda response: tasks.answer_of(response) == answer,
        baseline_tokens=10.0,
    )


async def sampled(engine: ScriptedEngine, *prompts: Prompt, **more) -> list[list[Rollout]]:
    options = {"format": FORMAT, "group_size": 2, "budget": Budget(), "concurrency": 3, "seed": 1} | more
    options.setdefault("version", lambda: 0)
    async with engine:
        return await collect(list(enumerate(prompts)), engine=engine, **options)


async def one(*texts: str, **more):
    ((rollout, *_), *_) = await sampled(says(*texts), prompt(), **more)
    return rollout, outcome_of(rollout, format=FORMAT, tokenizer=TOKENIZER)


async def test_gold_rollouts_are_right_valid_and_cost_what_the_baseline_says() -> None:
    model = gold_model("multiverse")
    numbered = [(n, PROMPTS[n]) for n in range(6)]
    async with model.open_engine() as engine:
        groups = await collect(
            numbered,
            engine=engine,
            format=model.format,
            group_size=2,
            budget=Budget(),
            concurrency=4,
            version=lambda: 7,
            seed=0,
        )
    assert [[r.id for r in group] for group in groups] == [[f"{n}/0", f"{n}/1"] for n in range(6)]
    for group in groups:
        for rollout in group:
            outcome = outcome_of(rollout, format=model.format, tokenizer=TOKENIZER)
            assert outcome.correct
            assert outcome.valid
            assert (outcome.forks > 0) == rollout.prompt.forks
            assert set(rollout.versions.values()) == {7}
            assert rollout.versions.keys() == rollout.tree.segments.keys()
            if not rollout.prompt.forks:
                assert outcome.critical_path_tokens == outcome.baseline_tokens
            else:
                assert outcome.critical_path_tokens < outcome.baseline_tokens


async def test_rollouts_of_a_group_differ_and_are_the_same_again_whatever_runs_beside_them() -> None:
    def engine() -> ScriptedEngine:
        return ScriptedEngine(vocab_size=64, weights={TOKENIZER.eos_ids[0]: 8.0}, chunk_size=3, timing_seed=5)

    one_by_one = await sampled(engine(), prompt(), prompt("2+2?"), concurrency=1)
    together = await sampled(engine(), prompt(), prompt("2+2?"), concurrency=4)
    assert [[r.tree for r in group] for group in one_by_one] == [[r.tree for r in group] for group in together]
    assert one_by_one[0][0].tree != one_by_one[0][1].tree


async def test_an_answer_that_stands_only_in_the_prompt_earns_nothing() -> None:
    asked = prompt("\nAnswer: 2")
    ((rollout, *_),) = await sampled(says("=>7<eos>"), asked)
    assert not outcome_of(rollout, format=FORMAT, tokenizer=TOKENIZER).correct
    _, right = await one("=>\nAnswer: 2<eos>")
    assert right.correct


async def test_a_boxed_answer_in_the_prompt_earns_nothing() -> None:
    words = FixedTokenizer(
        (*TOKENIZER.tokens, "\\boxed{", "}"), control=tuple(TOKENIZER.control), bos="<bos>", eos="<eos>"
    )
    asked = Prompt(
        family="toy",
        question="",
        prompt_ids=(*words.bos_ids, *words.encode("\\boxed{2}?")),
        grade=lambda response: exact(response, "2"),
        baseline_tokens=10.0,
    )
    rewards = []
    for said in ("7<eos>", "\\boxed{7}<eos>", "\\boxed{2}<eos>"):
        response = words.encode(said, special=True)
        engine = ScriptedEngine(script=lambda context, response=response: response, vocab_size=len(words.tokens))
        ((rollout, *_),) = await sampled(engine, asked, format=open_format("multiverse", words))
        outcome = outcome_of(rollout, format=open_format("multiverse", words), tokenizer=words)
        rewards.append(Reward({"correctness": {}, "latency": {}})(outcome, Group(outcomes=[outcome])))
    assert rewards[:2] == [0.0, 0.0]
    assert rewards[2] > 1.0


async def test_an_answer_inside_a_thread_is_not_the_runs_answer() -> None:
    block = "<Parallel><Goal><Outline>1: 1</Outline></Goal>"
    _, outcome = await one(f"1+1?=>{block}", "1:=>\nAnswer: 2</Path>", "<Conclusion>=></Conclusion></Parallel><eos>")
    assert outcome.valid
    assert outcome.forks == outcome.threads == outcome.closed_threads == 1
    assert not outcome.correct


async def test_an_engine_that_fails_is_data_and_the_others_go_on() -> None:
    def fail(context: Context, said: Sequence[int]) -> Exception | None:
        first = context[0]
        return RuntimeError("out of memory") if TOKENIZER.encode("9")[0] in first and len(said) == 2 else None

    engine = ScriptedEngine(script=lambda context: ids("+\nAnswer: 2<eos>"), fail=fail)
    bad, good = await sampled(engine, prompt("9?"), prompt())
    for rollout in bad:
        outcome = outcome_of(rollout, format=FORMAT, tokenizer=TOKENIZER)
        assert "out of memory" in rollout.error
        assert not outcome.correct
        assert not outcome.valid
        assert outcome.sampled_tokens == 2
    assert all(outcome_of(r, format=FORMAT, tokenizer=TOKENIZER).correct for r in good)


async def test_a_prompt_that_does_not_fit_is_data_too() -> None:
    engine = ScriptedEngine(script=lambda context: ids("<eos>"), max_context=4)
    ((rollout, _),) = await sampled(engine, prompt())
    assert rollout.error.startswith("ContextLengthError")
    assert outcome_of(rollout, format=FORMAT, tokenizer=TOKENIZER).sampled_tokens == 0


async def test_leaving_early_is_no_outcome() -> None:
    engine = ScriptedEngine(script=lambda context: ids("1" * 50 + "<eos>"), delay_s=1.0)
    with anyio.move_on_after(0.05) as scope:
        await sampled(engine, prompt())
    assert scope.cancelled_caught
    assert engine.stats().active == 0


BLOCK = "1+1?=><Parallel><Goal><Outline>1: 1</Outline><Outline>2: 2</Outline></Goal>"
END = "<Conclusion>=></Conclusion></Parallel>\nAnswer: 2<eos>"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((BLOCK, ":=> 1</Path>", END), []),
        ((BLOCK, "1:=> 1<eos>", "2:=> 1</Path>", END), ["closing tag"]),
        ((BLOCK, "1:=> <Parallel></Path>", "2:=> 1</Path>", END), ["none was opened"]),
        (("1+1?=><Parallel>\nAnswer: 2<eos>",), ["none was opened"]),
        (("1+1?=><Parallel><Goal></Goal>", "</Goal>=>\nAnswer: 2<eos>"), ["without a numbered outline"]),
        ((BLOCK.replace("2: 2", "1: 2"), ":=> 1</Path>", END), ["twice"]),
    ],
)
async def test_faults_of_format_are_found_in_what_was_sampled(texts: tuple[str, ...], expected: list[str]) -> None:
    rollout, outcome = await one(*texts)
    found = faults(rollout.tree, FORMAT)
    assert len(found) == len(expected), found
    assert all(words in fault for words, fault in zip(expected, found, strict=True))
    assert outcome.faults == found
    assert outcome.correct


@pytest.mark.parametrize("name", FORMATS.own)
def test_what_a_format_renders_has_no_faults(name: str) -> None:
    format = text_format(name)
    tokenizer = CharTokenizer(format_class(name).tags())
    prompt_ids = (*tokenizer.bos_ids, *tokenizer.encode("a"))
    drawn = Trajectories(format, tokenizer, alphabet="abc 12", prompt_ids=prompt_ids)
    trees = [drawn.render(drawn.draw(random.Random(seed))) for seed in range(12)]
    assert [fault for tree in trees for fault in faults(tree, format)] == []
    assert any(tree.num_forks for tree in trees) or name == "sequential"


async def test_a_run_over_its_budget_is_limited_and_not_malformed() -> None:
    _, outcome = await one(BLOCK, ":=> 111111111111</Path>", END, budget=Budget(max_thread_tokens=13))
    assert outcome.faults == ()
    assert outcome.limited > 0
    assert not outcome.correct


async def test_threads_that_do_nothing_gain_published_rewards_and_lose_the_recommended_one() -> None:
    def opening(threads: int) -> str:
        outlines = "".join(f"<Outline>{n}: 1</Outline>" for n in range(1, threads + 1))
        return f"1+1?=><Parallel><Goal>{outlines}</Goal>"

    long, useless = " 111111111111111111</Path>", " 11111111111111111</Path>"
    outcomes = [(await one(opening(n), f"1:=>{long}", f":=>{useless}", END))[1] for n in (2, 9)]
    modest, spammed = (replace(o, baseline_tokens=60.0) for o in outcomes)
    assert modest.correct
    assert spammed.correct
    assert spammed.valid
    assert spammed.threads == 9
    group = Group(outcomes=(modest, spammed))
    for variant in ("paper", "code", "readme"):
        published = Reward({"correctness": {}, "acceleration": {"variant": variant, "clip": 1.0}})
        assert published(spammed, group) > published(modest, group)
    recommended = Reward({"correctness": {}, "latency": {}, "format_validity": {}})
    assert recommended(spammed, group) < recommended(modest, group)


async def test_every_segment_records_the_weights_it_began_with() -> None:
    updates = iter(range(100))
    rollout, _ = await one(BLOCK, ":=> 1</Path>", END, version=lambda: next(updates), concurrency=1, group_size=1)
    assert sorted(rollout.versions.values()) == [0, 1, 2, 3]
    assert rollout.versions["0:0"] == 0
    assert rollout.versions["0:1"] == 3


async def test_a_rollout_survives_a_checkpoint() -> None:
    rollout, _ = await one(BLOCK, ":=> 1</Path>", END)
    again = Rollout.from_state(rollout.state(), rollout.prompt)
    assert again == rollout
    assert again.tree == rollout.tree
    assert [decode(line) for line in rollout.state()["events"]] == list(rollout.events)


async def test_prompts_depend_on_their_number_alone() -> None:
    again = Prompts(SOURCE, weights={"long_multiplication": 1.0, "control": 1.0}, seed=4)
    assert [again[n].question for n in (5, 2)] == [PROMPTS[n].question for n in (5, 2)]
    assert PROMPTS[2].question != Prompts(SOURCE, weights={"control": 1.0}, seed=5)[2].question
