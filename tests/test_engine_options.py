"""Options of engines: wrong types, names and ranges are refused by name, before anything is read or allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plait.engines import open_engine
from plait.engines.inprocess.sampling import Sampler, uniforms
from plait.engines.llamacpp import LlamaCppEngine
from plait.errors import EngineError, RequestError
from plait.models import load_model
from plait.types import SamplingParams


@pytest.mark.parametrize(
    ("engine", "option", "value", "says"),
    [
        ("llamacpp", "cells", "abc", "cells of the llamacpp engine is 'abc'; it must be a whole number or left out$"),
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


@pytest.mark.parametrize(
    ("option", "values", "says"),
    [
        ("threads", (0, -1, 257, 100_000), "from 1 to 256"),
        ("cells", (0, -5, 10**10), "from 1 to 67108864"),
        ("max_context", (0, -3), "at least 2"),
        ("prefill_rows", (0, -4), "at least 1"),
        ("flush_s", (-1, float("nan"), float("inf")), "from 0 to 60"),
        ("keep", (-1,), "at least 0"),
        ("lora_scale", (float("nan"),), "from -1000 to 1000"),
        ("speculate", (-1, 65), "from 0 to 64"),
        ("max_seqs", (1, 257), "from 2 to 256"),
        ("cache", ("Q8", "F64"), "known: F16, F32"),
    ],
)
def test_a_value_outside_of_its_range_is_refused_before_the_weights_are_read(
    option: str, values: tuple[Any, ...], says: str
) -> None:
    for value in values:
        options: dict[str, Any] = {option: value}
        with pytest.raises(RequestError, match=f"{option} .*{says}"):
            LlamaCppEngine(Path("absent.gguf"), **options)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("threads", (0, 257)),
        ("cells", (0, 10**12)),
        ("max_context", (0, -3)),
        ("prefill_rows", (0,)),
        ("flush_s", (-1, float("nan"))),
        ("block_size", (0,)),
    ],
)
def test_the_torch_engine_refuses_them_alike(option: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"^{option} is {value}; it must be"):
            open_engine("torch", path="absent", **{option: value})


@pytest.mark.anyio
async def test_all_ids_banned_and_a_model_that_gives_nan_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model()
    context = (tuple(range(5)),)
    async with model.open_engine("llamacpp", threads=1) as engine:
        every = tuple(range(len(model.tokenizer.tokens) + 1000))
        with pytest.raises(RequestError, match="are banned; leave one"):
            await anext(engine.generate(context, SamplingParams(max_tokens=4, banned_ids=every)))

        sample = Sampler.sample

        def nan(self: Sampler, logits: Any, ids: Any, logprobs: Any) -> bool:
            logits[:, 7] = np.nan
            return sample(self, logits, ids, logprobs)

        monkeypatch.setattr(Sampler, "sample", nan)
        for more in ({}, {"logprobs": False}, {"logprobs": False, "temperature": 1.0, "top_k": 5, "top_p": 0.9}):
            params: dict[str, Any] = {"max_tokens": 4, **more}
            with pytest.raises(EngineError, match="gave NaN"):
                await anext(engine.generate(context, SamplingParams(**params)))


@pytest.mark.parametrize("temperature", [1e-6, 1e-310, 5e-324])
def test_a_temperature_next_to_none_is_greedy(temperature: float) -> None:
    sampler = Sampler(1, 48)
    sampler.place(0, SamplingParams(max_tokens=1, temperature=temperature), uniforms(0))
    sampler.arrange(1)
    logits = np.random.default_rng(0).standard_normal((1, 48)).astype(np.float32)
    ids, logprobs = np.zeros(1, np.int32), np.zeros(1, np.float32)
    sampler.sample(logits, ids, logprobs)
    assert ids[0] == logits.argmax() > 0
