"""Published formats: traces written from their descriptions are accepted and run, and odd cases end as the docs say.

The texts in golden/traces are ours, written from papers and described behaviour; the table of cases is the one in
docs/formats.md, row by row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from plait.engines.scripted import ScriptedEngine
from plait.formats import Block, Fork, Spawn, Trajectory, format_class, open_format, render
from plait.formats.text import CharTokenizer
from plait.session import run
from plait.testing.clock import run_virtual
from plait.tree import Tree
from plait.types import Budget, Context, Request, StopReason

TRACES = Path(__file__).parent / "golden" / "traces"
DOCS = Path(__file__).parents[1] / "docs" / "formats.md"
OPTIONS: dict[str, dict[str, Any]] = {"threadweaver-conclusion": {"conclusion": True}, "npr": {"min_tokens": 0}}
OPTIONS["npr-nested"] = OPTIONS["npr"]
THREADS = {
    "threadweaver": 5,
    "threadweaver-conclusion": 2,
    "multiverse": 2,
    "npr": 4,
    "npr-nested": 4,
    "medverse": 3,
    "parallel_r1": 2,
    "parathinker": 2,
    "asyncthink": 3,
    "plait": 5,
    "apr-parent": 0,
    "apr-child": 0,
}
"""Forked by each trace; APR's are one text a sequence."""


def num_threads(trajectory: Trajectory) -> int:
    threads = [t for p in trajectory if isinstance(p, Block) for t in p.threads]
    threads += [p.thread for p in trajectory if isinstance(p, Spawn)]
    return len(threads) + sum(map(num_threads, threads))


@pytest.mark.parametrize("name", THREADS)
def test_a_trace_written_from_a_published_description_is_accepted_and_runs(name: str) -> None:
    text = (TRACES / f"{name}.txt").read_text(encoding="utf-8")
    cls = format_class(name.partition("-")[0])
    tokenizer = CharTokenizer(cls.tags())
    format = cls(tokenizer, **OPTIONS.get(name, {}))
    trajectory = format.read(text)
    assert num_threads(trajectory) == THREADS[name]
    assert format.read(format.write(trajectory)) == trajectory
    if name == "parallel_r1":
        # Its paths are told apart by their seeds alone: a model without chance says the same in both.
        return
    prompt = (*tokenizer.bos_ids, *tokenizer.encode("Go"))
    gold = render(trajectory, format=format, tokenizer=tokenizer, prompt_ids=prompt)

    async def main() -> Tree:
        free = Budget(max_tokens=None, max_threads=None)
        return await run(Request(prompt_ids=prompt, budget=free), engine=ScriptedEngine(script=gold), format=format)

    assert run_virtual(main) == gold


def test_a_published_call_of_sub_searches_forks() -> None:
    tokenizer = CharTokenizer(format_class("apr").tags())
    text = (TRACES / "apr-call.txt").read_text(encoding="utf-8")
    fork = open_format("apr", tokenizer).parse(tokenizer.encode(text, special=True), 0)
    assert isinstance(fork, Fork)
    child = (TRACES / "apr-child.txt").read_text(encoding="utf-8")
    told = [tokenizer.decode(branch.header_ids).removeprefix("<bos>") for branch in fork.branches]
    assert len(told) == 2
    assert child.startswith(told[0])


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a model says, and what becomes of it."""

    format: str
    said: str
    """By the root, first."""
    stop: StopReason = StopReason.STOP
    """Of the root's first call."""
    threads: int = 0
    note: str = ""
    """Stands in the note of the first call, or of the one after the join."""
    answers: dict[str, str] = field(default_factory=dict[str, str])
    """What else is said, by how the context ends."""
    budget: Budget = field(default_factory=Budget)
    options: dict[str, Any] = field(default_factory=dict[str, Any])


def weave(*outlines: str) -> str:
    lines = "".join(f"<Outline>{outline}</Outline>\n" for outline in outlines)
    return f"<Parallel>\n<Outlines>\n{lines}</Outlines>"


def plans(count: int) -> str:
    return "<guideline>\n" + "".join(f"<plan>{i}: a</plan>\n" for i in range(1, count + 1)) + "</guideline>"


S = StopReason
NODES = (
    "Moving to Node #0\nCurrent State: 9:[1, 2, 3], Operations: []\nGenerated Node #0,0: 9:[3, 3] Operation: 1+2=3\n"
)
CALL = "<Calling Sub Searches>\n{}<End Calling Sub Searches>"
SUB = "<Start Sub Search {} at level 1> Moving to Node #0,{}\n"
CASES: dict[str, Case] = {
    "numbers twice": Case(format="threadweaver", said=weave("1: a", "1: b", "2: c"), threads=2, note="outline 1 twice"),
    "numbers in another order": Case(format="threadweaver", said=weave("3: a", "1: b"), threads=2),
    "dotted numbers": Case(format="threadweaver", said=weave("1.1: a", "1.2: b"), threads=2),
    "no numbered outline": Case(format="threadweaver", said=weave("a", "b"), stop=S.MALFORMED),
    "no opening tag": Case(
        format="threadweaver", said="<Outline>1: a</Outline></Outlines>", threads=1, note="no <Outlines>"
    ),
    "an outline that is not closed": Case(
        format="threadweaver", said="<Outlines><Outline>1: a\n<Outline>2: b\n</Outlines>", threads=2
    ),
    "one outline": Case(format="threadweaver", said=weave("1: a"), threads=1),
    "two hundred outlines": Case(
        format="threadweaver",
        said=weave(*(f"{i}: a" for i in range(200))),
        stop=S.MALFORMED,
        note="max_threads_per_fork",
    ),
    "outlines and then the end": Case(format="threadweaver", said="<Outline>1: a<eos>", stop=S.EOS),
    "a thread without outlines": Case(format="threadweaver", said="<Thread>\n1: a\n</Thread><eos>", stop=S.EOS),
    "a block inside a thread": Case(
        format="threadweaver", said=weave("1: a"), threads=1, answers={"1:": f" {weave('1: b')}\n</Thread>"}
    ),
    "a thread that ends with end-of-sequence": Case(
        format="threadweaver", said=weave("1: a", "2: b"), threads=2, note="1 of 2 threads", answers={"2:": " hm<eos>"}
    ),
    "a thread that never ends": Case(
        format="threadweaver",
        said=weave("1: a", "2: b"),
        threads=2,
        note="1 of 2 threads",
        answers={"2:": " hm" * 500},
        budget=Budget(max_tokens=300),
    ),
    "blocks without end": Case(
        format="threadweaver",
        said=weave("1: a"),
        threads=5,
        answers={"</Thread>\n": f"</Parallel>{weave('1: a')}", "</Outlines>": "<eos>"},
        budget=Budget(max_threads=5),
    ),
    "a path that forks": Case(
        format="multiverse",
        said="<Parallel><Goal><Outline>1: a</Outline></Goal>",
        threads=1,
        answers={"<Path>1:": " <Parallel><Goal><Outline>1: b</Outline></Goal></Path>"},
    ),
    "six plans": Case(format="npr", said=plans(6), stop=S.MALFORMED, note="6 plans; at most 5"),
    "no plan": Case(format="npr", said=plans(0), stop=S.MALFORMED),
    "fewer than 1,024 tokens left": Case(
        format="npr", said=plans(2), stop=S.BUDGET, note="fewer than 1024", budget=Budget(max_tokens=1000)
    ),
    "guidelines six deep": Case(
        format="npr",
        said=plans(1),
        threads=5,
        answers={"<step>\n1:": f" {plans(1)}", "</guideline>": "\n</step>"},
        options={"min_tokens": 0},
        budget=Budget(max_tokens=None),
    ),
    "a call of a node that nothing generated": Case(
        format="apr", said=NODES + CALL.format(SUB.format(0, 7)), stop=S.MALFORMED, note="did not generate"
    ),
    "a call without a sub search": Case(format="apr", said=CALL.format(""), stop=S.MALFORMED),
    "the same node twice": Case(format="apr", said=NODES + CALL.format(SUB.format(0, 0) + SUB.format(1, 0)), threads=2),
    "results that the model wrote itself": Case(
        format="apr",
        said="<Sub Searches>\n<No Solution in Sub Search 0 at level 1>\n<End Sub Searches><eos>",
        stop=S.EOS,
    ),
    "a call inside a sub search": Case(
        format="apr",
        said=NODES + CALL.format(SUB.format(0, 0)),
        threads=1,
        answers={"1+2=3']": f"\n{CALL.format(SUB.format(0, 0))}<eos>"},
    ),
    "a fifth block": Case(format="parallel_r1", said="<Parallel>", threads=8, answers={"<Summary>": "<Parallel>"}),
    "a join of a thread that does not run": Case(format="asyncthink", said="<JOIN-1>", stop=S.MALFORMED),
    "a number that runs already": Case(
        format="asyncthink",
        said="<FORK-1>a</FORK-1>",
        threads=1,
        answers={"<FORK-1>a</FORK-1>": "<FORK-1>b</FORK-1>", "a": "work<RETURN>r</RETURN>"},
    ),
    "a worker that nobody waits for": Case(
        format="asyncthink",
        said="<FORK-1>a</FORK-1>",
        threads=1,
        answers={"a": "work" * 9 + "<RETURN>r</RETURN>"},
    ),
    "threads that wait for each other": Case(
        format="plait", said=weave("1(2): a", "2(1): b"), stop=S.MALFORMED, note="wait for each other"
    ),
    "a need that is not there": Case(format="plait", said=weave("1(7): a"), threads=1, note="which is not there"),
    "a need inside a race": Case(
        format="plait",
        said=weave("1: a", "2(1): b").replace("<Outlines>", "<Outlines>?"),
        stop=S.MALFORMED,
        note="in a race",
    ),
    "steps that depend on each other": Case(
        format="medverse",
        said="<Plan><Outline>1. a; Dependency: [2]</Outline><Outline>2. b; Dependency: [1]</Outline></Plan>",
        stop=S.MALFORMED,
        note="wait for each other",
    ),
}
LAST = {
    "threadweaver": "\n</Thread>",
    "plait": "\n</Thread>",
    "multiverse": "</Path>",
    "npr": "\n</step>",
    "medverse": "\n</Step>",
    "parallel_r1": "</Path>",
}


def played(case: Case) -> Tree:
    """Run a case; a thread that is told nothing else says `ok` and closes, everything else ends."""
    cls = format_class(case.format)
    tokenizer = CharTokenizer(cls.tags())
    format = cls(tokenizer, **case.options)
    headers = ("1:", "2:", "3:", "1.1:", "1.2:", "<Path>")

    def script(context: Context) -> Sequence[int]:
        read = tokenizer.decode([id for part in context if isinstance(part, tuple) for id in part])
        answers = {header: f" ok{LAST.get(case.format, '')}" for header in headers} | case.answers
        if read == "What?":
            answer = case.said
        else:
            end = max((end for end in answers if read.endswith(end)), key=len, default="")
            answer = answers.get(end, "")
        return [*tokenizer.encode(answer, special=True), *tokenizer.eos_ids]

    async def main() -> Tree:
        request = Request(prompt_ids=tuple(tokenizer.encode("What?")), budget=case.budget)
        return await run(request, engine=ScriptedEngine(script=script), format=format)

    return run_virtual(main)


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_the_table_ends_as_the_docs_say(name: str) -> None:
    case = CASES[name]
    tree = played(case)
    first = tree.segments["0:0"]
    notes = [segment.note for segment in tree.segments.values() if segment.thread == "0"]
    assert (first.stop, tree.num_threads) == (case.stop, case.threads), notes
    assert any(case.note in note for note in notes), notes
    assert tree.stop in (StopReason.EOS, StopReason.BUDGET), tree.note


def test_the_table_in_the_docs_has_the_cases_that_are_tested() -> None:
    section = DOCS.read_text(encoding="utf-8").partition("## Odd cases")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?P<case>[^|]+) \| `(?P<format>\w+)` \| (?P<outcome>[^|]+) \|", section, re.MULTILINE)
    assert {(case, format) for case, format, _ in rows} == {(name, case.format) for name, case in CASES.items()}
    for name, _, outcome in rows:
        declined = CASES[name].stop in (StopReason.MALFORMED, StopReason.BUDGET)
        assert outcome.startswith(f"declined, `{CASES[name].stop}`" if declined else ("runs", "text")), name
