"""How likely a given text is: by an engine, held against its own samples and a plain forward, and over HTTP."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

import plait
import tiny_llama
from plait.engines.scoring import score
from plait.engines.scripted import ScriptedEngine
from plait.errors import ContextLengthError, RequestError
from plait.types import Chunk, Context, SamplingParams, StopReason

MODEL = "plait-tiny-sequential"
TOLERANCE = 0.02
"""Eight-bit weights and a cache of sixteen bits: other batches round otherwise."""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.anyio
async def test_what_a_model_sampled_scores_as_it_was_sampled() -> None:
    model = plait.load_model(MODEL)
    prompt = model.request("What is 34 * 5?").prompt_ids
    size = len(model.tokenizer.tokens)
    async with model.open_engine() as engine:
        ids: list[int] = []
        logprobs: list[float] = []
        params = SamplingParams(max_tokens=12, temperature=3.0, seed=3)
        async with aclosing(engine.generate((prompt,), params)) as chunks:
            async for chunk in chunks:
                ids += chunk.token_ids
                logprobs += chunk.logprobs
        scored = await score(engine, (*prompt, *ids), vocab_size=size)
        assert len(scored) == len(prompt) + len(ids)
        assert [one.logprob for one in scored[len(prompt) - 1 : -1]] == pytest.approx(logprobs, abs=TOLERANCE, rel=0.01)
        assert scored[-1].logprob is None
        assert all(one.logprob <= one.top_logprob for one in scored if one.logprob is not None)
        unlike = [one for one, id in zip(scored, (*prompt, *ids)[1:], strict=False) if one.top_id != id]
        assert unlike, "at this temperature not every token is the likeliest"
        assert engine.stats().active == 0


@pytest.mark.anyio
@pytest.mark.torch
async def test_the_torch_engine_scores_as_a_plain_forward_does() -> None:
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from plait.engines.torch import TorchEngine

    torch.set_num_threads(1)
    config = {**tiny_llama.CONFIG, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    ids = (7, 3, 11, 40, 2, 19, 23, 5)
    async with TorchEngine.from_weights(tiny_llama.weights(0), config, cells=1024, device="cpu") as engine:
        scored = await score(engine, ids, vocab_size=tiny_llama.VOCAB)
    for count, (one, id) in enumerate(zip(scored, ids[1:], strict=False), 1):
        expected = tiny_llama.forward((ids[:count],))
        assert one.logprob == pytest.approx(expected[id], abs=5e-4)
        assert one.top_logprob == pytest.approx(expected.max(), abs=5e-4)


@pytest.mark.anyio
async def test_an_engine_whose_logprobs_come_after_bans_is_refused() -> None:
    async with ScriptedEngine(max_context=8) as engine:
        with pytest.raises(RequestError, match="scripted engine cannot score"):
            await score(engine, (1, 2, 3, 4), vocab_size=64)
        with pytest.raises(ContextLengthError):
            await score(engine, range(8), vocab_size=64)
        with pytest.raises(RequestError, match="at least one"):
            await score(engine, (), vocab_size=64)
        assert engine.stats().active == 0


class Rounding(ScriptedEngine):
    """Two tokens are equally likely; one call says 0.51 of the first, another 0.52 of the second."""

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        id, p = (1, 0.52) if params.banned_ids else (0, 0.51)
        yield Chunk(token_ids=(id,), logprobs=(math.log(p),), stop=StopReason.LENGTH)


@pytest.mark.anyio
async def test_two_calls_that_round_otherwise_are_scored_all_the_same() -> None:
    async with Rounding(max_context=8) as engine:
        first, last = await score(engine, (0, 1), vocab_size=2)
    assert (first.top_id, first.logprob, first.top_logprob) == (0, math.log(0.51), math.log(0.51))
    assert (last.top_id, last.logprob) == (0, None)


server_tests = pytest.importorskip("test_server", reason="needs the serve extra")


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    served = server_tests.Served(model=plait.load_model(MODEL), engine_name="llamacpp")
    with server_tests.serving(served, server_tests.gold()) as running:
        yield running


def echo(server: Any, prompt: Any, **more: Any) -> Any:
    options = {"model": MODEL, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, **more}
    return server.client().completions.create(prompt=prompt, **options)


def test_echo_gives_the_log_probabilities_of_a_prompt(server: Any) -> None:
    model = plait.load_model(MODEL)
    ids = list(model.request("What is 34 * 5?").prompt_ids)
    reply = echo(server, ids)
    (choice,) = reply.choices
    found = choice.logprobs
    assert choice.finish_reason == "length"
    assert choice.text == "".join(found.tokens)
    assert choice.text.startswith(model.tokenizer.decode(ids))
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + 1
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    assert found.text_offset == [len("".join(found.tokens[:k])) for k in range(len(ids) + 1)]
    for text, logprob, top in zip(found.tokens[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert top[text] == logprob <= max(top.values()) <= 0
    assert found.token_logprobs[-1] == pytest.approx(max(found.top_logprobs[-1].values()), abs=TOLERANCE)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 1)
    assert server.idle()


def test_echo_reads_words_as_they_are_and_many_prompts(server: Any) -> None:
    reply = echo(server, ["34*5", "12=12"], max_tokens=0)
    assert [choice.text for choice in reply.choices] == ["34*5", "12=12"]
    assert [len(choice.logprobs.tokens) for choice in reply.choices] == [4, 5]
    plain = echo(server, "34*5", logprobs=None)
    assert plain.choices[0].logprobs is None
    assert plain.choices[0].text.startswith("34*5")
    streamed = list(echo(server, "34*5", stream=True))
    assert streamed[0].choices[0].text == echo(server, "34*5").choices[0].text


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": "34*5", "echo": True, "logprobs": 1, "max_tokens": 5}, "echo goes with max_tokens 0 or 1"),
        ({"prompt": "34*5", "logprobs": 1, "max_tokens": 5}, "logprobs go with echo"),
        ({"prompt": "34*5", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "34*5", "echo": True, "logprobs": 7, "max_tokens": 1}, "less than or equal to 1"),
        ({"prompt": "What?", "echo": True, "logprobs": 1, "max_tokens": 1}, "vocabulary has no 'W'"),
        ({"prompt": "", "echo": True, "logprobs": 1, "max_tokens": 1}, "nothing to score"),
        ({"prompt": [1, 60], "echo": True, "max_tokens": 1}, "control token"),
        ({"prompt": [1] * 5000, "echo": True, "logprobs": 1, "max_tokens": 1}, "5000"),
    ],
)
def test_what_cannot_be_scored_is_refused(server: Any, body: dict[str, Any], says: str) -> None:
    reply = server.post("/v1/completions", body)
    assert reply.status_code == 400, reply.text
    assert says in reply.json()["error"]["message"]
    assert server.idle()


def test_tokens_of_a_model_are_told(server: Any) -> None:
    model = plait.load_model(MODEL)
    told = server.post("/tokenize", {"prompt": "34*5", "add_special_tokens": False}).json()
    assert told == {"count": 4, "max_model_len": model.max_context, "tokens": model.tokenizer.encode("34*5")}
    assert server.post("/tokenize", {"prompt": "34*5"}).json()["tokens"] == [*model.tokenizer.bos_ids, *told["tokens"]]
    assert server.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "34*5"}
    assert server.post("/tokenize", {"prompt": "<eos>", "add_special_tokens": False}).json()["tokens"] == list(
        model.tokenizer.eos_ids
    )
    assert server.post("/tokenize", {"prompt": "1<eos>"}).status_code == 400
    assert server.post("/detokenize", {"tokens": [100_000]}).status_code == 400
    info = server.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")
