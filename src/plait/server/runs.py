"""`/plait/runs`: runs as their events, for the page that draws them; and that page.

A frame's data is one line of `plait.events.encode`, which is what `plait.log` writes. Leaving the stream of a run that
was started here cancels it; following one that somebody started elsewhere does not.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from plait import viewer
from plait.events import decode
from plait.server.reply import Out, Reply, asked, documented
from plait.server.schemas import RunRequest
from plait.server.service import Asked
from plait.server.traces import Trace
from plait.viewer import describe_run

router = APIRouter()


@router.post("/plait/runs", **documented())
async def start_run(body: RunRequest, asked: Annotated[Asked, Depends(asked)]) -> Reply:
    """Ask a question; the events of its run."""
    served = asked.service.find(body.model)
    options = body.plait.model_copy(update={"trace": True})
    body = body.model_copy(update={"plait": options, "seed": body.seed or 0})
    request = asked.request(served, body.question, param="question", body=body)
    trace = asked.trace(served, body.question, options)
    assert trace is not None

    async def work(out: Out | None) -> None:
        assert out is not None
        number = 0
        async with asked.service.job(served, request, asked=asked, trace=trace) as job:
            async for _ in job:
                number = await _tell(out, trace, number)
        await _tell(out, trace, number)
        await _close(out, trace)

    return Reply(asked.service, work, stream=True, last=None, headers={"x-plait-run-id": trace.id})


async def _tell(out: Out, trace: Trace, number: int) -> int:
    """Send the lines from a number on; the number after the last."""
    while number < len(trace.lines):
        await out.data(trace.lines[number], id=number)
        number += 1
    return number


async def _close(out: Out, trace: Trace) -> None:
    """The run as the page draws it, then how it ended."""
    if trace.lines:
        answer = dict(trace.closing).get("usage", {}).get("answer")
        await out.data(describe_run([decode(line) for line in trace.lines], answer=answer), event="run")
    for event, data in trace.closing:
        await out.data(data, event=event)


@router.get("/plait/runs")
async def list_runs(asked: Annotated[Asked, Depends(asked)]) -> dict[str, Any]:
    """The last runs of this client, newest first."""
    return {"data": [trace.about() for trace in asked.service.traces.of(asked.client)]}


@router.get("/plait/runs/{id}/events", **documented())
async def follow_run(id: str, asked: Annotated[Asked, Depends(asked)]) -> Reply:
    """A run's events from its first to its last."""
    trace = asked.service.traces.find(id, asked.client)

    async def work(out: Out | None) -> None:
        assert out is not None
        async with aclosing(trace.follow()) as lines:
            async for number, line in lines:
                await out.data(line, id=number)
        await _close(out, trace)

    return Reply(asked.service, work, stream=True, last=None, headers={"x-plait-run-id": trace.id})


@router.get("/plait/runs/{id}/log")
async def run_log(id: str, asked: Annotated[Asked, Depends(asked)]) -> Response:
    """A run as the file that `plait view` and `plait trace show` read."""
    trace = asked.service.traces.find(id, asked.client)
    headers = {"content-disposition": f'attachment; filename="{trace.id}.jsonl"'}
    body = "".join(f"{line}\n" for line in trace.lines)
    return Response(body, media_type="application/x-ndjson", headers=headers)


@router.get("/", response_class=Response)
async def page() -> Response:
    """The page on which runs are watched."""
    return Response(viewer.page(), headers=viewer.HEADERS)
