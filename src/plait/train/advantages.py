"""From rewards to advantages: one number for each rollout, compared within its group.

Every rollout counts once, however many segments, rows or copies of it a trainer has: groups are keyed by rollout, and
an advantage reaches tokens only through its rollout's id. Averaging over rows instead lets rollouts with many threads
dominate their group, and a padding row that stands in for a rollout gives it the raw reward; both were published.

Knows nothing of trees and torch. Symbols: G rollouts of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from plait.registry import Registry

Floats: TypeAlias = NDArray[np.float64]
_EPS = 1e-6


def mean(groups_G: Sequence[Floats]) -> list[Floats]:
    """A = r - mean of the group.

    P-GRPO (ThreadWeaver, Lian et al. 2025, arXiv:2512.07843) and Dr. GRPO (Liu et al. 2025, arXiv:2503.20783). Where
    all are right and differ in speed only, dividing by their spread would blow a bonus of hundredths up to ones.
    """
    return [r_G - r_G.mean() for r_G in groups_G]


def group_std(groups_G: Sequence[Floats]) -> list[Floats]:
    """A = (r - mean) / (std of the group + 1e-6), std with G - 1.

    GRPO (Shao et al. 2024, arXiv:2402.03300).
    """
    return [(r_G - r_G.mean()) / (_std(r_G) + _EPS) for r_G in groups_G]


def batch_std(groups_G: Sequence[Floats]) -> list[Floats]:
    """A = (r - mean of the group) / (std of all rewards of the batch + 1e-6).

    NPR's third stage (Wu et al. 2025, arXiv:2512.07461), after Liu et al. 2025 (arXiv:2508.08221).
    """
    spread = _std(np.concatenate(groups_G)) if groups_G else 0.0
    return [(r_G - r_G.mean()) / (spread + _EPS) for r_G in groups_G]


def _std(r_G: Floats) -> float:
    return float(r_G.std(ddof=1)) if len(r_G) > 1 else 0.0


ADVANTAGES: Registry[Callable[[Sequence[Floats]], list[Floats]]] = Registry(
    "plait.advantages", "advantage", {f.__name__: f for f in (mean, group_std, batch_std)}, of=Callable
)


def advantages(name: str, rewards: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Advantages of a batch.

    Args:
        name: One of `ADVANTAGES`.
        rewards: For each group by id, the reward of each of its rollouts by id.

    Returns:
        The advantage of every rollout by id; 0 for a group of one.

    Raises:
        RequestError: No rule has this name.
        ValueError: Two groups hold a rollout of the same id: a copy would be compared with itself.
    """
    rule = ADVANTAGES[name]
    ids = [id for group in rewards.values() for id in group]
    if len(set(ids)) != len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise ValueError(f"rollout {twice!r} stands in two groups")
    groups = [np.array(list(group.values()), np.float64) for group in rewards.values() if group]
    values = np.concatenate(rule(groups)) if groups else np.zeros(0)
    return dict(zip(ids, map(float, values), strict=True))
