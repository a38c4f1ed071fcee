"""Runs of every kind that the viewer has to draw, made by the runtime itself: each is short and says what it shows."""

from __future__ import annotations

from collections.abc import Sequence

from plait.engines.scripted import ScriptedEngine
from plait.events import Event
from plait.formats import format_class, open_format
from plait.formats.text import CharTokenizer
from plait.session import open_run
from plait.testing.clock import run_virtual
from plait.types import Budget, Context, Request

PROMPT = "What?"
END = "</Thread>\n"
"""How what a parent reads at the join ends, in the plait format."""


def block(*outlines: str, race: bool = False) -> str:
    lines = "".join(f"<Outline>{outline}</Outline>\n" for outline in outlines)
    return f"<Parallel>\n<Outlines>{'?' if race else ''}\n{lines}</Outlines>"


def thread(number: int, text: str = "", *, concludes: str = "", closed: bool = True) -> tuple[str, str]:
    """What thread `number` of the outermost block says."""
    told = f"\n<Conclusion>{concludes}</Conclusion>" if concludes else ""
    return f"</Outlines>\n<Thread>\n{number}:", f" {text}{told}" + ("\n</Thread>" if closed else "<eos>")


def played(
    kind: str,
    says: dict[str, str],
    *,
    format: str = "plait",
    budget: Budget | None = None,
    most: int | None = None,
    delay_s: float = 0.004,
) -> list[Event]:
    """Events of a run whose model answers a context by the longest of these ends that it has.

    Args:
        kind: What the run shows; its question.
        most: Leave the run after so many events.
    """
    tokenizer = CharTokenizer(format_class(format).tags())
    opened = open_format(format, tokenizer)

    def script(context: Context) -> Sequence[int]:
        read = tokenizer.decode([id for part in context if isinstance(part, tuple) for id in part])
        end = max((end for end in says if read.endswith(end)), key=len)
        return tokenizer.encode(says[end], special=True)

    async def main() -> list[Event]:
        engine = ScriptedEngine(script=script, delay_s=delay_s, chunk_size=4, timing_seed=7)
        request = Request(prompt_ids=tuple(tokenizer.encode(PROMPT)), budget=budget or Budget())
        tokens = [*tokenizer.control, *map(chr, range(128))]
        about = {"tokens": tokens, "control": list(tokenizer.control), "bos": "<bos>", "eos": "<eos>"}
        meta = {"question": kind, "model": "scripted", "tokenizer": about}
        events: list[Event] = []
        async with open_run(request, engine=engine, format=opened, meta=meta) as run:
            async for event in run:
                events.append(event)
                if len(events) == most:
                    break
        return [*events, *run.pending()]

    return run_virtual(main)


def odd_runs() -> dict[str, list[Event]]:
    """A run for each kind, by the kind's name."""
    inner = block("1: left", "2: right")
    nested = "\n<Thread>\n1: " + inner + "\n<Thread>\n"
    race = {
        PROMPT: "Search both ways. " + block("1: upwards", "2: downwards", "3: from the middle", race=True),
        **dict(
            [
                thread(1, "try 1, no; try 2, no; " * 4, concludes="7"),
                thread(2, "nothing here"),
                thread(3, "try 5, no; try 7, yes", concludes="7"),
            ]
        ),
        END: "</Parallel>It is 7.<eos>",
    }
    return {
        "nested": played(
            "nested threads",
            {
                PROMPT: "Two parts. " + block("1: the hard part", "2: the easy part"),
                "</Outlines>\n<Thread>\n1:": " " + inner,
                f"{nested}1:": " one half of it\n</Thread>",
                f"{nested}2:": " the other half, which is longer\n</Thread>",
                "</Outlines>\n<Thread>\n2:": " easy\n</Thread>",
                END: "</Parallel>so\n</Thread>",
                "easy\n</Thread>\n": "</Parallel>Both are done.<eos>",
            },
        ),
        "dependencies": played(
            "a thread that needs another",
            {
                PROMPT: block("1(2): use it", "2: find it", "3: something else"),
                **dict([thread(2, "long work " * 6, concludes="42"), thread(3, "else " * 9)]),
                "</Outlines>\n<Thread>\n2: 42\n</Thread><Thread>\n1:": " with 42 it is 84\n</Thread>",
                END: "</Parallel>84<eos>",
            },
        ),
        "race": played("a race that the third thread wins", race),
        "nested race": played(
            "a race whose losers had forked",
            race
            | {
                "</Outlines>\n<Thread>\n1:": " " + inner,
                f"{nested}1:": " " + "left " * 20 + "\n</Thread>",
                f"{nested}2:": " right\n</Thread>",
            },
        ),
        "messages": played(
            "messages, read where they are asked for",
            {
                PROMPT: "I ask. <FORK-1>one?</FORK-1>",
                "</FORK-1>": " and <FORK-2>two?</FORK-2>",
                "</FORK-2>": " I go on meanwhile. <JOIN-2>",
                "one?": "working " * 20 + "<RETURN>1</RETURN>",
                "two?": "quick<RETURN>2</RETURN>",
                "</RETURN>\n": "Enough: 2<eos>",
            },
            format="asyncthink",
        ),
        "budget": played(
            "threads that meet their limit, and a fork that is declined",
            {
                PROMPT: block("1: short", "2: long", "3: endless"),
                **dict([thread(1, "ok"), thread(2, "on and on " * 30), thread(3, "and on " * 40)]),
                END: "</Parallel>" + block("1: more", "2: still more"),
                "</Outlines>": "no room for that<eos>",
            },
            budget=Budget(max_thread_tokens=180, max_threads=3),
        ),
        "out of tokens": played(
            "a run that its budget ends",
            {
                PROMPT: block("1: a", "2: b"),
                **dict([thread(1, "a " * 60), thread(2, "b " * 60)]),
                END: "</Parallel><eos>",
            },
            budget=Budget(max_tokens=120),
        ),
        "malformed": played(
            "a block that cannot be read, then threads that do not close",
            {
                PROMPT: block("1(2): a", "2(1): b"),
                "</Outlines>": " so again " + block("1: a", "2: b "),
                **dict([thread(1, "says a", closed=False), thread(2, "<Outline>lost", closed=False)]),
                END: "</Parallel>done<eos>",
            },
        ),
        "left": played("a run that was left", race, most=40),
        "one line": played("a run that never forks", {PROMPT: "There is nothing to split here.<eos>"}),
        "says nothing": played("a run that says nothing", {PROMPT: "<eos>"}),
    }
