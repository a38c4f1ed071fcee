"""What reinforcement learning asks: a prompt, how its response is graded, what a sequential solution would cost.

Prompt number n depends on the seed and n alone, so a run that goes on asks what it would have asked. Knows nothing of
engines and models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from plait import tasks
from plait.formats import open_format, render
from plait.models import prompt_ids
from plait.tokenizer import Tokenizer
from plait.train.mixture import Mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question to sample rollouts for."""

    family: str
    question: str
    """In plain words, for people."""
    prompt_ids: tuple[int, ...]
    grade: Callable[[str], bool]
    """Whether a response is right; it is given what the root thread sampled, never the prompt or an end-of-sequence."""
    baseline_tokens: float | None = None
    """Sampled tokens of a sequential solution, for rewards that compare with it."""
    forks: bool | None = None
    """Whether forking is the right decision; None where nobody knows."""


PromptSource: TypeAlias = Callable[[str, random.Random, Literal["train", "held_out"]], Prompt]
"""Draws a prompt: family name, random numbers, split."""


class Questions(Protocol):
    """Prompts by number, and those that are kept for evaluation."""

    def __getitem__(self, number: int) -> Prompt: ...
    def held_out(self, count: int) -> list[tuple[int, Prompt]]:
        """At most so many of each family, always the same ones, each with its number."""
        ...


class Prompts:
    """An endless, seeded sequence of prompts from a mixture of families.

    Args:
        source: Draws a prompt of a family.
        weights: How often each family is drawn, in any unit.
        seed: Sequences with the same arguments are equal.
    """

    def __init__(self, source: PromptSource, *, weights: Mapping[str, float], seed: int) -> None:
        self._source, self._seed = source, seed
        self._mixture = Mixture(weights)

    def __getitem__(self, number: int) -> Prompt:
        rng = random.Random(f"rl/{self._seed}/{number}")
        return self._source(self._mixture.draw(rng), rng, "train")

    def held_out(self, count: int) -> list[tuple[int, Prompt]]:
        return [
            (n, self._source(family, random.Random(f"held_out/{family}/{n}"), "held_out"))
            for family in self._mixture.names
            for n in range(count)
        ]


def task_source(
    format: str, *, tokenizer: Tokenizer, knobs: Mapping[str, Mapping[str, Any]] | None = None
) -> PromptSource:
    """Problems of `plait.tasks`, graded exactly.

    The sequential baseline of a problem is the length of its serial gold trace, in sampled tokens: what the sequential
    twin writes where it is right.

    Args:
        format: Name of the trajectory format.
        tokenizer: What the model reads and writes.
        knobs: What the problems of a family are drawn from, by family.

    Raises:
        RequestError: No format has this name.
    """
    opened = open_format(format, tokenizer)
    families = {name: tasks.family(name, chosen) for name, chosen in (knobs or {}).items()}

    def draw(family: str, rng: random.Random, split: Literal["train", "held_out"]) -> Prompt:
        problem = tasks.sample(families.get(family, family), rng, split)
        ids = prompt_ids(tokenizer, problem.prompt)
        serial = render(tasks.gold(problem, parallel=False), format=opened, tokenizer=tokenizer, prompt_ids=ids)
        return Prompt(
            family=family,
            question=problem.question,
            prompt_ids=ids,
            grade=lambda response: tasks.grade(problem, response),
            baseline_tokens=float(serial.num_sampled),
            forks=problem.forks,
        )

    return draw
