"""A `plait serve` process under load, for moments: what `bench_soak.py` and `bench_cuts.py` run for minutes."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from server_process import Answered, Ask, Broken, answered, server_process

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_cuts
import bench_soak

CHAT = Ask(path="/v1/chat/completions", body={"messages": [{"role": "user", "content": "?"}], "stream": True})


def test_streams_under_load_are_whole_nothing_grows_and_sigterm_loses_none() -> None:
    result = bench_soak.Soak(engine="scripted", streams=6, minutes=0.02)
    with server_process("scripted", "--engine-option", "delay_s=0.004", "--drain-s", "20") as server:
        anyio.run(lambda: bench_soak.soak(server, result, say=False))
    # How many threads six streams have is chance; growth under load shows in minutes.
    assert [fault for fault in result.faults() if not fault.endswith("under load")] == []
    assert result.accepted == result.drained > 0
    assert sum(result.whole.values()) > 0
    assert "SIGTERM: " in bench_soak.table(result)
    json.dumps(bench_soak.as_data(result))


def test_cut_connections_leave_nothing_in_a_server_process() -> None:
    found = bench_cuts.side_by_side("scripted", 12, 2, options=())
    # How soon is for the benchmark to say: here the machine may be busy.
    assert bench_cuts.faults(found, 9.0) == []
    assert "| cuts | 12: " in bench_cuts.table(found)


def served_bytes(data: bytes) -> int:
    """Something that answers one connection with these bytes; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


def chunked(text: str) -> bytes:
    data = text.encode()
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)


def frame(delta: object, finish: str | None = None, **more: object) -> str:
    choices = [] if delta is None else [{"delta": delta, "finish_reason": finish}]
    return f"data: {json.dumps({'id': 'a', 'object': 'chunk', 'choices': choices, **more})}\n\n"


FIRST, LAST = frame({"role": "assistant"}), frame({}, "stop") + frame(None, usage={}) + "data: [DONE]\n\n"
SAID = frame({"content": "1"})


def test_a_stream_that_is_right_passes() -> None:
    reply = Answered()
    anyio.run(answered, served_bytes(chunked(FIRST + SAID + LAST)), CHAT, reply)
    assert (reply.complete, reply.frames) == (True, 5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: chunked(FIRST + SAID), "without its last frame"),
        (lambda: chunked(FIRST + LAST + SAID), "after the end"),
        (lambda: chunked(FIRST + LAST[:-2]), "within a frame"),
        (lambda: chunked(FIRST + LAST)[:-9], "ended early"),
        (lambda: chunked(SAID + LAST), "role"),
        (lambda: chunked(FIRST + "data: {\n\n" + LAST), "without JSON"),
        (lambda: chunked(FIRST + 'data: {"id": NaN}\n\n' + LAST), "without JSON"),
        (lambda: chunked(FIRST + "oops\n\n" + LAST), "no frame has"),
        (lambda: chunked(FIRST + 'data: {"error": {"code": "engine_error"}}\n\n'), "engine_error"),
        (lambda: chunked(FIRST + frame({}, "error") + LAST), "after the finish"),
        (lambda: chunked(FIRST + frame({"plait": {"thread": "0/0.0", "ev": "delta"}}) + LAST), "not open"),
        (lambda: chunked(FIRST + frame({"plait": {"thread": "0", "ev": "open"}}) + LAST), "not closed"),
    ],
)
def test_a_stream_that_is_wrong_is_found_out(make: Callable[[], bytes], says: str) -> None:
    with pytest.raises(Broken, match=says):
        anyio.run(answered, served_bytes(make()), CHAT, Answered())
