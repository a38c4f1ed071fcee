"""`POST /v1/responses`: one reasoning item for each thread, streamed side by side, then the answer as a message.

Items of the Responses API are told apart by their ids, so parallel threads need no field of ours: OpenAI's own client
puts them together.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from plait.server.prompt import asked_of
from plait.server.refusal import body_of
from plait.server.replies import ResponsesReply
from plait.server.reply import Out, Reply, asked, documented
from plait.server.schemas import InputItem, ResponsesRequest
from plait.server.service import Asked, Job
from plait.server.transcript import ROOT, Piece, Transcript

router = APIRouter()


@router.post("/v1/responses", **documented(ResponsesReply))
async def responses(body: ResponsesRequest, asked: Annotated[Asked, Depends(asked)]) -> Reply:
    """Answer the input."""
    response = _Response(body, asked)
    return Reply(asked.service, response.work, stream=bool(body.stream), last=None, fail=response.fail)


class _Item:
    """An item of the output while it grows."""

    def __init__(self, id: str, index: int, kind: str, **more: Any) -> None:
        self.id, self.index, self.kind = id, index, kind
        self.text: list[str] = []
        self.more = more
        self.done = False

    @property
    def part(self) -> str:
        return "reasoning_text" if self.kind == "reasoning" else "output_text"

    def content(self, text: str) -> dict[str, Any]:
        part: dict[str, Any] = {"type": self.part, "text": text}
        return part if self.kind == "reasoning" else part | {"annotations": [], "logprobs": []}

    def data(self) -> dict[str, Any]:
        status = "completed" if self.done else "in_progress"
        content = [self.content("".join(self.text))] if self.text or self.done else []
        own = {"summary": []} if self.kind == "reasoning" else {"role": "assistant"}
        return {"id": self.id, "type": self.kind, "status": status, "content": content, **own, **self.more}


class _Response:
    def __init__(self, body: ResponsesRequest, asked: Asked) -> None:
        self.body, self.asked = body, asked
        self.served = asked.service.find(body.model)
        given = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
        plain = self.served.model.plain
        prompt, question, self.unread = asked_of(given, "input", plain=plain, instructions=body.instructions)
        self.request = asked.request(
            self.served,
            prompt,
            param="input",
            body=body,
            max_tokens=body.max_output_tokens,
        )
        self.trace = asked.trace(self.served, question, body.plait)
        self.id, self.created = f"resp_{asked.request_id}", int(time.time())
        self.items: list[_Item] = []
        self.threads: dict[str, _Item] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.message: _Item | None = None
        self.number = 0

    async def work(self, out: Out | None) -> dict[str, Any] | None:
        asked = self.asked
        async with asked.service.job(self.served, self.request, asked=asked, trace=self.trace) as job:
            await self._send(out, "response.created", response=self._data(None))
            await self._send(out, "response.in_progress", response=self._data(None))
            self.answer = job.answer()
            transcript = Transcript(job.served.model.tokenizer, job.served.format)
            async for event in job:
                for piece in transcript.read(event):
                    await self._piece(out, piece)
        data = self._data(job)
        await self._send(out, f"response.{data['status']}", response=data)
        return data if out is None else None

    async def fail(self, out: Out, failure: Exception) -> None:
        """The last event of a stream that failed."""
        error = {"code": "server_error", "message": body_of(failure)["error"]["message"]}
        await self._send(out, "response.failed", response=self._data(None) | {"status": "failed", "error": error})

    async def _piece(self, out: Out | None, piece: Piece) -> None:
        if piece.kind == "open":
            self.about[piece.thread] = {"thread": piece.thread, "parent": piece.parent, "outline": piece.outline}
            # Plait's own models think before they answer; whether another does is seen when it writes.
            if piece.thread != ROOT or not self.served.model.plain:
                await self._thinking(out, piece.thread)
        reasoning, answer = self.answer.put(piece)
        if reasoning:
            await self._add(out, await self._thinking(out, piece.thread), reasoning)
        if answer:
            if self.message is None:
                await self._thought(out, ROOT)
                self.message = await self._open(out, "msg", "message")
            await self._add(out, self.message, answer)
        if piece.kind == "close":
            await self._thought(out, piece.thread)
            if piece.thread == ROOT and self.message is not None:
                await self._done(out, self.message)

    async def _thinking(self, out: Out | None, thread: str) -> _Item:
        """The item of what a thread thinks now."""
        if thread not in self.threads or self.threads[thread].done:
            self.threads[thread] = await self._open(out, "rs", "reasoning", plait=self.about[thread])
        return self.threads[thread]

    async def _thought(self, out: Out | None, thread: str) -> None:
        """A thread has thought, or never did."""
        if thread in self.threads:
            await self._done(out, self.threads[thread])

    async def _open(self, out: Out | None, prefix: str, kind: str, **more: Any) -> _Item:
        item = _Item(f"{prefix}_{self.asked.request_id}_{len(self.items)}", len(self.items), kind, **more)
        self.items.append(item)
        await self._send(out, "response.output_item.added", output_index=item.index, item=item.data())
        place = {"item_id": item.id, "output_index": item.index, "content_index": 0}
        await self._send(out, "response.content_part.added", **place, part=item.content(""))
        return item

    async def _add(self, out: Out | None, item: _Item, text: str) -> None:
        item.text.append(text)
        place = {"item_id": item.id, "output_index": item.index, "content_index": 0}
        more = {} if item.kind == "reasoning" else {"logprobs": []}
        await self._send(out, f"response.{item.part}.delta", **place, delta=text, **more)

    async def _done(self, out: Out | None, item: _Item) -> None:
        if item.done:
            return
        item.done = True
        text = "".join(item.text)
        place = {"item_id": item.id, "output_index": item.index, "content_index": 0}
        more = {} if item.kind == "reasoning" else {"logprobs": []}
        await self._send(out, f"response.{item.part}.done", **place, text=text, **more)
        await self._send(out, "response.content_part.done", **place, part=item.content(text))
        await self._send(out, "response.output_item.done", output_index=item.index, item=item.data())

    async def _send(self, out: Out | None, kind: str, **data: Any) -> None:
        if out is not None:
            await out.data({"type": kind, "sequence_number": self.number, **data}, event=kind)
            self.number += 1

    def _data(self, job: Job | None) -> dict[str, Any]:
        """The response object; `job` is there when it has ended."""
        status = "in_progress"
        if job is not None:
            status = "incomplete" if job.finish == "length" else "completed"
        data: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.served.name,
            "output": [item.data() for item in self.items],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.body.instructions,
            "metadata": self.body.metadata or {},
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "temperature": self.request.temperature,
            "top_p": self.request.top_p,
            "max_output_tokens": self.body.max_output_tokens,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "usage": None,
        }
        if job is not None:
            data["usage"] = _usage(job)
            data["plait"] = job.about() | ({"unread_messages": self.unread} if self.unread else {})
        return data


def _usage(job: Job) -> dict[str, Any]:
    tokens = job.tokens()
    sampled = tokens["completion_tokens"]
    return {
        "input_tokens": tokens["prompt_tokens"],
        # What an engine found in its cache belongs to no request: nothing is billed as cached.
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": sampled,
        "output_tokens_details": {"reasoning_tokens": sampled - job.answer_tokens()},
        "total_tokens": tokens["total_tokens"],
        "plait": tokens["plait"],
    }
