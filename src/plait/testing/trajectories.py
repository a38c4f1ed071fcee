"""Random trajectories of any format: what it has a form for is found by trying, so a new format needs no generator.

Knows no format by name and no engine. Every trajectory is one that a runtime could produce: calls with the same context
say the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from plait.errors import FormatError, RequestError
from plait.formats.base import Block, Part, Return, Spawn, Trajectory, TrajectoryFormat, Wait
from plait.formats.render import render, trajectory_of
from plait.tokenizer import Tokenizer
from plait.tree import Tree

MAX_WIDTH, MAX_DEPTH = 4, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """What a format has a form for."""

    text: bool
    """Whole trajectories have a text: `write` and `read`."""
    widths: tuple[int, ...]
    """Threads that a block may have; none where there are no blocks."""
    depth: int
    """Levels of blocks, up to `MAX_DEPTH`."""
    before: bool
    """Text may stand before a block."""
    outlines: bool
    """Threads may be told anything; else only their number."""
    distinct: bool
    """No two threads of a block may be told the same: nothing but that tells their contexts apart."""
    alike: bool
    """All threads of a block open alike, so a model without chance says the same in all."""
    fresh: bool
    """Threads see nothing but what they are told."""
    needs: bool
    races: bool
    returns: bool
    conclusions: bool
    spawns: bool
    """Threads may start while their parent goes on."""


class Trajectories:
    """Draws trajectories of a format.

    Args:
        format: Any.
        tokenizer: Its vocabulary.
        alphabet: Characters that texts are made of; the vocabulary must have them.
        prompt_ids: What trajectories follow.
    """

    def __init__(
        self, format: TrajectoryFormat, tokenizer: Tokenizer, *, alphabet: str = "abc 12", prompt_ids: Sequence[int]
    ) -> None:
        self.format, self.tokenizer, self.alphabet = format, tokenizer, alphabet
        self.prompt_ids = tuple(prompt_ids)
        self.forms = self._forms()
        self._told = 0

    def render(self, trajectory: Trajectory) -> Tree:
        return render(trajectory, format=self.format, tokenizer=self.tokenizer, prompt_ids=self.prompt_ids)

    def draw(self, rng: random.Random, *, whole: bool = False) -> Trajectory:
        """A random trajectory.

        Args:
            rng: Random numbers.
            whole: True: without races, returns and threads that nobody waits for: all that is written is read.
        """
        forms = replace(self.forms, races=False, returns=False, spawns=False) if whole else self.forms
        self._told = 0
        return self._thread(rng, forms, 0)

    def _thread(self, rng: random.Random, forms: Forms, depth: int) -> Trajectory:
        parts: list[Part] = []
        running: list[int] = []
        blocks = 0
        if (forms.widths or forms.spawns) and depth < forms.depth:
            # Few inside threads: the tree grows with the power of its depth.
            blocks = int(rng.random() < 0.3) if depth else rng.randint(1, 2 + 2 * forms.spawns)
        if not depth and self.format.begin() is not None:
            blocks = 1
        for _ in range(blocks):
            if forms.before:
                parts += self._said(rng)
            if forms.spawns:
                free = [n for n in (1, 2, 3) if n not in running]
                if free and (not running or rng.random() < 0.6):
                    running.append(rng.choice(free))
                    parts.append(Spawn(running[-1], self._outline(rng, forms, 0), self._leaf(rng, returns=True)))
                else:
                    parts.append(Wait(running.pop(rng.randrange(len(running)))))
            else:
                parts.append(self._block(rng, forms, depth))
        parts += self._said(rng)
        return tuple(parts)

    def _block(self, rng: random.Random, forms: Forms, depth: int) -> Block:
        width = rng.choice([n for n in forms.widths if n < 3 or not depth] or forms.widths)
        race = forms.races and rng.random() < 0.4
        needs = [()] * width
        if forms.needs and not race:
            # Any order of the threads may be the one that they wait in.
            ranks = rng.sample(range(width), width)
            needs = [tuple(n for n in range(width) if ranks[n] < ranks[i] and rng.random() < 0.4) for i in range(width)]
        threads = [self._inner(rng, forms, depth + 1) for _ in range(width)]
        outlines: list[str] = []
        for i in range(width):
            outline = self._outline(rng, forms, i)
            while forms.distinct and outline in outlines:
                outline += self.alphabet[0]
            outlines.append(outline)
        return Block(
            outlines=tuple(outlines),
            threads=tuple(threads[:1] * width if forms.alike else threads),
            conclusion=self._words(rng) if forms.conclusions else "",
            needs=tuple(needs) if any(needs) else (),
            race=race,
        )

    def _inner(self, rng: random.Random, forms: Forms, depth: int) -> Trajectory:
        if depth < forms.depth:
            body = self._thread(rng, forms, depth)
            return (*body, Return(self._words(rng).strip())) if forms.returns and rng.random() < 0.5 else body
        return self._leaf(rng, returns=forms.returns and rng.random() < 0.5)

    def _leaf(self, rng: random.Random, *, returns: bool) -> Trajectory:
        return (*self._said(rng), *((Return(self._words(rng).strip()),) if returns else ()))

    def _outline(self, rng: random.Random, forms: Forms, i: int) -> str:
        if not forms.outlines:
            return str(i + 1)
        self._told += 1
        # Threads that see nothing else are told apart by what they are told.
        return str(self._told) if forms.fresh else self._words(rng).strip()

    def _said(self, rng: random.Random) -> tuple[str, ...]:
        return tuple(filter(None, (self._words(rng),)))

    def _words(self, rng: random.Random) -> str:
        return "".join(rng.choices(self.alphabet, k=rng.choice((0, 1, 3, 9, 20))))

    def _forms(self) -> Forms:
        a, b = self.alphabet[0], self.alphabet[1]
        begins = self.format.begin() is not None
        widths = tuple(n for n in range(1, MAX_WIDTH + 1) if self._has((_block(["1", "2", "3", "4"][:n], a),)))
        width = max(widths, default=0)
        told = [str(i + 1) for i in range(width)]
        plain = _block(told, a)
        text = self._writable((plain,) if widths else (a,))
        tree = self.render((plain,)) if widths else Tree()
        outlines = bool(widths) and self._has((_block([a, *told[1:]], a),))
        spawns = self._has((Spawn(1, a, (Return(b),)), Wait(1)))
        deep = plain
        depth = 0
        while widths and depth < MAX_DEPTH and self._has((deep,)):
            depth += 1
            deep = replace(plain, threads=((deep,), *plain.threads[1:]))
        return Forms(
            text=text,
            widths=widths,
            depth=1 if spawns else depth,
            before=not begins and (spawns or self._writes((a, plain))),
            outlines=spawns or outlines,
            distinct=width > 1 and outlines and len(_headers(self.render((_block([a] * width, a),)))) == 1,
            alike=width > 1 and len(_headers(tree)) == 1,
            fresh=spawns or any(s.keep == 0 for s in tree.segments.values()),
            needs=width > 1 and self._has((replace(plain, needs=((), (0,), *[()] * (width - 2))),)),
            races=bool(widths) and self._has((replace(plain, race=True),)),
            returns=bool(widths) and self._has((replace(plain, threads=((a, Return(b)), *plain.threads[1:])),)),
            conclusions=bool(widths) and self._has((replace(plain, conclusion=a),)),
            spawns=spawns,
        )

    def _has(self, trajectory: Trajectory) -> bool:
        """Whether the format has a form for it."""
        try:
            tree = self.render(trajectory)
            return trajectory_of(tree, format=self.format, tokenizer=self.tokenizer) == trajectory
        except (RequestError, AssertionError):
            return False

    def _writable(self, trajectory: Trajectory) -> bool:
        try:
            return bool(self.format.write(trajectory))
        except RequestError:
            return False

    def _writes(self, trajectory: Trajectory) -> bool:
        """Whether it has a text too; a format without texts of whole trajectories is asked for its form alone."""
        try:
            return self.format.read(self.format.write(trajectory)) == trajectory
        except FormatError:
            return False
        except RequestError:
            return self._has(trajectory)


def _headers(tree: Tree) -> set[tuple[int, ...]]:
    """What opens the threads of a tree's first block."""
    return {s.forced_ids for s in tree.segments.values() if s.parent == "0:0" and not s.joins}


def _block(outlines: Sequence[str], said: str) -> Block:
    return Block(outlines=tuple(outlines), threads=tuple((said,) for _ in outlines))
