"""The wire of HTTP engines: what arrives together is read together, however it was cut, and connections are reused."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("h11", reason="needs the http extra")

import h11

import clocks
from fake_servers import FakeVllm
from plait.engines.http import HttpEngine, Timeouts
from plait.engines.http.base import Call, Json
from plait.engines.http.chunked import Chunked
from plait.engines.http.client import Client
from plait.engines.http.llama_server import LlamaServer
from plait.engines.http.reader import Reader
from plait.engines.http.wire import Pool, Wait, _Connection
from plait.errors import EngineError, EngineProtocolError, EngineTimeout, EngineUnavailable
from plait.types import SamplingParams

pytestmark = pytest.mark.anyio

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.fixture(params=[clocks.ASYNCIO, clocks.TRIO], ids=lambda backend: backend[0])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def framed(*datas: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(data), data) for data in datas)


END = b"0\r\n\r\n"
SIZES = ("%x\r\n", "%X\r\n", "%x;a=b\r\n", "%x \r\n", "00%x\r\n", "%x\n", "0x%x\r\n", "+%x\r\n", "%d\r\n")
"""The first five are good."""
ENDS = ("0\r\n\r\n", "0\r\na: b\r\nc: d\r\n\r\n", "00\r\n\r\nHTTP", "0\r\n", "-1\r\n\r\n")
"""The first three are good."""


class Said:
    """A server that answers each request with the next of the given writes, and counts its connections.

    Args:
        answers: What is written for each request, in turn; between two writes, what has to hold before it goes on.
            One that ends in None is followed by a close.
    """

    def __init__(self, *answers: list[bytes | Callable[[], object] | None]) -> None:
        self.answers = list(answers)
        self.connections = self.num_asked = self.num_closed = 0
        self.url = ""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}/x"
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, self._connection)
            yield self.url
            tasks.cancel_scope.cancel()

    async def _connection(self, stream: anyio.abc.SocketStream) -> None:
        self.connections += 1
        async with stream:
            while self.answers:
                try:
                    asked = b""
                    while b"\r\n\r\n" not in asked:
                        asked += await stream.receive()
                    self.num_asked += 1
                    for data in self.answers.pop(0):
                        if callable(data):
                            await eventually(data)
                        elif data is not None:
                            await stream.send(data)
                    if data is None:
                        break
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    return
            else:
                await anyio.sleep_forever()
        self.num_closed += 1


async def eventually(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110 - what it looks at has no event to wait for
        await anyio.sleep(0.001)


async def parts(pool: Pool, url: str, seconds: float = 40.0, into: list[bytes] | None = None) -> list[bytes]:
    found: list[bytes] = [] if into is None else into
    async with pool.answer("GET", url, {}, None, Wait(seconds, "nothing came")) as answer:
        while part := await answer.part():
            found.append(part)
    return found


@asynccontextmanager
async def pooled(server: Said) -> AsyncIterator[Pool]:
    pool = Pool(connect_s=40, secure=False)
    async with server.serve():
        try:
            yield pool
        finally:
            await pool.aclose()


# Parts --------------------------------------------------------------------------------------------------------------


async def test_chunks_that_arrive_together_are_one_part() -> None:
    found: list[bytes] = []
    writes = CHUNKED + framed(b"a", b"bc"), framed(b"d"), framed(b"e", b"f") + END
    server = Said([writes[0], lambda: len(found) == 1, writes[1], lambda: len(found) == 2, writes[2]])
    async with pooled(server) as pool:
        assert await parts(pool, server.url, into=found) == [b"abc", b"d", b"ef"]


@settings(max_examples=25, deadline=None)
@given(
    datas=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    chunked=st.booleans(),
)
def test_a_body_is_the_same_however_it_was_cut(datas: list[bytes], cuts: list[int], chunked: bool) -> None:
    body = b"".join(datas)
    sent = CHUNKED + framed(*datas) + END if chunked else HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    bounds = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]

    async def read() -> list[bytes]:
        pool = Pool(connect_s=5, secure=False)
        stream = _Pieces([sent[a:b] for a, b in pairwise(bounds) if a < b])
        pool._connected = stream.connected  # type: ignore[method-assign]
        found = await parts(pool, "http://nowhere/x")
        assert not stream.closed, "it can be used again"
        return found

    assert b"".join(anyio.run(read)) == body


@settings(deadline=None)
@given(
    datas=st.lists(st.binary(min_size=1, max_size=20), max_size=4),
    size=st.sampled_from(SIZES),
    end=st.sampled_from(ENDS),
    change=st.one_of(st.none(), st.tuples(st.integers(0, 100), st.sampled_from([b"", b"\r", b"\n", b"0", b"g", b" "]))),
    cuts=st.lists(st.integers(0, 100), max_size=5),
)
def test_chunks_are_what_h11_takes_them_for(
    datas: list[bytes], size: str, end: str, change: tuple[int, bytes] | None, cuts: list[int]
) -> None:
    sent = b"".join((size % len(data)).encode() + data + b"\r\n" for data in datas) + end.encode()
    if change is not None:
        sent = sent[: change[0]] + change[1] + sent[change[0] + 1 :]
    bounds = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    parts = [sent[a:b] for a, b in pairwise(bounds)]
    body = Chunked()
    found = b"".join(body.feed(part) for part in parts)
    expected, ended, behind = by_h11(parts)
    # It is nowhere more lenient, trailers apart, which it does not read.
    assert expected.startswith(found)
    assert found == expected or not body.ended
    if change is None and size in SIZES[:5] and end in ENDS[:3]:
        assert (body.failure, body.ended, ended, body.rest) == (None, True, True, behind)
        assert found == b"".join(datas)


def by_h11(parts: list[bytes]) -> tuple[bytes, bool, bytes]:
    """The data, whether the body ended, and what follows it."""
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    http.send(h11.EndOfMessage())
    http.receive_data(CHUNKED)
    assert isinstance(http.next_event(), h11.Response)
    found = b""
    for number, part in enumerate(parts, 1):
        if not part:
            continue
        http.receive_data(part)
        while True:
            try:
                event = http.next_event()
            except h11.RemoteProtocolError:
                return found, False, b""
            if not isinstance(event, h11.Data):
                break
            found += event.data
        if isinstance(event, h11.EndOfMessage):
            return found, True, http.trailing_data[0] + b"".join(parts[number:])
    return found, False, b""


class _Pieces(anyio.abc.ByteStream):
    """A stream that gives one piece a read."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces, self.closed = pieces, False

    async def connected(self, origin: Any, url: str) -> Any:
        return _Connection(self)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if not self.pieces:
            raise anyio.EndOfStream
        return self.pieces.pop(0)

    async def send(self, item: bytes) -> None: ...
    async def send_eof(self) -> None: ...

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("tail", "says"),
    [([b"zz\r\n"], "broke off"), ([None], "broke off: peer closed connection")],
)
async def test_what_came_before_a_broken_end_is_read_first(tail: list[bytes | None], says: str) -> None:
    first = CHUNKED + framed(b"a", b"b")
    server = Said([first + tail[0]] if tail[0] else [first, None])
    async with pooled(server) as pool:
        found: list[bytes] = []
        with pytest.raises(EngineError, match=says):
            await parts(pool, server.url, into=found)
        assert found == [b"ab"]


async def test_a_body_without_a_length_ends_with_its_connection() -> None:
    server = Said([b"HTTP/1.0 200 OK\r\n\r\nab", b"c", None], [CHUNKED + END])
    async with pooled(server) as pool:
        assert b"".join(await parts(pool, server.url)) == b"abc"
        assert await parts(pool, server.url) == []
        assert server.connections == 2


# Connections --------------------------------------------------------------------------------------------------------


async def test_a_connection_is_used_again_unless_its_server_or_its_reader_ended_it() -> None:
    whole = CHUNKED + framed(b"a") + END
    closing = HEAD + b"connection: close\r\ncontent-length: 1\r\n\r\na"
    server = Said([whole], [whole, None], [whole], [closing, None], [CHUNKED + framed(b"a")], [whole])
    async with pooled(server) as pool:
        used: list[int] = []
        for closed in (0, 1, 1, 2):
            assert await parts(pool, server.url) == [b"a"]
            used.append(server.connections)
            await eventually(lambda n=closed: server.num_closed == n)
        async with pool.answer("GET", server.url, {}, None, Wait(40, "nothing came")) as answer:
            assert await answer.part() == b"a"
        assert await parts(pool, server.url) == [b"a"]
        assert used == [1, 1, 2, 2]
        assert server.connections == 4


async def test_a_server_that_closes_a_connection_just_when_it_is_used_again_is_asked_once_more() -> None:
    whole = CHUNKED + framed(b"a") + END
    server = Said([whole], [None], [whole], [None], [None])
    async with pooled(server) as pool:
        assert await parts(pool, server.url) == await parts(pool, server.url) == [b"a"]
        assert server.connections == 2
        with pytest.raises(EngineError, match="closed the connection before it answered"):
            await parts(pool, server.url)
        assert server.connections == 3, "a new one is no reason to ask again"


async def test_connections_that_idled_too_long_are_closed_whoever_calls_first() -> None:
    answers = [[CHUNKED + framed(b"a"), lambda n=4 * wave: server.num_asked >= n, END] for wave in (1, 2, 3)]
    server = Said(*[list(answer) for answer in answers for _ in range(4)])
    async with pooled(server) as pool:
        for _ in range(3):
            async with anyio.create_task_group() as calls:
                for _ in range(4):
                    calls.start_soon(parts, pool, server.url)
            assert len(pool._open) == 4
            await clocks.sleep(6)
        assert server.connections == 12


async def test_what_follows_an_answer_unasked_belongs_to_no_other_call() -> None:
    whole = CHUNKED + framed(b"a") + END
    server = Said([whole + whole.replace(b"a\r", b"b\r")], [whole])
    async with pooled(server) as pool:
        assert await parts(pool, server.url) == await parts(pool, server.url) == [b"a"]
        assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([None], "closed the connection before it answered"),
        ([b"220 mail.example ESMTP\r\n\r\n"], "broke off"),
        ([b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000], "broke off"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"], None),
    ],
)
async def test_what_is_no_answer_is_an_error_with_the_address(answer: list[bytes | None], says: str | None) -> None:
    server = Said(answer)
    async with pooled(server) as pool:
        if says is None:
            assert await parts(pool, server.url) == []
        else:
            with pytest.raises(EngineError, match=f"{server.url} .*{says}"):
                await parts(pool, server.url)


async def test_silence_ends_where_the_wait_does() -> None:
    server = Said([CHUNKED + framed(b"a")])
    async with pooled(server) as pool:
        with pytest.raises(EngineTimeout, match=r"nothing came within 0\.05 s"):
            await parts(pool, server.url, 0.05)


async def test_closing_the_pool_ends_what_reads() -> None:
    server = Said([CHUNKED + framed(b"a")])
    failures: list[EngineError] = []
    async with pooled(server) as pool, anyio.create_task_group() as tasks:
        found: list[bytes] = []

        async def read() -> None:
            try:
                await parts(pool, server.url, into=found)
            except EngineError as exc:
                failures.append(exc)

        tasks.start_soon(read)
        await eventually(lambda: found)
        await pool.aclose()
    assert "broke off" in str(failures[0])


# TLS ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    path = tmp_path / "server.pem"
    asked = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1 -addext"
    made = [*asked.split(), "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", tmp_path / "certificate"]
    subprocess.run([openssl, *made], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + (tmp_path / "certificate").read_bytes())
    return path


async def test_a_server_is_asked_over_tls_and_only_if_its_certificate_is_good(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    server = FakeVllm(tls=tls)
    async with server.serve() as url:
        with pytest.raises(EngineUnavailable, match="certificate verify failed"):
            async with HttpEngine(url):
                pass
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with HttpEngine(url) as engine:
            before = server.connections
            for _ in range(3):
                chunks = [c async for c in engine.generate(((1, 2, 3),), SamplingParams(max_tokens=5))]
                assert sum(len(c.token_ids) for c in chunks) == 5
            assert server.connections - before <= 1


# Events -------------------------------------------------------------------------------------------------------------


def event(*ids: int, **more: Any) -> Json:
    return {"tokens": list(ids), "stop": False, "completion_probabilities": [{"logprob": -1.0} for _ in ids]} | more


LAST = event(stop=True, stop_type="word", timings={"cache_n": 2, "prompt_n": 1})


def read(events: list[Json], **params: Any) -> tuple[list[tuple[int, ...]], EngineError | None, Reader]:
    """The ids of each piece, and what went wrong behind them."""
    asked = SamplingParams(**{"max_tokens": 9, **params})
    call = Call(
        model="m", token_ids=(1, 2, 3), params=asked, max_tokens=asked.max_tokens, seed=0, key="k", stop_texts={}
    )
    reader = Reader(call, LlamaServer())
    pieces: list[tuple[int, ...]] = []
    try:
        for piece in reader.pieces(events):
            pieces.append(piece.token_ids)
            assert len(piece.logprobs) == len(piece.token_ids)
    except EngineError as exc:
        return pieces, exc, reader
    return pieces, None, reader


def test_events_that_arrive_together_are_one_piece_up_to_the_end_of_the_call() -> None:
    pieces, failure, reader = read([event(4), event(5, 6), event(7)])
    assert (pieces, failure) == ([(4, 5, 6, 7)], None)
    pieces, failure, reader = read([event(4), event(5, 6), event(7), LAST], stop_ids=(5,), banned_ids=(6, 7))
    assert (pieces, failure) == ([(4, 5), ()], None), "nothing behind a stop was asked for, a banned id neither"
    assert (reader.prompt_tokens, reader.cached_tokens) == (3, 2)
    pieces, failure, _ = read([event(4), event(5), event(6)], max_tokens=2)
    assert (pieces, failure) == ([(4, 5), ()], None)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (event(8), "C4: the server sampled a banned id"),
        (event(-1), "C4: the server gave token ids that are none"),
        (event(5, completion_probabilities=[]), "C6"),
        ({"what": 1}, "no completion"),
        (event(5, stop=True, stop_type="none of these"), "aborted"),
    ],
)
def test_tokens_before_a_wrong_event_come_first(wrong: Json, says: str) -> None:
    pieces, failure, _ = read([event(4), event(5), wrong, event(6)], banned_ids=(8,))
    assert pieces == [(4, 5)]
    assert says in str(failure)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (b'{"error": {"message": "it died", "code": 500}}', EngineError, "it died"),
        (b'{"tokens": [', EngineProtocolError, "not JSON"),
        (b"17", EngineProtocolError, "no object"),
    ],
)
async def test_events_before_a_wrong_one_come_first(wrong: bytes, error: type[EngineError], says: str) -> None:
    datas = [b'{"a": 1}', b'{"a": 2}', wrong, b'{"a": 3}']
    server = Said([CHUNKED + framed(*(b"data: %s\n\n" % data for data in datas)) + END])
    client = Client(timeouts=Timeouts(), api_key=None, secure=False)
    async with server.serve() as url, aclosing(client.events(url, {}, {}, Wait(40, "nothing came"))) as batches:
        assert await anext(batches) == [{"a": 1}, {"a": 2}]
        with pytest.raises(error, match=says):
            await anext(batches)
    await client.aclose()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}", "as gzip, though it was asked not to compress it"),
        (b"content-length: 2\r\n\r\n12", "a page of more than 1 bytes"),
    ],
)
async def test_a_page_that_is_compressed_or_has_no_end_is_refused(
    answer: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.engines.http.client._MOST_PAGE_BYTES", 1)
    server = Said([b"HTTP/1.1 200 OK\r\n" + answer])
    client = Client(timeouts=Timeouts(), api_key=None, secure=False)
    async with server.serve() as url:
        with pytest.raises(EngineProtocolError, match=says):
            await client.get(url)
        await client.aclose()


async def test_an_error_whose_page_does_not_come_is_told_by_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.engines.http.client._ERROR_S", 0.05)
    server = Said([b"HTTP/1.1 503 Not Now\r\ncontent-length: 9\r\n\r\nfull"])
    client = Client(timeouts=Timeouts(), api_key=None, secure=False)
    async with server.serve() as url:
        with pytest.raises(EngineUnavailable, match="answered 503"):
            await anext(client.events(url, {}, {}, Wait(40, "nothing came")))
        await client.aclose()
