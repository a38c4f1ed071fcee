"""An endless, seeded, resumable stream of packed batches: problem, gold trace, tree, row.

Example number n depends on the seed and n alone, so the position of a stream is the numbers it has drawn but not yet
handed out. Knows nothing of models.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

from plait import tasks
from plait.budget import fits
from plait.errors import RequestError, nearest
from plait.formats import open_format
from plait.models import gold_tree
from plait.tasks.vocabulary import TOKENIZER
from plait.tokenizer import Tokenizer
from plait.train.mixture import Mixture
from plait.train.packing import PackedBatch, Packer
from plait.train.trie import TrieBatch, pieces
from plait.tree import Tree
from plait.types import Budget

Source: TypeAlias = Callable[[str, random.Random, Literal["train", "held_out"]], Tree]
"""Draws one gold trace: family name, random numbers, split (`train` or `held_out`)."""
PIECES = 256
"""Sequences that one example may come in, at most: piece p of example n has the tag n * PIECES + p."""

SERIAL_SHARE = 0.6
"""Of the traces of `either`, those in one line: more than half, so that a greedy model starts by not forking."""


class Stream:
    """Batches of a mixture of families.

    Args:
        source: Draws an example of a family.
        weights: How often each family is drawn, in any unit.
        packer: Empty; belongs to the stream from here on.
        seed: Streams with the same arguments and seed are equal, batch by batch.
        state: As `state()` gave it, to go on from there.
    """

    def __init__(
        self,
        source: Source,
        *,
        weights: dict[str, float],
        packer: Packer,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._source, self._seed, self._packer = source, seed, packer
        self._mixture = Mixture(weights)
        self._next = 0
        """Tag of the next piece."""
        self._drawn: tuple[int, str, list[TrieBatch]] = (-1, "", [])
        """The last example: its number, family and pieces."""
        self.seen: Counter[str] = Counter()
        """Examples drawn, by family; `longer` counts pieces that fit into no row and were left out."""
        if state is not None:
            self._next, self.seen = state["next"], Counter(state["seen"])
            for bucket, row, tag in state["waiting"]:
                packer.put_back(bucket, row, tag, self._example(tag // PIECES)[1][tag % PIECES])

    def state(self) -> dict[str, Any]:
        """Plain numbers from which an equal stream goes on."""
        return {"next": self._next, "waiting": self._packer.waiting(), "seen": dict(self.seen)}

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        while True:
            tag = self._next
            number, place = divmod(tag, PIECES)
            family, parts = self._example(number)
            self._next = tag + 1 if place + 1 < len(parts) else (number + 1) * PIECES
            if not place:
                self.seen[family] += 1
            if len(parts[place]) > self._packer.longest:
                # Cutting it would train on a wrong trace; stopping would lose a run of hours to one rare example.
                self.seen["longer"] += 1
                continue
            batch = self._packer.add(parts[place], tag)
            if batch is not None:
                return batch

    def _example(self, number: int) -> tuple[str, list[TrieBatch]]:
        if self._drawn[0] != number:
            rng = random.Random(f"{self._seed}/{number}")
            family = self._mixture.draw(rng)
            parts = pieces(self._source(family, rng, "train"))
            assert len(parts) <= PIECES, f"an example has {len(parts)} sequences of its own"
            self._drawn = number, family, parts
        return self._drawn[1:]


def num_problems(batch: PackedBatch) -> int:
    """Examples whose first piece is in a batch."""
    return sum(tag % PIECES == 0 for *_, tag in batch.places)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """Limits that are drawn for each example, said in its prompt and kept by its trace."""

    threads: tuple[int, ...] = ()
    """Drawn evenly; empty: the prompt does not say how many."""
    tokens: tuple[int, ...] = ()
    share: float = 1.0
    """Of the examples; the prompts of the others say nothing."""

    def __post_init__(self) -> None:
        if not self.threads and not self.tokens:
            raise RequestError("[data.budget] needs threads, tokens or both: the limits to draw from")
        for name, levels in (("threads", self.threads), ("tokens", self.tokens)):
            if any(level < (name == "tokens") for level in levels):
                raise RequestError(f"[data.budget] {name} is {list(levels)}; threads are 0 or more, tokens 1 or more")
        if not 0 < self.share <= 1:
            raise RequestError(f"[data.budget] share is {self.share}; it must be above 0 and at most 1")

    def draw(self, rng: random.Random) -> Budget:
        """The threads are those of the whole run and of each fork alike."""
        threads = rng.choice(self.threads) if self.threads else None
        tokens = rng.choice(self.tokens) if self.tokens else None
        return Budget(max_threads=threads, max_threads_per_fork=threads, max_tokens=tokens)

    def more(self, budget: Budget) -> Budget:
        """The next limit of tokens above one that is not enough: a level, beyond all levels a power of two."""
        assert budget.max_tokens is not None, "one line needs no threads"
        above = (level for level in sorted(self.tokens) if level > budget.max_tokens)
        return replace(budget, max_tokens=next(above, 1 << budget.max_tokens.bit_length()))


def gold_source(
    format: str,
    *,
    traces: str,
    tokenizer: Tokenizer = TOKENIZER,
    knobs: Mapping[str, Mapping[str, Any]] = {},
    budget: BudgetConfig | None = None,
) -> Source:
    """Gold traces of `plait.tasks` in a trajectory format.

    Args:
        format: Name of the format.
        traces: `parallel` forks where the problem says that forking is right; `serial` never does: the twin; `either`
            draws one of the two for each example (`SERIAL_SHARE`), so that a model learns both ways and neither as the
            right one: where reinforcement learning has something left to choose.
        tokenizer: What they are written in.
        knobs: What the problems of a family are drawn from, by family.
        budget: Limits to draw; the prompt says them and the trace keeps them.

    Raises:
        RequestError: No format has this name, or `traces` is none of the three.
    """
    if traces not in ("parallel", "serial", "either"):
        raise nearest(traces, ["parallel", "serial", "either"], "kind of trace")
    opened = open_format(format, tokenizer)
    families = {name: tasks.family(name, chosen) for name, chosen in knobs.items()}
    if budget is not None:
        # A format that cannot say it is refused before the first step.
        opened.condition(tokenizer.bos_ids, budget.draw(random.Random(0)))

    def draw(family: str, rng: random.Random, split: Literal["train", "held_out"]) -> Tree:
        problem = tasks.sample(families.get(family, family), rng, split)
        forks = traces == "parallel" or (traces == "either" and rng.random() >= SERIAL_SHARE)
        gold = partial(gold_tree, problem, format=opened, tokenizer=tokenizer, parallel=forks)
        if budget is None or rng.random() >= budget.share:
            return gold()
        drawn = budget.draw(rng)
        tree = gold(budget=drawn)
        # Even one line can need more than what was drawn; then the prompt says the least that is enough.
        while not fits(tree, drawn):
            drawn = budget.more(drawn)
            tree = gold(budget=drawn)
        return tree

    return draw
