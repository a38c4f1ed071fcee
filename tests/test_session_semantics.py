"""What the runtime does with whatever a model writes. A change here is a change of behaviour.

 1. A fork opens its threads in outline order; the parent reads them in outline order, whoever is first.
 2. Only sampled ids fork. Control ids in a prompt, or in what the runtime wrote, are text.
 3. Repeated outline numbers count once, in the order written; the segment's note says so.
 4. Numbers are copied verbatim: gaps, any order, dots. One outline is a block of one thread.
 5. A block without an outline, or with more than `max_threads_per_fork`, is declined as MALFORMED: nothing is
    forced, the same thread goes on in a next segment, and may fork again.
 6. A block that does not fit the budget is declined as a whole with BUDGET, and fork ids are not sampled any more.
 7. Where no fork is possible from the start (no threads, no depth) fork ids are not sampled at all.
 8. The eighth declined block ends its thread as MALFORMED.
 9. A thread that ends without its closer (end-of-sequence, tokens, context) is closed by the runtime in a FORCED
    segment of its own; the join goes on and its note counts such threads. The run does not end by it.
10. An end-of-sequence id of a thread stays in the tree; a concat parent does not read it.
11. A block inside a thread is text where the format has none, and a thread of its own where it nests.
12. End-of-sequence ends the run, nothing follows. A format may end the run at a join: nothing is sampled after it.
13. What is left of `max_tokens` is divided equally among the branches and what follows the join; what a branch did
    not use flows back. `max_threads` likewise, for nested blocks.
14. The context is divided the same way, so a join always fits; a block whose join could not is declined (BUDGET).
    Where threads are merged they lie side by side, and of a race only the winner is read: half of what is left for
    each, half for what follows.
15. At the deadline calls are cancelled, threads are closed and joined as in 9, and nothing more is sampled.
16. Gold traces are what the runtime produces: replaying a rendered tree gives that tree.

What the formats beyond flat concat and merge add is held in `test_plait_format.py` and, on random programs,
in `test_joins.py`:

17. A thread that starts from a message sees nothing else; where a message takes a block's place, what was before the
    block stays. Messages that do not fit the parent's context are read as if the thread had written nothing, the
    longest first; the segment's note counts them.
18. A thread that needs others starts when all of them have ended, and reads them. Threads that wait for each other, or
    wait in a race, or wait without seeing their parent: the block is MALFORMED.
19. A race is won by the success with the smallest clock (sampled tokens on the longest dependent chain), of equals by
    the first outline. Every other thread and all that it forked are cut there as CANCELLED.
20. A thread that was cut gives nothing of its share back; tokens sampled past a cut are counted and within the budget.
21. A thread forked without waiting runs beside its parent, which reads it where it asks; asking for one that does not
    run is MALFORMED. One that nobody asked for is cut where its parent ends.
22. A format's own caps decline a block with BUDGET, like the request's.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.engines.scripted import ScriptedEngine
from plait.formats import Block, Join, ThreadOutcome, open_format, render
from plait.session import MAX_DECLINED, run
from plait.tasks.vocabulary import TOKENIZER
from plait.testing.clock import run_virtual
from plait.testing.strategies import CLOSE, EOS, FORK, HEADER, JOIN, TEXT, ToyFormat
from plait.tree import Tree
from plait.types import Budget, Chunk, Context, Merge, Request, SamplingParams, StopReason

PROMPT = (*TOKENIZER.bos_ids, *TOKENIZER.encode("1+2?"))
TAGS = {"threadweaver": ("Outlines", "\n<Thread>\n{}:", "\n</Thread>"), "multiverse": ("Goal", "<Path>{}:", "</Path>")}
both = pytest.mark.parametrize("name", list(TAGS))
backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


class Spy(ScriptedEngine):
    """Remembers how it was asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[tuple[Context, SamplingParams]] = []

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        self.asked.append((context, params))
        async with aclosing(super().generate(context, params)) as chunks:
            async for chunk in chunks:
                yield chunk


def flat(context: Context) -> list[int]:
    return [
        id
        for part in context
        for id in (part if isinstance(part, tuple) else (i for branch in part.branches for i in flat(branch)))
    ]


def text(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(ids)


def play(
    name: str,
    *says: str,
    threads: dict[str, str] | None = None,
    budget: Budget | None = None,
    prompt: Sequence[int] = PROMPT,
    backend: str = "asyncio",
    **options: Any,
) -> tuple[Tree, Spy]:
    """Run a text format with a model that says these texts in turn, and in thread k what `threads` has for it."""
    header = TAGS[name][1] if name in TAGS else "never {}"

    def script(context: Context) -> list[int]:
        read = text(flat(context))
        for number, said in (threads or {}).items():
            if read.endswith(header.format(number)):
                return TOKENIZER.encode(said, special=True)
        at = 0
        for said in says:
            at = read.find(said, at)
            if at < 0:
                return TOKENIZER.encode(said, special=True)
            at += len(said)
        raise AssertionError(f"nothing to say after {read!r}")

    engine = Spy(script=script, **options)
    request = Request(prompt_ids=tuple(prompt), budget=budget or Budget())

    async def main() -> Tree:
        return await run(request, engine=engine, format=open_format(name, TOKENIZER))

    return run_virtual(main, backend=backend), engine


def outlines(name: str, *numbers: str) -> str:
    tag = TAGS[name][0]
    return f"<Parallel><{tag}>" + "".join(f"<Outline>{n}: {n}</Outline>" for n in numbers) + f"</{tag}>"


def thread(name: str, body: str) -> str:
    return body + TAGS[name][2]


def stops(tree: Tree) -> list[tuple[str, str]]:
    return [(s.id, s.stop.value if s.stop else "open") for s in tree.walk()]


TIMED = [{"timing_seed": i, "chunk_size": 1 + i} for i in range(3)]


@backends
@both
def test_rule_1_threads_are_read_in_outline_order(name: str, backend: str) -> None:
    said = {"1": thread(name, "1" * 30), "2": thread(name, "22"), "3": thread(name, "3" * 9)}
    for timing in TIMED:
        tree, _ = play(name, outlines(name, "1", "2", "3"), "9<eos>", threads=said, backend=backend, **timing)
        assert tree.segments["0:1"].joins == ("0/0.0:0", "0/0.1:0", "0/0.2:0")
        assert list(tree.labels.items()) == [("0/0.0", "1"), ("0/0.1", "2"), ("0/0.2", "3")]
        read = text(flat(tree.context("0:1")))
        assert read.index("111") < read.index("22" + TAGS[name][2]) < read.index("333")
        assert tree.stop is StopReason.EOS


def test_rule_1_the_wire_of_threadweaver() -> None:
    said = {"1": thread("threadweaver", "4"), "2": thread("threadweaver", "5")}
    _, engine = play("threadweaver", outlines("threadweaver", "1", "2"), "</Parallel>9<eos>", threads=said)
    before = text(PROMPT) + outlines("threadweaver", "1", "2")
    asked = [text(flat(context)) for context, _ in engine.asked]
    assert asked[0] == text(PROMPT)
    assert sorted(asked[1:3]) == [before + "\n<Thread>\n1:", before + "\n<Thread>\n2:"]
    assert asked[3] == before + "\n<Thread>\n1:4\n</Thread><Thread>\n2:5\n</Thread>\n"
    assert all(len(context) == 1 for context, _ in engine.asked)


def test_rule_1_the_wire_of_multiverse() -> None:
    said = {"1": thread("multiverse", "4"), "2": thread("multiverse", "5")}
    tree, engine = play("multiverse", outlines("multiverse", "1", "2"), "9</Conclusion></Parallel><eos>", threads=said)
    head, merge, tail = engine.asked[-1][0]
    assert isinstance(merge, Merge)
    assert text(flat((head,))) == text(PROMPT) + outlines("multiverse", "1", "2")
    assert [text(flat(branch)) for branch in merge.branches] == ["<Path>1:4</Path>", "<Path>2:5</Path>"]
    assert text(flat((tail,))) == "<Conclusion>"
    assert tree.context("0:1") == engine.asked[-1][0]


@both
def test_rule_2_a_prompt_never_forks(name: str) -> None:
    block = outlines(name, "1", "2")
    prompt = TOKENIZER.encode(block, special=True)
    tree, _ = play(name, "7<eos>", prompt=prompt)
    assert stops(tree) == [("0:0", "eos")]
    # What a block repeats of the prompt is read from what was sampled: outlines there are none.
    tree, _ = play(name, f"</{TAGS[name][0]}>", "7<eos>", prompt=(*prompt, 1))
    assert tree.num_threads == 0


@both
def test_rule_3_repeated_numbers_count_once(name: str) -> None:
    said = {"1": thread(name, "1"), "2": thread(name, "2")}
    tree, _ = play(name, outlines(name, "1", "1", "2", "1"), "9<eos>", threads=said)
    assert tree.num_threads == 2
    assert tree.segments["0:0"].stop is StopReason.STOP
    assert "outline 1 twice" in tree.segments["0:0"].note


@both
@pytest.mark.parametrize("number", ["3", "0", "17"])
def test_rule_4_numbers_are_copied_verbatim(name: str, number: str) -> None:
    said = {number: thread(name, "5"), "1": thread(name, "6")}
    tree, _ = play(name, outlines(name, number, "1"), "9<eos>", threads=said)
    headers = [text(tree.segments[f"0/0.{i}:0"].forced_ids) for i in (0, 1)]
    assert headers == [TAGS[name][1].format(number), TAGS[name][1].format("1")]
    tree, _ = play(name, outlines(name, number), "9<eos>", threads=said)
    assert tree.num_threads == 1


@both
@pytest.mark.parametrize(
    ("numbers", "note"),
    [((), "a block without a numbered outline"), (tuple(map(str, range(200))), "200 threads; max_threads_per_fork=16")],
)
def test_rule_5_a_malformed_block_is_declined_and_the_thread_goes_on(
    name: str, numbers: tuple[str, ...], note: str
) -> None:
    said = {"1": thread(name, "1")}
    tree, engine = play(name, outlines(name, *numbers), "77" + outlines(name, "1"), "9<eos>", threads=said)
    first, second = tree.segments["0:0"], tree.segments["0:1"]
    assert first.stop is StopReason.MALFORMED
    assert note in first.note
    assert (second.parent, second.forced_ids, second.joins) == ("0:0", (), ())
    assert engine.asked[1][1].banned_ids == ()
    assert tree.segments["0/1.0:0"].parent == "0:1"
    assert tree.stop is StopReason.EOS


@both
@pytest.mark.parametrize(
    ("limits", "note"),
    [
        ({"max_threads": 2}, "2 are left of max_threads=2"),
        ({"max_tokens": 3}, "3 tokens are left of max_tokens="),
        ({"max_thread_tokens": 0}, "leaves none to go on with"),
    ],
)
def test_rule_6_a_block_that_does_not_fit_the_budget_is_declined_whole(
    name: str, limits: dict[str, int], note: str
) -> None:
    block = outlines(name, "1", "2", "3")
    asked = len(TOKENIZER.encode(block, special=True))
    # Token limits are what is left after the outlines were written.
    limits = {key: n if key == "max_threads" else n + asked for key, n in limits.items()}
    tree, engine = play(name, block, "9<eos>", budget=Budget(**limits))
    assert tree.num_threads == 0
    assert tree.segments["0:0"].stop is StopReason.BUDGET
    assert note in tree.segments["0:0"].note
    if "max_thread_tokens" in limits:
        assert (stops(tree)[1:], len(engine.asked)) == ([("0:1", "budget")], 1)
    else:
        assert engine.asked[1][1].banned_ids == open_format(name, TOKENIZER).fork_ids
        assert stops(tree)[1:] == [("0:1", "eos")]


@both
@pytest.mark.parametrize("budget", [Budget(max_threads=0), Budget(max_depth=0), Budget(max_threads_per_fork=0)])
def test_rule_7_where_no_fork_is_possible_none_is_sampled(name: str, budget: Budget) -> None:
    fork_ids = open_format(name, TOKENIZER).fork_ids
    tree, engine = play(name, "9<eos>", budget=budget)
    assert engine.asked[0][1].banned_ids == fork_ids
    # An engine that samples it all the same is declined.
    tree, _ = play(name, outlines(name, "1"), "9<eos>", budget=budget)
    assert tree.num_threads == 0
    assert [s.stop for s in tree.walk()][-1] is StopReason.EOS


@both
def test_rule_7_where_the_format_has_no_fork_its_ids_are_text(name: str) -> None:
    said = {"1": thread(name, "1")}
    tree, engine = play(name, outlines(name, "1"), "9<eos>", threads=said, budget=Budget(max_depth=1))
    assert tree.num_threads == 1
    assert [params.banned_ids for _, params in engine.asked] == [(), (), ()]


def toy(
    script: Any, *, format: ToyFormat | None = None, budget: Budget | None = None, backend: str = "asyncio", **more: Any
) -> tuple[Tree, Spy]:
    engine = Spy(script=lambda context: script(flat(context)), **more)
    request = Request(prompt_ids=(8, 9), budget=budget or Budget())

    async def main() -> Tree:
        return await run(request, engine=engine, format=format or ToyFormat())

    return run_virtual(main, backend=backend), engine


def test_rule_8_the_eighth_declined_block_ends_the_thread() -> None:
    tree, engine = toy(lambda ids: [FORK])
    assert stops(tree) == [(f"0:{k}", "malformed") for k in range(MAX_DECLINED)]
    assert "8 blocks were declined" in tree.segments["0:7"].note
    assert (tree.stop, len(engine.asked)) == (StopReason.MALFORMED, 8)


def test_rule_8_in_a_thread_the_join_goes_on() -> None:
    tree, _ = toy(lambda ids: [EOS] if ids[-1] == JOIN else [TEXT + 1, FORK] if ids[-1] == 9 else [FORK])
    assert tree.segments["0/0.0:7"].stop is StopReason.MALFORMED
    assert (tree.segments["0/0.0:8"].stop, tree.stop) == (StopReason.FORCED, StopReason.EOS)


@both
@pytest.mark.parametrize("ends", ["eos", "tokens", "context"])
def test_rule_9_a_thread_that_does_not_close_is_closed_and_joined(name: str, ends: str) -> None:
    said = {"1": "11<eos>" if ends == "eos" else "1" * 500, "2": thread(name, "2")}
    budget = Budget(max_thread_tokens=60 if ends == "tokens" else None)
    max_context = 200 if ends == "context" else 4096
    tree, engine = play(
        name, outlines(name, "1", "2"), "</Parallel>9<eos>", threads=said, budget=budget, max_context=max_context
    )
    ended, closed = tree.segments["0/0.0:0"], tree.segments["0/0.0:1"]
    reason = {"eos": StopReason.EOS, "tokens": StopReason.BUDGET, "context": StopReason.LENGTH}[ends]
    assert ended.stop is reason
    assert (closed.stop, closed.sampled_ids, text(closed.forced_ids)) == (StopReason.FORCED, [], TAGS[name][2])
    assert f"the thread ended with {reason}" in closed.note
    assert tree.segments["0/0.1:0"].stop is StopReason.STOP
    assert "0/0.1:1" not in tree.segments
    last = tree.segments["0:1"]
    assert (last.joins, last.stop) == (("0/0.0:1", "0/0.1:0"), StopReason.EOS)
    assert last.note == "joins 1 of 2 threads unfinished"
    assert len(engine.asked) == 4
    assert [t.stop for t in tree.threads()] == [StopReason.EOS, reason, StopReason.STOP]


@both
def test_rule_10_a_threads_end_of_sequence_is_kept_but_not_read_again(name: str) -> None:
    tree, engine = play(name, outlines(name, "1"), "9<eos>", threads={"1": "11<eos>"})
    eos = TOKENIZER.eos_ids[0]
    assert tree.segments["0/0.0:0"].sampled_ids[-1] == eos
    assert (eos in flat(engine.asked[-1][0])) == (name == "multiverse")
    assert tree.stop is StopReason.EOS


@both
def test_rule_11_a_block_in_a_thread_is_text_where_the_format_has_none(name: str) -> None:
    inner = outlines(name, "1", "2") + "4"
    tree, _ = play(name, outlines(name, "1"), "9<eos>", threads={"1": thread(name, inner)})
    assert (tree.num_threads, tree.num_forks) == (1, 1)
    assert text(tree.segments["0/0.0:0"].sampled_ids) == thread(name, inner)


@pytest.mark.parametrize("join", ["concat", "merge"])
def test_rule_11_a_block_in_a_thread_forks_where_the_format_nests(join: Any) -> None:
    def nested(ids: list[int]) -> list[int]:
        # The id before a fork tells where it is: a block of two at the root, a block of one in a thread.
        if ids[-1] == JOIN:
            return [7, CLOSE, EOS]
        if ids[-2] != HEADER:
            return [TEXT + 2, FORK]
        return [TEXT + 1, FORK, 7, CLOSE] if ids[-4] == TEXT + 2 else [8, CLOSE]

    tree, _ = toy(nested, format=ToyFormat(join_kind=join), budget=Budget(max_tokens=400))
    names = {t.name for t in tree.threads()}
    assert {"0", "0/0.0", "0/0.1", "0/0.0/0.0", "0/0.1/0.0"} <= names
    inner = tree.segments["0/0.0:1"]
    assert (inner.parent, inner.joins, inner.join) == ("0/0.0:0", ("0/0.0/0.0:0",), join)
    flat_tree, _ = toy(nested, format=ToyFormat(join_kind=join, nested=False))
    assert flat_tree.num_forks == 1
    assert flat_tree.segments["0/0.0:0"].sampled_ids == [TEXT + 1, FORK, 7, CLOSE]


@both
def test_rule_12_end_of_sequence_ends_the_run(name: str) -> None:
    tree, engine = play(name, "12<eos>" + outlines(name, "1") + "34")
    assert text(tree.segments["0:0"].sampled_ids) == "12<eos>"
    assert (stops(tree), len(engine.asked)) == ([("0:0", "eos")], 1)


def test_rule_12_a_format_may_end_the_run_at_a_join() -> None:
    class Ends(ToyFormat):
        def join(self, threads: Sequence[ThreadOutcome]) -> Join:
            return Join(forced_ids=(JOIN,), end=True)

    tree, engine = toy(lambda ids: [7, CLOSE] if ids[-2] == HEADER else [TEXT + 2, FORK], format=Ends())
    assert stops(tree)[-1] == ("0:1", "forced")
    assert (tree.stop, len(engine.asked)) == (StopReason.FORCED, 3)


def test_the_sequential_format_never_forks() -> None:
    said = "1" + outlines("threadweaver", "1", "2") + outlines("multiverse", "1") + "2<eos>"
    tree, engine = play("sequential", said, budget=Budget(max_threads=0))
    assert stops(tree) == [("0:0", "eos")]
    assert engine.asked[0][1].banned_ids == ()


def test_rule_13_tokens_are_divided_equally_and_flow_back() -> None:
    def script(ids: list[int]) -> list[int]:
        if ids[-1] == JOIN:
            return [7] * 500
        if ids[-2] == HEADER:
            return [8, CLOSE] if ids[-1] == TEXT else [8] * 500
        return [TEXT + 3, FORK]

    tree, engine = toy(script, budget=Budget(max_tokens=102))
    # 100 are left at the fork: 25 for each of three threads, 25 for what follows, and the first thread's 23 back.
    assert [params.max_tokens for _, params in engine.asked] == [102, 25, 25, 25, 48]
    assert [t.num_sampled for t in tree.threads()] == [2 + 48, 2, 25, 25]
    assert (tree.num_sampled, tree.stop) == (102, StopReason.BUDGET)
    assert "its share of max_tokens=102 is used up" in tree.note


def test_rule_13_threads_are_divided_for_nested_blocks() -> None:
    def script(ids: list[int]) -> list[int]:
        if ids[-1] == JOIN:
            return [7, CLOSE, EOS]
        if ids.count(HEADER) == 2 or ids[-1] == FORK:
            return [8, CLOSE]
        return [TEXT + 2, FORK]

    # 2 for the first block leave 5: one for each thread, three for the root: the inner blocks of two do not fit.
    tree, _ = toy(script, budget=Budget(max_threads=7))
    assert tree.num_threads == 2
    assert "1 are left of max_threads=7" in tree.segments["0/0.0:0"].note
    tree, _ = toy(script, budget=Budget(max_threads=8))
    assert tree.num_threads == 6


@both
def test_rule_14_a_join_always_fits_the_context(name: str) -> None:
    said = {str(i): "1" * 900 for i in range(1, 5)}
    for max_context in range(60, 260, 7):
        tree, _ = play(name, outlines(name, "1", "2", "3", "4"), "9" * 900, threads=said, max_context=max_context)
        assert tree.longest_context() <= max_context
        if tree.num_threads:
            threads = [t.num_sampled for t in tree.threads()[1:]]
            assert len(set(threads)) == 1
            assert len(tree.segments["0:1"].sampled_ids) >= threads[0] >= 1
            assert [s.stop for s in tree.walk() if s.id == "0:1"] == [StopReason.LENGTH]
        else:
            assert f"it and its join need more than max_context={max_context}" in tree.segments["0:0"].note


def test_rule_14_merged_threads_lie_side_by_side() -> None:
    said = {str(i): "1" * 900 for i in range(1, 9)}
    block = [str(i) for i in range(1, 9)]
    lengths = {
        name: play(name, outlines(name, *block), "9" * 900, threads=said, max_context=600)[0].threads()[1].num_sampled
        for name in TAGS
    }
    assert lengths["multiverse"] > 4 * lengths["threadweaver"]


@backends
@both
def test_rule_15_at_the_deadline_threads_are_closed_and_joined(name: str, backend: str) -> None:
    said = {"1": thread(name, "1"), "2": "2" * 500}
    asked = len(TOKENIZER.encode(outlines(name, "1", "2"), special=True))
    tree, engine = play(
        name,
        outlines(name, "1", "2"),
        "9<eos>",
        threads=said,
        budget=Budget(deadline_s=asked + 10.5),
        delay_s=1.0,
        backend=backend,
    )
    assert tree.segments["0/0.0:0"].stop is StopReason.STOP
    assert (tree.segments["0/0.1:0"].stop, len(tree.segments["0/0.1:0"].sampled_ids)) == (StopReason.BUDGET, 10)
    assert "the deadline of" in tree.segments["0/0.1:0"].note
    assert tree.segments["0/0.1:1"].stop is StopReason.FORCED
    last = tree.segments["0:1"]
    assert (last.joins, last.sampled_ids, last.stop) == (("0/0.0:0", "0/0.1:1"), [], StopReason.BUDGET)
    assert (tree.stop, len(engine.asked), engine.stats().active) == (StopReason.BUDGET, 3, 0)


@backends
def test_rule_15_a_deadline_that_has_passed_samples_nothing(backend: str) -> None:
    tree, engine = toy(lambda ids: [7] * 9, budget=Budget(deadline_s=0), backend=backend)
    assert (stops(tree), engine.asked) == ([("0:0", "budget")], [])


@backends
def test_rule_15_threads_that_wait_for_a_place_end_at_the_deadline_too(backend: str) -> None:
    def script(ids: list[int]) -> list[int]:
        return [TEXT + 3, FORK] if ids[-2] != HEADER else [7] * 500

    budget = Budget(deadline_s=10.5, max_concurrent_threads=1)
    tree, _ = toy(script, budget=budget, delay_s=1.0, backend=backend)
    assert [t.num_sampled for t in tree.threads()] == [2, 8, 0, 0]
    assert {t.stop for t in tree.threads()} == {StopReason.BUDGET}


texts = st.text("0123456789+*=", max_size=8)
blocks = st.lists(st.tuples(texts, texts), min_size=1, max_size=4).map(
    lambda rows: Block(outlines=tuple(o for o, _ in rows), threads=tuple((t,) for _, t in rows))
)


@both
@given(parts=st.lists(st.tuples(texts, blocks), max_size=3), last=texts, seed=st.integers(0, 99))
def test_rule_16_a_gold_trace_is_what_the_runtime_produces(
    name: str, parts: list[tuple[str, Block]], last: str, seed: int
) -> None:
    format = open_format(name, TOKENIZER)
    gold = render((*(x for part in parts for x in part), last), format=format, tokenizer=TOKENIZER, prompt_ids=PROMPT)
    backend = random.Random(seed).choice(["asyncio", "trio"])

    async def main() -> Tree:
        engine = ScriptedEngine(script=gold, timing_seed=seed, chunk_size=3)
        return await run(Request(prompt_ids=PROMPT), engine=engine, format=format)

    assert run_virtual(main, backend=backend) == gold
