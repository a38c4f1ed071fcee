"""Values refuse what makes no sense, in words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from plait.errors import RequestError
from plait.types import Budget, Request, SamplingParams, StopReason


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_number_that_is_no_limit_is_refused(value: float) -> None:
    with pytest.raises(RequestError, match="deadline_s"):
        Budget(deadline_s=value)
    with pytest.raises(RequestError, match="temperature"):
        SamplingParams(max_tokens=1, temperature=value)


@pytest.mark.parametrize("value", ["3", None, True, math.nan, -1], ids=repr)
def test_what_is_no_number_is_refused_in_words(value: Any) -> None:
    for name in ("max_tokens", "temperature", "top_p", "top_k"):
        with pytest.raises(RequestError, match=f"^{name} is .*; it must be a (whole )?number"):
            SamplingParams(**{"max_tokens": 1, name: value})
    with pytest.raises(RequestError, match="seed is 'x'"):
        SamplingParams(**{"max_tokens": 1, "seed": "x"})
    for name in Budget.__slots__ if value is not None else ():
        with pytest.raises(RequestError, match=f"^budget {name} is "):
            Budget(**{name: value})


def test_infinity_is_no_temperature_and_no_count() -> None:
    for name in ("temperature", "max_tokens", "top_k"):
        wrong: dict[str, Any] = {name: math.inf}
        with pytest.raises(RequestError, match=" is inf; it must be"):
            SamplingParams(**{"max_tokens": 1, **wrong})
    assert Budget(deadline_s=math.inf).deadline_s == math.inf


@pytest.mark.parametrize("given", ["What is 2 + 2?", b"2", 7, None, [1, "2"], [1.5]], ids=repr)
def test_a_prompt_that_is_no_token_ids_is_refused(given: Any) -> None:
    says = "model.request\\(text\\)" if isinstance(given, str | bytes) else "must be a sequence of token ids"
    with pytest.raises(RequestError, match=says):
        Request(**{"prompt_ids": given})


def test_a_prompt_may_be_any_sequence_of_ids() -> None:
    some: list[Any] = [(3, 1), [3, 1], np.array([3, 1]), range(3, 0, -2)]
    for given in some:
        ids = Request(prompt_ids=given).prompt_ids
        assert ids == (3, 1)
        assert [type(id) for id in ids] == [int, int]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0 and at most 1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"seed": None}, "seed is None"),
        ({"budget": 100}, "the budget is 100; it must be a Budget"),
    ],
)
def test_a_request_is_held_to_its_ranges_before_it_runs(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Request(prompt_ids=(1,), **wrong)


def test_an_empty_prompt_and_a_budget_of_no_tokens_are_refused() -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        Request(prompt_ids=())
    with pytest.raises(RequestError, match="max_tokens is 0"):
        Budget(max_tokens=0)


def test_a_stop_id_ends_a_call_before_its_length_does() -> None:
    params = SamplingParams(max_tokens=9, stop_ids=(1,), eos_ids=(2,))
    assert [params.stop_at(id, full=False) for id in (0, 1, 2)] == [None, StopReason.STOP, StopReason.EOS]
    assert [params.stop_at(id, full=True) for id in (0, 1, 2)] == [StopReason.LENGTH, StopReason.STOP, StopReason.EOS]
