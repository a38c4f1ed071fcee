"""vLLM: its route for token ids alone, and `/v1/completions` where a server has not opened that one.

`/inference/v1/generate` needs `--enable-scale-out`; it takes a `SamplingParams` object and returns ids. Both routes
include the stop token in `token_ids`. Facts: vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from plait.engines.http.base import Call, Json, signed_seed
from plait.engines.http.completions import Completions

NATIVE = "/inference/v1/generate"


class Vllm(Completions):
    """A vLLM server.

    Args:
        native: Whether it has the route for token ids.
    """

    kind = "vllm"
    running_metric = "vllm:num_requests_running"

    def __init__(self, *, native: bool) -> None:
        super().__init__()
        self.native = native

    def route(self, call: Call) -> str:
        return NATIVE if self._uses_native(call) else super().route(call)

    def body(self, call: Call) -> Json:
        if not self._uses_native(call):
            return super().body(call)
        params = call.params
        body: Json = {
            "model": call.model,
            "token_ids": list(call.token_ids),
            "sampling_params": {
                "max_tokens": call.max_tokens,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "seed": signed_seed(call.seed),
                "stop_token_ids": list(call.end_ids),
                "ignore_eos": True,
                "skip_special_tokens": False,
                "logprobs": 1 if params.logprobs else None,
            },
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if call.cache_salt is not None:
            body["cache_salt"] = call.cache_salt
        return body

    def _uses_native(self, call: Call) -> bool:
        # JSON has no integer keys, and this route's `logit_bias` is documented for integers only.
        return self.native and not call.params.banned_ids
