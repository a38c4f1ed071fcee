"""A family of problems of one's own: questions, exact answers, and gold solutions to train a model on.

    python examples/your_own_task.py

The largest number of several rows: one line of reasoning goes through row after row, threads through a row each.
Checked below is what makes it fit for training: in each format both solutions are what the runtime makes of them, token
for token, they earn full marks, and threads are asked for where they make the critical path shorter.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import ClassVar

import anyio

import plait
from plait import tasks
from plait.formats import Block, Trajectory
from plait.models import gold_tree, response_text
from plait.tasks.vocabulary import TOKENIZER


@dataclass(frozen=True, kw_only=True)
class Largest:
    name: ClassVar = "largest"
    about: ClassVar = "1 to 5 rows of 4 to 8 two-digit numbers: What is the largest number of 17,25,22,31;40,18,11,52?"

    rows: tuple[int, int] = (1, 5)
    """Fewest and most rows. Fields are knobs: `tasks.family("largest", {"rows": [2, 9]})`."""

    def sample(self, rng: random.Random) -> tasks.Problem:
        rows = [rng.choices(range(10, 100), k=rng.randint(4, 8)) for _ in range(rng.randint(*self.rows))]
        return self.problem(";".join(",".join(map(str, row)) for row in rows))

    def parse(self, text: str) -> tasks.Problem | None:
        row = r"\d\d(?:,\d\d){3,7}"
        found = re.fullmatch(rf"(?:What is the largest number of )?({row}(?:;{row}){{,4}})\?", text.strip())
        return self.problem(found[1]) if found else None

    def problem(self, rows: str) -> tasks.Problem:
        prompt, most = f"{rows}?", max(map(int, re.split("[,;]", rows)))
        question, forks = f"What is the largest number of {prompt}", rows.count(";") > 1
        return tasks.Problem(family=self.name, prompt=prompt, question=question, answer=str(most), forks=forks)

    def grade(self, problem: tasks.Problem, answer: str) -> bool:
        return answer == problem.answer

    def serial(self, problem: tasks.Problem) -> Trajectory:
        return ("\n".join(map(walk, rows_of(problem))) + end(problem),)

    def parallel(self, problem: tasks.Problem) -> Trajectory:
        rows = rows_of(problem)
        outlines = tuple(str(row[0]) for row in rows)
        return (Block(outlines=outlines, threads=tuple((walk(row),) for row in rows)), end(problem))


def rows_of(problem: tasks.Problem) -> list[list[int]]:
    return [[int(number) for number in row.split(",")] for row in problem.prompt.rstrip("?").split(";")]


def walk(row: list[int]) -> str:
    """Number after number beside the largest so far."""
    steps = zip(accumulate(row, max), row[1:], strict=False)
    return "".join(f"{most}{'<' if number > most else '>'}{number};" for most, number in steps) + f"~{max(row)}"


def end(problem: tasks.Problem) -> str:
    return f"\n{walk([max(row) for row in rows_of(problem)])}\nAnswer: {problem.answer}"


async def check(problem: tasks.Problem, format: plait.TrajectoryFormat, *, parallel: bool) -> int:
    """The critical path of a gold solution that passed."""
    tree = gold_tree(problem, format=format, tokenizer=TOKENIZER, parallel=parallel)
    request = plait.Request(prompt_ids=tree.segments["0:0"].forced_ids)
    run = await plait.run(request, engine=plait.open_engine("scripted", script=tree), format=format)
    assert run == tree, "the runtime makes something else of it"
    assert tasks.grade(problem, response_text(run, TOKENIZER)), "it is not right"
    return run.critical_path()


async def main(examples: int = 40) -> None:
    tasks.TASKS.add("largest", Largest)  # In this process; `pyproject.toml` beside this file names it everywhere.
    problems = list(islice(tasks.problems("largest", seed=0, split="train"), examples))
    for name in ("multiverse", "threadweaver"):
        format = plait.open_format(name, TOKENIZER)
        alone = [await check(problem, format, parallel=False) for problem in problems]
        beside = [await check(problem, format, parallel=True) for problem in problems]
        assert all(b < a for p, a, b in zip(problems, alone, beside, strict=True) if p.forks), "a fork does not pay"
        print(
            f"{name}: {sum(p.forks for p in problems)} of {examples} fork, {sum(alone) / sum(beside):.2f}x fewer steps"
        )


if __name__ == "__main__":
    anyio.run(main)
