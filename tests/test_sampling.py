"""Drawing next tokens: filters against a plain sort, vocabularies of any size alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.engines.inprocess import sampling
from plait.engines.inprocess.sampling import Sampler
from plait.types import SamplingParams

WEIGHTS = st.lists(st.sampled_from([0.0, 1e-8, 1e-4, 0.25, 0.5, 1.0]), min_size=1, max_size=40).map(lambda w: [1.0, *w])
"""Few values: ties are what goes wrong."""


def kept(weights: list[float], top_k: int, top_p: float) -> set[int]:
    """Which tokens are left, said as plainly as it can be."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[: top_k or None]
    enough, total, left = top_p * sum(weights[i] for i in order), 0.0, set[int]()
    for i in order:
        if top_p < 1 and left and total >= enough:
            break
        left.add(i)
        total += weights[i]
    return {i for i in left if weights[i]}


@given(WEIGHTS, st.integers(0, 45), st.sampled_from([1e-9, 0.1, 0.3, 0.6, 0.9, 0.9999, 1.0]), st.randoms())
def test_filters_keep_what_a_plain_sort_keeps(weights: list[float], top_k: int, top_p: float, rng: object) -> None:
    rng.shuffle(weights)  # type: ignore[attr-defined]
    array = np.array(weights, np.float32)
    sampling._filter(array, top_k, top_p)
    assert set(np.flatnonzero(array).tolist()) == kept(np.array(weights, np.float32).tolist(), top_k, top_p)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1, exclude_max=True))
def test_blocks_of_weights_give_the_token_that_one_running_sum_gives(seed: int, draw: float) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 4, (3, 5 * sampling._WIDTH)).astype(np.float32)  # sums of whole numbers do not round
    weights[0] *= rng.random(weights.shape[1]) < 0.01
    weights[0, 700] = 1
    draws = np.array([[draw], [draw], [rng.random()]])
    assert sampling._inverted_by_blocks(weights, draws).tolist() == sampling._inverted(weights, draws).tolist()


@pytest.mark.parametrize("vocab_size", [300, 30_000])
@pytest.mark.parametrize("draw", [0.0, 0.5, math.nextafter(1, 0)])
def test_no_draw_gives_a_token_without_weight(vocab_size: int, draw: float) -> None:
    allowed, params = (vocab_size // 3, vocab_size - 2), SamplingParams(max_tokens=1, temperature=0.7)
    logits: npt.NDArray[np.float32] = np.full((2, vocab_size), -np.inf, np.float32)
    logits[:, allowed] = -3.0, -3.1
    sampler = Sampler(2, vocab_size)
    for slot in range(2):
        sampler.place(slot, params, iter([draw]))
    sampler.arrange(2)
    ids, logprobs = np.zeros(2, np.int32), np.zeros(2, np.float32)
    sampler.sample(logits, ids, logprobs)
    assert ids.tolist() == [allowed[draw > 0.55]] * 2


@pytest.mark.parametrize("vocab_size", [40, 30_000])
@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}, {"banned_ids": (1, 2)}])
@pytest.mark.parametrize("scored", [0, 1, 2])
def test_nan_is_seen_whether_or_not_logprobs_are_asked_for(vocab_size: int, more: dict[str, Any], scored: int) -> None:
    """Rows 0 and 1 have one NaN, 2 and 3 none; 0 and 2 are greedy; the first `scored` pairs are asked for them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, vocab_size)).astype(np.float32)
    logits[:2, 5] = np.nan
    logits[2:, 6] = -np.inf
    sampler, ids, logprobs = Sampler(4, vocab_size), np.zeros(4, np.int32), np.zeros(4, np.float32)
    for slot in range(4):
        params = SamplingParams(max_tokens=1, temperature=float(slot % 2), logprobs=slot // 2 < scored, **more)
        sampler.place(slot, params, iter([0.3]))
    sampler.arrange(4)
    sampler.sample(logits, ids, logprobs)
    assert np.isnan(logprobs).tolist() == [True, True, False, False]
    assert all(math.copysign(1, p) == 1 and p == 0 for p in logprobs[2:]) or scored == 2
    _, further = sampler.sample_greedily(logits, range(4))
    assert [math.isnan(p) for p in further] == [True, True, False, False]
