"""Hundreds of runs at once on one engine, each with a budget of its own; the throughput, and what the budgets ended.

    python examples/many_runs.py [RUNS]

The engine batches the threads of all runs into the same steps; a run's result does not depend on what runs beside it.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from itertools import islice

import anyio

import plait
from plait import tasks

AT_ONCE = 64
BUDGETS = {
    "no limits to speak of": plait.Budget(max_tokens=1500),
    "400 tokens in all": plait.Budget(max_tokens=400),
    "80 tokens a thread": plait.Budget(max_tokens=1500, max_thread_tokens=80),
}


async def main(runs: int = 300) -> None:
    model = plait.load_model()
    places = anyio.CapacityLimiter(AT_ONCE)
    right, cut, tokens = Counter[str](), Counter[str](), Counter[str]()

    async def one(problem: tasks.Problem, name: str) -> None:
        async with places:
            request = model.request(problem.question, budget=BUDGETS[name])
            tree = await plait.run(request, engine=engine, format=model.format)
        right[name] += tasks.grade(problem, model.text(tree))
        # A limit never fails a run: the tree says which threads it ended, and the join goes on with what they have.
        cut[name] += any(segment.stop is plait.StopReason.BUDGET for segment in tree.segments.values())
        tokens[name] += tree.num_sampled

    names = [list(BUDGETS)[number % len(BUDGETS)] for number in range(runs)]
    problems = islice(tasks.problems("bundle", seed=0, split="held_out"), runs)
    async with model.open_engine() as engine:
        started = time.perf_counter()
        async with anyio.create_task_group() as group:
            for problem, name in zip(problems, names, strict=True):
                group.start_soon(one, problem, name)
        seconds, steps = time.perf_counter() - started, engine.stats().steps
    for name, count in Counter(names).items():
        print(f"{name:>21}: {count} runs, {right[name]} right, {cut[name]} met their limit, {tokens[name]} tokens")
    total = tokens.total()
    print(f"{runs / seconds:.0f} runs and {total / seconds:.0f} tokens a second, {total / steps:.1f} tokens a step")


if __name__ == "__main__":
    anyio.run(lambda: main(*map(int, sys.argv[1:])))
