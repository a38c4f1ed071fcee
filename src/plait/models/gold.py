"""A model without weights: it says the gold trace of every problem. What training aims at, and what tests run on.

The ceiling of every measure: no model trained on these traces can need fewer steps on them. It computes answers with
the families' own arithmetic, so it is never what answers a question unless it is asked for by name.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from plait import tasks
from plait.engines.scripted import Script
from plait.formats import format_class, open_format, render
from plait.models.model import Model, prompt_ids
from plait.tasks.vocabulary import TOKENIZER
from plait.tree import Tree
from plait.types import Context, Merge

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
        tokenizer=TOKENIZER,
        max_context=1 << 20,
        num_weights=0,
        dtype="",
        train={"data": {"mixture": dict.fromkeys(tasks.FAMILIES, 1.0)}},
        scores={},
        script=gold_script(format, parallel=parallel),
    )


def gold_script(format: str, *, parallel: bool) -> Script:
    """What the scripted engine says: the ids that the prompt's gold trace has after a context."""
    opened = open_format(format, TOKENIZER)

    @lru_cache(maxsize=256)
    def said(prompt: str) -> dict[Context, list[int]]:
        problem = tasks.parse(prompt)
        ids = prompt_ids(TOKENIZER, problem.prompt)
        trace = tasks.gold(problem, parallel=parallel)
        tree: Tree = render(trace, format=opened, tokenizer=TOKENIZER, prompt_ids=ids)
        out: dict[Context, list[int]] = {}
        for segment in tree.segments.values():
            out.setdefault(tree.context(segment.id), segment.sampled_ids)
        return out

    def script(context: Context) -> list[int]:
        first = context[0]
        assert not isinstance(first, Merge), "a context begins with its prompt"
        text = PLACE.sub("", TOKENIZER.decode(first[len(TOKENIZER.bos_ids) :]))
        # A budget can lead where no gold trace goes: then there is nothing to say.
        return said(f"{text.partition('?')[0]}?").get(context, list(TOKENIZER.eos_ids))

    return script
