"""A model without weights: it says the gold trace of every problem. What training aims at, and what tests run on.

The ceiling of every measure: no model trained on these traces can need fewer steps on them. It computes answers with
the families' own arithmetic, so it is never what answers a question unless it is asked for by name.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from plait import tasks
from plait.budget import fits
from plait.engines.scripted import Script
from plait.formats import TrajectoryFormat, format_class, open_format, render
from plait.models.model import Model, prompt_ids
from plait.tasks.vocabulary import tokenizer_for
from plait.tokenizer import Tokenizer
from plait.tree import Tree
from plait.types import Budget, Context, Merge

NAME = "gold"
PLACE = re.compile("[a-z]")
"""What `tasks.spelled` adds to a prompt."""


def gold_model(format: str | None = None, *, traces: Literal["parallel", "serial"] = "parallel") -> Model:
    """Gold traces in a format, as a model for the scripted engine.

    Raises:
        RequestError: No format has this name.
    """
    format = format or ("multiverse" if traces == "parallel" else "sequential")
    join = format_class(format).join_kind
    parallel = traces == "parallel" and join != "none"
    return Model(
        name=f"{NAME}-{format}",
        path=None,
        digest="",
        format_name=format,
        join=join,
        tokenizer=tokenizer_for("compact", format),
        max_context=1 << 20,
        num_weights=0,
        dtype="",
        train={"data": {"mixture": dict.fromkeys(tasks.FAMILIES, 1.0)}},
        scores={},
        script=gold_script(format, parallel=parallel),
    )


def gold_script(format: str, *, parallel: bool) -> Script:
    """What the scripted engine says: the ids that the prompt's gold trace has after a context."""
    tokenizer = tokenizer_for("compact", format)
    opened = open_format(format, tokenizer)

    @lru_cache(maxsize=256)
    def said(prompt: str, limits: Budget | None) -> dict[Context, list[int]]:
        problem = tasks.parse(prompt)
        tree = gold_tree(problem, format=opened, tokenizer=tokenizer, parallel=parallel, budget=limits)
        out: dict[Context, list[int]] = {}
        for segment in tree.segments.values():
            out.setdefault(tree.context(segment.id), segment.sampled_ids)
        return out

    def script(context: Context) -> list[int]:
        first = context[0]
        assert not isinstance(first, Merge), "a context begins with its prompt"
        limits, asked = opened.conditioned(first)
        text = PLACE.sub("", tokenizer.decode(asked[len(tokenizer.bos_ids) :]))
        # A budget can lead where no gold trace goes: then there is nothing to say.
        known = said(f"{text.partition('?')[0]}?", None if asked == first else limits)
        return known.get(context, list(tokenizer.eos_ids))

    return script


def gold_tree(
    problem: tasks.Problem,
    *,
    format: TrajectoryFormat,
    tokenizer: Tokenizer,
    parallel: bool = True,
    budget: Budget | None = None,
) -> Tree:
    """The tree of a problem's gold solution in a format.

    Args:
        problem: What is solved.
        format, tokenizer: What it is written in.
        parallel: False: on one line.
        budget: Is said in the prompt, and kept where it can be: the solution with the most threads that fits, by
            `plait.budget.fits`, else the one on one line. None: nothing is said, and as many threads as help.

    Raises:
        RequestError: The format has no form for a part of it, or for a budget.
    """
    ids = prompt_ids(tokenizer, problem.prompt)
    plait, fresh = format.name == "plait", format.name == "apr"

    def solved(max_threads: int | None, *, parallel: bool) -> Tree:
        trace = tasks.gold(problem, parallel=parallel, max_threads=max_threads, plait=plait, fresh=fresh)
        return render(trace, format=format, tokenizer=tokenizer, prompt_ids=ids)

    if budget is None:
        return solved(None, parallel=parallel)
    ids = format.condition(ids, budget)
    most = [limit for limit in (budget.max_threads, budget.max_threads_per_fork) if limit is not None]
    threads = min(most) if format.name == "apr" and most else budget.max_threads
    while parallel and threads != 0:
        tree = solved(threads, parallel=True)
        if fits(tree, budget) or not tree.num_threads:
            return tree
        threads = tree.num_threads - 1
    return solved(0, parallel=False)
