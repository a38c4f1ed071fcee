"""The torch engine's scheduler over a decoder that hashes what each row sees: one wrong cell is another token.

So thousands of programs of forks, merges, cancellations and evictions are checked exactly, without rounding.
"""

from __future__ import annotations

import random
from typing import Any

import anyio
import numpy as np
import pytest

import tiny_llama
from plait.engines.inprocess.calls import normalise
from plait.errors import ContextLengthError
from plait.types import Context, StopReason
from random_trees import expand

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.anyio]

from plait.engines.torch import TorchEngine  # noqa: E402
from plait.engines.torch.model import Rows  # noqa: E402
from test_torch_engine import CONFIG, assert_idle, call, random_context  # noqa: E402

PROGRAMS = 60


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Hashing:
    """Says, in place of logits, the hash of a row's token, its position, and the hashes of all that it sees."""

    device, dtype = torch.device("cpu"), torch.float32

    def new_cache(self, cells: int) -> list[int]:
        return [0] * cells

    def forward(self, rows: Rows, cache: list[int]) -> Any:
        cells, ids, positions = rows.cells.tolist(), rows.token_ids.tolist(), rows.position_ids.tolist()
        assert len(set(cells)) == len(cells), "a cell is written once a step"
        sees: list[list[int]] = []
        for group in rows.groups:
            for bias_RC, cells_C in zip(group.bias_GRC, group.cells_GC, strict=True):
                sees += [cells_C[bias_C == 0].tolist() for bias_C in bias_RC]
        if rows.places is not None:
            sees = [sees[i] for i in rows.places.tolist()]
        # What a row sees of its own step stands at lower positions.
        for row in sorted(range(len(ids)), key=lambda row: positions[row]):
            own = cells[row]
            assert sees[row].count(own) == 1
            cache[own] = digest(ids[row], positions[row], [cache[cell] for cell in sees[row] if cell != own])
        logits = np.zeros((len(rows.outputs), tiny_llama.VOCAB), np.float32)
        for i, row in enumerate(rows.outputs.tolist()):
            logits[i, cache[cells[row]] % tiny_llama.VOCAB] = 9
        return torch.from_numpy(logits)


def digest(id: int, position: int, seen: list[int]) -> int:
    return hash((id, position, tuple(sorted(seen))))


def answer(context: Context, count: int) -> tuple[int, ...]:
    """What a call over the hashing decoder samples."""
    out: list[int] = []
    ids, positions, sees = expand(context)
    digests: list[int] = []
    for row in range(len(ids)):
        digests.append(digest(ids[row], positions[row], [digests[i] for i in sorted(sees[row] - {row})]))
    seen = [digests[i] for i in sorted(sees[-1])]
    while len(out) < count:
        out.append(seen[-1] % tiny_llama.VOCAB)
        seen.append(digest(out[-1], positions[-1] + len(out), seen))
    return tuple(out)


async def program(seed: int) -> tuple[int, int]:
    """Calls over few contexts in little memory, some cancelled; how many ended, and how many were computed again."""
    rng = random.Random(seed)
    pool = [random_context(rng) for _ in range(5)]
    pool += [normalise((*context, (1, 2))) for context in pool]
    contexts = [rng.choice(pool) for _ in range(12)]
    lengths = [rng.randint(1, 12) for _ in contexts]
    engine = TorchEngine.from_weights(
        tiny_llama.weights(),
        CONFIG,
        device="cpu",
        cells=rng.choice([64, 96, 128]),
        block_size=rng.choice([1, 2, 4, 8]),
        max_seqs=rng.randint(1, 8),
        prefill_rows=rng.choice([1, 3, 20]),
        flush_s=0,
    )
    engine._decoder = Hashing()  # type: ignore[assignment]
    outs: dict[int, Any] = {}

    async def one(i: int) -> None:
        for _ in range(rng.randrange(6)):
            await anyio.lowlevel.checkpoint()
        try:
            with anyio.move_on_after(rng.choice([0, 0.001, 0.004]) if i % 4 == 0 else 60):
                outs[i] = await call(engine, contexts[i], max_tokens=lengths[i])
        except ContextLengthError:
            outs[i] = None

    async with engine:
        with anyio.fail_after(50):
            async with anyio.create_task_group() as tasks:
                for i in range(len(contexts)):
                    tasks.start_soon(one, i)
            while engine.stats().active or engine.stats().queued:  # noqa: ASYNC110 - nothing tells
                await anyio.sleep(0.001)
        assert_idle(engine)
    done = {i: out for i, out in outs.items() if out is not None}
    for i, (ids, _, stop) in done.items():
        assert ids == answer(contexts[i], len(ids)), f"seed {seed}, call {i}: {contexts[i]}"
        assert len(ids) == lengths[i] or stop is StopReason.LENGTH
    return len(done), engine.stats().prefill_tokens


async def test_no_program_gives_a_wrong_token_leaks_a_cell_or_hangs() -> None:
    done = [await program(seed) for seed in range(PROGRAMS)]
    assert sum(count for count, _ in done) > 6 * PROGRAMS
