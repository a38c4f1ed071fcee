"""Random workloads in too little memory, a few of `benchmarks/check_scarcity.py`'s; and that faults are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import scarce_engines
import tiny_llama
from plait.engines.llamacpp import LlamaCppEngine
from plait.engines.llamacpp.binding import Decoder
from plait.engines.llamacpp.scheduler import Scheduler
from plait.errors import EngineProtocolError
from plait.testing.scarcity import Findings, run_workload
from test_llamacpp import PROMPT, assert_balanced, call

pytest.importorskip("gguf", reason="writes its own weights: needs the train extra")


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("weights") / "tiny.gguf")


@pytest.mark.parametrize("name", ["llamacpp", "llamacpp-windows", pytest.param("torch", marks=pytest.mark.torch)])
def test_no_program_gives_a_wrong_token_leaks_a_cell_or_hangs(name: str, tmp_path: Path) -> None:
    if name == "torch":
        pytest.importorskip("torch")
    gguf, found, seed = scarce_engines.MODELS[name].write(tmp_path / "tiny.gguf"), Findings(), 0
    # What is cut off, and what gives way, is a matter of time: on until all has been seen, which two mostly show.
    while seed < 2 or min(found.merges, found.cut, found.forgets, found.evictions) == 0:
        seed += 1
        assert seed < 30, f"something never happened: {found}"
        found += anyio.run(scarce_engines.run, name, seed, gguf, backend=("asyncio", "trio")[seed % 2])
    assert found.ended > found.calls / 2
    assert found.unpressed < seed, "something had to give way"


def test_an_engine_that_forgets_keeps_what_runs(gguf: Path) -> None:
    async def main() -> None:
        async with LlamaCppEngine(gguf, cache="F32", cells=512, flush_s=0) as engine:
            expected = (await call(engine, (PROMPT,), max_tokens=200))[0]
            assert engine.stats().cached_tokens
            await engine.forget()
            assert engine.stats().cached_tokens == 0
            out: list[Any] = []
            async with anyio.create_task_group() as tasks:

                async def ask() -> None:
                    out.append(await call(engine, (PROMPT,), max_tokens=200))

                tasks.start_soon(ask)
                while not out:
                    await engine.forget()
                    await anyio.lowlevel.checkpoint()
            assert out[0][0] == expected
            assert_balanced(engine)

    anyio.run(main)


def wrong_cell(patch: pytest.MonkeyPatch) -> None:
    decode = Decoder.decode

    def mistaken(self: Decoder, rows: int) -> int:
        # Keys and values of another token: nothing that llama.cpp itself could find.
        unread = [row for row in range(rows) if not self.outputs[row]]
        self.tokens[unread] = (self.tokens[unread] + 1) % tiny_llama.VOCAB
        return decode(self, rows)

    patch.setattr(Decoder, "decode", mistaken)


def leaked_cell(patch: pytest.MonkeyPatch) -> None:
    def remove(self: Decoder, seq: int) -> None:
        self._lib.llama_memory_seq_cp(self._memory, seq, 255, 0, 8)  # a sequence that nobody else uses
        self._lib.llama_memory_seq_rm(self._memory, seq, -1, -1)

    patch.setattr(Decoder, "remove", remove)


def stuck_queue(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_push_out", lambda self: False)
    patch.setattr(Scheduler, "_admit", lambda self: None)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (wrong_cell, "the reference gives"),
        (leaked_cell, "failed: llama_decode"),
        (stuck_queue, "sampled nothing for 1 s"),
    ],
)
def test_a_planted_fault_is_found(plant: Any, message: str, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    async def main() -> None:
        engine = LlamaCppEngine(gguf, cache="F32", cells=256, max_seqs=256, flush_s=0)
        async with engine:
            await run_workload(
                engine,
                0,
                vocab_size=tiny_llama.VOCAB,
                reference=tiny_llama.scores,  # pyright: ignore[reportArgumentType]
                cells=256,
                limit_s=1 if plant is stuck_queue else 30,
            )

    with pytest.raises(EngineProtocolError, match=message):
        anyio.run(main)
