"""Engines on tiny random weights with too few cells, each seed with other sizes, and a workload run on one of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tiny_gemma
import tiny_llama
from plait.testing.scarcity import Findings, run_workload

MODELS: dict[str, Any] = {"llamacpp": tiny_llama, "llamacpp-windows": tiny_gemma, "torch": tiny_llama}
"""What runs on which weights; Gemma's layers have sliding windows, much shorter than the contexts."""
_ROUNDING = {"llamacpp-windows": 5e-3}
"""Nats. llama.cpp reads Gemma's activation function from a table in float16."""


def make(name: str, seed: int, gguf: Path) -> tuple[Any, dict[str, int]]:
    """An engine, and what `run_workload` has to know of its memory."""
    rng = random.Random(f"sizes {seed}")
    if name != "torch":
        from plait.engines.llamacpp import LlamaCppEngine

        engine: Any = LlamaCppEngine(
            gguf,
            cache="F32",
            cells=256,  # llama.cpp has no fewer
            max_seqs=rng.choice([4, 8, 32]),
            keep=rng.choice([0, 128]),
            prefill_rows=rng.choice([1, 8, 64]),
            flush_s=0,
            threads=1,
            speculate=rng.choice([0, 0, 3, 8]),
        )
        return engine, {"cells": 256}
    from plait.engines.torch import TorchEngine

    cells, block_size = rng.choice([128, 192, 256]), rng.choice([1, 2, 4, 8])
    engine = TorchEngine.from_weights(
        tiny_llama.weights(),
        {**tiny_llama.CONFIG, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        device="cpu",
        cells=cells,
        block_size=block_size,
        max_seqs=rng.choice([2, 4, 8]),
        prefill_rows=rng.choice([1, 8, 64]),
        flush_s=0,
    )
    return engine, {"cells": cells, "block_size": block_size}


async def run(name: str, seed: int, gguf: Path) -> Findings:
    """One workload on a fresh engine."""
    engine, memory = make(name, seed, gguf)
    async with engine:
        return await run_workload(
            engine,
            seed,
            vocab_size=MODELS[name].VOCAB,
            reference=MODELS[name].scores,
            tolerance=_ROUNDING.get(name, 5e-4),
            check=lambda: check(engine),
            **memory,
        )


def check(engine: Any) -> None:
    """The engine's books balance, and no cell is held for a call that is over."""
    scheduler = engine._scheduler
    if engine.name == "torch":
        scheduler.pool.check()
        return
    cache, decoder = scheduler._cache, scheduler._decoder
    cache.check()
    assert cache.seqs == set(cache.idle)
    for seq in cache.idle:
        assert decoder.last_position(seq.id) == seq.tip.end - 1
    for id in cache.free:
        assert decoder.last_position(id) == -1
