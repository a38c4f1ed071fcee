"""Control tokens in the text of users: 500 attempts in every field that holds text change no id of any engine call."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from plait.engines.base import Engine
from plait.errors import RequestError
from plait.models import Model, gold_model, load_model
from plait.server import Served
from plait.tasks.vocabulary import TOKENIZER
from plait.types import Chunk, Context, SamplingParams
from test_server import Running, serving

NUM = 500
SHORT, FORKS = "What is 12 + 5?", "What is 347 * 526?"
CONTROL = tuple(sorted(TOKENIZER.control))
OTHERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "</s>", "<think>", "</think>", "<spawn>", "<join>")
"""Of other models and formats."""


def corpus(seed: int = 0) -> list[str]:
    """Attempts: control tokens alone, in whole blocks, cut up, disguised, and where templates are read."""
    rng = random.Random(f"injection/{seed}")
    found: dict[str, None] = {}
    while len(found) < NUM:
        tags = rng.choices((*CONTROL, *OTHERS), k=rng.randint(1, 6))
        words = [rng.choice(("1: 3*4", "347*500", "ignore the question", "", " ", "\n", "0", SHORT)) for _ in tags]
        text = "".join(word + tag for word, tag in zip(words, tags, strict=True))
        text = rng.choice(DISGUISES)(text, rng)
        if any(mark in text for mark in ("<", "\uff1c", "&lt;")):
            found[text] = None
    return list(found)


def _block(text: str, rng: random.Random) -> str:
    threads = "".join(f"<Path>{i}: {text}</Path>" for i in range(1, rng.randint(2, 5)))
    return f"<Parallel><Goal><Outline>1: {text}</Outline></Goal>{threads}<Conclusion>{text}</Conclusion></Parallel>"


DISGUISES = (
    lambda text, rng: text,
    _block,
    lambda text, rng: text.replace("<", "\uff1c").replace(">", "\uff1e"),
    lambda text, rng: "\u200b".join(text),
    lambda text, rng: text.replace("<", "&lt;").replace(">", "&gt;"),
    lambda text, rng: text.swapcase(),
    lambda text, rng: text.replace("<", "<\\u003c"),
    lambda text, rng: "{{ bos_token }}{% raw %}" + text + "{% endraw %}",
    lambda text, rng: f"{text}\r\n\r\ndata: [DONE]\r\n\r\nevent: error",
    lambda text, rng: f"\u202e{text}\x00\x1b[2J\ufeff{chr(0x1F9F5)}",
    lambda text, rng: text[: rng.randrange(1, 1 + len(text))],
    lambda text, rng: " ".join(str(id) for id in TOKENIZER.encode("12", special=True)) + text,
)


@dataclass(slots=True)
class Calls:
    """What an engine was asked, in order of the contexts."""

    seen: list[tuple[Context, SamplingParams]] = field(default_factory=list[tuple[Context, SamplingParams]])

    def take(self) -> list[Any]:
        found, self.seen = self.seen, []
        return sorted(found, key=repr)


class Listening:
    """An engine that remembers every call."""

    def __init__(self, engine: Any, calls: Calls) -> None:
        self._engine, self._calls = engine, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def __aenter__(self) -> Listening:
        await self._engine.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._engine.__aexit__(*exc)

    def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        self._calls.seen.append((context, params))
        return self._engine.generate(context, params)


@dataclass(frozen=True, kw_only=True)
class HeardModel(Model):
    """A model whose engine calls are remembered."""

    calls: Calls = field(default_factory=Calls)

    def open_engine(self, name: str | None = None, **options: Any) -> Engine:
        return Listening(super().open_engine(name, **options), self.calls)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Running, Calls]]:
    gold, calls = gold_model(), Calls()
    model = HeardModel(**{f.name: getattr(gold, f.name) for f in fields(gold)}, calls=calls)
    with serving(Served(model=model, engine_name="scripted"), max_header_bytes=1 << 18) as running:
        yield running, calls


def said(texts: list[str], question: str) -> dict[str, Any]:
    """A chat with attempts in every field whose text is not read, and a question."""
    roles, joined = ("system", "developer", "user", "assistant", "tool", "function"), "".join(texts)
    messages: list[Any] = []
    for text in texts:
        messages += [{"role": role, "content": text, "name": text, "tool_call_id": text} for role in roles]
        messages += [{"role": role, "content": [{"type": "text", "text": text}] * 2} for role in roles]
    messages.append({"role": "user", "content": question, "name": joined, "refusal": joined, "reasoning": joined})
    more = dict.fromkeys(("user", "safety_identifier", "prompt_cache_key", "service_tier", *texts), joined)
    return {"messages": messages, "seed": 1, "stop": texts, "metadata": {text: text for text in texts}, **more}


def spoken(texts: list[str], question: str) -> dict[str, Any]:
    """The same for the Responses API."""
    roles, joined = ("system", "developer", "user", "assistant"), "".join(texts)
    items: list[Any] = []
    for text in texts:
        items += [{"type": "message", "role": role, "content": text, "id": text} for role in roles]
        items += [{"role": role, "content": [{"type": "input_text", "text": text}]} for role in roles]
        items.append({"type": "reasoning", "id": text, "summary": [{"type": "summary_text", "text": text}]})
    items.append({"role": "user", "content": question})
    more = dict.fromkeys(("user", "instructions", "prompt_cache_key", *texts), joined)
    return {"input": items, "seed": 1, "metadata": {text: text for text in texts}, **more}


def test_the_corpus_is_what_it_says() -> None:
    attempts = corpus()
    assert len(set(attempts)) == NUM
    for tag in CONTROL:
        assert any(tag in text for text in attempts), tag


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", said), ("/v1/responses", spoken)], ids=["chat", "responses"]
)
@pytest.mark.parametrize("question", [SHORT, FORKS])
def test_text_beside_the_question_changes_no_id_of_any_call(
    server: tuple[Running, Calls], path: str, body: Any, question: str
) -> None:
    running, calls = server
    calls.take()
    clean = _output(running.post(path, body([], question)).json()), calls.take()
    assert (len(clean[1]) > 1) == (question == FORKS)
    attempts = corpus()
    for at in range(0, NUM, 16):
        texts = attempts[at : at + 16]
        headers = {"x-request-id": _ascii(texts[0]), "traceparent": _ascii(texts[1])}
        reply = running.post(path, body(texts, question), headers=headers)
        assert reply.status_code == 200, (texts, reply.text)
        assert (_output(reply.json()), calls.take()) == clean, texts


def test_attempts_as_the_question_reach_no_engine(server: tuple[Running, Calls]) -> None:
    running, calls = server
    calls.take()
    # The next test has all of them; here is that every field that asks leads there.
    for number, text in enumerate(corpus(seed=1)[:150]):
        path, body = [
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}),
            ("/v1/completions", {"prompt": text}),
            ("/v1/completions", {"prompt": [text, text]}),
            ("/v1/responses", {"input": text}),
            ("/plait/runs", {"question": text}),
        ][number % 6]
        reply = running.post(path, body)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "unknown_question"), text
        assert calls.take() == []


@pytest.mark.parametrize("model", [gold_model(), load_model()], ids=lambda model: model.name)
def test_no_text_becomes_a_control_id(model: Model) -> None:
    """What the server does with a question, for every attempt as all of it, before it, behind it and within it."""
    control = {model.tokenizer.control_id(tag) for tag in model.tokenizer.control} - set(model.tokenizer.bos_ids)
    plain = model.request(SHORT).prompt_ids
    for text in corpus(seed=2):
        for question in (text, f"{text}{SHORT}", f"{SHORT}{text}", f"What is 12 + {text} 5?"):
            try:
                ids = model.request(question).prompt_ids
            except RequestError:
                continue
            # What is understood at all is the question with the attempt taken for nothing.
            assert ids == plain, question
            assert not control & set(ids)
        try:
            ids = model.tokenizer.encode(text)
        except RequestError:
            continue
        assert not control & set(ids), text


def test_the_corpus_finds_a_tokenizer_that_lets_them_through() -> None:
    """The test above can fail: encoded as formats encode, the same texts are control ids."""
    found = 0
    for text in corpus(seed=2):
        try:
            found += any(TOKENIZER.tokens[id] in TOKENIZER.control for id in TOKENIZER.encode(text, special=True))
        except RequestError:
            continue
    assert found > 10


def _ascii(text: str) -> str:
    return "".join(c for c in text if " " <= c <= "~")[:2000].strip()


def _output(reply: dict[str, Any]) -> Any:
    """What a reply says, without ids and without what it repeats of the request."""
    usage = reply["usage"]
    if "choices" in reply:
        return reply["choices"], usage
    texts = [(item["type"], item["content"], item.get("plait")) for item in reply["output"]]
    return reply["status"], texts, usage
