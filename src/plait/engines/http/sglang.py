"""SGLang's own route, `/generate`: ids in, triples of log-probability, id and text out.

Traps: `ignore_eos` also turns off `stop_token_ids`, so the model's own end-of-sequence always ends a call; a stream
repeats all earlier tokens in each event unless the server was started to send only new ones; `sampling_seed` counts
only with `--enable-deterministic-inference`; log-probabilities are those after temperature unless the server's
environment has `SGLANG_RETURN_ORIGINAL_LOGPROB`; an id that the model does not have ends the whole server; a prompt
that leaves fewer than seven positions is refused with a token that nobody sampled. Facts: SGLang 0.5.23, run.
"""

from __future__ import annotations

from typing import Any

from plait.engines.http.base import Call, Finish, Json, Piece, piece, signed_seed
from plait.engines.http.client import fault
from plait.errors import EngineProtocolError


class Sglang:
    """An SGLang server."""

    kind = "sglang"
    shares_blocks = True
    needs_stop_texts = False
    running_metric = "sglang:num_running_reqs"

    def route(self, call: Call) -> str:
        return "/generate"

    def ends_itself(self, call: Call) -> bool:
        return True

    def body(self, call: Call) -> Json:
        params = call.params
        sampling: Json = {
            "max_new_tokens": call.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": 0.0,
            "stop_token_ids": list(call.end_ids),
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "sampling_seed": signed_seed(call.seed),
        }
        if params.banned_ids:
            sampling["logit_bias"] = {str(id): -100 for id in params.banned_ids}
        body: Json = {
            "input_ids": list(call.token_ids),
            "sampling_params": sampling,
            "stream": True,
            # The triples are the only place where a trimmed stop token is sure to be.
            "return_logprob": True,
            "logprob_start_len": -1,
            "routing_key": call.key,
        }
        if call.cache_salt is not None:
            # Its OpenAI routes put their `cache_salt` in here; most versions of this one know no other name.
            body["extra_key"] = call.cache_salt
        return body

    def read(self, event: Json, num_seen: int) -> Piece:
        meta = event.get("meta_info")
        if not isinstance(meta, dict):
            raise EngineProtocolError(f"the server sent an event without meta_info; it has {sorted(event)[:8]}")
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "abort" and isinstance(reason.get("status_code"), int):
            raise fault("the server gave the call up", reason["status_code"], str(reason.get("message"))[:300])
        triples = meta.get("output_token_logprobs") or []
        # All tokens so far, or only the new ones: the count tells, whichever way the server was started.
        num_new = int(meta.get("completion_tokens") or 0) - num_seen
        new = triples[-num_new:] if num_new > 0 else []
        if len(new) < num_new:
            raise EngineProtocolError(f"C6: the server counts {num_new} new tokens and describes {len(new)}")
        return piece(
            [triple[1] for triple in new],
            [triple[0] for triple in new],
            finish=_finish(reason),
            prompt_tokens=meta.get("prompt_tokens"),
            cached_tokens=meta.get("cached_tokens"),
        )


def _finish(reason: Any) -> Finish | None:
    if not reason:
        return None
    kind = reason.get("type") if isinstance(reason, dict) else reason
    return kind if kind in ("stop", "length") else "abort"
