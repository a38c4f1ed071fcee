"""Inference servers on loopback, small and true to their documents: real HTTP, no weights, faults on request.

Each is a dialect over the scripted engine, so that what it says is a pure function of ids and seed. They check what
the real ones check, and have the traps of the real ones. `Fault`s happen to the next POSTs, in order.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
import anyio.abc
import h11
from anyio.streams.tls import TLSListener

import clocks
from plait.engines.scripted import ScriptedEngine
from plait.types import Chunk, SamplingParams, StopReason

VOCAB = 50
CONTROL = {40: "<Fork>", 41: "</Fork>", 42: "<Stop>"}
"""Control tokens: they print as nothing unless they are asked for."""
BLOCK = 16
FaultKind = Literal[
    "503", "500", "garbage", "html", "cut", "stall", "slow", "error", "abort", "banned", "silent", "pings"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong with one POST, after so many events of its stream."""

    kind: FaultKind
    after: int = 0
    seconds: float = 0.0
    retry_after: str | None = None


@dataclass(slots=True)
class Seen:
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    cached: int = 0


class BadRequest(Exception):
    """Answered with 400, or in the stream where a server looks at a call only after it has begun to answer."""

    def __init__(self, message: str, *, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


@dataclass(slots=True)
class FakeServer:
    """What all of them share."""

    max_context: int = 400
    own_eos: int | None = None
    """The model's end-of-sequence, which most servers heed unasked."""
    prefill: Callable[[], Awaitable[object]] | None = None
    """Waited for before the first token of a prompt that is not cached."""
    token_s: float = 0.0
    api_key: str | None = None
    vocab_size: int = VOCAB
    weights: dict[int, float] = field(default_factory=dict)
    chunk_size: int = 1
    """Tokens of one event, as with speculative decoding."""
    script: Any = None
    """What the scripted engine says, in place of a pseudo-random model."""
    heeds_bans: bool = True
    together: bool = False
    """All that a stream holds is sent at once, as a client sees it that lags behind."""
    tls: ssl.SSLContext | None = None
    loading: int = 0
    """GETs that are answered with 503 first."""
    on_loading: Callable[[], object] = lambda: None
    """Called at each of them."""
    faults: list[Fault] = field(default_factory=list)
    trap: Callable[[dict[str, Any]], Fault | None] = lambda body: None
    """What goes wrong with a POST of this body, where no other fault waits."""
    spoil: Callable[[dict[str, Any]], None] = lambda event: None
    """Changes the events of completions before they are sent."""
    seen: list[Seen] = field(default_factory=list)
    running: int = 0
    most: int = 0
    """That ran at once."""
    aborted: int = 0
    """Streams whose client went away."""
    connections: int = 0
    blocks: set[tuple[int, ...]] = field(default_factory=set)
    url: str = ""

    def pages(self) -> dict[str, Any]:
        raise NotImplementedError

    def routes(self) -> tuple[str, ...]:
        raise NotImplementedError

    def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        raise NotImplementedError

    ends_with_done = True

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """A POST that is no completion; None where there is no such page."""
        return None

    def bad_request(self, message: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}

    async def sample(self, ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[Chunk, None]:
        """Tokens one by one."""
        if not ids or not all(isinstance(id, int) and 0 <= id < self.vocab_size for id in ids):
            raise BadRequest("token ids are out of the vocabulary")
        if len(ids) >= self.max_context:
            raise BadRequest(
                f"This model's maximum context length is {self.max_context} tokens. However, your request has "
                f"{len(ids)} input tokens."
            )
        said = list(ids)
        if self.prefill is not None and self.cached(ids) + BLOCK < len(ids):
            await self.prefill()
        engine = self.model()
        async with aclosing(engine.generate((tuple(ids),), params)) as chunks:
            async for chunk in chunks:
                self.keep(said)
                said += chunk.token_ids
                yield chunk
        self.keep(said)

    def model(self) -> ScriptedEngine:
        return ScriptedEngine(
            vocab_size=self.vocab_size,
            weights=self.weights,
            script=self.script,
            max_context=self.max_context,
            delay_s=self.token_s,
            chunk_size=self.chunk_size,
        )

    def keep(self, ids: Sequence[int]) -> None:
        self.blocks |= {tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)}

    def cached(self, ids: Sequence[int]) -> int:
        """Tokens of whole blocks that are there; the last token is always computed."""
        end = 0
        while end + BLOCK < len(ids) and tuple(ids[: end + BLOCK]) in self.blocks:
            end += BLOCK
        return end

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Listen on loopback."""
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{port}"
        if self.tls is not None:
            listener = TLSListener(listener, self.tls, standard_compatible=False)
        async with listener:
            tasks = anyio.create_task_group()
            await tasks.__aenter__()
            try:
                tasks.start_soon(listener.serve, self._connection)
                yield self.url
            finally:
                tasks.cancel_scope.cancel()
                await tasks.__aexit__(None, None, None)  # so that an error of the block leaves it bare

    async def _connection(self, stream: anyio.abc.ByteStream) -> None:
        self.connections += 1
        wire = _Wire(stream, self.together)
        try:
            async with stream:
                while await self._request(wire):
                    wire.h11.start_next_cycle()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, h11.ProtocolError):
            return

    async def _request(self, wire: _Wire) -> bool:
        """Answer one request; whether the connection goes on."""
        request, data = await wire.request()
        if request is None:
            return False
        path, headers = request.target.decode(), {k.decode(): v.decode() for k, v in request.headers}
        if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            await wire.page(401, {"error": "Unauthorized"})
            return True
        if request.method == b"GET":
            await self._get(wire, path)
            return True
        body = json.loads(data)
        if path not in self.routes():
            page = self.post(path, body)
            status = 404 if page is None else 500 if "error" in page else 200
            await wire.page(status, page or {"detail": "Not Found"})
            return True
        self.seen.append(Seen(path, body, headers))
        fault = self.faults.pop(0) if self.faults else self.trap(body)
        return await self._completion(wire, path, body, fault)

    async def _get(self, wire: _Wire, path: str) -> None:
        if self.loading:
            self.loading -= 1
            self.on_loading()
            await wire.page(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
            return
        page = self.pages().get(path)
        await wire.page(404 if page is None else 200, {"detail": "Not Found"} if page is None else page)

    async def _completion(self, wire: _Wire, path: str, body: dict[str, Any], fault: Fault | None) -> bool:
        kind = fault.kind if fault else None
        if fault is not None and kind == "503":
            extra = [("retry-after", fault.retry_after)] if fault.retry_after else []
            await wire.page(503, {"error": {"message": "no room", "type": "ServiceUnavailableError"}}, extra)
            return True
        if kind == "500":
            await wire.page(500, {"error": {"message": "out of memory", "type": "InternalServerError"}})
            return True
        if kind == "html":
            await wire.page(200, "<html>a proxy</html>")
            return True
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self._stream(wire, path, body, fault)
        finally:
            self.running -= 1

    async def _stream(self, wire: _Wire, path: str, body: dict[str, Any], fault: Fault | None) -> bool:
        whole, gone = False, anyio.Event()
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                await wire.hung_up()
                gone.set()
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            try:
                async with aclosing(self.events(path, body)) as events:
                    whole = await self._send(wire, events, fault)
                    await wire.flush()
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                gone.set()
            tasks.cancel_scope.cancel()
        self.aborted += gone.is_set()
        return whole

    async def _send(self, wire: _Wire, events: AsyncGenerator[dict[str, Any], None], fault: Fault | None) -> bool:
        count = 0
        started = False
        while True:
            if fault is not None and count == fault.after:
                if not started and fault.kind in ("garbage", "error", "cut", "silent"):
                    await wire.begin_stream()
                    started = True
                match fault.kind:
                    case "slow" | "stall":
                        await wire.flush()
                        await clocks.sleep(fault.seconds)
                    case "pings":
                        until = anyio.current_time() + fault.seconds
                        while anyio.current_time() < until:
                            await wire.comment("ping")
                            await clocks.sleep(0.3)
                    case "garbage":
                        await wire.event('{"choices": [{"tok')
                    case "error":
                        await wire.event(json.dumps({"error": {"message": "the engine died", "type": "Internal"}}))
                    case "cut":
                        return False
                    case "silent":
                        await wire.end()
                        return True
            try:
                event = await anext(events, None)
            except BadRequest as exc:
                if not exc.late:
                    await wire.page(400, self.bad_request(str(exc)))
                    return True
                await wire.begin_stream()
                await wire.event(json.dumps(self.bad_request(str(exc))))
                break
            if not started:
                await wire.begin_stream()
                started = True
            if event is None:
                break
            if fault is not None and fault.kind == "abort" and count >= fault.after:
                event = self.aborting(event)
            count += 1
            self.spoil(event)
            await wire.event(json.dumps(event))
        if self.ends_with_done:
            await wire.event("[DONE]")
        await wire.end()
        return True

    def aborting(self, event: dict[str, Any]) -> dict[str, Any]:
        return (
            event | {"choices": [event["choices"][0] | {"finish_reason": "abort"}]} if event.get("choices") else event
        )


class _Wire:
    """One HTTP/1.1 connection."""

    def __init__(self, stream: anyio.abc.ByteStream, together: bool) -> None:
        self.stream, self.h11 = stream, h11.Connection(h11.SERVER)
        self.together, self.held = together, b""

    async def request(self) -> tuple[h11.Request | None, bytes]:
        request, data = None, b""
        while True:
            event = self.h11.next_event()
            if event is h11.NEED_DATA:
                try:
                    self.h11.receive_data(await self.stream.receive())
                except anyio.EndOfStream:
                    return None, b""
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                data += event.data
            else:
                return request, data

    async def hung_up(self) -> None:
        """Wait until the client goes away; what it sends meanwhile belongs to its next request."""
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                self.h11.receive_data(await self.stream.receive())

    async def send(self, event: h11.Event) -> None:
        self.held += self.h11.send(event) or b""
        if not (self.together and isinstance(event, h11.Data)):
            await self.flush()

    async def flush(self) -> None:
        data, self.held = self.held, b""
        if data:
            await self.stream.send(data)

    async def page(self, status: int, page: Any, extra: Sequence[tuple[str, str | None]] = ()) -> None:
        text = page if isinstance(page, str) else json.dumps(page)
        kind = "text/html" if isinstance(page, str) else "application/json"
        headers = [("content-type", kind), ("content-length", str(len(text.encode()))), *extra]
        await self.send(h11.Response(status_code=status, headers=headers))
        await self.send(h11.Data(data=text.encode()))
        await self.send(h11.EndOfMessage())

    async def begin_stream(self) -> None:
        headers = [("content-type", "text/event-stream; charset=utf-8"), ("transfer-encoding", "chunked")]
        await self.send(h11.Response(status_code=200, headers=headers))

    async def event(self, data: str) -> None:
        await self.send(h11.Data(data=f"data: {data}\n\n".encode()))

    async def comment(self, text: str) -> None:
        await self.send(h11.Data(data=f": {text}\n\n".encode()))

    async def end(self) -> None:
        await self.send(h11.EndOfMessage())


def params_of(
    sampling: dict[str, Any],
    *,
    max_tokens: str,
    seed: str,
    stop_ids: Sequence[int],
    eos: int | None,
    banned: Sequence[int],
) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling[max_tokens],
        temperature=sampling["temperature"],
        top_p=sampling["top_p"],
        seed=sampling[seed],
        stop_ids=tuple(stop_ids),
        eos_ids=() if eos is None else (eos,),
        banned_ids=tuple(banned),
    )


@dataclass(slots=True)
class FakeVllm(FakeServer):
    """vLLM 0.32: both routes, one event a token, the finish reason with the last token, then the usage, then [DONE]."""

    native: bool = True
    tells_cached: bool = True

    def pages(self) -> dict[str, Any]:
        paths = {"/v1/completions": {}, **({"/inference/v1/generate": {}} if self.native else {})}
        model = {"id": "tiny", "object": "model", "owned_by": "vllm", "max_model_len": self.max_context}
        return {
            "/v1/models": {"object": "list", "data": [model]},
            "/version": {"version": "0.33.0"},
            "/openapi.json": {"openapi": "3.1.0", "paths": paths},
            "/metrics": "# TYPE vllm:num_requests_running gauge\n"
            f'vllm:num_requests_running{{engine="0",model_name="tiny"}} {float(self.running)}\n'
            'vllm:cache_config_info{block_size="16",enable_prefix_caching="True"} 1.0\n',
        }

    def routes(self) -> tuple[str, ...]:
        return ("/v1/completions", "/inference/v1/generate") if self.native else ("/v1/completions",)

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        native = path.startswith("/inference")
        sampling = body["sampling_params"] if native else body
        ids = body["token_ids"] if native else body["prompt"]
        if out := [id for id in ids if id >= self.vocab_size]:
            raise BadRequest(f"Token id {out[0]} is out of vocabulary", late=True)
        if native and len(ids) >= self.max_context:
            what = f"The decoder prompt (length {len(ids)}) is longer than the maximum model length of"
            raise BadRequest(f"{what} {self.max_context}.", late=True)
        banned = self._banned(sampling, native)
        if sampling["top_k"] < -1 or sampling["repetition_penalty"] != 1.0 or sampling["min_p"] != 0.0:
            raise BadRequest("a default of the generation config would have been used")
        eos = None if sampling.get("ignore_eos") else self.own_eos
        params = params_of(
            sampling,
            max_tokens="max_tokens",
            seed="seed",
            stop_ids=sampling["stop_token_ids"],
            eos=eos,
            banned=banned,
        )
        cached = self.cached(ids)
        self.seen[-1].cached = cached
        spelled = body.get("return_tokens_as_token_ids")
        async with aclosing(self.sample(ids, params)) as chunks:
            async for chunk in chunks:
                choice: dict[str, Any] = {"index": 0, "token_ids": list(chunk.token_ids), "finish_reason": None}
                if native:
                    choice["logprobs"] = sampling.get("logprobs") and {"content": self._content(chunk)}
                else:
                    names = [f"token_id:{id}" if spelled else f"t{id}" for id in chunk.token_ids]
                    choice["text"] = "".join(f"t{id}" for id in chunk.token_ids)
                    choice["logprobs"] = {"tokens": names, "token_logprobs": list(chunk.logprobs)}
                if chunk.stop is not None:
                    choice["finish_reason"] = "length" if chunk.stop is StopReason.LENGTH else "stop"
                    choice["stop_reason"] = chunk.token_ids[-1] if chunk.stop is StopReason.STOP else None
                yield {"id": "x", "choices": [choice]}
        usage: dict[str, Any] = {"prompt_tokens": len(ids)}
        if self.tells_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        yield {"id": "x", "choices": [], "usage": usage}

    def _banned(self, sampling: dict[str, Any], native: bool) -> list[int]:
        bias = sampling.get("logit_bias") or {}
        if native and bias:
            raise BadRequest("Expected `int`, got `str` - at `key` in `$.logit_bias`")
        return [int(key) for key, value in bias.items() if value == -100 and self.heeds_bans]

    def _content(self, chunk: Chunk) -> list[dict[str, Any]]:
        pairs = zip(chunk.token_ids, chunk.logprobs, strict=True)
        # A hair above zero, as rounding leaves it.
        return [{"token": f"token_id:{id}", "logprob": p or 1e-9, "bytes": None, "top_logprobs": []} for id, p in pairs]


@dataclass(slots=True)
class FakeSglang(FakeServer):
    """SGLang 0.5: each event repeats all tokens unless `incremental`; the model's own eos always ends a call."""

    incremental: bool = False
    deterministic: bool = True
    """Whether it was started so that seeds count."""
    died: bool = False
    SAMPLING = frozenset(
        ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_token_ids", "skip_special_tokens")
    ) | {"no_stop_trim", "sampling_seed", "logit_bias", "ignore_eos"}
    KEPT_FREE = 6
    """Positions of its context that no prompt may fill."""

    def pages(self) -> dict[str, Any]:
        context = self.max_context + self.KEPT_FREE
        model = {"id": "tiny", "object": "model", "owned_by": "sglang", "max_model_len": context}
        return {
            "/v1/models": {"object": "list", "data": [model]},
            "/server_info": {
                "version": "0.5.23",
                "context_length": context,
                "max_req_input_len": self.max_context,
                "max_total_num_tokens": 9999,
                "disable_radix_cache": False,
                "enable_deterministic_inference": self.deterministic,
            },
        }

    def routes(self) -> tuple[str, ...]:
        return ("/generate",)

    def bad_request(self, message: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": "invalid_request_error", "code": 400, "retryable": False}}

    async def _connection(self, stream: anyio.abc.ByteStream) -> None:
        if self.died:
            await stream.aclose()
        else:
            await FakeServer._connection(self, stream)

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        sampling, ids = dict(body["sampling_params"]), body["input_ids"]
        if unknown := set(sampling) - self.SAMPLING:
            raise BadRequest(f"Unexpected keyword argument `{min(unknown)}`")
        late = bool(body.get("stream"))
        if sampling.get("top_k", -1) != -1 and sampling["top_k"] < 1:
            raise BadRequest(f"top_k must be -1 (disable) or at least 1, got {sampling['top_k']}.", late=late)
        bias = sampling.get("logit_bias") or {}
        if none := [key for key in bias if not 0 <= int(key) < self.vocab_size]:
            raise BadRequest(f"logit_bias must has keys in [0, {self.vocab_size - 1}], got {none[0]}.", late=late)
        context = self.max_context + self.KEPT_FREE
        if len(ids) >= context:
            what = f"The input ({len(ids)} tokens) is longer than the model's context length ({context} tokens)."
            raise BadRequest(what, late=late)
        if len(ids) >= self.max_context:
            yield self._refusal(len(ids))
            return
        if any(not 0 <= id < self.vocab_size for id in ids):
            self.died = True
            raise anyio.BrokenResourceError
        if not self.deterministic:
            sampling["sampling_seed"] = len(self.seen)
        banned = [int(key) for key, value in bias.items() if value == -100]
        ends = [] if sampling.get("ignore_eos") else sampling["stop_token_ids"]
        params = params_of(
            sampling, max_tokens="max_new_tokens", seed="sampling_seed", stop_ids=ends, eos=self.own_eos, banned=banned
        )
        cached = self.cached(ids)
        self.seen[-1].cached = cached
        triples: list[list[Any]] = []
        async with aclosing(self.sample(ids, params)) as chunks:
            async for chunk in chunks:
                new = [[p, id, None] for id, p in zip(chunk.token_ids, chunk.logprobs, strict=True)]
                triples += new
                meta: dict[str, Any] = {
                    "id": "x",
                    "finish_reason": None,
                    "prompt_tokens": len(ids),
                    "completion_tokens": len(triples),
                    "cached_tokens": cached,
                    "output_token_logprobs": new if self.incremental else list(triples),
                }
                if chunk.stop is StopReason.LENGTH:
                    meta["finish_reason"] = {"type": "length", "length": len(triples)}
                elif chunk.stop is not None:
                    meta["finish_reason"] = {"type": "stop", "matched": chunk.token_ids[-1]}
                yield {"text": "", "output_ids": [t[1] for t in triples], "meta_info": meta}

    def _refusal(self, num_ids: int) -> dict[str, Any]:
        """Counts a token that was never sampled."""
        why = f"Input length ({num_ids} tokens) exceeds the maximum allowed length ({self.max_context} tokens). "
        reason = {"type": "abort", "message": why, "status_code": 400, "err_type": "BadRequestError"}
        meta = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0, "output_token_logprobs": []}
        return {"output_ids": [0], "meta_info": meta | {"finish_reason": reason}}

    def aborting(self, event: dict[str, Any]) -> dict[str, Any]:
        return event | {"meta_info": event["meta_info"] | {"finish_reason": {"type": "abort", "message": "no"}}}


@dataclass(slots=True)
class FakeLlamaServer(FakeServer):
    """llama.cpp's server: stops are texts, control tokens have none unless preserved, a cache for each slot."""

    slots: list[list[int]] = field(default_factory=lambda: [[], [], [], []])
    busy: set[int] = field(default_factory=set)
    vocab_type: int = 1
    unspelt: frozenset[str] = frozenset()
    """Texts of tokens that no smaller tokens spell, which its tokenizer fails at, also where they are preserved."""
    ends_with_done = False

    def pages(self) -> dict[str, Any]:
        meta = {
            "vocab_type": self.vocab_type,
            "n_vocab": self.vocab_size,
            "n_ctx": self.max_context,
            "n_ctx_train": 4096,
        }
        return {
            "/v1/models": {"object": "list", "data": [{"id": "tiny.gguf", "owned_by": "llamacpp", "meta": meta}]},
            "/props": {
                "default_generation_settings": {"n_ctx": self.max_context},
                "total_slots": len(self.slots),
                "build_info": "b11549",
            },
            "/metrics": f"llamacpp:requests_processing {self.running}\n",
        }

    def routes(self) -> tuple[str, ...]:
        return ("/completion",)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/tokenize":
            return {"error": {"message": "_Map_base::at", "code": 500}} if body["content"] in self.unspelt else {}
        return {"content": "".join(text_of(id) for id in body["tokens"])} if path == "/detokenize" else None

    def bad_request(self, message: str) -> dict[str, Any]:
        kind = "exceed_context_size_error" if "maximum context" in message else "invalid_request_error"
        return {"error": {"code": 400, "message": message, "type": kind}}

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        ids = body["prompt"]
        if body.get("ignore_eos") or "stop_token_ids" in body:
            raise BadRequest("a field that this server ignores, or that forbids end-of-sequence")
        if self.unspelt & set(body["preserved_tokens"]):
            raise BadRequest("Field 'preserved_tokens': _Map_base::at")
        params = SamplingParams(
            max_tokens=body["n_predict"],
            temperature=body["temperature"],
            seed=body["seed"],
            eos_ids=() if self.own_eos is None else (self.own_eos,),
            banned_ids=tuple(id for id, value in body["logit_bias"] if value is False),
        )
        slot, cached = self._slot(ids)
        self.seen[-1].cached = cached
        self.busy.add(slot)
        text, said = "", list(ids)
        finish = {"stop": True, "stop_type": "limit", "tokens": []}
        try:
            async with aclosing(self.sample(ids, params)) as chunks:
                async for chunk in chunks:
                    (id,) = chunk.token_ids
                    said.append(id)
                    described = [{"id": id, "logprob": chunk.logprobs[0], "top_logprobs": []}]
                    yield {
                        "tokens": [id],
                        "content": "",
                        "stop": False,
                        **({"completion_probabilities": described} if body["n_probs"] else {}),
                    }
                    text += text_of(id) if id not in CONTROL or text_of(id) in body["preserved_tokens"] else ""
                    if any(stop in text for stop in body["stop"]):
                        finish["stop_type"] = "word"
                        break
                    if chunk.stop is StopReason.EOS:
                        finish["stop_type"] = "eos"
        finally:
            self.busy.discard(slot)
            self.slots[slot] = said
        yield finish | {"timings": {"cache_n": cached, "prompt_n": len(ids) - cached}}

    def _slot(self, ids: list[int]) -> tuple[int, int]:
        """The free slot that shares the longest prefix."""
        free = [n for n in range(len(self.slots)) if n not in self.busy] or [0]
        shared = {n: _shared(self.slots[n], ids) for n in free}
        slot = max(free, key=lambda n: shared[n])
        return slot, min(shared[slot], len(ids) - 1)


@dataclass(slots=True)
class FakeCompletions(FakeServer):
    """A server that knows OpenAI's fields only, and spells ids as text if `ids`."""

    ids: bool = True
    STANDARD = frozenset(
        ("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stream", "stream_options", "logprobs")
    ) | {"logit_bias"}

    def pages(self) -> dict[str, Any]:
        return {"/v1/models": {"object": "list", "data": [{"id": "tiny", "owned_by": "somebody"}]}}

    def routes(self) -> tuple[str, ...]:
        return ("/v1/completions",)

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        if unknown := set(body) - self.STANDARD:
            raise BadRequest(f"Extra inputs are not permitted: {sorted(unknown)}")
        banned = [int(key) for key in body.get("logit_bias") or {}]
        params = params_of(body, max_tokens="max_tokens", seed="seed", stop_ids=(), eos=self.own_eos, banned=banned)
        async with aclosing(self.sample(body["prompt"], params)) as chunks:
            async for chunk in chunks:
                names = [f"token_id:{id}" if self.ids else text_of(id) for id in chunk.token_ids]
                choice = {
                    "index": 0,
                    "text": "".join(text_of(id) for id in chunk.token_ids),
                    "logprobs": {"tokens": names, "token_logprobs": list(chunk.logprobs)},
                    "finish_reason": None,
                }
                if chunk.stop is not None:
                    choice["finish_reason"] = "length" if chunk.stop is StopReason.LENGTH else "stop"
                yield {"choices": [choice]}


def text_of(id: int) -> str:
    return CONTROL.get(id, f"{id},")


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
