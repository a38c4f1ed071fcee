"""Values refuse what makes no sense, in words."""

from __future__ import annotations

import math

import pytest

from plait.errors import RequestError
from plait.types import Budget, Request, SamplingParams, StopReason


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_number_that_is_no_limit_is_refused(value: float) -> None:
    with pytest.raises(RequestError, match="deadline_s"):
        Budget(deadline_s=value)
    with pytest.raises(RequestError, match="temperature"):
        SamplingParams(max_tokens=1, temperature=value)


def test_an_empty_prompt_and_a_budget_of_no_tokens_are_refused() -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        Request(prompt_ids=())
    with pytest.raises(RequestError, match="max_tokens is 0"):
        Budget(max_tokens=0)


def test_a_stop_id_ends_a_call_before_its_length_does() -> None:
    params = SamplingParams(max_tokens=9, stop_ids=(1,), eos_ids=(2,))
    assert [params.stop_at(id, full=False) for id in (0, 1, 2)] == [None, StopReason.STOP, StopReason.EOS]
    assert [params.stop_at(id, full=True) for id in (0, 1, 2)] == [StopReason.LENGTH, StopReason.STOP, StopReason.EOS]
