"""`POST /v1/completions`: the whole finished text, reasoning and answer as the model wrote them, tags included.

A prompt in words is a question to a model that Plait trained, and to any other a text that it continues; one of ids is
taken as it is. Many prompts run side by side, as threads do. With `echo`
a prompt, in words too, is a text to be scored, and nothing is run: so evaluations ask for log-likelihoods.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends

from plait.engines.base import Engine
from plait.engines.scoring import Scored, score
from plait.errors import EngineError, EngineTimeout, Failures, RequestError
from plait.server.answer import stops_of
from plait.server.refusal import Refusal
from plait.server.replies import CompletionReply
from plait.server.reply import Out, Reply, asked, documented
from plait.server.schemas import CompletionRequest
from plait.server.service import Asked, Served, checked_ids
from plait.server.transcript import ROOT, Cut, Ordered, Transcript
from plait.tokenizer import Vocabulary
from plait.tokenizer.text import TextTokenizer
from plait.types import SamplingParams

router = APIRouter()


@router.post("/v1/completions", **documented(CompletionReply))
async def completions(body: CompletionRequest, asked: Annotated[Asked, Depends(asked)]) -> Reply:
    """Continue each prompt."""
    prompts = _Scores(body, asked) if body.echo else _Completions(body, asked)
    return Reply(asked.service, prompts.work, stream=bool(body.stream))


class _Prompts:
    """What the prompts of a request have in common: they are worked on side by side."""

    def __init__(self, body: CompletionRequest, asked: Asked) -> None:
        self.body, self.asked = body, asked
        self.served = asked.service.find(body.model)
        self.prompts = _prompts(body.prompt)
        self.base = {
            "id": f"cmpl-{asked.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.served.name,
        }

    async def work(self, out: Out | None) -> dict[str, Any] | None:
        done: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        failures = Failures()

        async def one(index: int) -> None:
            with failures.noting():
                done[index] = await self._one(index, out)

        with failures.unwrapped():
            async with anyio.create_task_group() as prompts:
                for index in range(len(self.prompts)):
                    prompts.start_soon(one, index)
        usage = _total([done[index][1] for index in sorted(done)])
        if out is None:
            return {**self.base, "choices": [done[index][0] for index in sorted(done)], "usage": usage}
        options = self.body.stream_options
        if options is not None and options.include_usage:
            await out.data({**self.base, "choices": [], "usage": usage})
        return None

    async def _one(self, index: int, out: Out | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Work on a prompt; its choice and its usage."""
        raise NotImplementedError


class _Completions(_Prompts):
    def __init__(self, body: CompletionRequest, asked: Asked) -> None:
        super().__init__(body, asked)
        self.requests = [
            asked.request(
                self.served, _prompt_of(prompt, self.served), param="prompt", body=body, max_tokens=body.max_tokens
            )
            for prompt in self.prompts
        ]

    async def _one(self, index: int, out: Out | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run a prompt; its choice and its usage."""
        asked, prompt = self.asked, self.prompts[index]
        question = prompt if isinstance(prompt, str) else self.served.model.tokenizer.decode(prompt)
        trace = asked.trace(self.served, question, self.body.plait)
        parts: list[str] = []
        async with asked.service.job(self.served, self.requests[index], asked=asked, trace=trace) as job:
            transcript, order = Transcript(job.served.model.tokenizer, job.served.format), Ordered()
            stop = Cut(stops_of(self.body.stop))
            async for event in job:
                for piece in transcript.read(event):
                    for ready in order.put(piece):
                        text = "" if stop.found is not None else stop.put(ready.text)[0]
                        if ready.kind == "close" and ready.thread == ROOT:
                            text += stop.rest()
                        parts.append(text)
                        if text and out is not None:
                            await out.data({**self.base, "choices": [_choice(index, text, None)]})
                if stop.found is not None:
                    break
        reason = "stop" if stop.found is not None else job.finish
        if out is not None:
            await out.data({**self.base, "choices": [_choice(index, "", reason) | {"plait": job.about()}]})
        return _choice(index, "".join(parts), reason) | {"plait": job.about()}, job.tokens()


class _Scores(_Prompts):
    """Prompts that are scored; with `max_tokens` 1 each is continued by a token."""

    def __init__(self, body: CompletionRequest, asked: Asked) -> None:
        super().__init__(body, asked)
        self.ids = [_text_ids(prompt, self.served) for prompt in self.prompts]

    async def _one(self, index: int, out: Out | None) -> tuple[dict[str, Any], dict[str, Any]]:
        body, ids, tokenizer = self.body, list(self.ids[index]), self.served.model.tokenizer
        timeout_s = self.asked.service.config.request_timeout_s
        scored: list[Scored] = []
        more: list[float] = []
        with self.asked.service.lane(self.served, self.asked) as (lane, _):
            with anyio.move_on_after(timeout_s) as waited:
                if body.logprobs is not None:
                    scored = await score(lane, ids, vocab_size=len(tokenizer.tokens))
                if body.max_tokens:
                    id, logprob = await self._continue(lane, ids)
                    ids.append(id)
                    more.append(logprob)
            if waited.cancelled_caught:
                raise EngineTimeout(f"the prompt was not scored within {timeout_s:g} s")
        choice = _choice(index, tokenizer.decode(ids), "length")
        if scored:
            choice["logprobs"] = _logprobs(ids, scored, more, tokenizer, top=bool(body.logprobs))
        counts = {"prompt_tokens": len(self.ids[index]), "completion_tokens": len(more), "total_tokens": len(ids)}
        if out is not None:
            await out.data({**self.base, "choices": [choice]})
        return choice, counts

    async def _continue(self, engine: Engine, ids: Sequence[int]) -> tuple[int, float]:
        """One more token, and its log-probability."""
        body = self.body
        params = SamplingParams(
            max_tokens=1,
            temperature=self.asked.service.config.temperature if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            seed=body.seed or 0,
        )
        async with aclosing(engine.generate((tuple(ids),), params)) as chunks:
            async for chunk in chunks:
                return chunk.token_ids[0], chunk.logprobs[0]
        raise EngineError(f"the {engine.name} engine ended a call without a token")


def _prompt_of(prompt: str | Sequence[int], served: Served) -> str | tuple[int, ...]:
    """What a model is to continue."""
    tokenizer = served.model.tokenizer
    if not isinstance(prompt, str):
        return checked_ids(prompt, served, "prompt")
    if not isinstance(tokenizer, TextTokenizer) or not served.model.plain:
        return prompt
    try:
        ids = tokenizer.text_ids(prompt)
    except RequestError as exc:
        raise Refusal(str(exc), code="unwritable_prompt", param="prompt") from exc
    if not ids:
        raise Refusal("the prompt is empty; there is nothing to continue", param="prompt")
    return ids


def _text_ids(prompt: str | Sequence[int], served: Served) -> tuple[int, ...]:
    """A given text as ids: words as the tokenizer reads them, without control tokens."""
    if not isinstance(prompt, str):
        return checked_ids(prompt, served, "prompt")
    try:
        ids = tuple(served.model.tokenizer.encode(prompt))
    except RequestError as exc:
        raise Refusal(str(exc), code="unknown_text", param="prompt") from exc
    if not ids:
        raise Refusal("the prompt is empty; there is nothing to score", param="prompt")
    return ids


def _logprobs(
    ids: Sequence[int], scored: Sequence[Scored], more: Sequence[float], tokenizer: Vocabulary, *, top: bool
) -> dict[str, Any]:
    """OpenAI's four lists: nothing is known of the first token, for nothing is before it."""
    texts = [tokenizer.decode((id,)) for id in ids]
    given = [*(one.logprob for one in scored[:-1]), *more]
    tops = [
        {tokenizer.decode((one.top_id,)): one.top_logprob} | {text: logprob}
        for one, text, logprob in zip(scored, texts[1:], given, strict=False)
    ]
    return {
        "tokens": texts,
        "token_logprobs": [None, *given],
        "top_logprobs": [None, *tops] if top else None,
        "text_offset": [0, *accumulate(map(len, texts[:-1]))],
    }


def _prompts(prompt: Any) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _total(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Usage of all prompts; the `plait` block is there where there is one prompt, for its numbers do not add up."""
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    total: dict[str, Any] = {name: sum(usage[name] for usage in usages) for name in counts}
    return total | {"plait": usages[0]["plait"]} if len(usages) == 1 and "plait" in usages[0] else total
