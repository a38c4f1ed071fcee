"""`POST /v1/chat/completions`: the reasoning in the fields that clients know, the answer as content.

A stream is in the order of the finished text, so that any client may put its deltas one after the other; `interleaved`
sends them as they come, each with the name of its thread.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from plait.server.answer import stops_of
from plait.server.prompt import asked_of
from plait.server.replies import ChatReply
from plait.server.reply import Out, Reply, asked, documented
from plait.server.schemas import ChatRequest
from plait.server.service import Asked, Job
from plait.server.transcript import Ordered, Piece, Transcript

router = APIRouter()


@router.post("/v1/chat/completions", **documented(ChatReply))
async def chat_completions(body: ChatRequest, asked: Annotated[Asked, Depends(asked)]) -> Reply:
    """Answer a conversation."""
    chat = _Chat(body, asked)
    return Reply(asked.service, chat.work, stream=bool(body.stream))


class _Chat:
    def __init__(self, body: ChatRequest, asked: Asked) -> None:
        self.body, self.asked = body, asked
        self.served = asked.service.find(body.model)
        prompt, question, self.unread = asked_of(body.messages, "messages", plain=self.served.model.plain)
        most = [n for n in (body.max_tokens, body.max_completion_tokens) if n is not None]
        self.request = asked.request(
            self.served,
            prompt,
            param="messages",
            body=body,
            max_tokens=min(most, default=None),
        )
        self.trace = asked.trace(self.served, question, body.plait)
        kind = asked.service.config.reasoning
        self.fields = ("reasoning", "reasoning_content") if kind == "both" else (kind,)
        self.reasons = body.include_reasoning and body.plait.stream != "final"
        self.base = {"id": f"chatcmpl-{asked.request_id}", "created": int(time.time()), "model": self.served.name}

    async def work(self, out: Out | None) -> dict[str, Any] | None:
        parts: dict[str, list[str]] = {"reasoning": [], "content": []}
        asked = self.asked
        async with asked.service.job(self.served, self.request, asked=asked, trace=self.trace) as job:
            if out is not None:
                await self._send(out, {"role": "assistant", "content": ""})
            self.answer = job.answer(stops_of(self.body.stop))
            transcript, order = Transcript(job.served.model.tokenizer, job.served.format), Ordered()
            mixed = out is not None and self.body.plait.stream == "interleaved"
            async for event in job:
                for piece in transcript.read(event):
                    for ready in [piece] if mixed else order.put(piece):
                        delta = self._delta(ready, parts, mixed=mixed)
                        if delta and out is not None:
                            await self._send(out, delta)
                if self.answer.stopped:
                    break
        if out is None:
            return self._whole(job, parts)
        await self._finish(out, job)
        return None

    def _delta(self, piece: Piece, parts: dict[str, list[str]], *, mixed: bool) -> dict[str, Any]:
        """What a piece adds to the message; empty for nothing."""
        reasoning, content = self.answer.put(piece)
        delta: dict[str, Any] = {}
        if reasoning and self.reasons:
            parts["reasoning"].append(reasoning)
            delta |= dict.fromkeys(self.fields, reasoning)
        if content:
            parts["content"].append(content)
            delta["content"] = content
        if mixed and (delta or piece.kind != "text"):
            about = {"thread": piece.thread, "parent": piece.parent, "ev": _EVENTS[piece.kind]}
            if piece.kind == "open":
                about["outline"] = piece.outline
            if piece.threads:
                about["threads"] = list(piece.threads)
            delta["plait"] = about
        return delta

    async def _send(self, out: Out, delta: dict[str, Any], finish: str | None = None, **more: Any) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        data = {**self.base, "object": "chat.completion.chunk", "choices": [choice], **more}
        if self._wants_usage:
            data["usage"] = None
        await out.data(data)

    @property
    def _wants_usage(self) -> bool:
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)

    async def _finish(self, out: Out, job: Job) -> None:
        await self._send(out, {}, self._reason(job), plait=self._about(job))
        if self._wants_usage:
            data = {**self.base, "object": "chat.completion.chunk", "choices": [], "usage": _usage(job)}
            await out.data(data)

    def _whole(self, job: Job, parts: dict[str, list[str]]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(parts["content"]), "refusal": None}
        if self.reasons:
            message |= dict.fromkeys(self.fields, "".join(parts["reasoning"]))
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._reason(job)}
        return {
            **self.base,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(job),
            "plait": self._about(job),
        }

    def _reason(self, job: Job) -> str:
        return "stop" if self.answer.stopped else job.finish

    def _about(self, job: Job) -> dict[str, Any]:
        about = job.about()
        return about | {"unread_messages": self.unread} if self.unread else about


_EVENTS = {"open": "open", "text": "delta", "fork": "fork", "join": "join", "close": "close"}


def _usage(job: Job) -> dict[str, Any]:
    tokens = job.tokens()
    reasoning = tokens["completion_tokens"] - job.answer_tokens()
    return tokens | {"completion_tokens_details": {"reasoning_tokens": reasoning}}
