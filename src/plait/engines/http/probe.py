"""What answers at an address: which server, which model, how much context, by which route to call it.

Asks pages that cost nothing, then samples one token to see that ids come back. Changes nothing on the server.
"""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import anyio

from plait.engines.http.base import MOST_IDS, Call, Dialect
from plait.engines.http.client import Busy, Client
from plait.engines.http.completions import Completions
from plait.engines.http.llama_server import LlamaServer
from plait.engines.http.reader import Reader
from plait.engines.http.sglang import Sglang
from plait.engines.http.vllm import NATIVE, Vllm
from plait.engines.http.wire import Wait
from plait.errors import EngineError, EngineProtocolError, EngineUnavailable, RequestError, nearest
from plait.types import SamplingParams

KINDS = ("vllm", "sglang", "llama-server", "completions")
_START_S = 120.0
"""How long a server that says it is loading is waited for."""
_TRIAL_IDS = (1, 2, 3)
Pages: TypeAlias = Mapping[str, Any]
_log = logging.getLogger("plait.engines.http")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What is known of one server."""

    url: str
    kind: str
    route: str
    """Path that calls go to."""
    model: str
    version: str | None = None
    max_context: int | None = None
    """Positions of one call; None where it does not say."""
    vocab_size: int | None = None
    id_limit: int | None = None
    """Its ids are below it. Weights may have rows for more ids than their vocabulary; None where it does not say."""
    num_slots: int | None = None
    """Sequences it decodes at once; None where it does not say."""
    prefix_caching: bool | None = None
    """None where it does not say."""
    tells_cached_tokens: bool = False
    """Whether an answer says how much of its prompt was cached."""
    heeds_seeds: bool | None = None
    """None where it does not say."""


async def probe(
    client: Client, url: str, *, kind: str | None = None, model: str | None = None
) -> tuple[Server, Dialect]:
    """Find out what answers at a base URL, and how to speak with it.

    Args:
        kind: One of `KINDS`, where a router or a proxy hides what is behind it.
        model: The model to use, where a server has several.

    Raises:
        RequestError: The address, kind or model is none.
        EngineUnavailable: Nobody answers there.
        EngineProtocolError: What answers cannot be an engine; the message says what it would take.
    """
    if kind is not None and kind not in KINDS:
        raise nearest(kind, list(KINDS), "kind of server")
    pages = await _pages(client, url)
    own = _own_kind(pages)
    if kind is not None and own is not None and kind not in (own, "completions"):
        raise RequestError(
            f"{url} is a {own}, by its own pages, and not of the kind {kind}: say {own}, or leave it out"
        )
    kind = kind or _kind(url, pages)
    server = _described(url, kind, pages, model)
    if kind == "sglang":
        server = replace(server, id_limit=await _id_limit(client, url))
    refusal: EngineProtocolError | None = None
    for dialect in _dialects(kind, pages):
        try:
            told = await _trial(client, url, server, dialect)
        except EngineProtocolError as exc:
            refusal = exc
            continue
        return _with_route(server, dialect, told), dialect
    assert refusal is not None
    raise refusal


async def _pages(client: Client, url: str) -> Pages:
    """The pages by which servers are told apart."""
    pages = {"models": await _models(client, f"{url}/v1/models")}
    for name, path in (
        ("props", "/props"),
        ("version", "/version"),
        ("sglang", "/server_info"),
        ("sglang_old", "/get_server_info"),
    ):
        pages[name] = None
        if not (name == "sglang_old" and isinstance(pages["sglang"], dict)):
            pages[name] = await _page(client, f"{url}{path}")
    if isinstance(pages["version"], dict):
        pages["openapi"] = await _page(client, f"{url}/openapi.json")
    return pages


async def _models(client: Client, url: str) -> Any:
    """The first page, which waits for a server that is still loading, and says so."""
    busy: Busy | None = None
    with anyio.move_on_after(_START_S):
        while True:
            try:
                return await client.get(url)
            except Busy as exc:
                if busy is None:
                    _log.warning("%s (it may be loading; waiting for it, at most %g s)", exc, _START_S)
                busy = exc
            await anyio.sleep(max(0.25, busy.retry_after_s))
    raise EngineUnavailable(f"{busy or f'{url} did not answer'} (after {_START_S:g} s)")


async def _page(client: Client, url: str) -> Any:
    """A page that a server need not have; a refusal counts as none."""
    try:
        return await client.get(url)
    except (EngineError, RequestError):
        return None


def _own_kind(pages: Pages) -> str | None:
    """The kind by pages that only such a server has; a router may well name any owner."""
    if _has(pages["props"], "total_slots"):
        return "llama-server"
    return "sglang" if _has(_sglang(pages), "max_total_num_tokens") else None


def _kind(url: str, pages: Pages) -> str:
    listed = _listed(pages)
    owner = listed[0].get("owned_by") if listed else None
    own = _own_kind(pages)
    if owner == "llamacpp" or own == "llama-server":
        return "llama-server"
    if owner == "sglang" or own == "sglang":
        return "sglang"
    if owner == "vllm" or (_has(pages["version"], "version") and listed):
        return "vllm"
    if listed:
        return "completions"
    raise EngineProtocolError(
        f"{url} is no language model server that is known: it has no /v1/models. If it is one behind a proxy, say "
        f"which: {', '.join(KINDS)}"
    )


def _described(url: str, kind: str, pages: Pages, model: str | None) -> Server:
    listed = _listed(pages)
    names = [id if isinstance(id := entry.get("id"), str) else "" for entry in listed]
    if model is not None and names and model not in names and kind != "llama-server":
        raise nearest(model, names, f"model of {url}")
    entry = listed[names.index(model)] if model in names else (listed[0] if listed else {})
    meta = _dict(entry.get("meta"))
    if meta.get("vocab_type") == 0:
        raise RequestError(
            f"{url} serves a GGUF file without a vocabulary; llama-server aborts on the first request to one. Serve a "
            "copy written by plait.models.serving.write_served"
        )
    props, info = _dict(pages["props"]), _dict(_sglang(pages))
    context = entry.get("max_model_len") or info.get("context_length")
    if kind == "llama-server":
        context = _dict(props.get("default_generation_settings")).get("n_ctx") or meta.get("n_ctx")
    told = [_count(url, "context length", context), _count(url, "longest prompt", info.get("max_req_input_len"))]
    cached_off = info.get("disable_radix_cache")
    return Server(
        url=url,
        kind=kind,
        route="",
        model=model or (names[0] if names else ""),
        version=_dict(pages["version"]).get("version") or info.get("version") or props.get("build_info"),
        max_context=min((n for n in told if n), default=None),
        vocab_size=_count(url, "vocabulary size", meta.get("n_vocab")),
        num_slots=_count(url, "number of slots", props.get("total_slots") or info.get("max_running_requests")),
        prefix_caching=None if cached_off is None else not cached_off,
        heeds_seeds=info.get("enable_deterministic_inference"),
    )


def _count(url: str, what: str, given: Any) -> int | None:
    """A number that a page holds; None where it holds none.

    Raises:
        EngineProtocolError: It is no whole number above zero.
    """
    if not given:
        return None
    if type(given) is not int or given < 0:
        raise EngineProtocolError(f"{url} says that its {what} is {reprlib.repr(given)}; it must be a whole number")
    return given


async def _id_limit(client: Client, url: str) -> int | None:
    """What none of an SGLang's pages says, and what it has to be asked for: an id beyond ends the whole server.

    A call that biases an id which no model has is refused before it is scheduled, and the refusal says which there are.
    """
    sampling = {"max_new_tokens": 1, "logit_bias": {str(MOST_IDS - 1): 0.0}}
    try:
        await client.post(f"{url}/generate", {"input_ids": list(_TRIAL_IDS), "sampling_params": sampling})
    except (EngineError, RequestError) as exc:
        found = re.search(r"keys in \[0, (\d{1,10})\]", str(exc))
        return int(found[1]) + 1 if found else None
    return None


def _dialects(kind: str, pages: Pages) -> list[Dialect]:
    """What to try, best first."""
    match kind:
        case "vllm":
            has_native = NATIVE in _dict(_dict(pages.get("openapi")).get("paths"))
            return [*([Vllm(native=True)] if has_native else []), Vllm(native=False), Completions(plain=True)]
        case "sglang":
            return [Sglang()]
        case "llama-server":
            return [LlamaServer()]
        case _:
            return [Completions(), Completions(plain=True)]


async def _trial(client: Client, url: str, server: Server, dialect: Dialect) -> bool:
    """Sample one token; whether the answer says how much of its prompt was cached.

    Raises:
        EngineProtocolError: No token id came back, or no log-probability.
    """
    call = _trial_call(server.model)
    reader = Reader(call, dialect, server.vocab_size)
    path = f"{url}{dialect.route(call)}"
    wait = Wait(client.timeouts.first_token_s, f"{path} did not answer")
    async with aclosing(client.events(path, dialect.body(call), {}, wait)) as batches:
        async for events in batches:
            for event in events:
                reader.take(event)
    if reader.num_read != 1:
        raise EngineProtocolError(
            f"C3: {path} gave {reader.num_read} token ids where one was asked for. An engine has "
            "to return the ids of its tokens"
        )
    return reader.cached_tokens is not None


def _with_route(server: Server, dialect: Dialect, told: bool) -> Server:
    return replace(server, route=dialect.route(_trial_call("")), tells_cached_tokens=told)


def _trial_call(model: str) -> Call:
    return Call(
        model=model,
        token_ids=_TRIAL_IDS,
        params=SamplingParams(max_tokens=1),
        max_tokens=1,
        seed=0,
        key="plait-probe",
        stop_texts={},
    )


def _listed(pages: Pages) -> list[dict[str, Any]]:
    data = _dict(pages["models"]).get("data")
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []


def _sglang(pages: Pages) -> Any:
    return pages["sglang"] if isinstance(pages["sglang"], dict) else pages["sglang_old"]


def _has(page: Any, key: str) -> bool:
    return isinstance(page, dict) and key in page


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
