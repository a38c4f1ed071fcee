"""Several unrelated questions in one prompt: a thread for each where they are long, in line where they are short."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from plait.errors import RequestError
from plait.formats.base import Block, Trajectory
from plait.tasks.base import Problem
from plait.tasks.notation import parse_expression, spelled
from plait.tasks.terms import Term, as_term, number
from plait.tasks.worked import answer, block_cost, worth


@dataclass(frozen=True, kw_only=True)
class Bundle:
    name: ClassVar = "bundle"
    about: ClassVar = (
        "2 to 4 questions at once: products of 3 x 2, 2 x 3 or (up to three questions) 3 x 3 digits, the same for all, "
        "where two numbers in brackets may stand for the first; short ones in between: sums of two numbers of up to 3 "
        "digits, numbers of up to 2 digits times one digit: What is 347 * 52, 88 + 977 and 612 * 34?"
    )

    questions: Sequence[float] = (0, 15, 25, 60)
    """How often there are 1, 2, 3, ... questions; at least 2."""
    kinds: Sequence[float] = (82, 5, 13)
    """How often they are all long, mixed, and all short."""

    def sample(self, rng: random.Random) -> Problem:
        (num_questions,) = rng.choices(range(1, len(self.questions) + 1), self.questions)
        kind = rng.choices(("long", "mixed", "short"), self.kinds)[0]
        size = rng.choice(((3, 2), (3, 2), (2, 3)) if num_questions == 4 else ((3, 2), (2, 3), (3, 3)))
        return self._problem(tuple(self._question(rng, kind, size) for _ in range(num_questions)))

    def _question(self, rng: random.Random, kind: str, size: tuple[int, int]) -> Term:
        if kind == "mixed":
            kind = rng.choice(("long", "short"))
        if kind == "long":
            num_addends = 2 if rng.random() < 0.08 else 1
            return Term(tuple(number(rng, size[0]) for _ in range(num_addends)), number(rng, size[1]))
        if rng.random() < 0.5:
            return Term(tuple(number(rng, rng.choice((1, 2, 3))) for _ in range(2)), None)
        return Term((number(rng, rng.choice((1, 2))),), number(rng, 1))

    def _problem(self, questions: tuple[Term, ...]) -> Problem:
        costs = [q.cost() + q.answer_cost() - 1 for q in questions]
        tail = 1 + sum(q.answer_cost() - 1 for q in questions)
        serial = sum(costs) + len(costs) - 1 + tail
        parallel = block_cost([q.label for q in questions], costs) + tail
        spoken = [q.text.replace("*", " * ").replace("+", " + ") for q in questions]
        return Problem(
            family=self.name,
            prompt=";".join(q.text for q in questions) + "?",
            question=f"What is {', '.join(spoken[:-1])} and {spoken[-1]}?",
            answer=";".join(str(q.value) for q in questions),
            forks=worth(serial, parallel),
            shape={"questions": len(questions), "serial_cost": serial, "parallel_cost": parallel},
        )

    def _questions(self, text: str) -> list[Term | None]:
        return [as_term(parse_expression(q)) for q in text.rstrip("?").split(";")]

    def parse(self, text: str) -> Problem | None:
        if ";" not in text:
            return None
        questions = self._questions(text)
        known = [q for q in questions if q is not None]
        long = [q for q in known if not _is_short(q)]
        sizes = {(len(str(n)), len(str(q.factor))) for q in long for n in q.addends}
        inside = (
            len(known) == len(questions) <= 4
            and all(n >= 2 for q in known for n in (*q.addends, q.factor or 2))
            and all(len(q.addends) <= 2 and q.factor is not None for q in long)
            and len(sizes) <= 1
            and sizes <= ({(3, 2), (2, 3)} if len(known) == 4 else {(3, 2), (2, 3), (3, 3)})
        )
        if not inside:
            raise RequestError(f"{text} is outside the trained range: {self.about}")
        return self._problem(tuple(known))

    def grade(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer

    def _known(self, problem: Problem) -> list[Term]:
        return [q for q in self._questions(problem.prompt) if q is not None]

    def told(self, problem: Problem) -> tuple[tuple[str, str], ...]:
        return tuple((f"{spelled(f'{q.text}?').rstrip('?')}=", f"={q.value}") for q in self._known(problem))

    def serial(self, problem: Problem) -> Trajectory:
        return (";".join(map(_solved, self._known(problem))), *answer(problem.answer))

    def parallel(self, problem: Problem) -> Trajectory:
        questions = self._known(problem)
        block = Block(outlines=tuple(q.label for q in questions), threads=tuple((_solved(q),) for q in questions))
        return (block, *answer(problem.answer))


def _is_short(question: Term) -> bool:
    if question.factor is None:
        return len(question.addends) == 2 and max(question.addends) <= 999
    return len(question.addends) == 1 and question.addends[0] <= 99 and question.factor <= 9


def _solved(question: Term) -> str:
    """A question on one line; ends in its answer as it will be given: the parent only copies."""
    return f"{question.work()}={question.value}"
