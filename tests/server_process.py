"""A `plait serve` process seen from outside, and clients that check every byte it sends.

What the soak and the cuts in `benchmarks/` run for minutes, the tests run for a moment. Speaks HTTP by hand: what is
checked is the bytes on the socket, and a client library would forgive some of them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import ByteReceiveStream

SRC = Path(__file__).parent.parent / "src"
HOST = "127.0.0.1"
ENGINES = {
    # Places for everybody: what is looked at is streams, and a script knows no way on where its forks are declined.
    "scripted": ("--engine", "scripted", "--max-threads", "4096", "--max-requests", "2048"),
    "embedded": ("--max-requests", "2048"),
}
MODELS = {"scripted": ("gold-multiverse", "gold-sequential"), "embedded": ("plait-tiny", "plait-tiny-sequential")}
QUESTIONS = ("What is 347 * 526?", "What is 12 + 5?", "What is 347 * 52, 88 + 977 and 612 * 34?", "What is 836 * 472?")


class Broken(Exception):
    """What a server sent is not what it promises."""


# The process ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    address: str
    lines: list[str] = field(default_factory=list[str])
    """Of its log, but for those of requests that went well."""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int | None:
        """The exit code; None where it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


@contextmanager
def server_process(engine: str, *options: str) -> Iterator[Server]:
    """Start `plait serve` on any free port; end it.

    Args:
        engine: One of `ENGINES`.
        options: More of the command line.
    """
    path = os.pathsep.join(filter(None, (str(SRC), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "plait", "serve", "--port", "0", *ENGINES[engine], *options]
    env = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr is not None
            first = process.stderr.readline()
            if not first:
                raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")
            server = Server(process, json.loads(first)["address"])
            reader = threading.Thread(target=_keep, args=(process.stderr, server.lines), daemon=True)
            reader.start()
            yield server
        finally:
            process.kill()
            process.wait()


def _keep(stream: Any, lines: list[str]) -> None:
    lines += (line.rstrip() for line in stream if '"event": "request"' not in line or '"level": "error"' in line)


class Probe:
    """Reads `/metrics` over one connection, or a new one where the server has closed it for being quiet."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    def read(self) -> dict[str, float]:
        """Every sample, summed over its labels, by name."""
        try:
            text = self._asked()
        except OSError:
            self.close()
            text = self._asked()
        values: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
        return values

    def _asked(self) -> str:
        if self._socket is None:
            self._socket = socket.create_connection((HOST, self._port), timeout=60)
        self._socket.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        data = bytearray()
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        (length,) = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        while len(body) < length:
            body += self._more()
        return body.decode()

    def _more(self) -> bytes:
        assert self._socket is not None
        got = self._socket.recv(1 << 16)
        if not got:
            raise ConnectionResetError("the server closed the connection of its metrics")
        return got

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


BUSY = ("plait:requests_running", "plait:threads_active", "plait:threads_waiting")
BUSY_ENGINE = ("plait:engine_inflight", "plait:engine_queued")


def is_idle(values: dict[str, float]) -> bool:
    """Whether no request runs, and no thread samples or waits, in the limits and in the engines."""
    return not any(values[name] for name in (*BUSY, *BUSY_ENGINE))


def until_idle(probe: Probe, *, seconds: float) -> float:
    """Wait until nothing runs; the seconds it took, or infinity after so many of them."""
    started = time.perf_counter()
    while not is_idle(probe.read()):
        if time.perf_counter() - started > seconds:
            return float("inf")
    return time.perf_counter() - started


# What is asked --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request."""

    path: str
    body: dict[str, Any]
    key: str = ""
    """API key."""

    @property
    def kind(self) -> str:
        """What is counted together."""
        streams = self.path == "/plait/runs" or self.body.get("stream")
        how = self.body.get("plait", {}).get("stream", "") if streams else "whole"
        return " ".join(filter(None, (self.path, how)))

    def data(self) -> bytes:
        body = json.dumps(self.body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def asks(engine: str, *, stream: bool = True) -> list[Ask]:
    """Every kind of request, of both models.

    Args:
        stream: Streams alone, or whole replies too.
    """
    found: list[Ask] = []
    for number, question in enumerate(QUESTIONS):
        model = MODELS[engine][number == 1]
        chat = {"model": model, "messages": [{"role": "user", "content": question}]}
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        found += [
            Ask(path="/v1/chat/completions", body={**chat, **usage}),
            Ask(path="/v1/chat/completions", body={**chat, **usage, "plait": {"stream": "interleaved"}}),
            Ask(path="/v1/completions", body={"model": model, "prompt": question, **usage}),
            Ask(path="/v1/responses", body={"model": model, "input": question, "stream": True}),
            Ask(path="/plait/runs", body={"model": model, "question": question}),
        ]
        if not stream:
            found.append(Ask(path="/v1/chat/completions", body=chat))
    return found


# What is answered -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Answered:
    """What came of one request."""

    status: int = 0
    begun: anyio.Event = field(default_factory=anyio.Event)
    """Set when the status has come."""
    complete: bool = False
    """The whole reply came, and every frame of it was right."""
    frames: int = 0
    declined: bool = False
    """Its forks were declined for load."""
    first_s: float = 0.0
    """To the first byte of the reply's body."""
    retry_after: str = ""
    whole_s: float = 0.0


async def answered(port: int, ask: Ask, result: Answered) -> None:
    """Send a request, check everything that comes; what is found out stands in `result`, also where this is cut off.

    Raises:
        Broken: A frame, their order, or the end of the reply is wrong.
        OSError: The connection failed.
    """
    started = time.perf_counter()
    async with await anyio.connect_tcp(HOST, port) as stream:
        await stream.send(ask.data())
        reader = _Reader(stream)
        head = (await reader.until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        result.status = int(head[0].split()[1])
        result.begun.set()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        result.retry_after = headers.get("retry-after", "")
        if "chunked" not in headers.get("transfer-encoding", ""):
            body = json.loads(await reader.exactly(int(headers["content-length"])))
            result.first_s = time.perf_counter() - started
            if result.status == 200:
                _check_whole(body)
                result.declined = "forks_declined" in body.get("plait", {})
            elif set(body.get("error", {})) != {"message", "type", "param", "code"}:
                raise Broken(f"an error of another shape: {str(body)[:200]}")
            result.complete = True
        else:
            check = CHECKS[ask.path](result)
            frames = b""
            async for chunk in reader.chunks():
                result.first_s = result.first_s or time.perf_counter() - started
                frames += chunk
                *whole, frames = frames.split(b"\n\n")
                for frame in whole:
                    result.frames += 1
                    check.put(*_parsed(frame))
            if frames:
                raise Broken(f"the stream ended within a frame: {frames[:80]!r}")
            check.end()
            result.complete = True
    result.whole_s = time.perf_counter() - started


class _Reader:
    """Reads HTTP's pieces from a connection."""

    def __init__(self, stream: ByteReceiveStream) -> None:
        self._stream, self._data = stream, b""

    async def _more(self) -> None:
        try:
            self._data += await self._stream.receive(1 << 16)
        except (anyio.EndOfStream, anyio.BrokenResourceError) as exc:
            raise Broken(f"the connection ended early, after {self._data[-80:]!r}") from exc

    async def until(self, mark: bytes) -> bytes:
        while mark not in self._data:
            await self._more()
        found, _, self._data = self._data.partition(mark)
        return found

    async def exactly(self, count: int) -> bytes:
        while len(self._data) < count:
            await self._more()
        found, self._data = self._data[:count], self._data[count:]
        return found

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        while size := int(await self.until(b"\r\n"), 16):
            yield await self.exactly(size)
            if await self.exactly(2) != b"\r\n":
                raise Broken("a chunk is longer than it says")
        await self.until(b"\r\n")


def _parsed(frame: bytes) -> tuple[str, Any]:
    """Event and data of a frame."""
    event, data = "", None
    for line in frame.decode().split("\n"):
        name, _, value = line.partition(": ")
        if name == "data" and data is None:
            data = value
        elif name == "event" and not event:
            event = value
        elif not (name == "id" and value.isdigit()) and not line.startswith(":"):
            raise Broken(f"a line that no frame has: {line[:80]!r}")
    if data is None or data == "[DONE]":
        return event, data
    try:
        return event, json.loads(data, parse_constant=_no_constant)
    except ValueError as exc:
        raise Broken(f"a frame without JSON: {data[:80]!r}") from exc


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_whole(body: dict[str, Any]) -> None:
    (choice,) = body["choices"]
    if choice["finish_reason"] not in ("stop", "length") or not isinstance(choice["message"]["content"], str):
        raise Broken(f"a reply that has no end: {str(body)[:200]}")


class _Check:
    """Holds the frames of one stream to the order they must have."""

    def __init__(self, result: Answered) -> None:
        self._result = result
        self._done = False

    def put(self, event: str, data: Any) -> None:
        if data is None:
            return
        if self._done:
            raise Broken(f"something after the end: {str(data)[:80]}")
        if isinstance(data, dict) and data.get("error") and "object" not in data and "response" not in data:
            raise Broken(f"an error: {data['error']}")
        self.frame(event, data)

    def frame(self, event: str, data: Any) -> None:
        raise NotImplementedError

    def end(self) -> None:
        if not self._done:
            raise Broken("the stream ended without its last frame")

    def note(self, about: dict[str, Any] | None) -> None:
        self._result.declined |= "forks_declined" in (about or {})


class _Choices(_Check):
    """Chat and completions: one id, deltas, one finish, usage, [DONE]; threads open, speak, close, are joined."""

    def __init__(self, result: Answered) -> None:
        super().__init__(result)
        self._id = ""
        self._num = 0
        self._finish: str | None = None
        self._usage: dict[str, Any] | None = None
        self._open: set[str] = set()
        self._closed: set[str] = set()

    def frame(self, event: str, data: Any) -> None:
        if data == "[DONE]":
            if self._finish not in ("stop", "length") or self._usage is None:
                raise Broken(f"[DONE] after finish {self._finish} and usage {self._usage}")
            self._done = True
            return
        self._id = self._id or data["id"]
        if data["id"] != self._id or event or self._usage is not None:
            raise Broken(f"out of order: {str(data)[:120]}")
        if not data["choices"]:
            self._usage = data["usage"]
            return
        if self._finish is not None:
            raise Broken("text after the finish")
        (choice,) = data["choices"]
        self._finish = choice["finish_reason"]
        self.note(data.get("plait") or choice.get("plait"))
        delta = choice.get("delta")
        if delta is not None:
            if ("role" in delta) != (self._num == 0):
                raise Broken(f"the role is told in frame {self._num}")
            self._thread(delta.get("plait"))
        self._num += 1

    def _thread(self, about: dict[str, Any] | None) -> None:
        if about is None:
            return
        name, what = about["thread"], about["ev"]
        if what == "open":
            self._open.add(name)
        elif name not in self._open or name in self._closed:
            raise Broken(f"thread {name} says {what} while it is not open")
        if what == "close":
            self._closed.add(name)
        if what == "join" and not self._closed.issuperset(about["threads"]):
            raise Broken(f"thread {name} joins threads that are open: {about['threads']}")

    def end(self) -> None:
        super().end()
        if self._open != self._closed:
            raise Broken(f"threads that were not closed: {sorted(self._open - self._closed)}")


class _Items(_Check):
    """Responses: numbers without gaps, every delta in an open item, every text as its deltas said."""

    def __init__(self, result: Answered) -> None:
        super().__init__(result)
        self._num = 0
        self._texts: dict[str, str] = {}

    def frame(self, event: str, data: Any) -> None:
        if data["sequence_number"] != self._num or data["type"] != event:
            raise Broken(f"frame {self._num} is {event} {data['sequence_number']} {data['type']}")
        self._num += 1
        if (event == "response.created") != (self._num == 1):
            raise Broken(f"frame {self._num} is {event}")
        if event == "response.output_item.added":
            self._texts[data["item"]["id"]] = ""
        elif event.endswith(".delta"):
            self._texts[data["item_id"]] += data["delta"]
        elif event.endswith("_text.done") and self._texts[data["item_id"]] != data["text"]:
            raise Broken(f"item {data['item_id']} is not what its deltas said")
        elif event in ("response.completed", "response.incomplete"):
            said = {
                item["id"]: "".join(part["text"] for part in item["content"]) for item in data["response"]["output"]
            }
            if said != self._texts:
                raise Broken("the output is not what its deltas said")
            self.note(data["response"].get("plait"))
            self._done = True
        elif event == "response.failed":
            raise Broken(f"it failed: {data['response']['error']}")


class _Events(_Check):
    """A run's events: it starts, ends, is drawn, counted, and over."""

    def __init__(self, result: Answered) -> None:
        super().__init__(result)
        self._names: list[str] = []

    def frame(self, event: str, data: Any) -> None:
        self._names.append(event or data["event"])
        self._done = event == "end"

    def end(self) -> None:
        super().end()
        if self._names[:2] != ["RunStarted", "SegmentStarted"] or self._names[-4:] != [
            "RunEnded",
            "run",
            "usage",
            "end",
        ]:
            raise Broken(f"events out of order: {self._names[:2]} ... {self._names[-4:]}")


CHECKS: dict[str, type[_Check]] = {
    "/v1/chat/completions": _Choices,
    "/v1/completions": _Choices,
    "/v1/responses": _Items,
    "/plait/runs": _Events,
}


# Leaving --------------------------------------------------------------------------------------------------------------


def cut(port: int, ask: Ask, at: int, *, reset: bool, wait_s: float = 0.0) -> int:
    """Send a request, leave at a byte; how many bytes of the reply had come.

    Args:
        at: Byte of the request and the reply, counted through.
        reset: Leave by a reset, else by an end of stream.
        wait_s: Wait so long before leaving.
    """
    data = ask.data()
    connection = socket.create_connection((HOST, port), timeout=2)
    try:
        connection.sendall(data[:at])
        left = at - len(data)
        # Some replies are a digit shorter than others: what does not come is left like what does.
        with suppress(TimeoutError):
            while left > 0 and (got := connection.recv(left)):
                left -= len(got)
        if wait_s:
            time.sleep(wait_s)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        connection.close()
    return at - len(data) - max(0, left)


def reply_length(port: int, ask: Ask) -> int:
    """Bytes of a reply, its head included; it is read to its end."""
    connection = socket.create_connection((HOST, port), timeout=60)
    connection.sendall(ask.data().replace(b"Host: localhost\r\n", b"Host: localhost\r\nConnection: close\r\n", 1))
    length = 0
    while got := connection.recv(1 << 16):
        length += len(got)
    connection.close()
    return length


def quantile(values: Sequence[float], q: float) -> float:
    """Of values in any order, the nearest; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0
