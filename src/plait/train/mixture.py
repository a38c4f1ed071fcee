"""Families by weight: what examples and prompts are drawn from. Knows nothing of problems."""

from __future__ import annotations

import random
from collections.abc import Mapping

from plait.errors import RequestError


class Mixture:
    """Names, each with how often it is drawn, in any unit.

    Raises:
        RequestError: None has a weight above 0, or one has a weight below.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise RequestError(f"the mixture is {dict(weights)}; it needs a family with a weight above 0")
        self.names, self._weights = tuple(weights), tuple(weights.values())

    def draw(self, rng: random.Random) -> str:
        return rng.choices(self.names, self._weights)[0]
