"""The format contract on all formats of ours, and on formats that break it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from plait.errors import FormatProtocolError, RequestError
from plait.formats import FORMATS, Block, Fork, Malformed, Return, ThreadOutcome, format_class, open_format
from plait.formats.base import Join
from plait.formats.convert import unnested
from plait.formats.text import CharTokenizer
from plait.formats.threadweaver import ThreadWeaver
from plait.tasks.vocabulary import TOKENIZER
from plait.testing import FORMAT_CLAUSES, check_format
from plait.testing.formats import MakeFormat
from plait.testing.trajectories import Trajectories

OPTIONS: dict[str, dict[str, Any]] = {"npr": {"min_tokens": 0}, "parathinker": {"num_paths": 3}}
APART = {"sequential": {"F9"}, "apr": {"F2", "F6"}, "asyncthink": {"F6"}}


def maker(name: str) -> MakeFormat:
    return partial(format_class(name), **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_keeps_the_contract(name: str) -> None:
    checked = check_format(maker(name), tags=format_class(name).tags(), examples=8, mutations=60)
    assert set(checked) == set(FORMAT_CLAUSES) - APART.get(name, set())


def test_the_older_form_of_threadweaver_keeps_it_too() -> None:
    check_format(partial(ThreadWeaver, conclusion=True), tags=ThreadWeaver.tags(), examples=4, mutations=20)


@pytest.mark.parametrize("name", ["threadweaver", "plait", "multiverse"])
def test_formats_keep_it_in_the_vocabulary_of_the_embedded_models(name: str) -> None:
    check_format(maker(name), tokenizer=TOKENIZER, tags=(), alphabet="12+3 ", examples=4, mutations=20)


class Unclosed(ThreadWeaver):
    """Leaves threads open."""

    def closer_ids(self, outcome: ThreadOutcome) -> tuple[int, ...]:
        return super().closer_ids(outcome)[:1]


class Peeking(ThreadWeaver):
    """The second thread is given a hint that its parent never wrote."""

    def parse(self, sampled_ids: Sequence[int], depth: int) -> Fork | Malformed | None:
        fork = super().parse(sampled_ids, depth)
        if isinstance(fork, Malformed):
            raise ValueError("no block")
        return fork


class Forgetful(ThreadWeaver):
    """The parent never reads the last thread."""

    def join(self, threads: Sequence[ThreadOutcome]) -> Join:
        return super().join(threads[:-1] or threads)


class Loose(ThreadWeaver):
    """Writes a blank that it does not read."""

    def write(self, trajectory: Any) -> str:
        return super().write(trajectory) + " "


@pytest.mark.parametrize(("broken", "clause"), [(Unclosed, "F8"), (Peeking, "F5"), (Forgetful, "F6"), (Loose, "F2")])
def test_a_format_that_breaks_a_clause_is_told_which(broken: type[ThreadWeaver], clause: str) -> None:
    with pytest.raises(FormatProtocolError, match=f"^{clause} "):
        check_format(broken, examples=8, mutations=200)


def test_a_clause_that_is_not_there_is_refused() -> None:
    with pytest.raises(RequestError, match="did you mean 'F1'"):
        check_format(ThreadWeaver, clauses=["F11"])
    assert check_format(ThreadWeaver, clauses=["F7", "F9"], examples=1) == ["F7", "F9"]


@pytest.mark.parametrize("seed", range(12))
def test_nested_blocks_become_threads_that_need_each_other(seed: int) -> None:
    tokenizer = CharTokenizer(format_class("plait").tags())
    format = open_format("plait", tokenizer)
    prompt = tokenizer.encode("a")
    drawn = Trajectories(format, tokenizer, prompt_ids=prompt)
    trajectory = unnested(drawn.draw(random.Random(seed), whole=seed % 2 == 0))
    assert format.read(format.write(trajectory)) == trajectory
    for part in trajectory:
        for thread in part.threads if isinstance(part, Block) and not part.race else ():
            inner = [p for p in thread if isinstance(p, Block)]
            assert len(inner) != 1 or inner[0].race


def test_what_nested_threads_did_is_read_by_those_that_need_them() -> None:
    inner = Block(("x", "y"), (("1", Return("2")), ("3",)))
    nested = (Block(("a", "b"), (("p", inner, "q", Return("r")), ("s",))), "t")
    block, rest = unnested(nested)
    assert isinstance(block, Block)
    assert (block.outlines, block.needs, rest) == (("x", "y", "a", "b"), ((), (), (0, 1), ()), "t")
    assert block.threads == (("1", Return("2")), ("3",), ("pq", Return("r")), ("s",))
