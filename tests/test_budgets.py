"""Budgets: what fits one, what a prompt says of it, and gold traces that keep what their prompt says."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from plait import tasks
from plait.budget import fits
from plait.cli import main as cli
from plait.engines.scripted import ScriptedEngine
from plait.errors import EngineError, RequestError
from plait.formats import BudgetLevels, open_format
from plait.models import gold_model, gold_tree
from plait.session import run
from plait.tasks.vocabulary import TOKENIZER
from plait.testing.clock import run_virtual
from plait.testing.strategies import Program, budgets, formats, programs
from plait.train.data import BudgetConfig, gold_source
from plait.tree import Tree
from plait.types import Budget, StopReason

CUT = (StopReason.BUDGET, StopReason.MALFORMED)


@settings(max_examples=60)
@given(program=programs(format=formats()), budget=budgets())
def test_a_tree_fits_a_budget_if_a_run_within_it_gives_that_tree(program: Program, budget: Budget) -> None:
    free = replace(
        program,
        max_context=4096,
        request=replace(program.request, budget=Budget(max_threads=40, max_tokens=400, max_depth=3)),
    )
    tree, _, _ = free.run()
    if any(segment.stop in CUT for segment in tree.segments.values()):
        return

    async def again() -> Tree:
        limits = replace(free.request, budget=budget)
        return await run(limits, engine=ScriptedEngine(script=tree), format=program.format)

    try:
        told = run_virtual(again)
    except EngineError:
        # What is said after another outcome is not in the tree.
        told = None
    assert fits(tree, budget) == (told == tree)


@given(
    threads=st.none() | st.integers(0, 70),
    tokens=st.none() | st.integers(1, 9000),
    levels=st.none() | st.builds(BudgetLevels, threads=st.just((0, 2, 8)), tokens=st.just((256, 1024))),
)
def test_a_prompt_never_promises_more_than_there_is(
    threads: int | None, tokens: int | None, levels: BudgetLevels | None
) -> None:
    format = open_format("plait", TOKENIZER, levels=levels)
    prompt = (*TOKENIZER.bos_ids, *TOKENIZER.encode("1+2?"))
    said, rest = format.conditioned(format.condition(prompt, Budget(max_threads=threads, max_tokens=tokens)))
    assert rest == prompt
    for limit, told in ((threads, said.max_threads), (tokens, said.max_tokens)):
        assert limit is None or (told is not None and told <= limit)
    if levels is not None:
        assert said.max_threads in levels.threads
        assert said.max_tokens in levels.tokens or (tokens or 0) < 256


@pytest.mark.parametrize("threads", [0, 1, 2, 4, 64])
@pytest.mark.parametrize("tokens", [150, 500, 4000])
@pytest.mark.parametrize("family", ["long_multiplication", "expression", "countdown"])
def test_a_gold_trace_keeps_the_budget_that_its_prompt_says(family: str, threads: int, tokens: int) -> None:
    format = open_format("plait", TOKENIZER)
    rng = random.Random(threads * tokens)
    budget = Budget(max_threads=threads, max_tokens=tokens)
    for _ in range(3):
        problem = tasks.sample(family, rng, "train")
        tree = gold_tree(problem, format=format, tokenizer=TOKENIZER, budget=budget)
        text = TOKENIZER.decode(tree.segments["0:0"].forced_ids)
        assert text.startswith(f"<bos>!{1 << threads.bit_length() - 1 if threads else 0},")
        assert fits(tree, budget) or tree.num_threads == 0
        assert tree.num_threads <= threads


def test_the_runtime_gives_the_gold_trace_of_the_budget_in_the_prompt() -> None:
    model = gold_model("plait")

    async def answered(threads: int) -> Tree:
        request = model.request("What is 4631 * 8274?", budget=Budget(max_threads=threads), conditioned=True)
        return await run(request, engine=ScriptedEngine(script=model.script), format=model.format)

    for threads, wide in ((2, False), (64, True)):
        tree = run_virtual(answered, threads)
        assert (tree.num_threads > 0, tree.stop) == (wide, StopReason.EOS)
        assert model.answer(tree) == str(4631 * 8274)
        assert TOKENIZER.decode(tree.segments["0:0"].forced_ids).startswith(f"<bos>!{threads},4096!")


def test_solve_says_the_budget_in_the_prompt() -> None:
    question = "What is 4631 * 8274?"
    told = ["solve", question, "--engine", "scripted", "--format", "plait", "--max-threads", "4", "--json"]
    results = [json.loads(CliRunner().invoke(cli, [*told, *more]).stdout) for more in ([], ["--conditioned"])]
    assert results[1]["usage"]["prompt_tokens"] == results[0]["usage"]["prompt_tokens"] + len("!4,4096!")
    assert results[1]["threads"] == 4
    refused = CliRunner().invoke(cli, ["solve", question, "--conditioned"])
    assert refused.exit_code == 2
    assert "was not trained to read a budget" in refused.stderr


def test_a_budget_that_no_prompt_can_say_is_refused() -> None:
    with pytest.raises(RequestError, match="no way to write a budget"):
        gold_tree(
            tasks.parse("2*3+4*5?"), format=open_format("multiverse", TOKENIZER), tokenizer=TOKENIZER, budget=Budget()
        )


def test_weights_say_what_they_were_trained_to_read() -> None:
    data = {"budget": {"threads": [0, 4], "tokens": [256, 2048], "share": 0.5}}
    model = replace(gold_model("plait"), train={"data": data})
    assert model.levels == BudgetLevels(threads=(0, 4), tokens=(256, 2048))
    request = model.request("What is 12 * 34?", budget=Budget(max_threads=7, max_tokens=None))
    assert request.conditioned
    assert TOKENIZER.decode(model.format.condition(request.prompt_ids, request.budget)).startswith("<bos>!4,2048!")
    assert not model.request("What is 12 * 34?", conditioned=False).conditioned
    assert not gold_model("plait").request("What is 12 * 34?").conditioned


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_training_data_says_budgets_that_its_traces_keep(share: float) -> None:
    config = BudgetConfig(threads=(0, 2, 4, 8), tokens=(128, 256, 1024, 4096), share=share)
    format = open_format("plait", TOKENIZER)
    said: list[Budget] = []
    draw = gold_source("plait", traces="parallel", budget=config)
    for seed in range(60):
        tree = draw(("expression", "countdown", "bundle")[seed % 3], random.Random(seed), "train")
        limits, rest = format.conditioned(tree.segments["0:0"].forced_ids)
        if rest != tree.segments["0:0"].forced_ids:
            said.append(limits)
            assert fits(tree, limits)
            assert limits.max_threads in config.threads
            assert limits.max_tokens in config.tokens
    assert {limits.max_threads for limits in said} == {0, 2, 4, 8}
    assert (len(said) == 60) == (share == 1.0)


def test_a_budget_that_is_too_small_for_one_line_is_raised_to_one_that_is_not() -> None:
    draw = gold_source("plait", traces="serial", budget=BudgetConfig(tokens=(16,)))
    tree = draw("long_multiplication", random.Random(1), "train")
    limits, _ = open_format("plait", TOKENIZER).conditioned(tree.segments["0:0"].forced_ids)
    assert limits.max_tokens is not None
    assert limits.max_tokens // 2 < tree.num_sampled <= limits.max_tokens
