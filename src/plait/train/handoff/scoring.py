"""What a hand-off needs to reward a rollout by itself: a grader by its name, terms that look at one rollout alone.

Knows nothing of trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from plait.errors import RequestError
from plait.formats.base import TrajectoryFormat
from plait.tokenizer import Tokenizer
from plait.train.rewards import Group, Reward
from plait.train.rollouts import Rollout, outcome_of

GROUPED = frozenset({"length_penalty", "parallel_r1", "npr", "kimi"})
"""Terms that compare with the group, or change as the training goes on: unknown where one rollout is judged."""


def named(path: str) -> Callable[..., Any]:
    """A function by `module:name`.

    Raises:
        RequestError: There is none.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise RequestError(f"no function {path!r} (written as package.module:function): {exc}") from exc
    if not callable(found):
        raise RequestError(f"{path} is no function")
    return found


def exact(response: str, answer: str) -> bool:
    """Whether the last `\\boxed{...}` of a response, or else its last line, is the answer as it is written.

    A check that needs no package, for data whose answers are short. Mathematics wants a parser: name yours.
    """
    text = response.rpartition("\\boxed{")[2].partition("}")[0] if "\\boxed{" in response else ""
    lines = response.strip().splitlines()
    given = text or (lines[-1] if lines else "")
    return given.strip() == str(answer).strip()


class LoneReward:
    """Rewards one rollout without its group.

    Args:
        terms: As in `[reward]` of a config.

    Raises:
        RequestError: A term is unknown, or looks at the group or at how far the training is.
    """

    def __init__(self, terms: Mapping[str, Mapping[str, Any]]) -> None:
        if grouped := GROUPED & set(terms):
            raise RequestError(
                f"the reward term {min(grouped)} looks at the group or the schedule, unknown where a single rollout is "
                "judged; leave it out here"
            )
        self._reward = Reward({name: dict(options) for name, options in terms.items()})

    def __call__(self, rollout: Rollout, *, format: TrajectoryFormat, tokenizer: Tokenizer) -> dict[str, float]:
        """Numbers of a rollout: `reward`, each term, and what is worth a curve."""
        outcome = outcome_of(rollout, format=format, tokenizer=tokenizer)
        parts = self._reward.parts(outcome, Group(outcomes=[outcome], step=0, done=0.0))
        return {
            "reward": sum(parts.values()),
            **{f"reward/{name}": value for name, value in parts.items()},
            "correct": float(outcome.correct),
            "valid": float(outcome.valid),
            "parallel": float(outcome.forks > 0),
            "threads": float(outcome.threads),
            "critical_path_tokens": float(outcome.critical_path_tokens),
            "sampled_tokens": float(outcome.sampled_tokens),
        }
