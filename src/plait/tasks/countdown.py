"""Countdown: combine all numbers with + - * / to make a target. Threads are the choices of the first pair.

Sized to what trains on a CPU: two or three numbers, every intermediate result from 1 to 99. A thread tries every
operation on its pair, then every operation of the result with the number left, and stops at the first success. Every
end says how it compares with the target, `25-07=18<`, and numbers have two digits, so that they compare digit by digit:
a model that only had to notice equality did not learn to. The gold search leaves out steps times or over 1; what could
only be made so is refused, so `none` is a proof.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

from plait.errors import RequestError
from plait.formats.base import Block, Return, Trajectory
from plait.tasks.base import Problem
from plait.tasks.notation import two_digits
from plait.tasks.worked import answer

MAX_NUMBER, MAX_TARGET = 25, 99
_EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@dataclass(frozen=True, kw_only=True)
class Countdown:
    name: ClassVar = "countdown"
    about: ClassVar = (
        f"two or three numbers up to {MAX_NUMBER} and a target up to {MAX_TARGET}, all numbers used once, results from "
        f"1 to {MAX_TARGET}, nothing times or over 1: Use 3, 7 and 25 to make 54"
    )

    numbers: Sequence[float] = (0, 15, 85)
    """How often there are 1, 2, 3, ... numbers; at least 2."""
    up_to: int = MAX_NUMBER
    """The largest number."""
    reports: bool = True
    """Whether a thread that finds a solution ends in the answer as it will be given, for the parent to copy."""

    def sample(self, rng: random.Random) -> Problem:
        (count,) = rng.choices(range(1, len(self.numbers) + 1), self.numbers)
        numbers = tuple(sorted((rng.randint(2, self.up_to) for _ in range(count)), reverse=True))
        # Few targets can be made: half of the draws take one that can.
        reachable = sorted({value for value, _ in _all(numbers)})
        while True:
            target = rng.choice(reachable) if rng.random() < 0.45 else rng.randint(1, MAX_TARGET)
            if target in reachable or not _only_through_one(numbers, target):
                return self._problem(numbers, target)

    def _problem(self, numbers: tuple[int, ...], target: int) -> Problem:
        spoken = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
        solution = next((text for value, text in _all(numbers) if value == target), "none")
        return Problem(
            family=self.name,
            prompt=f"{','.join(map(str, numbers))}>{target}?",
            question=f"Use {spoken} to make {target}",
            answer=solution,
            forks=len(numbers) > 2,
            shape={"numbers": len(numbers), "solvable": solution != "none", "reports": self.reports},
        )

    def parse(self, text: str) -> Problem | None:
        if ">" not in text:
            return None
        left, right = text.rstrip("?").split(">")
        numbers = tuple(sorted(map(int, left.split(",")), reverse=True))
        target = int(right)
        inside = 2 <= len(numbers) <= 3 and all(2 <= n <= MAX_NUMBER for n in numbers) and 1 <= target <= MAX_TARGET
        if not inside:
            raise RequestError(
                f"using {', '.join(map(str, numbers))} to make {target} is outside the trained range: {self.about}"
            )
        if _only_through_one(numbers, target):
            raise RequestError(
                f"{text} can only be made by a step times or over 1, which was not trained: {self.about}"
            )
        return self._problem(numbers, target)

    def grade(self, problem: Problem, answer: str) -> bool:
        """Whether the equations are right, use every number once, and end at the target; `none` only where true."""
        if answer == "none" or problem.answer == "none":
            return answer == problem.answer
        left, right = problem.prompt.rstrip("?").split(">")
        pool = sorted(map(int, left.split(",")))
        value = None
        for equation in answer.split(","):
            match = _EQUATION.fullmatch(equation)
            if match is None:
                return False
            a, sign, b, value = int(match[1]), match[2], int(match[3]), int(match[4])
            if a in pool:
                pool.remove(a)
            else:
                return False
            if b not in pool or _apply(a, sign, b, ones=True) != value:
                return False
            pool.remove(b)
            pool.append(value)
        return value == int(right) and pool == [value]

    def _threads(self, problem: Problem) -> tuple[list[str], list[str]]:
        left, right = problem.prompt.rstrip("?").split(">")
        numbers, target = tuple(map(int, left.split(","))), int(right)
        labels, threads = [], []
        for pair in _pairs(numbers):
            rest = _without(numbers, pair)
            labels.append(two_digits(",".join(map(str, rest))))
            threads.append(two_digits(_search(pair, rest, target)))
        return labels, threads

    def within(self, problem: Problem, max_threads: int | None, *, plait: bool) -> Trajectory:
        """In the plait format its threads race, and return the equations that they found."""
        trace = self._block(problem, reports=not plait and bool(problem.shape["reports"]))
        block = trace[0]
        assert isinstance(block, Block), "a solution begins with its block"
        if max_threads is not None and len(block.threads) > max_threads:
            return self.serial(problem)
        if not plait:
            return trace
        found = [value for _, value in self.told(problem)]
        threads = tuple(t if v == "none" else (*t, Return(v)) for t, v in zip(block.threads, found, strict=True))
        # Every character of these threads is a token: the shortest success wins.
        won = min((t for t in threads if len(t) > 1), key=lambda t: sum(len(_said(part)) for part in t), default=None)
        return (replace(block, threads=threads, race=True), *answer("none" if won is None else _said(won[-1])))

    def told(self, problem: Problem) -> tuple[tuple[str, str], ...]:
        left, right = problem.prompt.rstrip("?").split(">")
        numbers, target = tuple(map(int, left.split(","))), int(right)
        out: list[tuple[str, str]] = []
        for pair in _pairs(numbers):
            rest = _without(numbers, pair)
            first = ((value, text) for move, made in _moves(*pair) for value, text in _ends(move, made, rest))
            found = next((text for value, text in first if value == target), "none")
            out.append((two_digits(f"{pair[0]},{pair[1]}:{','.join(map(str, rest))}>{target}"), found))
        return tuple(out)

    def serial(self, problem: Problem) -> Trajectory:
        _, threads = self._threads(problem)
        found = next((i for i, t in enumerate(threads) if t.endswith("!")), len(threads) - 1)
        return (";".join(threads[: found + 1]), *answer(problem.answer))

    def parallel(self, problem: Problem) -> Trajectory:
        return self._block(problem, reports=bool(problem.shape["reports"]))

    def _block(self, problem: Problem, *, reports: bool) -> Trajectory:
        labels, threads = self._threads(problem)
        if reports:
            threads = [t if v == "none" else f"{t}={v}" for t, (_, v) in zip(threads, self.told(problem), strict=True)]
        block = Block(outlines=tuple(labels), threads=tuple((t,) for t in threads))
        return (block, *answer(problem.answer))


def _apply(a: int, sign: str, b: int, *, ones: bool = False) -> int | None:
    """The result, None where the rules forbid it: 1 to 99, exact division; times or over 1 only if `ones`."""
    if sign == "+":
        value = a + b
    elif sign == "-":
        value = a - b
    elif not ones and (b == 1 or a == 1):
        return None
    elif sign == "*":
        value = a * b
    else:
        value = a // b if a % b == 0 else 0
    return value if 1 <= value <= MAX_TARGET else None


def _moves(a: int, b: int, *, ones: bool = False) -> list[tuple[str, int]]:
    """Allowed operations on two numbers, larger first."""
    a, b = max(a, b), min(a, b)
    values = [(f"{a}{sign}{b}", _apply(a, sign, b, ones=ones)) for sign in "+-*/"]
    return [(f"{text}={value}", value) for text, value in values if value is not None]


def _ends(text: str, value: int, rest: list[int]) -> list[tuple[int, str]]:
    """What can be made after a move, with its equations."""
    return [(end, f"{text},{more}") for end, more in _all(_left(value, rest))] if rest else [(value, text)]


def _said(part: object) -> str:
    return part.text if isinstance(part, Return) else str(part)


def _pairs(numbers: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(numbers[i], numbers[j]) for i, j in combinations(range(len(numbers)), 2)]


def _without(numbers: tuple[int, ...], pair: tuple[int, int]) -> list[int]:
    rest = list(numbers)
    for n in pair:
        rest.remove(n)
    return rest


def _only_through_one(numbers: tuple[int, ...], target: int) -> bool:
    """Whether every solution has a step times or over 1: the gold search leaves those out, and would say `none`."""
    made = {value for value, _ in _all(numbers)}
    return target not in made and target in {value for value, _ in _all(numbers, ones=True)}


def _all(numbers: tuple[int, ...], *, ones: bool = False) -> list[tuple[int, str]]:
    """Every value that can be made, with its equations, in the order of the gold search."""
    if len(numbers) == 2:
        return [(value, text) for text, value in _moves(*numbers, ones=ones)]
    out: list[tuple[int, str]] = []
    for pair in _pairs(numbers):
        for text, value in _moves(*pair, ones=ones):
            left = _left(value, _without(numbers, pair))
            out += [(end, f"{text},{rest}") for end, rest in _all(left, ones=ones)]
    return out


def _left(value: int, rest: list[int]) -> tuple[int, ...]:
    """The numbers after a move, largest first."""
    return tuple(sorted((value, *rest), reverse=True))


def _search(pair: tuple[int, int], rest: list[int], target: int) -> str:
    """One thread: every move on the pair, each with every move on what is left; `!` at success, else `none`."""
    tried = _tried(pair, rest, target)
    return (";" if rest else "").join(tried if tried and tried[-1].endswith("!") else [*tried, "none"])


def _tried(pair: tuple[int, int], rest: list[int], target: int) -> list[str]:
    """What comes of each move on the pair, up to the first success."""
    out: list[str] = []
    for text, value in _moves(*pair):
        if not rest:
            out.append(text + _verdict(value, target))
        elif len(rest) == 1:
            out.append(f"{text}:{''.join(_tried((value, rest[0]), [], target))}")
        else:
            numbers, inner = _left(value, rest), list[str]()
            for next_pair in _pairs(numbers):
                inner += _tried(next_pair, _without(numbers, next_pair), target)
                if inner and inner[-1].endswith("!"):
                    break
            out.append(f"{text}({';'.join(inner)}")
            out[-1] += "" if out[-1].endswith("!") else ")"
        if out[-1].endswith("!"):
            break
    return out


def _verdict(value: int, target: int) -> str:
    return "!" if value == target else "<" if value < target else ">"
