"""Options of engines: wrong types, names and ranges are refused by name, before anything is read or allocated."""

from __future__ import annotations

from typing import Any

import pytest

from plait.engines import open_engine
from plait.errors import RequestError


@pytest.mark.parametrize(
    ("engine", "option", "value", "says"),
    [
        ("llamacpp", "cells", "abc", "cells of the llamacpp engine is 'abc'; it must be a whole number$"),
        ("llamacpp", "threads", "two", "a whole number or left out"),
        ("llamacpp", "threads", True, "threads of the llamacpp engine is True"),
        ("llamacpp", "max_seqs", 3.5, "max_seqs of the llamacpp engine is 3.5"),
        ("llamacpp", "speculate", "yes", "a whole number"),
        ("llamacpp", "flash_attention", "no", "true or false"),
        ("llamacpp", "flush_s", "x", "a number"),
        ("llamacpp", "cache", "F64", "did you mean 'F16'"),
        ("llamacpp", "path", 4, "text or a path"),
        ("http", "retries", "x", "retries of the http engine is 'x'"),
        ("http", "timeouts", 5, "a Timeouts or left out"),
        ("scripted", "script", 3, "a function or a Tree"),
        ("scripted", "weights", 3, "a Mapping"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_by_name(engine: str, option: str, value: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        open_engine(engine, **{option: value})


def test_what_an_engine_cannot_do_without_is_named() -> None:
    with pytest.raises(RequestError, match="the llamacpp engine needs path"):
        open_engine("llamacpp")


def test_whole_numbers_pass_for_numbers_and_lists_for_sequences() -> None:
    open_engine("scripted", delay_s=0, weights={1: 2.0}, script=lambda context: (1,))
    open_engine("http", urls=["http://127.0.0.1:1"], retries=0)
