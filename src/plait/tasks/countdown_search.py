"""Countdown as in the APR paper: the same problems, heuristic and search traces, in sizes that train on a CPU.

A search writes the state of a node, explores its best successors in random order, and goes on with the best open node.
In parallel the successors of the root become sub searches that start from their own state alone (message join), or, in
the plait format, threads that race to the first success. On one line the sub searches stand where they are entered
(SoS+). Every problem can be solved; a search that keeps too little says so, and has no answer. Knows its vocabulary.

What differs from the paper: results are at most `largest`; numbers stand sorted, so that the held-out split is one of
multisets; there is one round of sub searches; the solution is one `Answer: ` line where the paper replays the path.

Source: Pan et al. 2025, "Learning Adaptive Parallel Reasoning" (arXiv:2504.15466), after Stream of Search, Gandhi et
al. 2024 (arXiv:2404.03683).
"""

from __future__ import annotations

import heapq
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, TypeAlias

from plait.formats.base import Block, Return, Trajectory
from plait.tasks.base import Problem
from plait.tasks.vocabulary import SEARCH
from plait.tasks.worked import answer

_EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
_PROMPT = re.compile(r"Moving to Node #0\nCurrent State: (\d+):\[([\d, ]+)\], Operations: \[\]")


@dataclass(frozen=True, kw_only=True)
class CountdownSearch:
    name: ClassVar = "countdown_search"
    about: ClassVar = (
        "Countdown with search traces as in the APR paper: four numbers below the largest target, all used, results "
        "from 0 to 99: Use 3, 7, 25 and 8 to make 54"
    )

    numbers: int = 4
    targets: tuple[int, int] = (10, 50)
    """Smallest and largest; numbers are from 1 to one below the largest."""
    largest: int = 99
    """The largest result of an operation; the paper has no limit. Numbers up to 99 are one token, larger ones more."""
    beams: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8)
    """How many successors of the root are kept, and so how many sub searches there are; drawn evenly."""
    sub_beams: tuple[int, int] = (1, 8)
    """Fewest and most successors that a sub search keeps; never fewer than its parent."""
    spawn: float = 0.9
    """How often the successors of the root become sub searches; else the search goes on by itself."""
    serial_beams: Sequence[int] = (1, 2, 3, 4, 5)
    """The same as `beams` for the search on one line, at every level."""
    dive: float = 0.5
    """How often the search on one line enters the successors of a node at once, one after the other."""

    def sample(self, rng: random.Random) -> Problem:
        target = rng.randint(*self.targets)
        while True:
            numbers = tuple(sorted((rng.randint(1, self.targets[1] - 1) for _ in range(self.numbers)), reverse=True))
            solution = _solution(numbers, target, self.largest)
            if solution is not None:
                break
        beam = rng.choice(self.beams)
        shape = {
            "numbers": self.numbers,
            "largest": self.largest,
            "beam": beam,
            "sub_beam": self.sub_beams,
            "serial_beam": rng.choice(self.serial_beams),
            "spawn": self.spawn,
            "dive": self.dive,
            "seed": rng.getrandbits(32),
        }
        return Problem(
            family=self.name,
            prompt="\n".join(_Node((0,), numbers, ()).entered(target)),
            question=f"Use {', '.join(map(str, numbers[:-1]))} and {numbers[-1]} to make {target}",
            answer=",".join(solution),
            forks=True,
            shape=shape,
        )

    def parse(self, text: str) -> Problem | None:
        return None

    def grade(self, problem: Problem, answer: str) -> bool:
        """Whether the equations are right, use every number once, and end at the target."""
        numbers, target = _asked(problem)
        pool = list(numbers)
        for equation in answer.split(","):
            match = _EQUATION.fullmatch(equation)
            if match is None:
                return False
            a, sign, b, value = int(match[1]), match[2], int(match[3]), int(match[4])
            for n in (a, b):
                if n not in pool:
                    return False
                pool.remove(n)
            right = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else -1}[sign]
            if value != right:
                return False
            pool.append(value)
        return pool == [target]

    def serial(self, problem: Problem) -> Trajectory:
        shape, (root, target) = problem.shape, _root(problem)
        search = _Search(target, shape["serial_beam"], shape["largest"], random.Random(shape["seed"]), shape["dive"])
        return _ended(*search.run(root))

    def parallel(self, problem: Problem) -> Trajectory:
        return self.within(problem, None, plait=False)

    def within(self, problem: Problem, max_threads: int | None, *, plait: bool) -> Trajectory:
        """The gold search that keeps as many successors of the root as it may have threads."""
        shape, (root, target), rng = problem.shape, _root(problem), random.Random(problem.shape["seed"])
        beam = shape["beam"] if max_threads is None else max_threads
        if not beam:
            return self.serial(problem)
        parent = _Search(target, beam, shape["largest"], rng)
        lines, nodes, found = parent.explore(root)
        if found is not None or len(nodes) < 2 or rng.random() >= shape["spawn"]:
            more, found = parent.go_on(nodes) if found is None else ([], found)
            return _ended(lines + more, found)
        low, high = shape["sub_beam"]
        sub_beam = rng.randint(max(low, beam), high) if beam < high else beam
        threads: list[Trajectory] = []
        solutions: list[tuple[int, _Found]] = []
        for node in nodes:
            inner, found = _Search(target, sub_beam, shape["largest"], rng).run(node)
            text = "".join(f"\n{line}" for line in inner)
            if plait:
                text = "\n".join(node.entered(target)) + text
            if found is not None:
                # All children are read, in order; of a race the winner alone, which is the shortest success.
                solutions.append((len(SEARCH.encode(text)) if plait else len(threads), found))
            threads.append((text, Return(",".join(found))) if plait and found is not None else (text,))
        block = Block(outlines=tuple(node.moving for node in nodes), threads=tuple(threads), race=plait)
        head = "".join(f"\n{line}" for line in lines)
        goal = [f"{target},{target} equal: Goal Reached"] if solutions else ["No solution found."]
        tail = _ended(goal, min(solutions, key=lambda s: s[0])[1] if solutions else None)
        return (f"{head}\n", block, *tail)


def _ended(lines: Sequence[str], solution: Sequence[str] | None) -> Trajectory:
    text = "".join(f"\n{line}" for line in lines)
    return (text,) if solution is None else (text, *answer(",".join(solution)))


def _asked(problem: Problem) -> tuple[tuple[int, ...], int]:
    """Numbers and target of a problem."""
    match = _PROMPT.fullmatch(problem.prompt)
    assert match is not None, "not a prompt of this family"
    return tuple(map(int, match[2].split(", "))), int(match[1])


def _root(problem: Problem) -> tuple[_Node, int]:
    numbers, target = _asked(problem)
    return _Node((0,), numbers, ()), target


@dataclass(frozen=True, slots=True)
class _Node:
    """Numbers that are left, and how they came about."""

    place: tuple[int, ...]
    """Its number among the open successors of each of its ancestors."""
    numbers: tuple[int, ...]
    operations: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"#{','.join(map(str, self.place))}"

    @property
    def moving(self) -> str:
        return f"Moving to Node {self.name}"

    def state(self, target: int) -> str:
        operations = ", ".join(f"'{operation}'" for operation in self.operations)
        return f"Current State: {target}:[{_listed(self.numbers)}], Operations: [{operations}]"

    def entered(self, target: int) -> tuple[str, str]:
        return self.moving, self.state(target)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


_Found: TypeAlias = tuple[str, ...]
"""The operations of a solution."""
_Move: TypeAlias = tuple[int, str, int, int]
"""Two numbers with the operation between them, and its result."""


class _Search:
    """One search: what it writes, up to its first success or until no node is open.

    Args:
        target: What is to be made of all numbers.
        beam: Successors that a node keeps, and nodes that are taken from the open ones at a time.
        largest: The largest result.
        rng: Shuffles what is explored.
        dive: How often successors are entered at once, as inner searches.
    """

    def __init__(self, target: int, beam: int, largest: int, rng: random.Random, dive: float = 0.0) -> None:
        self._target, self._beam, self._largest, self._rng, self._dive = target, beam, largest, rng, dive
        factors = [k for k in range(2, target + 1) if target % k == 0]
        self._from_factor = [min(abs(n - factor) for factor in factors) for n in range(target + 1)]
        self._count = 0

    def run(self, root: _Node, level: int = 0) -> tuple[list[str], _Found | None]:
        """Search from a node whose state is written already."""
        lines, nodes, found = self.explore(root)
        if found is None:
            more, found = self.enter(nodes, level) if self._dives() else self.go_on(nodes, level)
            lines += more
        return lines, found

    def go_on(self, nodes: Sequence[_Node], level: int = 0) -> tuple[list[str], _Found | None]:
        """Take open nodes, best first, until one leads to the target or none is left."""
        lines: list[str] = []
        heap: list[tuple[int, int, _Node]] = []
        self._push(heap, nodes)
        while heap:
            batch = [heapq.heappop(heap)[2] for _ in range(min(self._beam, len(heap)))]
            for node in batch:
                lines += node.entered(self._target)
                explored, successors, found = self.explore(node)
                lines += explored
                if found is None and self._dives():
                    entered, found = self.enter(successors, level, ends=False)
                    lines += entered
                else:
                    self._push(heap, successors)
                if found is not None:
                    return lines, found
        return [*lines, "No solution found."], None

    def enter(self, nodes: Sequence[_Node], level: int, *, ends: bool = True) -> tuple[list[str], _Found | None]:
        """Search from each node in turn, written where it is entered."""
        lines: list[str] = []
        for node in nodes:
            lines += [f"Start Sub Search at level {level + 1}: {node.moving}", node.state(self._target)]
            inner, found = self.run(node, level + 1)
            lines += inner
            if found is not None:
                return lines, found
            lines += [f"Exit Sub Search at level {level + 1}", "No solution found in sub search"]
        return [*lines, "No solution found."] if ends else lines, None

    def explore(self, node: _Node) -> tuple[list[str], list[_Node], _Found | None]:
        """Try the best successors of a node; those that are open, best first."""
        moves = _moves(node.numbers, self._largest)
        kept = sorted(moves, key=lambda successor: self._distance(successor[1]))[: self._beam]
        self._rng.shuffle(kept)
        lines: list[str] = []
        nodes: list[_Node] = []
        for move, numbers in kept:
            operation = _written(move)
            operations = (*node.operations, operation)
            lines.append(f"Exploring Operation: {operation}, Resulting Numbers: [{_listed(numbers)}]")
            if len(numbers) > 1:
                successor = _Node((*node.place, len(nodes)), numbers, operations)
                left = f"{self._target}:[{_listed(numbers)}]"
                lines.append(f"Generated Node {successor.name}: {left} Operation: {operation}")
                nodes.append(successor)
            elif numbers == (self._target,):
                lines.append(f"{self._target},{self._target} equal: Goal Reached")
                return lines, [], operations
            else:
                lines.append(f"{_listed(numbers)},{self._target} unequal: No Solution")
        return lines, sorted(nodes, key=lambda successor: self._distance(successor.numbers)), None

    def _dives(self) -> bool:
        return self._dive > 0 and self._rng.random() < self._dive

    def _push(self, heap: list[tuple[int, int, _Node]], nodes: Sequence[_Node]) -> None:
        for node in nodes:
            self._count += 1
            heapq.heappush(heap, (self._distance(node.numbers), self._count, node))

    def _distance(self, numbers: Sequence[int]) -> int:
        """How far numbers are from factors of the target, in all."""
        target = self._target
        return sum(self._from_factor[n] if n <= target else n - target for n in numbers)


def _moves(numbers: tuple[int, ...], largest: int) -> Iterator[tuple[_Move, tuple[int, ...]]]:
    """Every operation on two of some numbers, its result, and what is left: the others in order, the result last."""
    for i, j in combinations(range(len(numbers)), 2):
        a, b = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        rest = (*numbers[:i], *numbers[i + 1 : j], *numbers[j + 1 :])
        for sign, value in (("+", a + b), ("*", a * b), ("-", a - b), ("/", a // b if b and a % b == 0 else -1)):
            if 0 <= value <= largest:
                yield (a, sign, b, value), (*rest, value)


def _written(move: _Move) -> str:
    a, sign, b, value = move
    return f"{a}{sign}{b}={value}"


def _solution(numbers: tuple[int, ...], target: int, largest: int) -> tuple[str, ...] | None:
    """Operations that make the target of all numbers, the first of a depth-first search."""
    if len(numbers) == 1:
        return () if numbers[0] == target else None
    for move, left in _moves(numbers, largest):
        rest = _solution(left, target, largest)
        if rest is not None:
            return (_written(move), *rest)
    return None


__all__ = ["CountdownSearch"]
