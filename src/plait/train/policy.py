"""From judged rollouts to a gradient: one advantage a rollout, credit on each of its sampled tokens, the clipped loss.

Knows nothing of where rollouts come from and which model learns.
Sources: P-GRPO, ThreadWeaver (Lian et al. 2025, arXiv:2512.07843); see `advantages` and `losses` for each formula.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.train.advantages import advantages
from plait.train.experience import Experience, PolicyBatch
from plait.train.losses import importance, k3, surrogate, token_weights
from plait.train.packing import IGNORED
from plait.train.rewards import Outcome
from plait.train.rl_config import LossConfig, RLConfig
from plait.train.rollouts import Rollout
from plait.train.trie import flatten


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A rollout and what it was worth."""

    rollout: Rollout
    outcome: Outcome
    parts: dict[str, float]
    """By reward term."""

    @property
    def reward(self) -> float:
        return sum(self.parts.values())


def experiences(judged: Sequence[Sequence[Judged]], config: RLConfig) -> list[list[Experience]]:
    """What the rollouts of a step are trained as, in minibatches.

    An advantage is of a rollout and goes to every token that it sampled, in whichever segment. Rollouts that the
    system failed are left out, if so configured. Those whose advantage is 0 are not computed, for they have no
    gradient, but they count where tokens are weighed.
    """
    loss, counted = (
        config.loss,
        [[j for j in group if not j.outcome.error or config.rollout.errors == "wrong"] for group in judged],
    )
    worth = advantages(
        loss.advantage, {str(i): {j.rollout.id: j.reward for j in group} for i, group in enumerate(counted)}
    )
    sampled = [j.rollout for group in counted for j in group if j.rollout.tree.num_sampled]
    random.Random(f"{config.seed}/{sampled[0].id if sampled else ''}").shuffle(sampled)
    out: list[list[Experience]] = []
    for part in (sampled[i :: loss.minibatches] for i in range(loss.minibatches)):
        weights = token_weights(
            loss.aggregate, {r.id: r.tree.num_sampled for r in part}, constant=config.rollout.max_tokens
        )
        out.append(
            [
                Experience(trie=flatten(r.tree), advantage=worth[r.id], weight=weights[r.id])
                for r in part
                if worth[r.id] or loss.kl
            ]
        )
    return out


def policy_loss(
    new: Tensor,
    batch: PolicyBatch,
    config: LossConfig,
    *,
    proximal: Tensor | None = None,
    reference: Tensor | None = None,
    tally: Tally | None = None,
) -> Tensor:
    """The part of the loss that this batch is; the parts of a minibatch add up to its loss.

    Args:
        new: Log-probabilities [R, T] under the policy, with gradient; 0 where nothing is trained.
        proximal: The same at the start of the step; None where nothing was updated since.
        reference: The same under the weights the run started with, for the divergence.
        tally: Counts what there is to say.
    """
    behaviour = torch.from_numpy(batch.behaviour).to(new.dtype)
    credit = torch.from_numpy(batch.advantages).to(new.dtype)
    weights = torch.from_numpy(batch.weights).to(new.dtype)
    start = new.detach() if proximal is None else proximal
    old = start if config.correction == "truncated" else behaviour
    losses, clipped = surrogate(new, old, credit, clip_low=config.clip_low, clip_high=config.clip_high)
    if config.correction == "truncated":
        losses = losses * importance(start, behaviour, cap=config.cap)
    if reference is not None:
        losses = losses + config.kl * k3(new, reference)
    loss = (losses * weights).sum()
    if tally is not None:
        trained = torch.from_numpy(batch.packed.labels) != IGNORED
        tally.add(loss, (start - behaviour)[trained], clipped[trained], config.cap)
    return loss


class Tally:
    """Counts over the trained tokens of a step."""

    def __init__(self) -> None:
        self.loss, self.tokens, self.apart, self.drift, self.clipped, self.capped = 0.0, 0, 0.0, 0.0, 0, 0

    def add(self, loss: Tensor, log_ratio: Tensor, clipped: Tensor, cap: float) -> None:
        self.loss += float(loss.detach())
        self.tokens += len(log_ratio)
        self.apart += float(log_ratio.abs().sum())
        self.drift -= float(log_ratio.sum())
        self.clipped += int(clipped.sum())
        self.capped += int((log_ratio.exp() > cap).sum())

    def counts(self) -> list[float]:
        """What adds up over processes; `Tally.of` reads it."""
        return [self.loss, self.tokens, self.apart, self.drift, self.clipped, self.capped]

    @classmethod
    def of(cls, counts: Sequence[Sequence[float]]) -> Tally:
        """The sum of these."""
        tally = cls()
        tally.loss, tokens, tally.apart, tally.drift, clipped, capped = map(sum, zip(*counts, strict=True))
        tally.tokens, tally.clipped, tally.capped = int(tokens), int(clipped), int(capped)
        return tally

    def numbers(self) -> dict[str, float]:
        """`mismatch`: mean distance of trainer and engine in nats; `mismatch_kl`: engine against trainer."""
        n = max(1, self.tokens)
        return {
            "loss": self.loss,
            "trained_tokens": float(self.tokens),
            "mismatch": self.apart / n,
            "mismatch_kl": self.drift / n,
            "clipped": self.clipped / n,
            "capped": self.capped / n,
        }
