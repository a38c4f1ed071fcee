"""Any number of inference servers as one engine: contexts go out as token ids, tokens come back as they are sampled.

This file is the life of a call: placed where its prefix is, sent, retried while nothing has come back, read, ended at
its stop id, and cancelled on the server when nobody reads on. It knows nothing of threads, formats or text. What a
kind of server wants is in its dialect.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

import anyio
import anyio.lowlevel

from plait.engines.base import EngineStats, check_params, no_context
from plait.engines.http.base import MOST_IDS, Call, Dialect, Json, Piece
from plait.engines.http.client import Busy, Client, Timeouts
from plait.engines.http.placement import Place, Placement
from plait.engines.http.probe import Server, probe
from plait.engines.http.reader import Reader
from plait.engines.http.wire import Wait
from plait.errors import (
    ContextLengthError,
    EngineError,
    EngineProtocolError,
    EngineTimeout,
    EngineUnavailable,
    Failures,
    RequestError,
    UnsupportedJoin,
)
from plait.settings import within
from plait.types import Chunk, Context, Merge, SamplingParams, StopReason, context_merges

KEY_VARIABLE = "PLAIT_ENGINE_KEY"
HEADERS = ("x-session-id", "x-smg-routing-key")
"""By which routers keep calls with one key on one replica: vllm-router and its relatives, SGLang's."""
UNKNOWN_CONTEXT = 32_768
"""Positions assumed where neither server nor user says; a longer call is refused by the server instead."""
_log = logging.getLogger("plait.engines.http")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_DOWN_S = 5.0
_END_S = 1.0
"""How long a server may take to end a stream whose last token has come; then the connection is closed."""


class HttpEngine:
    """Continues contexts on vLLM, SGLang, llama-server, or any server whose completions speak token ids.

    Args:
        urls: Base address of a server, or several with the same model: a list, or separated by commas. Calls go to the
            replica that holds their prefix. One that does not answer when the engine is opened is left out, as long as
            another one does.
        kind: `vllm`, `sglang`, `llama-server` or `completions`, where a router hides what is behind it.
        model: Where a server has several.
        api_key: By default what the environment variable PLAIT_ENGINE_KEY holds.
        max_context: Positions of one call, prompt and completion; by default what the servers say.
        max_calls: Calls in progress at once; more wait here.
        vocab_size: A server that is known to have another one is refused: it serves another model.
        timeouts: Limits for each phase of a call.
        retries: How often a call is sent again that failed before its first token.
        share_prefill: Let calls wait that need the same prefix, until the first of them has computed it, on servers
            that share blocks among running calls; for half of `first_token_s` at most, of which it is part.

    Raises:
        RequestError: An address is none, or the options are out of range.
    """

    supports_merge = False

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        kind: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        max_context: int | None = None,
        max_calls: int = 256,
        vocab_size: int | None = None,
        timeouts: Timeouts | None = None,
        retries: int = 3,
        share_prefill: bool = True,
    ) -> None:
        self.urls = base_urls(urls)
        within("max_calls", max_calls, 1, whole=True, or_none=False)
        within("retries", retries, 0, whole=True, or_none=False)
        within("max_context", max_context, 2, whole=True)
        within("vocab_size", vocab_size, 1, whole=True)
        self.name = "http"
        self.max_context = max_context or UNKNOWN_CONTEXT
        self.vocab_size = vocab_size
        self.servers: tuple[Server, ...] = ()
        """What was found at each of `urls`, once opened."""
        self.left_out: dict[str, str] = {}
        """Addresses that did not answer when it was opened, and why; they are no longer among `urls`."""
        self._asked = {"kind": kind, "model": model}
        self._asked_context = max_context
        self._api_key = _key(api_key if api_key is not None else os.environ.get(KEY_VARIABLE, ""))
        self._max_calls, self._retries, self._share_prefill = max_calls, retries, share_prefill
        self.timeouts = timeouts or Timeouts()
        self._dialects: list[Dialect] = []
        self._texts: dict[tuple[int, int], str] = {}
        self._client: Client | None = None
        self._room = anyio.Semaphore(max_calls)
        self._placement = Placement(len(self.urls))
        self._active = self._queued = self._prefill = self._reused = self._decoded = 0
        self._closed = False
        self._loop: object = None
        """The event loop that its connections belong to."""

    async def __aenter__(self) -> HttpEngine:
        if self._closed or self._client is not None:
            raise EngineUnavailable("an HTTP engine is opened once; make another one")
        self._loop = anyio.lowlevel.current_token()
        self._client = Client(
            timeouts=self.timeouts,
            api_key=self._api_key,
            secure=any(url.startswith("https:") for url in self.urls),
        )
        try:
            await self._look(self._client)
            self._agree()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def _look(self, client: Client) -> None:
        """Look at all addresses side by side. Those that do not answer are left out while another one does."""
        found: dict[str, tuple[Server, Dialect]] = {}
        down: dict[str, EngineError] = {}
        failures = Failures()

        async def look(url: str) -> None:
            with failures.noting():
                try:
                    found[url] = await probe(client, url, **self._asked)
                except EngineProtocolError:
                    raise
                except EngineError as exc:
                    down[url] = exc

        with failures.unwrapped():
            async with anyio.create_task_group() as looks:
                for url in self.urls:
                    looks.start_soon(look, url)
        if not found:
            raise next(down[url] for url in self.urls)
        for url, failure in down.items():
            _log.warning("%s is left out until the engine is opened again: %s", url, failure)
        self.left_out = {url: str(failure) for url, failure in down.items()}
        self.urls = tuple(url for url in self.urls if url in found)
        self.servers = tuple(found[url][0] for url in self.urls)
        self._dialects = [found[url][1] for url in self.urls]
        self._placement = Placement(len(self.urls))

    def _agree(self) -> None:
        """Hold the servers to what was asked, and to each other."""
        self.name = self.servers[0].kind
        models = sorted({server.model for server in self.servers})
        if len(models) > 1 and self._asked["model"] is None and len({s.vocab_size for s in self.servers}) > 1:
            raise RequestError(f"the servers have different models: {', '.join(models)}. Replicas serve the same one")
        for server in self.servers:
            told = server.vocab_size or server.id_limit
            if not self.vocab_size or not told:
                continue
            if told < self.vocab_size or server.vocab_size not in (None, self.vocab_size):
                raise RequestError(
                    f"{server.url} serves {server.model} with {told} token ids; the model that was asked "
                    f"for has {self.vocab_size}. Name the weights that the server runs with --model"
                )
        told = [n for n in (self._asked_context, *(server.max_context for server in self.servers)) if n]
        self.max_context = min(told, default=UNKNOWN_CONTEXT)
        sizes = [size for server in self.servers if (size := server.vocab_size or server.id_limit)]
        self.vocab_size = self.vocab_size or min(sizes, default=None)

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection, which ends the calls that still run; again is fine."""
        self._closed = True
        if self._client is not None:
            with anyio.CancelScope(shield=True):
                await self._client.aclose()

    @property
    def max_active(self) -> int | None:
        """Calls that the servers say they decode at once, all together; None where one of them does not say."""
        slots = [server.num_slots for server in self.servers if server.num_slots]
        return min(sum(slots), self._max_calls) if slots and len(slots) == len(self.servers) else None

    def stats(self) -> EngineStats:
        """Counters since it was opened. A prompt counts as computed as far as its server does not say it was cached."""
        return EngineStats(
            active=self._active,
            queued=self._queued,
            prefill_tokens=self._prefill,
            reused_tokens=self._reused,
            decode_tokens=self._decoded,
        )

    async def generate(self, context: Context, params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        """Continue a context. A chunk is what arrived together.

        Raises:
            UnsupportedJoin: The context holds a merge.
            ContextLengthError: It leaves no position to sample into.
            RequestError: It is empty, or holds an id that the model does not have; or all are banned.
            EngineUnavailable, EngineTimeout, EngineError: The server failed, and may be asked again.
            EngineProtocolError: The server answered what it must not.
        """
        try:
            token_ids = self._checked(context)
        except TypeError as exc:
            raise no_context(context) from exc
        check_params(params, range(self.vocab_size) if self.vocab_size else None)
        self._queued += 1
        try:
            await self._room.acquire()
        finally:
            self._queued -= 1
        try:
            place = self._placement.enter(token_ids)
            self._active += 1
            state = _State(token_ids, params, min(params.max_tokens, self.max_context - len(token_ids)))
            try:
                while state.stop is None:
                    async with aclosing(self._attempts(place, state)) as chunks:
                        async for chunk in chunks:
                            yield chunk
            finally:
                self._active -= 1
                self._placement.leave(place, (*token_ids, *state.sampled))
        finally:
            self._room.release()

    async def _attempts(self, place: Place, state: _State) -> AsyncGenerator[Chunk, None]:
        """One request, sent again as long as nothing came back."""
        before = len(state.sampled)
        failures = 0
        while True:
            try:
                async with aclosing(self._request(place, state)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except EngineError as exc:
                failures += 1
                may = exc.retryable and not isinstance(exc, EngineTimeout) and len(state.sampled) == before
                if self._closed:
                    raise EngineUnavailable("the HTTP engine was closed while a call ran") from exc
                if not may or failures > self._retries:
                    raise
                pause = min(_FIRST_PAUSE_S * 2 ** (failures - 1), _LONGEST_PAUSE_S)
                if isinstance(exc, Busy):
                    pause = min(max(pause, exc.retry_after_s), _LONGEST_PAUSE_S)
                if not isinstance(exc, Busy) or len(self.urls) > 1:
                    self._placement.mark_down(place.base, _DOWN_S)
                    self._placement.move(place)
            await anyio.sleep(pause)

    async def _request(self, place: Place, state: _State) -> AsyncGenerator[Chunk, None]:
        """Send what is left of a call; yield its chunks, the last one with `stop` unless the server ended too early."""
        assert self._client is not None
        dialect, url = self._dialects[place.base], self.urls[place.base]
        texts = await self._stop_texts(place.base, state.params)
        call = state.call(self.servers[place.base].model, place, texts)
        reader = Reader(call, dialect, self.vocab_size)
        headers: dict[str, str] = dict.fromkeys(HEADERS, place.key)
        path = f"{url}{dialect.route(call)}"
        first_s, next_s = self.timeouts.first_token_s, self.timeouts.next_token_s
        wait = Wait(first_s, f"{path}: no token came")
        if self._share_prefill and dialect.shares_blocks:
            # Waiting for another call counts, and ends while there is time to ask: that one may stall.
            wait.begin()
            with anyio.move_on_after(first_s / 2):
                await self._placement.wait_until_worth_it(place)
        further = f"{path}: no further token came"
        async with aclosing(self._client.events(path, dialect.body(call), headers, wait)) as batches:
            async for events in batches:
                pieces = reader.pieces(events)
                for piece in pieces:
                    if piece.token_ids:
                        self._placement.begin(place)
                    stop = state.add(piece)
                    self._decoded += len(piece.token_ids)
                    over = stop is not None or piece.finish is not None
                    if over:
                        if piece.finish is not None or dialect.ends_itself(call):
                            await self._read_to_end(pieces, batches, reader)
                        self._count_prompt(reader, call, state)
                        state.stop = stop
                    if piece.token_ids or stop is not None:
                        yield Chunk(token_ids=piece.token_ids, logprobs=piece.logprobs, stop=stop)
                        # Not before: whoever reads the chunk may take its time.
                        wait.extend(next_s, further)
                    if over:
                        if stop is None and reader.num_read == 0:
                            raise EngineProtocolError(f"C4: {path} ended a call without a token, for {piece.finish!r}")
                        return
        raise EngineError(f"{path} ended its stream after {reader.num_read} tokens without saying why")

    async def _read_to_end(
        self, pieces: Iterator[Piece], batches: AsyncGenerator[list[Json], None], reader: Reader
    ) -> None:
        """Take the usage that follows the last token, so that the connection can serve the next call."""
        deque(pieces, maxlen=0)
        with anyio.move_on_after(_END_S):
            async for events in batches:
                deque(reader.pieces(events), maxlen=0)

    def _count_prompt(self, reader: Reader, call: Call, state: _State) -> None:
        cached = reader.cached_tokens or 0
        self._prefill += max(0, (reader.prompt_tokens or len(call.token_ids)) - cached)
        if len(call.token_ids) == len(state.token_ids):
            # Not where a call goes on behind an early end: its own tokens were not given.
            self._reused += cached

    async def _stop_texts(self, base: int, params: SamplingParams) -> dict[int, str]:
        """Texts of stop and eos ids, asked once for each; empty where a server cannot be told to stop there."""
        if not self._dialects[base].needs_stop_texts:
            return {}
        texts: dict[int, str] = {}
        for id in dict.fromkeys((*params.stop_ids, *params.eos_ids)):
            if (base, id) not in self._texts:
                self._texts[base, id] = await self._stop_text(self.urls[base], id)
            texts[id] = self._texts[base, id]
        return texts

    async def _stop_text(self, url: str, id: int) -> str:
        assert self._client is not None
        page = await self._client.post(f"{url}/detokenize", {"tokens": [id]})
        text = page.get("content") if isinstance(page, dict) else None
        if not isinstance(text, str) or not text:
            return ""
        try:
            # A tokenizer without all letters of this text fails at it, and then refuses every call that names it.
            await self._client.post(f"{url}/tokenize", {"content": text})
        except (EngineUnavailable, EngineTimeout):
            raise
        except EngineError:
            return ""
        return text

    async def count_running(self, base: int = 0) -> float | None:
        """Calls that a server says it works on; None where it does not say."""
        return (await self.metrics(base)).get(self._dialects[base].running_metric)

    async def metrics(self, base: int = 0) -> dict[str, float]:
        """A server's Prometheus metrics, summed over labels; empty where it publishes none."""
        assert self._client is not None
        try:
            page = await self._client.get(f"{self.urls[base]}/metrics")
        except (EngineError, RequestError):
            return {}
        return read_metrics(page) if isinstance(page, str) else {}

    def _checked(self, context: Context) -> tuple[int, ...]:
        if self._client is None or self._closed:
            raise EngineUnavailable(
                "the HTTP engine is closed" if self._closed else "open the engine first: `async with engine`"
            )
        if self._loop != anyio.lowlevel.current_token():
            raise EngineUnavailable("the HTTP engine was opened in another event loop; make one in this")
        if any(True for _ in context_merges(context)):
            raise UnsupportedJoin(
                f"{self.name} servers take plain token sequences; a context with a merge needs an engine that holds "
                "the keys and values itself (llamacpp, torch, scripted)"
            )
        ids = tuple(id for part in context if not isinstance(part, Merge) for id in part)
        if not ids:
            raise RequestError("a context must hold at least one token id")
        if set(map(type, ids)) != {int}:
            bad = next(id for id in ids if type(id) is not int)
            raise RequestError(f"{bad!r} of type {type(bad).__name__} is no token id; ids are integers")
        if len(ids) >= self.max_context:
            raise ContextLengthError(f"the context has {len(ids)} tokens; with one to sample, {self.max_context} fit")
        size = self.vocab_size or MOST_IDS
        if min(ids) < 0 or max(ids) >= size:
            bad = next(id for id in ids if not 0 <= id < size)
            raise RequestError(f"token id {bad} is not in the vocabulary of {self.servers[0].model}: 0 to {size - 1}")
        return ids


@dataclass(slots=True)
class _State:
    """One call of the engine: what was sampled so far, over however many requests it takes."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    room: int
    """Tokens it may sample at most."""
    sampled: list[int] = field(default_factory=list[int])
    stop: StopReason | None = None

    def call(self, model: str, place: Place, stop_texts: dict[int, str]) -> Call:
        """What is left to ask for. A server that ended early, at an id that ends nothing here, is asked to go on."""
        return Call(
            model=model,
            token_ids=(*self.token_ids, *self.sampled),
            params=self.params,
            max_tokens=self.room - len(self.sampled),
            seed=self.params.seed + len(self.sampled),
            key=place.key,
            cache_salt=place.cache_salt,
            stop_texts=stop_texts,
        )

    def add(self, piece: Piece) -> StopReason | None:
        """Take tokens; why the call is over, None while it is not."""
        self.sampled += piece.token_ids
        if piece.token_ids and self.sampled[-1] in self.params.stop_ids:
            return StopReason.STOP
        if piece.token_ids and self.sampled[-1] in self.params.eos_ids:
            return StopReason.EOS
        # A server that stops for length before `room` has less context than it said.
        full = len(self.sampled) >= self.room or (piece.finish == "length" and self.sampled)
        return StopReason.LENGTH if full else None


def _key(given: str) -> str:
    """An API key as it goes into a header; what surrounds it, such as the newline of a file, is no part of it.

    Raises:
        RequestError: It holds what a header cannot; it is not repeated.
    """
    key = given.strip()
    if not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
        raise RequestError(f"the API key (api_key=, or {KEY_VARIABLE}) holds more than printable ASCII without spaces")
    return key


def base_urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    """Base addresses without a trailing slash or `/v1`.

    Raises:
        RequestError: One is no http or https address, or holds a password; or there is none.
    """
    given = [urls] if isinstance(urls, str) else list(urls)
    if any("@" in text for text in given):
        # Before anything that would repeat it.
        raise RequestError(
            f"an engine address holds a user or a password (an @): leave that out, and give the API key as "
            f"{KEY_VARIABLE} in the environment, or api_key="
        )
    given = urls.split(",") if isinstance(urls, str) else given
    if not given:
        raise RequestError("there is no engine address; it must look like http://host:port")
    return tuple(dict.fromkeys(_base_url(text.strip()) for text in given))


def _base_url(text: str) -> str:
    url = text.rstrip("/").removesuffix("/v1")
    wrong = f"{text!r} is no engine address; it must look like http://host:port"
    try:
        parts = urlsplit(url)
        # What the network looks up, and what goes into the head of a request: letters of other scripts are spelled.
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError as exc:
        raise RequestError(f"{wrong} ({exc})") from None
    if parts.scheme not in ("http", "https") or not host or port == 0 or parts.query or parts.fragment:
        raise RequestError(wrong)
    if not url.isprintable() or any(c.isspace() for c in url):
        raise RequestError(wrong)
    if url.isascii():
        return url
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{quote(parts.path, safe='/%')}"


def read_metrics(page: str) -> dict[str, float]:
    """Values of a Prometheus page by name, summed over their labels."""
    values: dict[str, float] = {}
    for line in page.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition("{") if "{" in line else line.partition(" ")
            number = rest.rpartition("} ")[2] if "{" in line else rest
            try:
                values[name] = values.get(name, 0.0) + float(number.split()[0])
            except (ValueError, IndexError):
                continue
    return values
