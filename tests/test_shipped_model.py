"""The weights that ship, through the real engine: they decide, split, join and mostly answer. Floors, not scores: the
scores are in the model's card.
"""

from __future__ import annotations

from itertools import islice

import anyio
import pytest
from click.testing import CliRunner

import plait
from plait import tasks
from plait.bench import Record, evaluate
from plait.cli import main

FLOORS = {
    "long_multiplication": 0.9,
    "product": 0.85,
    "expression": 0.85,
    "bundle": 0.85,
    "countdown": 0.75,
    "control": 0.9,
}


def scored(name: str, family: str, n: int = 20) -> list[Record]:
    model = plait.load_model(name)

    async def main() -> list[Record]:
        async with model.open_engine(cells=16384, max_seqs=64) as engine:
            return await evaluate(
                list(islice(tasks.problems(family, seed=3, split="held_out"), n)),
                engine=engine,
                format=model.format,
                tokenizer=model.tokenizer,
                model=model.id,
                concurrency=8,
            )

    return anyio.run(main)


@pytest.mark.parametrize("family", sorted(FLOORS))
def test_the_adaptive_model_forks_where_it_should_and_answers(family: str) -> None:
    records = scored("plait-tiny", family)
    assert sum(r.right for r in records) / len(records) >= FLOORS[family]
    assert sum(r.decision_right for r in records) / len(records) >= 0.95
    for r in records:
        assert r.critical_path_tokens < r.total_tokens if r.forked else r.critical_path_tokens == r.total_tokens
        assert r.reread_tokens == 0, "a merge computes nothing again"


@pytest.mark.parametrize("family", ["long_multiplication", "control"])
def test_the_twin_never_forks(family: str) -> None:
    records = scored("plait-tiny-sequential", family)
    assert not any(r.forked for r in records)
    assert sum(r.right for r in records) / len(records) >= 0.8


def test_without_threads_in_the_budget_the_model_still_ends() -> None:
    model = plait.load_model()

    async def main() -> plait.Tree:
        async with model.open_engine() as engine:
            request = model.request("What is 4631 * 8274?", budget=plait.Budget(max_threads=0, max_tokens=600))
            return await plait.run(request, engine=engine, format=model.format)

    tree = anyio.run(main)
    assert tree.num_forks == 0
    assert tree.stop in (plait.StopReason.EOS, plait.StopReason.BUDGET)


def test_without_an_answer_for_lack_of_threads_the_twin_is_named() -> None:
    done = CliRunner().invoke(main, ["solve", "What is 347 * 526?", "--max-threads", "0"])
    assert "no answer" in done.stdout
    assert "--model plait-tiny-sequential" in done.stdout
