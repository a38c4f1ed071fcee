"""Figures of rollouts: of a step that trains, and of an evaluation. Knows nothing of models and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plait.train.policy import Judged
from plait.train.rewards import Outcome
from plait.train.rollouts import Rollout


def summary(judged: Sequence[Judged], step: int) -> dict[str, float]:
    """Means over the rollouts of a step, those that the system failed left out but for their share."""
    counted = [j for j in judged if not j.outcome.error] or list(judged)
    n = len(counted)
    outcomes = [j.outcome for j in counted]
    logs = [p for j in counted for s in j.rollout.tree.segments.values() for p in s.logprobs]
    ages = [step - version for j in counted for version in j.rollout.versions.values()]
    terms = {f"reward/{name}": sum(j.parts[name] for j in counted) / n for name in counted[0].parts}
    return {
        "reward": sum(j.reward for j in counted) / n,
        **terms,
        "correct": sum(o.correct for o in outcomes) / n,
        "parallel": sum(o.forks > 0 for o in outcomes) / n,
        "valid": sum(o.valid for o in outcomes) / n,
        "limited": sum(o.limited > 0 for o in outcomes) / n,
        "errors": sum(bool(j.outcome.error) for j in judged) / len(judged),
        "threads": sum(o.threads for o in outcomes) / n,
        "critical_path_tokens": sum(o.critical_path_tokens for o in outcomes) / n,
        "sampled_tokens": float(sum(o.sampled_tokens for o in outcomes)),
        "speedup": _speedup(outcomes),
        # Unbiased where the tokens were sampled from the policy at temperature 1, and free.
        "entropy": -sum(logs) / max(1, len(logs)),
        "age": sum(ages) / max(1, len(ages)),
    }


def scores(runs: Sequence[tuple[Rollout, Outcome]]) -> dict[str, float]:
    """What an evaluation found: shares, and means over all its runs."""
    n = max(1, len(runs))
    outcomes = [outcome for _, outcome in runs]
    known = [(r.prompt.forks, o.forks > 0) for r, o in runs if r.prompt.forks is not None]
    found = {
        "n": float(len(runs)),
        "correct": sum(o.correct for o in outcomes) / n,
        "parallel": sum(o.forks > 0 for o in outcomes) / n,
        "valid": sum(o.valid for o in outcomes) / n,
        "critical_path_tokens": sum(o.critical_path_tokens for o in outcomes) / n,
        "sampled_tokens": sum(o.sampled_tokens for o in outcomes) / n,
        "speedup": _speedup(outcomes),
    }
    if known:
        found["fork_right"] = sum(should == did for should, did in known) / len(known)
    return {name: round(value, 4) for name, value in found.items()}


def shown_scores(found: Mapping[str, float]) -> str:
    """Scores in a line."""
    decisions = f" (decisions right {found['fork_right']:.1%})" if "fork_right" in found else ""
    return (
        f"right {found['correct']:.1%}  forks {found['parallel']:.1%}{decisions}  in the format {found['valid']:.1%}"
        f"  critical path {found['critical_path_tokens']:.1f} of {found['sampled_tokens']:.1f} tokens"
        f"  speedup {found['speedup']:.2f}"
    )


def _speedup(outcomes: Sequence[Outcome]) -> float:
    """Sequential baseline over critical path, both summed, over right answers; 0 where there is none."""
    pairs = [(o.baseline_tokens, o.critical_path_tokens) for o in outcomes if o.correct and o.baseline_tokens]
    return sum(b for b, _ in pairs) / max(1, sum(c for _, c in pairs))
