"""Connections: what is slow, too much, silent, or gone is noticed in time, and holds nothing."""

from __future__ import annotations

import json
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from plait.server import ServeConfig
from plait.server.connection import Connection
from server_process import asks, cut, reply_length
from test_server import QUESTION, Running, gold, held, raw_post, serving, until
from test_server import ask as question

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=40)


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    data = b""
    while got := connection.recv(1 << 16):
        data += got
    return data


def error_of(data: bytes) -> dict[str, Any]:
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return json.loads(body)["error"]


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    with serving(gold(), header_timeout_s=0.4, max_connections=12) as running:
        yield running


@pytest.fixture(scope="module")
def patient() -> Iterator[Running]:
    with serving(gold(), max_headers=20) as running:
        yield running


def test_headers_that_come_a_byte_at_a_time_hold_no_connection(impatient: Running) -> None:
    connections = [connect(impatient) for _ in range(8)]
    unanswered, sent = list(connections), 0
    started = time.perf_counter()
    # Never silent for long: were a byte enough to be given more time, it would go on for ever.
    while unanswered:
        assert time.perf_counter() - started < 40
        for connection in unanswered:
            # It may be closed just now.
            with suppress(ConnectionError):
                connection.sendall((HEAD + b"x" * 10_000)[sent : sent + 1])
        sent += 1
        readable, _, _ = select.select(unanswered, [], [], 0.02)
        unanswered = [connection for connection in unanswered if connection not in readable]
    for connection in connections:
        try:
            data = received(connection)
        except ConnectionError:
            data = b""
        if data:
            assert data.startswith(b"HTTP/1.1 408 ")
            assert error_of(data)["code"] == "timeout"
        connection.close()
    # Here a request that comes late is refused, which on a busy machine any may be.
    until(lambda: impatient.post("/v1/chat/completions", question("What is 12 + 5?")).status_code == 200)


def test_the_second_request_of_a_connection_must_come_in_time_too(impatient: Running) -> None:
    connection = connect(impatient)
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    while not connection.recv(1 << 16).startswith(b"HTTP/1.1 200 "):
        # The machine was so busy that the first was late.
        connection.close()
        connection = connect(impatient)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    connection.sendall(b"GET /hea")
    assert b"HTTP/1.1 408 " in received(connection)
    connection.close()


def test_a_connection_that_says_nothing_is_closed(impatient: Running) -> None:
    connection = connect(impatient)
    assert received(connection).startswith(b"HTTP/1.1 408 ")
    connection.close()


def test_there_are_only_so_many_connections_and_headers(patient: Running) -> None:
    with serving(gold(), max_connections=3) as server:
        held = [connect(server) for _ in range(3)]
        until(lambda: len(server.process.server_state.connections) == 3)
        with connect(server) as fourth:
            data = received(fourth)
        assert (data.startswith(b"HTTP/1.1 503 "), error_of(data)["code"]) == (True, "overloaded")
        assert b"retry-after: 1" in data
        for connection in held:
            connection.close()
        until(lambda: not server.process.server_state.connections)
        assert server.get("/health").status_code == 200
    reply = patient.get("/health", headers={f"x-{i}": "y" for i in range(30)})
    assert (reply.status_code, reply.json()["error"]["code"]) == (431, "too_many_headers")


def test_there_are_no_more_connections_than_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.server.connection._open_files", lambda: 100)
    for asked, most in ((1000, 36), (20, 20)):
        assert Connection.within(ServeConfig(max_connections=asked)).keywords["limits"].max_connections == most


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /health\r\n\r\n", 400),
        (b"GET / HTTP/9\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_is_told_so(patient: Running, sent: bytes, status: int) -> None:
    connection = connect(patient)
    connection.sendall(sent)
    data = received(connection)
    assert data.startswith(b"HTTP/1.1 %d " % status)
    assert error_of(data)["type"] == "invalid_request_error"
    connection.close()


def test_endless_headers_are_ended(patient: Running) -> None:
    connection = connect(patient)
    connection.sendall(b"GET /health HTTP/1.1\r\n")
    try:
        for _ in range(60):
            connection.sendall(b"x-more: " + b"y" * 1000 + b"\r\n")
            time.sleep(0.001)
        data = received(connection)
    except ConnectionError:
        data = b""
    assert data[:13] in (b"", b"HTTP/1.1 431 ")
    connection.close()


def test_who_leaves_with_more_words_on_the_way_is_noticed() -> None:
    with serving(held(threading.Event())) as server:
        connection = raw_post(server.port, "/v1/chat/completions", question(stream=False))
        engine = server.service.default.engine
        assert engine is not None
        until(lambda: engine.stats().active == 3)
        # The beginning of another request: uvicorn alone would read no more until the first is answered.
        connection.sendall(HEAD + b"Content-Length: 10\r\n\r\n{}")
        until(lambda: any(one.conn.trailing_data[0] for one in list(server.process.server_state.connections)))
        connection.close()
        until(server.idle)


def test_who_reads_nothing_is_left() -> None:
    with serving(gold(), send_timeout_s=0.3) as server:
        # Small buffers on both sides of the socket, or they would take the whole reply.
        for listener in server.process.servers[0].sockets:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = json.dumps({"prompt": [QUESTION] * 8, "stream": True}).encode()
        connection.sendall(HEAD.replace(b"/chat", b"") + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: server.metric("plait:client_disconnects_total") == 1)
        until(server.idle)
        with suppress(ConnectionError):
            assert b"[DONE]" not in received(connection)
        connection.close()


def test_a_connection_may_be_cut_at_any_byte_of_request_or_reply() -> None:
    """The short version of `benchmarks/bench_cuts.py`."""
    rng = random.Random(0)
    with serving(gold()) as server:
        menu = asks("scripted", stream=False)
        for ask in menu[:6]:
            whole = len(ask.data()) + reply_length(server.port, ask)
            for _ in range(5):
                cut(server.port, ask, rng.randrange(whole), reset=rng.random() < 0.5)
                until(server.idle)
        assert server.metric("plait:engine_inflight") == 0
