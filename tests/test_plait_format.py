"""The plait format and the published ones, case by case: races, dependencies, messages, caps, broken texts.

What holds of every format is in test_format_contract.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from plait.engines.scripted import ScriptedEngine
from plait.errors import FormatError, RequestError
from plait.formats import Block, Fork, Malformed, Return, format_class, open_format, render
from plait.formats.base import TrajectoryFormat
from plait.formats.text import CharTokenizer
from plait.session import run
from plait.tasks.vocabulary import SEARCH, TOKENIZER
from plait.testing.clock import run_virtual
from plait.tree import Tree
from plait.types import Budget, Context, Request, StopReason, context_positions

OPTIONS = {"npr": {"min_tokens": 0}}


def vocabulary(name: str) -> CharTokenizer:
    return CharTokenizer(format_class(name).tags())


def opened(name: str) -> tuple[TrajectoryFormat, CharTokenizer]:
    tokenizer = vocabulary(name)
    return open_format(name, tokenizer, **OPTIONS.get(name, {})), tokenizer


def play(
    name: str, texts: dict[str, str], *, prompt: str = "What?", budget: Budget | None = None, **timing: Any
) -> Tree:
    """Run a format with a model that answers a context by the longest of these ends that it has."""
    format, tokenizer = opened(name)

    def script(context: Context) -> Sequence[int]:
        read = tokenizer.decode([id for part in context if isinstance(part, tuple) for id in part])
        end = max((end for end in texts if read.endswith(end)), key=len)
        return tokenizer.encode(texts[end], special=True)

    async def main() -> Tree:
        engine = ScriptedEngine(script=script, **timing)
        ids = tuple(tokenizer.encode(prompt))
        return await run(Request(prompt_ids=ids, budget=budget or Budget()), engine=engine, format=format)

    return run_virtual(main)


def said(name: str, tree: Tree, id: str) -> tuple[str, str]:
    segment, tokenizer = tree.segments[id], vocabulary(name)
    return tokenizer.decode(segment.forced_ids), tokenizer.decode(segment.sampled_ids)


def test_a_threadweaver_trajectory_means_the_same_in_plait() -> None:
    theirs, tokenizer = opened("threadweaver")
    ours = open_format("plait", tokenizer)
    trajectory = ("a", Block(outlines=("x", "y"), threads=(("1",), ("22",))), "b")
    assert ours.read(theirs.write(trajectory)) == trajectory
    trees = [render(trajectory, format=f, tokenizer=tokenizer, prompt_ids=(5,)) for f in (theirs, ours)]
    assert trees[0] == trees[1]


def test_the_embedded_vocabulary_has_the_plait_format() -> None:
    format = open_format("plait", TOKENIZER)
    inner = Block(outlines=("3", "4"), threads=(("7", Return("7")), ("8",)), race=True)
    block = Block(outlines=("1+2", "3"), threads=(("1", Return("3")), (inner, "9")), needs=((), (0,)))
    tree = render((block,), format=format, tokenizer=TOKENIZER, prompt_ids=TOKENIZER.encode("1+2?"))
    assert tree.num_threads == 4


@pytest.mark.parametrize("name", ["apr", "asyncthink", "npr", "parallel_r1", "parathinker", "medverse"])
def test_a_format_that_the_embedded_vocabulary_lacks_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"the {name} format needs <.*> as one control token"):
        open_format(name, TOKENIZER)


OUTLINES = "<Parallel>\n<Outlines>{}\n{}</Outlines>"


def outlines(*lines: str, race: bool = False) -> str:
    return OUTLINES.format("?" if race else "", "".join(f"<Outline>{line}</Outline>\n" for line in lines))


def test_a_thread_starts_when_those_it_needs_have_closed_and_reads_their_conclusions() -> None:
    block = outlines("1(2): a", "2: b", "3: c")
    tree = play(
        "plait",
        {
            "What?": block,
            "</Outlines>\n<Thread>\n2:": " long work\n<Conclusion>42</Conclusion>\n</Thread>",
            "</Outlines>\n<Thread>\n2: 42\n</Thread><Thread>\n1:": " uses it\n</Thread>",
            "</Outlines>\n<Thread>\n3:": " else\n</Thread>",
            "</Thread>\n": "</Parallel>done<eos>",
        },
    )
    assert tree.segments["0/0.0:0"].joins == ("0/0.1:0",)
    assert said("plait", tree, "0:1")[0] == (
        "\n<Thread>\n1: uses it\n</Thread><Thread>\n2: 42\n</Thread><Thread>\n3: else\n</Thread>\n"
    )
    spans = tree.spans()
    assert spans["0/0.0:0"].start == spans["0/0.1:0"].end
    assert spans["0/0.2:0"].start == spans["0:0"].end
    assert tree.segments["0:1"].join == "message"


@pytest.mark.parametrize("lines", [("1(2): a", "2(1): b"), ("1(1): a",), ("1(3): a", "2: b", "3(1): c")])
def test_threads_that_wait_for_each_other_are_malformed(lines: tuple[str, ...]) -> None:
    tree = play("plait", {"What?": outlines(*lines), "</Outlines>": "never mind<eos>"})
    assert tree.segments["0:0"].stop is StopReason.MALFORMED
    assert "wait for each other" in tree.segments["0:0"].note
    assert (tree.num_threads, tree.stop) == (0, StopReason.EOS)


def test_a_need_that_is_not_there_is_dropped_and_noted() -> None:
    format, tokenizer = opened("plait")
    fork = format.parse(tokenizer.encode(outlines("1(7): a", "2( 1 , x): b"), special=True), 0)
    assert isinstance(fork, Fork)
    assert [branch.needs for branch in fork.branches] == [(), (0,)]
    assert fork.note == "outline 1 needs 7, which is not there; outline 2 needs x, which is not there"


RACE = {
    "What?": outlines("1: a", "2: b", "3: c", race=True),
    "</Outlines>\n<Thread>\n1:": " " + "slow " * 20 + "\n<Conclusion>1</Conclusion>\n</Thread>",
    "</Outlines>\n<Thread>\n2:": " none\n</Thread>",
    "</Outlines>\n<Thread>\n3:": " quick\n<Conclusion>3</Conclusion>\n</Thread>",
    "</Thread>\n": "</Parallel>done<eos>",
}


@pytest.mark.parametrize("places", [None, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_a_race_is_won_by_the_fewest_tokens_whatever_the_timing(places: int | None, seed: int) -> None:
    tree = play("plait", RACE, budget=Budget(max_concurrent_threads=places), timing_seed=seed, chunk_size=1 + 5 * seed)
    quick = tree.segments["0/0.2:0"].sampled_ids
    slow = tree.segments["0/0.0:0"]
    assert (len(slow.sampled_ids), slow.stop) == (len(quick), StopReason.CANCELLED)
    assert tree.segments["0/0.1:0"].stop is StopReason.STOP
    read = "\n<Thread>\n1:\n</Thread><Thread>\n2:\n</Thread><Thread>\n3: 3\n</Thread>\n"
    assert said("plait", tree, "0:1")[0] == read
    assert tree.segments["0:1"].note == "0/0.2 ended the race of 3 threads"
    assert tree.spans()["0:1"].start == tree.spans()["0/0.2:0"].end
    if places == 1:
        assert tree.num_dropped > 80


def test_of_equal_successes_the_first_outline_wins() -> None:
    texts = RACE | {f"</Outlines>\n<Thread>\n{i}:": f"<Conclusion>{i}</Conclusion>\n</Thread>" for i in (1, 2, 3)}
    tree = play("plait", texts, timing_seed=1, chunk_size=9)
    assert said("plait", tree, "0:1")[0].count("1: 1\n") == 1
    assert tree.segments["0/0.1:0"].stop is StopReason.CANCELLED


def test_a_race_that_nobody_wins_is_read_as_empty_threads() -> None:
    texts = RACE | {f"</Outlines>\n<Thread>\n{i}:": " none\n</Thread>" for i in (1, 2, 3)}
    tree = play("plait", texts)
    assert said("plait", tree, "0:1")[0] == "".join(
        ["\n<Thread>\n1:\n</Thread>", "<Thread>\n2:\n</Thread>", "<Thread>\n3:\n</Thread>\n"]
    )
    assert tree.num_dropped == 0


def test_threads_of_a_race_have_half_of_the_context_each_and_the_join_fits() -> None:
    lines = ("1: a", "2: b", "3: c", "4: d")
    texts = {"</Thread>\n": "x" * 900}
    texts |= {f"</Outlines>\n<Thread>\n{i}:": " " + "x" * 900 for i in range(1, 5)}
    lengths: list[int] = []
    for race in (False, True):
        tree = play("plait", texts | {"What?": outlines(*lines, race=race)}, max_context=400)
        assert tree.longest_context() <= 400
        assert {t.stop for t in tree.threads()} == {StopReason.LENGTH}
        lengths.append(tree.threads()[1].num_sampled)
    assert lengths[1] > 2 * lengths[0]
    won = texts | {"</Outlines>\n<Thread>\n3:": f" <Conclusion>{'y' * (lengths[1] - 10)}</Conclusion>\n</Thread>"}
    tree = play("plait", won | {"What?": outlines(*lines, race=True)}, max_context=400)
    assert tree.segments["0:1"].note.startswith("0/0.2 ended the race of 4 threads")
    assert tree.longest_context() <= 400


def test_blocks_nest_and_a_cut_takes_what_was_forked_with_it() -> None:
    nested = outlines("1: x", "2: y")
    texts = RACE | {
        "</Outlines>\n<Thread>\n1:": " " + nested,
        f"\n<Thread>\n1: {nested}\n<Thread>\n1:": " " + "x" * 300 + "\n</Thread>",
        f"\n<Thread>\n1: {nested}\n<Thread>\n2:": " y\n</Thread>",
        "</Outlines>\n<Thread>\n3:": " " + "q" * 60 + "\n<Conclusion>3</Conclusion>\n</Thread>",
    }
    trees = [play("plait", texts, timing_seed=seed, chunk_size=40) for seed in range(4)]
    assert all(tree == trees[0] for tree in trees)
    tree = trees[0]
    assert tree.segments["0/0.0/0.0:0"].stop is StopReason.CANCELLED
    assert tree.segments["0/0.0/0.1:0"].stop is StopReason.STOP
    assert "0/0.0:1" not in tree.segments
    assert tree.critical_path() < 300


def test_a_thread_that_ends_inside_its_conclusion_is_closed_and_read() -> None:
    texts = RACE | {"What?": outlines("1: a"), "</Outlines>\n<Thread>\n1:": " work\n<Conclusion>12<eos>"}
    tree = play("plait", texts)
    assert said("plait", tree, "0/0.0:1")[0] == "</Conclusion>\n</Thread>"
    assert said("plait", tree, "0:1")[0] == "\n<Thread>\n1: 12\n</Thread>\n"


def test_a_budget_is_written_into_the_prompt_in_powers_of_two() -> None:
    format = open_format("plait", TOKENIZER)
    prompt = (*TOKENIZER.bos_ids, *TOKENIZER.encode("1+2?"))

    def text(**limits: int | None) -> str:
        return TOKENIZER.decode(format.condition(prompt, Budget(**limits)))

    assert text(max_threads=9, max_tokens=700) == "<bos>!8,512!1+2?"
    assert text(max_threads=0, max_tokens=None) == "<bos>!0,-!1+2?"
    apr, tokenizer = opened("apr")
    ids = apr.condition((*tokenizer.bos_ids, *tokenizer.encode("Go")), Budget(max_threads_per_fork=10))
    assert tokenizer.decode(ids) == "<bos>Sub Call Budget: 10 Go"

    async def main() -> Tree:
        engine = ScriptedEngine(script=lambda context: TOKENIZER.eos_ids)
        request = Request(prompt_ids=prompt, budget=Budget(max_threads=4), conditioned=True)
        return await run(request, engine=engine, format=format)

    assert TOKENIZER.decode(run_virtual(main).segments["0:0"].forced_ids) == "<bos>!4,4096!1+2?"
    with pytest.raises(RequestError, match="no way to write a budget"):
        open_format("multiverse", TOKENIZER).condition(prompt, Budget())


CALL = (
    "\nExploring Operation: 60-45=15, Resulting Numbers: [3, 36, 15]\n"
    "Generated Node #0,0: 51:[3, 36, 15] Operation: 60-45=15\n"
    "<Calling Sub Searches>\n<Start Sub Search 0 at level 1> Moving to Node #0,0\n"
    "<Start Sub Search 1 at level 1> Moving to Node #0,0\n<End Calling Sub Searches>"
)
CHILD = "Moving to Node #0,0\nCurrent State: 51:[3, 36, 15], Operations: ['60-45=15']"
FOUND = (
    "\nExploring Operation: 3+36=39, Resulting Numbers: [15, 39]\n"
    "Generated Node #0,0,0: 51:[15, 39] Operation: 3+36=39\n"
    "Exploring Operation: 36+15=51, Resulting Numbers: [3, 51]\n"
    "Generated Node #0,0,1: 51:[3, 51] Operation: 36+15=51\n"
    "Moving to Node #0,0,1\nCurrent State: 51:[3, 51], Operations: ['60-45=15', '36+15=51']\n"
    "Exploring Operation: 51-3=48, Resulting Numbers: [48]\n48,51 unequal: No Solution\n"
    "Exploring Operation: 51*1=51, Resulting Numbers: [51]\n51,51 equal: Goal Reached"
)
ROOT = "Moving to Node #0\nCurrent State: 51:[60, 45, 3, 36], Operations: []"


def test_apr_sends_a_state_and_reads_back_the_path_in_place_of_the_call() -> None:
    texts = {ROOT: CALL, CHILD: FOUND + "<eos>", "<End Sub Searches>": "\n51,51 equal: Goal Reached<eos>"}
    tree = play("apr", texts, prompt=ROOT)
    assert said("apr", tree, "0/0.0:0")[0] == "<bos>" + CHILD
    last = tree.segments["0:1"]
    tokenizer = vocabulary("apr")
    (context,) = tree.context("0:1")
    assert isinstance(context, tuple)
    path = FOUND.split("\n")[3:7] + FOUND.split("\n")[-2:]
    found = ["<Goal Reached in Sub Search {} at level 1 at Node #0,0>", *CHILD.split("\n"), *path]
    results = ["<Sub Searches>", found[0].format(0), *found[1:], found[0].format(1), *found[1:], "<End Sub Searches>"]
    assert tokenizer.decode(context) == ROOT + CALL.partition("<Calling")[0] + "\n".join(results)
    assert (last.join, tree.segments["0/0.0:0"].keep) == ("message", 0)
    assert opened("apr")[0].read(tokenizer.decode((*context, *last.sampled_ids[:-1])))


def test_apr_reads_no_solution_of_a_search_that_was_cut_off_and_refuses_invented_nodes() -> None:
    texts = {ROOT: CALL, CHILD: FOUND[:150] + "<eos>", "<End Sub Searches>": "\nNo solution found.<eos>"}
    read = said("apr", play("apr", texts, prompt=ROOT), "0:1")[0]
    assert read.count("<No Solution in Sub Search") == 2
    format, tokenizer = opened("apr")
    asked = format.parse(tokenizer.encode(CALL.replace("#0,0\n<End", "#0,7\n<End"), special=True), 0)
    assert asked == Malformed(note="it calls node #0,7, which this call did not generate")


def test_apr_refuses_a_message_whose_result_the_vocabulary_cannot_say() -> None:
    format = open_format("apr", SEARCH)
    call = CALL.replace("#0,0\n<End", "#=\n<End")
    asked = format.parse(SEARCH.encode(call, special=True), 0)
    assert isinstance(asked, Malformed)
    assert asked.note.startswith("it calls no node but 'Moving to Node #='")
    assert isinstance(format.parse(SEARCH.encode(CALL, special=True), 0), Fork)


def test_messages_that_do_not_fit_the_parents_context_are_left_out() -> None:
    texts = {
        "What?": "<Calling Sub Searches>\n<Start Sub Search 0 at level 1> a\n<Start Sub Search 1 at level 1> b\n"
        "<End Calling Sub Searches>",
        "a": "\n" + "x" * 180 + "<eos>",
        "b": "\nshort<eos>",
        "<End Sub Searches>": "<eos>",
    }
    tree = play("apr", texts, max_context=300)
    assert "xx" not in said("apr", tree, "0:1")[0]
    assert "short" in said("apr", tree, "0:1")[0]
    assert tree.segments["0:1"].note == "1 of 2 messages do not fit the context"
    assert tree.longest_context() <= 300


def test_asyncthink_goes_on_while_its_workers_think_and_waits_where_it_asks() -> None:
    texts = {
        "What?": "I ask. <FORK-1>one?</FORK-1>",
        "</FORK-1>": " and <FORK-2>two?</FORK-2>",
        "</FORK-2>": " I go on. <JOIN-2>",
        "one?": "w" * 200 + "<RETURN>1</RETURN>",
        "two?": "ww<RETURN>2</RETURN>",
        "</RETURN>\n": "Enough: 2<eos>",
    }
    trees = [play("asyncthink", texts, timing_seed=seed, chunk_size=1 + 30 * seed) for seed in range(3)]
    assert trees[0] == trees[1] == trees[2]
    tree = trees[0]
    assert said("asyncthink", tree, "0:3")[0] == "\n<RETURN>2</RETURN>\n"
    assert tree.segments["0:3"].joins == ("0/1.0:0",)
    assert tree.segments["0:3"].parent == "0:2"
    unread = tree.segments["0/0.0:0"]
    assert (unread.stop, unread.note) == (StopReason.CANCELLED, "its parent ended without waiting for it")
    assert tree.spans()["0/0.0:0"].end == tree.critical_path()


def test_asyncthink_declines_a_join_of_a_thread_that_does_not_run() -> None:
    texts = {"What?": "<JOIN-3>", "<JOIN-3>": "</FORK-1>", "</FORK-1>": "<eos>"}
    tree = play("asyncthink", texts)
    assert [s.stop for s in tree.walk()] == [StopReason.MALFORMED, StopReason.MALFORMED, StopReason.EOS]


def test_parallel_r1_opens_two_paths_and_at_most_four_blocks() -> None:
    texts = {"What?": "<Parallel>", "<Path>": "p</Path>", "<Summary>": "s</Summary><Parallel>", "<Parallel>": "<eos>"}
    tree = play("parallel_r1", texts)
    assert (tree.num_forks, tree.num_threads, tree.stop) == (4, 8, StopReason.EOS)
    assert said("parallel_r1", tree, "0:1")[0] == "<Path>p</Path><Path>p</Path></Parallel><Summary>"
    assert "at most 4" in tree.segments["0:4"].note


def test_parathinker_begins_with_its_paths() -> None:
    def script(context: Context) -> Sequence[int]:
        tail = context[-1]
        assert isinstance(tail, tuple)
        return encode("s</summary><eos>" if decode(tail).endswith("<summary>") else "p</think1>")

    format, tokenizer = opened("parathinker")
    decode = tokenizer.decode

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, special=True)

    async def main() -> Tree:
        engine = ScriptedEngine(script=script)
        return await run(Request(prompt_ids=tuple(encode("What?"))), engine=engine, format=format)

    tree = run_virtual(main)
    assert (tree.segments["0:0"].stop, tree.segments["0:0"].sampled_ids) == (StopReason.FORCED, [])
    assert decode(tree.segments["0/0.1:0"].forced_ids) == "<think2>"
    assert tree.segments["0:1"].join == "merge"


def test_npr_caps_plans_and_needs_tokens_left() -> None:
    tokenizer = vocabulary("npr")
    plans = "".join(f"<plan>{i}: a</plan>\n" for i in range(1, 7))
    text = f"<guideline>\n{plans}</guideline>"
    format = open_format("npr", tokenizer)
    assert format.parse(tokenizer.encode(text, special=True), 0) == Malformed(note="6 plans; at most 5")
    one = tokenizer.encode("<guideline>\n<plan>1: a</plan>\n</guideline>", special=True)
    assert isinstance(format.parse(one, 4), Fork)
    assert isinstance(format.parse(one, 5), Malformed)

    async def main() -> Tree:
        engine = ScriptedEngine(script=lambda context: one if context_positions(context) < 9 else tokenizer.eos_ids)
        request = Request(prompt_ids=(70, 71), budget=Budget(max_tokens=1000))
        return await run(request, engine=engine, format=format)

    tree = run_virtual(main)
    assert "fewer than 1024 tokens are left" in tree.segments["0:0"].note


GOOD = (
    "go\n<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>\n"
    "<Thread>\n1: x\n</Thread><Thread>\n2: y\n</Thread>\n</Parallel>"
)


@pytest.mark.parametrize(
    ("change", "to", "where"),
    [
        ("2: b", "3: b", "line 5, column 10: outline 3 stands where 2 belongs"),
        ("2: b", "b", "line 5, column 10: an outline without a number"),
        ("</Thread><Thread>", "</Thread>\n<Thread>", "line 9, column 10: expected '<Thread>"),
        ("1: x", "1:x", "line 8, column 3: expected ' ' after the number"),
        ("\n2: y", "\n1: y", "line 9, column 18: thread 1 stands where 2 belongs"),
        ("</Parallel>", "", "line 12, column 1: expected </Parallel>, found the end"),
        ("go", "go</Thread>", "line 1, column 3: </Thread> belongs to no block"),
        ("2: y", "2: <Parallel>", "line 10, column 4: a block inside a thread"),
        ("</Outlines>\n<Thread>", "</Outlines>\nhm<Thread>", "line 7, column 1: text where only tags are: 'hm'"),
    ],
)
def test_a_broken_text_is_told_with_line_and_column(change: str, to: str, where: str) -> None:
    format, _ = opened("threadweaver")
    assert format.read(GOOD)
    with pytest.raises(FormatError) as error:
        format.read(GOOD.replace(change, to, 1))
    assert str(error.value).startswith(where)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("npr", "<guideline><plan>1: a</plan><plan>2: b</plan></guideline><step>1: x</step><step>2: y</step>"
         "<takeaway>z</takeaway>\nThe answer is \\boxed{4}."),
        ("multiverse", "<Parallel>\n<Goal>\n<Outline>1: a</Outline>\n</Goal>\n<Path>1: x</Path>\n"
         "<Conclusion>c</Conclusion>\n</Parallel>"),
        ("medverse", "<Plan> <Outline> 1. a; Dependency: [] </Outline> <Outline> 2. b; Dependency: [1] </Outline>"
         " </Plan> <Execution> <Step> 1: x </Step> <Step> 2: y </Step> </Execution> <Conclusion> c </Conclusion>"),
    ],
)  # fmt: skip
def test_published_spacing_is_accepted_and_written_in_one_way(name: str, text: str) -> None:
    format, _ = opened(name)
    trajectory = format.read(text)
    written = format.write(trajectory)
    assert format.read(written) == trajectory
    assert format.write(format.read(written)) == written


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("npr", "Hm. <guideline><plan>1: a</plan></guideline><step>1: x</step><takeaway>z</takeaway>", "text between"),
        ("plait", outlines("1(2): a", "2(1): b"), "outlines that wait for each other"),
        ("plait", outlines("1(3): a"), "it needs outline 3, which is not there"),
        ("apr", ROOT + "\nLet me see", "line 3, column 1: not a line of a search"),
        ("apr", ROOT + "\n<Calling Sub Searches>\n<End Calling Sub Searches>", "a call without a sub search"),
        ("asyncthink", "<FORK-1>a</FORK-1> <JOIN-2>", "line 1, column 20: thread 2 does not run"),
        ("asyncthink", "<FORK-1>a</FORK-1> <FORK-1>", "thread 1 runs already"),
        ("parallel_r1", "<Parallel><Path>a</Path></Parallel><Summary>s</Summary>", "expected <Path>"),
    ],
)
def test_what_a_format_does_not_allow_is_told(name: str, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        opened(name)[0].read(text)
