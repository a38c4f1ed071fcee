"""The embedded engine: llama.cpp in this process, every live call of every session in one batch per step.

Puts the pieces together. Contexts are values; which of their tokens are cached is the business of `cache`. It knows
nothing of threads, formats or text.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from plait.engines.inprocess.calls import Part
from plait.engines.inprocess.engine import InProcessEngine, Mailbox, check_options, deliver, poster
from plait.engines.inprocess.sampling import Sampler
from plait.engines.inprocess.worker import WORKER
from plait.engines.llamacpp.binding import MAX_SEQS, Decoder, Model, WindowedDecoder
from plait.engines.llamacpp.cache import Cache
from plait.engines.llamacpp.pace import Pace
from plait.engines.llamacpp.scheduler import Call, Scheduler
from plait.errors import EngineUnavailable, RequestError
from plait.settings import one_of, within
from plait.types import SamplingParams, context_positions

_MOST_GUESSED = 64
_FEWEST, _MEMORY = 4096, 2 * 2**30
"""Cells where nobody says how many: no fewer than these, and no more than fit into so many bytes."""
_THREAD_CELLS = 256
"""Room for a thread and its share of the contexts it came from, where nothing else is known."""
_SHORT = 2048
"""Contexts up to this many positions are computed faster with flash attention on the CPUs measured."""


class LlamaCppEngine(InProcessEngine):
    """Continues contexts with the weights of a GGUF file.

    Args:
        path: The GGUF file. It needs no tokenizer.
        max_context: Positions of one call; by default what the model was trained for, as far as `cells` allow.
        cells: Tokens held in memory for all calls together, shared prefixes counted once. A fork walks over all of
            them (a few microseconds a thousand), so no more than needed. By default what the model was trained for, as
            far as 2 GiB hold them, and 4,096 at least.
        max_seqs: Contexts held at once, live and cached; at most 256, and 128 with sliding windows.
        threads: CPU threads of one step, at most 256; all engines of a process take turns in them. By default every
            core for a large model; for a small one a second thread where several rows are computed and it has been
            faster.
        cache: Number format of cached keys and values. F32 is for exact comparisons.
        flash_attention: Skips cells a row does not attend to: on a CPU it pays for short contexts side by side, and
            costs for long ones. By default on for contexts up to 2,048 positions, if the cache is F16.
        keep: Cells of finished calls that are always kept for reuse; every step pays a little for them.
        prefill_rows: Given tokens computed in one step while other calls sample.
        flush_s: How often calls that go on sampling yield a chunk.
        lora: A LoRA adapter of these weights, as a GGUF file (llama.cpp's `convert_lora_to_gguf.py` writes one from a
            folder of peft).
        lora_scale: What the adapter is multiplied with, beside its own alpha.
        speculate: Tokens guessed ahead of each greedy call by prompt lookup, and checked in the same step; 0 guesses
            none. Changes how long a call takes, not its tokens (in float32; elsewhere rows of one step round
            differently beside each other). Pays where text repeats and a further row costs little.

    Raises:
        ModelError: The file is missing, damaged, or of a kind that this engine does not run.
        EngineUnavailable: llama.cpp is not installed in the version this was written for; says how to install it.
    """

    name = "llamacpp"

    def __init__(
        self,
        path: str | Path,
        *,
        max_context: int | None = None,
        cells: int | None = None,
        max_seqs: int = 32,
        threads: int | None = None,
        cache: Literal["F16", "F32"] = "F16",
        flash_attention: bool | None = None,
        keep: int = 128,
        prefill_rows: int = 64,
        flush_s: float = 0.01,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        speculate: int = 0,
    ) -> None:
        check_options(
            max_context=max_context,
            cells=cells,
            threads=threads,
            prefill_rows=prefill_rows,
            flush_s=flush_s,
            lora_scale=lora_scale,
        )
        one_of(cache, ("F16", "F32"), "cache")
        within("max_seqs", max_seqs, 2, MAX_SEQS)
        within("keep", keep, 0)
        within("speculate", speculate, 0, _MOST_GUESSED)
        if flash_attention and cache == "F32":
            raise RequestError("flash_attention needs cache='F16'")
        self._model = Model(path)
        if cells is None:
            held = _MEMORY // (self._model.cell_numbers() * (4 if cache == "F32" else 2))
            cells = max(_FEWEST, min(self._model.trained_context + 1, held))
        super().__init__(cells=-(-max(cells, 256) // 256) * 256)  # llama.cpp rounds up likewise
        self._decoder = WindowedDecoder if self._model.windowed else Decoder
        try:
            within("max_seqs", max_seqs, 2, MAX_SEQS // self._decoder.sequences_each)
            self._lora = None if lora is None else (self._model.load_lora(lora), lora_scale)
        except BaseException:
            self._model.close()
            raise
        self.vocab_size = self._model.vocab_size
        self.max_context = min(max_context or self._model.trained_context, self._cells - 1)
        if flash_attention is None:
            flash_attention = cache == "F16" and self.max_context <= _SHORT
        self.max_active = max(1, min(max_seqs // 2, self._cells // _THREAD_CELLS))
        """Calls that fit at once, with the contexts they came from; more wait for room."""
        self._pace = Pace.of(threads, model_bytes=Path(path).stat().st_size, cores=_cores(), load=_load())
        self._options: dict[str, Any] = {"flash": flash_attention, "wide_cache": cache == "F32"}
        self._max_seqs, self._keep, self._prefill_rows, self._flush_s = max_seqs, keep, prefill_rows, flush_s
        self._speculate = speculate

    def meta(self, key: str) -> str | None:
        """A string of the file's header, such as `plait.config`; None if it has no such key."""
        if self._closed:
            raise EngineUnavailable("the llama.cpp engine is closed")
        return self._model.meta(key)

    async def __aenter__(self) -> LlamaCppEngine:
        self._check_unopened()
        try:
            decoder = self._decoder(
                self._model,
                cells=self._cells,
                max_seqs=self._max_seqs,
                max_rows=min(512 + self._max_seqs, self._cells),
                **self._options,
            )
            if self._lora is not None:
                decoder.set_lora(*self._lora)
        except BaseException:
            await self.aclose()
            raise
        post = poster()

        def close() -> None:
            # Freed by the thread that computes, so that no way out of the event loop can free it under a decode.
            try:
                decoder.close()
                self._model.close()
            finally:
                post(self._stopped.set)

        self._scheduler = Scheduler(
            decoder,
            Cache(decoder, max_seqs=self._max_seqs, keep=self._keep),
            Sampler(self._max_seqs, self.vocab_size),
            self._pace,
            wake=WORKER.wake,
            post=lambda deliveries: post(deliver, deliveries),
            close=close,
            prefill_rows=self._prefill_rows,
            flush_s=self._flush_s,
            speculate=self._speculate,
        )
        WORKER.add(self._scheduler)
        return self

    def _free(self) -> None:
        self._model.close()

    def _call(self, number: int, parts: tuple[Part, ...], params: SamplingParams, mailbox: Mailbox) -> Call:
        room = self.max_context - context_positions(parts)
        call = Call(number, parts, params, min(params.max_tokens, room), mailbox)
        if call.need > self._max_seqs:
            raise RequestError(f"the context's merges nest {call.need - 1} deep; max_seqs={self._max_seqs} is too few")
        return call


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> float:
    """How many threads have wanted to run in the last minute, on the whole machine."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
