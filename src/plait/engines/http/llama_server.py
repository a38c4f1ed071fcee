"""llama.cpp's server, `/completion`.

Traps: it has no stop ids, only texts, and control tokens match a text only if they are listed in `preserved_tokens`;
a text also matches where ordinary tokens spell it, so the engine checks the id and goes on where it is another. A text
that its tokenizer cannot spell in smaller tokens is refused; there the engine closes the stream at the id.
`ignore_eos` would forbid end-of-sequence, so it is not sent. A prefix is cached by slot: siblings of a fork that start
at once prefill it again, unless each finds a slot that holds it. Facts: llama.cpp b11549.
"""

from __future__ import annotations

from plait.engines.http.base import Call, Finish, Json, Piece, piece
from plait.errors import EngineProtocolError

_RANDOM_SEED = 2**32 - 1
"""What llama.cpp takes for "no seed"."""
_FINISH: dict[str, Finish] = {"limit": "length", "word": "stop", "eos": "stop"}


class LlamaServer:
    """A llama-server."""

    kind = "llama-server"
    shares_blocks = False
    needs_stop_texts = True
    running_metric = "llamacpp:requests_processing"

    def route(self, call: Call) -> str:
        return "/completion"

    def ends_itself(self, call: Call) -> bool:
        return all(call.stop_texts.get(id) for id in call.end_ids)

    def body(self, call: Call) -> Json:
        params = call.params
        texts = [text for id in call.end_ids if (text := call.stop_texts.get(id))]
        return {
            "prompt": list(call.token_ids),
            "n_predict": call.max_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": 0.0,
            "typical_p": 1.0,
            "repeat_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "samplers": ["temperature", "top_k", "top_p"],
            "seed": call.seed % _RANDOM_SEED,
            "stop": texts,
            "preserved_tokens": texts,
            "logit_bias": [[id, False] for id in params.banned_ids],
            "n_probs": 1 if params.logprobs else 0,
            "return_tokens": True,
            "cache_prompt": True,
            "stream": True,
            # The last event would repeat the prompt as text.
            "response_fields": ["tokens", "stop", "stop_type", "timings"],
        }

    def read(self, event: Json, num_seen: int) -> Piece:
        if "stop" not in event and "stop_type" not in event:
            raise EngineProtocolError(f"the server sent an event that is no completion; it has {sorted(event)[:8]}")
        described = event.get("completion_probabilities") or []
        timings: Json = event.get("timings") or {}
        # Counted once, by the last event; earlier ones may carry the same numbers.
        cached = timings.get("cache_n") if event.get("stop") else None
        return piece(
            event.get("tokens"),
            [entry.get("logprob") for entry in described],
            finish=_FINISH.get(event.get("stop_type") or "", "abort") if event.get("stop") else None,
            prompt_tokens=None if cached is None else cached + timings["prompt_n"],
            cached_tokens=cached,
        )
