"""Next tokens of all rows of a batch at once, with as few numpy calls as possible. Knows nothing of sequences.

Shapes: S slots (rows that sample), V vocabulary. Greedy rows cost one argmax for all of them together; a row's random
numbers come from its own call's seed, so what it draws does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from plait.types import SamplingParams

Floats = npt.NDArray[np.float32]
_BLOCK = 64
_NARROW, _WIDTH = 2048, 256
"""Of larger vocabularies, weights are added up by so many first: running sums of all are most of the cost of a draw."""
_COLDEST = 1e-30
_LEAST = (1e-3, 1e-6)
"""Weights looked at for `top_p`, the largest being 1: the first are nearly always enough."""


def uniforms(seed: int) -> Iterator[float]:
    """An endless stream of numbers in [0, 1) that depends on the seed only."""
    generator = np.random.Generator(np.random.Philox(seed & (2**64 - 1)))
    while True:
        yield from generator.random(_BLOCK).tolist()


class Sampler:
    """The sampling parameters of every slot as tables, and one method that samples all slots."""

    def __init__(self, max_slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._stops_SV = np.zeros((max_slots, vocab_size), bool)
        self._banned_SV = np.zeros((max_slots, vocab_size), bool)
        self._narrow = vocab_size <= _NARROW
        width = vocab_size if self._narrow else -(-vocab_size // _WIDTH) * _WIDTH
        self._work_SV = np.zeros((max_slots, width), np.float32)
        self._sums_S = np.empty(max_slots, np.float32)
        self._rows_S = np.arange(max_slots) * vocab_size
        self._params: list[SamplingParams | None] = [None] * max_slots
        self._draws: list[Iterator[float] | None] = [None] * max_slots
        self._marked = lru_cache(64)(partial(_marked, vocab_size))
        self._hot: list[int] = []
        self._silent: list[int] = []
        self._bans = self._scored = False

    def place(self, slot: int, params: SamplingParams, draws: Iterator[float] | None) -> None:
        """Say how a slot samples. Call `arrange` after the last one."""
        self._params[slot], self._draws[slot] = params, draws
        self._stops_SV[slot] = self._marked((*params.stop_ids, *params.eos_ids))
        if params.banned_ids or self._bans:
            self._banned_SV[slot] = self._marked(params.banned_ids)

    def arrange(self, slots: int) -> None:
        """Take the first `slots` slots into use."""
        params = [p for p in self._params[:slots] if p is not None]
        self._hot = [i for i, p in enumerate(params) if p.temperature > 0]
        # Once seen, bans stay accounted for: rows placed without looking at them before are still clear.
        self._bans = self._bans or any(p.banned_ids for p in params)
        self._scored = any(p.logprobs for p in params)
        self._silent = [i for i, p in enumerate(params) if not p.logprobs]

    def sample(self, logits_SV: Floats, ids_S: npt.NDArray[np.int32], logprobs_S: Floats) -> bool:
        """Write the next token of every slot, and its log-probability before temperature and filters.

        NaN among a row's logits comes out as its log-probability, also where none is asked for.

        Returns:
            Whether any slot sampled one of its stop or eos ids.
        """
        slots = len(ids_S)
        choice_SV = logits_SV
        if self._bans:
            choice_SV = np.where(self._banned_SV[:slots], np.float32(-np.inf), logits_SV)
        chosen_S = choice_SV.argmax(1)
        if self._hot:
            chosen_S[self._hot] = self._draw(choice_SV)
        flat_S = chosen_S + self._rows_S[:slots]
        at_S = logits_SV.ravel().take(flat_S)
        if self._scored:
            work_SV = self._work_SV[:slots, : self._vocab_size]
            top_S = logits_SV.max(1) if self._hot or self._bans else at_S
            np.subtract(logits_SV, top_S[:, None], out=work_SV)
            np.exp(work_SV, out=work_SV)
            # -log(sum) + at - top, and never above zero by rounding
            sums_S = np.log(np.add.reduce(work_SV, 1, out=self._sums_S[:slots]))
            np.minimum(at_S - top_S - sums_S if top_S is not at_S else -sums_S, 0, out=logprobs_S)
            if self._silent:
                logprobs_S[self._silent] = _zeros(logprobs_S[self._silent])
        else:
            logprobs_S[:] = _zeros(at_S)
        ids_S[:] = chosen_S
        return bool(self._stops_SV.ravel().take(flat_S).any())

    def sample_greedily(self, logits_RV: Floats, slots_R: Sequence[int]) -> tuple[list[int], list[float]]:
        """The next token of further rows of greedy slots, and its log-probability.

        Args:
            slots_R: To which slot each row belongs.
        """
        choice_RV = logits_RV
        if self._bans:
            choice_RV = np.where(self._banned_SV[slots_R], np.float32(-np.inf), logits_RV)
        chosen_R = choice_RV.argmax(1)
        at_R = logits_RV[np.arange(len(slots_R)), chosen_R]
        if not self._scored:
            return chosen_R.tolist(), _zeros(at_R).tolist()
        top_R = logits_RV.max(1)
        sums_R = np.log(np.exp(logits_RV - top_R[:, None]).sum(1))
        logprobs_R = np.minimum(at_R - top_R - sums_R, 0)
        if self._silent:
            silent_R = np.isin(slots_R, self._silent)
            logprobs_R[silent_R] = _zeros(logprobs_R[silent_R])
        return chosen_R.tolist(), logprobs_R.tolist()

    def _draw(self, logits_SV: Floats) -> npt.NDArray[np.intp]:
        """Sample the hot slots by inverting the cumulative distribution."""
        params = [p for i in self._hot if (p := self._params[i]) is not None]
        draws = [d for i in self._hot if (d := self._draws[i]) is not None]
        padded_HV = self._work_SV[: len(params)]
        weights_HV = padded_HV[:, : self._vocab_size]
        weights_HV[:] = logits_SV[self._hot]
        weights_HV -= weights_HV.max(1, keepdims=True)
        weights_HV /= np.array([[max(p.temperature, _COLDEST)] for p in params], np.float32)
        np.exp(weights_HV, out=weights_HV)
        for weights_V, p in zip(weights_HV, params, strict=True):
            if (p.top_k or p.top_p < 1) and weights_V[0] == weights_V[0]:
                _filter(weights_V, p.top_k, p.top_p)
        draws_H1 = np.array([[next(d)] for d in draws])
        chosen_H = _inverted(padded_HV, draws_H1) if self._narrow else _inverted_by_blocks(padded_HV, draws_H1)
        # Rounding may carry a draw past the last weight: take the likeliest token then; of a row with NaN, that.
        drawn_H = padded_HV[np.arange(len(params)), chosen_H] > 0
        return chosen_H if drawn_H.all() else np.where(drawn_H, chosen_H, logits_SV[self._hot].argmax(1))


def _zeros(values: Floats) -> Floats:
    """Zeros, and NaN where there is NaN."""
    return np.minimum(np.maximum(values, 0), 0)


def _inverted(weights_HV: Floats, draws_H1: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The first weight of each row up to which the sum of weights exceeds a draw's share of the whole."""
    sums_HV = weights_HV.cumsum(1, dtype=np.float64)
    return np.minimum((sums_HV <= draws_H1 * sums_HV[:, -1:]).sum(1), weights_HV.shape[1] - 1)


def _inverted_by_blocks(weights_HV: Floats, draws_H1: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The same for many weights: in which block of W, and where in the block."""
    rows_H = np.arange(len(weights_HV))
    blocks_HNW = weights_HV.reshape(len(rows_H), -1, _WIDTH)
    sums_HN = blocks_HNW.sum(2).cumsum(1, dtype=np.float64)
    at_H1 = draws_H1 * sums_HN[:, -1:]
    block_H = np.minimum((sums_HN <= at_H1).sum(1), sums_HN.shape[1] - 1)
    block_HW = blocks_HNW[rows_H, block_H]
    before_H1 = sums_HN[rows_H, block_H][:, None] - block_HW.sum(1, keepdims=True)
    inside_H = (block_HW.cumsum(1, dtype=np.float64) + before_H1 <= at_H1).sum(1)
    return block_H * _WIDTH + np.where(inside_H < _WIDTH, inside_H, block_HW.argmax(1))


def _marked(vocab_size: int, ids: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """A table row that is True at some ids; those outside the vocabulary cannot be sampled anyway."""
    marks_V = np.zeros(vocab_size, bool)
    marks_V[[i for i in ids if 0 <= i < vocab_size]] = True
    return marks_V


def _filter(weights_V: Floats, top_k: int, top_p: float) -> None:
    """Zero all but the `top_k` largest weights, then all but the fewest that hold `top_p` of what is left.

    The largest weight is 1. Of equal weights the first are kept. Only weights that may be kept are sorted.
    """
    top_k = min(top_k, len(weights_V))
    least = np.partition(weights_V, -top_k)[-top_k] if top_k else _least(weights_V, top_p)
    kept = np.flatnonzero(weights_V >= least)
    kept = kept[np.argsort(-weights_V[kept], kind="stable")][: top_k or None]
    weights_K = weights_V[kept]
    if top_p < 1:
        whole = (weights_K if top_k else weights_V).sum(dtype=np.float64)
        keep = int((weights_K.cumsum(dtype=np.float64) < top_p * whole).sum()) + 1
        kept, weights_K = kept[:keep], weights_K[:keep]
    weights_V[:] = 0
    weights_V[kept] = weights_K


def _least(weights_V: Floats, share: float) -> float:
    """A weight that is small enough: those not smaller hold a share of all."""
    enough = share * weights_V.sum(dtype=np.float64)
    return next((w for w in _LEAST if weights_V[weights_V >= w].sum(dtype=np.float64) >= enough), 0.0)
