"""Early warning that a policy collapses: it stops forking, loses its format, or stops exploring.

Rewards alone do not show it: a policy that never forks is right as often as before, and reinforcement learning of
parallel reasoning is known to fall back to it ("serial collapse", Kimi K2.5; Parallel-R1, arXiv:2509.07980, after its
parallel reward is removed). Knows nothing of where its numbers come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

WATCHED = {
    "parallel": "share of rollouts that fork",
    "valid": "share of rollouts that keep the format",
    "entropy": "entropy of the policy",
}


@dataclass(slots=True)
class Watch:
    """Warns once when a watched number has fallen to a share of what the training started with."""

    steps: int = 10
    """Steps averaged for the start, and about as many for now."""
    share: float = 0.5
    start: dict[str, float] = field(default_factory=dict[str, float])
    now: dict[str, float] = field(default_factory=dict[str, float])
    seen: dict[str, int] = field(default_factory=dict[str, int])
    """Steps in which it was a number."""
    low: list[str] = field(default_factory=list[str])
    """Names that are low; each is warned of again only after it has recovered."""

    def add(self, values: Mapping[str, float]) -> list[str]:
        """Take in a step; warnings in plain words."""
        warnings: list[str] = []
        for name, about in WATCHED.items():
            value = values.get(name)
            if value is None or value != value:
                continue
            self.seen[name] = seen = self.seen.get(name, 0) + 1
            if seen <= self.steps:
                before = self.start.get(name, 0.0)
                self.start[name] = self.now[name] = before + (value - before) / seen
                continue
            self.now[name] += (value - self.now[name]) / self.steps
            limit = self.share * self.start[name]
            if self.now[name] < limit and name not in self.low:
                self.low.append(name)
                warnings.append(f"{about} fell from {self.start[name]:.3f} to {self.now[name]:.3f}")
            elif self.now[name] > (1 + self.share) / 2 * self.start[name] and name in self.low:
                self.low.remove(name)
        return warnings

    def state(self) -> dict[str, Any]:
        """Plain values from which an equal one goes on."""
        return asdict(self)
