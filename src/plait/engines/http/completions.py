"""Any server with `/v1/completions` that takes and returns token ids: vLLM's older route, and its relatives.

Ids come back as `token_ids` (vLLM), inside `logprobs.content` (llama.cpp), or spelled `token_id:17` in
`logprobs.tokens`. A server that returns text only cannot be an engine: ids would have to be guessed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.engines.http.base import Call, Json, Piece, finish_of, piece, signed_seed
from plait.errors import EngineProtocolError

_SPELLED = "token_id:"


class Completions:
    """The completions route.

    Args:
        plain: Send nothing that OpenAI's own route does not know, for servers that refuse unknown fields.
    """

    kind = "completions"
    shares_blocks = True
    needs_stop_texts = False
    running_metric = ""

    def __init__(self, *, plain: bool = False) -> None:
        self._plain = plain

    def route(self, call: Call) -> str:
        return "/v1/completions"

    def ends_itself(self, call: Call) -> bool:
        return not (self._plain and call.end_ids)

    def body(self, call: Call) -> Json:
        body: Json = {
            "model": call.model,
            "prompt": list(call.token_ids),
            "max_tokens": call.max_tokens,
            "temperature": call.params.temperature,
            "top_p": call.params.top_p,
            "seed": signed_seed(call.seed),
            "stream": True,
            "stream_options": {"include_usage": True},
            # Also asked for where nobody reads them: some servers return ids only inside.
            "logprobs": 1,
        }
        if call.params.banned_ids:
            body["logit_bias"] = {str(id): -100 for id in call.params.banned_ids}
        return body if self._plain else body | self._extensions(call)

    def _extensions(self, call: Call) -> Json:
        """vLLM's fields. All that a model's generation_config.json could set is said, so that it sets nothing."""
        more: Json = {
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop_token_ids": list(call.end_ids),
            # Only the ids that were asked for end a call.
            "ignore_eos": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "top_k": call.params.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "session_id": call.key,
        }
        if call.cache_salt is not None:
            more["cache_salt"] = call.cache_salt
        return more

    def read(self, event: Json, num_seen: int) -> Piece:
        return read_choice(event)


def read_choice(event: Json) -> Piece:
    """What an event of OpenAI's shape adds; the last one has no choice, only the usage."""
    usage = event.get("usage") or {}
    counts: dict[str, Any] = {
        "prompt_tokens": usage.get("prompt_tokens"),
        "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
    }
    choices = event.get("choices")
    if not isinstance(choices, list):
        raise EngineProtocolError(f"the server sent an event without choices; it has {sorted(event)[:8]}")
    if not choices:
        return piece((), (), **counts)
    choice = choices[0]
    if not isinstance(choice, Mapping):
        raise EngineProtocolError(f"the server sent a choice that is no object: {choice!r:.80}")
    ids, logprobs = _tokens(choice)
    return piece(ids, logprobs, finish=finish_of(choice.get("finish_reason")), **counts)


def _tokens(choice: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities, wherever this server puts them."""
    logprobs = choice.get("logprobs") or {}
    content = logprobs.get("content") or []
    ids: list[int] | None = choice.get("token_ids")
    if content:
        found = [entry.get("token_id", entry.get("id")) for entry in content]
        if None in found:
            found = _spelled([entry.get("token") for entry in content])
        return (found if ids is None else ids), [entry.get("logprob") for entry in content]
    values = logprobs.get("token_logprobs") or []
    if ids is None:
        ids = _spelled(logprobs.get("tokens") or [])
    if not ids and choice.get("text"):
        raise EngineProtocolError(
            "C4: the server returns text without token ids. It has to know return_token_ids (vLLM 0.10 and later) or "
            "return_tokens_as_token_ids"
        )
    return ids, values


def _spelled(tokens: list[Any]) -> list[int]:
    """Ids of tokens that are written as `token_id:17`; none where they are written as text."""
    if not all(isinstance(token, str) and token.startswith(_SPELLED) for token in tokens):
        return []
    return [int(token.removeprefix(_SPELLED)) for token in tokens]
