"""`POST /v1/completions`: the whole finished text, reasoning and answer as the model wrote them, tags included.

A prompt in words is a question; one of ids is taken as it is. Many prompts run side by side, as threads do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends

from plait.errors import Failures
from plait.server.answer import stops_of
from plait.server.reply import DOCUMENTED, Out, Reply, asked
from plait.server.schemas import CompletionRequest
from plait.server.service import Asked, Job
from plait.server.transcript import ROOT, Cut, Ordered, Transcript

router = APIRouter()


@router.post("/v1/completions", **DOCUMENTED)
async def completions(body: CompletionRequest, asked: Annotated[Asked, Depends(asked)]) -> Reply:
    """Continue each prompt."""
    return Reply(asked.service, _Completions(body, asked).work, stream=bool(body.stream))


class _Completions:
    def __init__(self, body: CompletionRequest, asked: Asked) -> None:
        self.body, self.asked = body, asked
        self.served = asked.service.find(body.model)
        self.prompts = _prompts(body.prompt)
        self.requests = [
            asked.request(
                self.served,
                prompt,
                param="prompt",
                options=body.plait,
                max_tokens=body.max_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=body.top_k,
                seed=body.seed,
            )
            for prompt in self.prompts
        ]
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

        try:
            async with anyio.create_task_group() as prompts:
                for index in range(len(self.requests)):
                    prompts.start_soon(one, index)
        except BaseExceptionGroup as group:
            failure = failures.first(group, cancelled=anyio.get_cancelled_exc_class())
            if failure is None:
                raise
            raise failure from None
        usage = _total([done[index][1] for index in sorted(done)])
        if out is None:
            return {**self.base, "choices": [done[index][0] for index in sorted(done)], "usage": usage}
        options = self.body.stream_options
        if options is not None and options.include_usage:
            await out.data({**self.base, "choices": [], "usage": usage})
        return None

    async def _one(self, index: int, out: Out | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run a prompt; its choice and its usage."""
        asked, prompt = self.asked, self.prompts[index]
        question = prompt if isinstance(prompt, str) else self.served.model.tokenizer.decode(prompt)
        trace = asked.trace(self.served, question, self.body.plait)
        parts: list[str] = []
        async with asked.service.job(self.served, self.requests[index], asked=asked, trace=trace) as job:
            transcript, order = Transcript(self.served.model.tokenizer, self.served.format), Ordered()
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
        return _choice(index, "".join(parts), reason) | {"plait": job.about()}, _usage(job)


def _prompts(prompt: Any) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _usage(job: Job) -> dict[str, Any]:
    usage = job.tree.usage()
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.sampled_tokens,
        "total_tokens": usage.prompt_tokens + usage.sampled_tokens,
        "plait": job.usage(),
    }


def _total(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Usage of all prompts; the `plait` block is there where there is one prompt, for its numbers do not add up."""
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    total: dict[str, Any] = {name: sum(usage[name] for usage in usages) for name in counts}
    return total | {"plait": usages[0]["plait"]} if len(usages) == 1 else total
