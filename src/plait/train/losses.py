"""The policy loss of one token, and how the tokens of a batch are weighed.

    loss = sum over sampled tokens of  w * (I * clipped surrogate + kl * k3)

All of it is a sum over tokens with weights fixed beforehand (`token_weights`), so it does not depend on how trees are
packed, in which order batches are run, or how many gradients are accumulated. Averaging micro-batches by their number
of rows, as is published practice, is another function of the same tokens.

Knows nothing of trees and models. Logprobs are natural logs under temperature 1. Three policies take part: the one
being trained, the proximal one (the same model at the start of the step), and the behaviour one (what the engine
sampled from: maybe older weights, always another implementation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from plait.errors import nearest

Aggregate: TypeAlias = Literal["token_mean", "rollout_mean", "constant"]
AGGREGATES = ("token_mean", "rollout_mean", "constant")
_MAX_LOG_RATIO = 20.0
"""e^20: far beyond every clip, and still finite in float32, so that one odd token gives no NaN."""


def surrogate(
    logprobs: Tensor, proximal: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate with its own bound on either side, to be minimised.

        r = exp(logprobs - proximal),    loss = -min(r * A, clip(r, 1 - low, 1 + high) * A)

    Sources: Schulman et al. 2017 (arXiv:1707.06347); the wider upper bound, DAPO (Yu et al. 2025, arXiv:2503.14476).

    Returns:
        The loss of each token, and whether its gradient was clipped away.
    """
    ratio = (logprobs - proximal).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(plain, clipped), clipped < plain


def importance(proximal: Tensor, behaviour: Tensor, *, cap: float) -> Tensor:
    """Truncated importance weight of each token, without gradient: I = min(exp(proximal - behaviour), cap).

    Corrects for what sampled the token not being what is trained: another implementation of the same weights (Yao et
    al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"), or older weights, where it is
    the decoupled objective of AReaL (Fu et al. 2025, arXiv:2505.24298).
    """
    return (proximal - behaviour).detach().clamp(max=_MAX_LOG_RATIO).exp().clamp(max=cap)


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token: exp(d) - d - 1 with d = reference - logprobs.

    Never negative, unbiased under the policy. Source: Schulman 2020, "Approximating KL divergence"; as a penalty in
    the loss, GRPO (arXiv:2402.03300).
    """
    d = (reference - logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return d.exp() - d - 1


def token_weights(aggregate: str, sampled_tokens: Mapping[str, int], *, constant: int = 1) -> dict[str, float]:
    """Weight of every sampled token of each rollout; a rollout's tokens weigh alike.

        token_mean      1 / all sampled tokens of the batch: ThreadWeaver eq. 4, DAPO
        rollout_mean    1 / (rollouts * tokens of this one): every rollout weighs the same, GRPO
        constant        1 / (rollouts * constant): no reward for being long or short, Dr. GRPO (arXiv:2503.20783)

    Args:
        sampled_tokens: Of each rollout by id, also of those whose advantage is 0.
        constant: For `constant`, such as the largest number of tokens a rollout may have.

    Raises:
        RequestError: No aggregate has this name.
    """
    if aggregate not in AGGREGATES:
        raise nearest(aggregate, list(AGGREGATES), "aggregate")
    rollouts, total = len(sampled_tokens), sum(sampled_tokens.values())
    if aggregate == "token_mean":
        return dict.fromkeys(sampled_tokens, 1 / max(1, total))
    if aggregate == "constant":
        return dict.fromkeys(sampled_tokens, 1 / max(1, rollouts * constant))
    return {id: 1 / (rollouts * max(1, n)) for id, n in sampled_tokens.items()}
