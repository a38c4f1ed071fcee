"""llama.cpp without Plait: a block as a loop of its C calls, what a hand-written program would do and no more.

Greedy, one batch a step, a fork and a join by `llama_memory_seq_cp`. It runs in the thread in which all engines of a
process compute, for teams of OpenMP threads slow each other down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import anyio
from blocks import SEPARATOR, headers

from plait.engines.inprocess.worker import WORKER
from plait.engines.llamacpp.binding import Decoder, Model

_ROWS = 512


class RawLlama:
    """A model and a context of llama.cpp.

    Args:
        threads: CPU threads of every step.
    """

    def __init__(self, path: Path, *, cells: int, threads: int, flash: bool = True) -> None:
        self._model = Model(path)
        self._decoder = Decoder(self._model, cells=cells, max_seqs=64, max_rows=_ROWS, flash=flash, wide_cache=False)
        self._compute_s = 0.0
        for rows in (1, 2):
            self._decoder.set_threads(rows, threads)

    def close(self) -> None:
        self._decoder.close()
        self._model.close()

    async def block(
        self, join: str, threads: int, tokens: int, prefix: tuple[int, ...], *, line: bool = True
    ) -> dict[str, float]:
        """What `blocks.block` measures of an engine."""
        assert join == "merge"
        measured: dict[str, float] = {}
        done = anyio.Event()
        token = anyio.lowlevel.current_token()

        def work() -> None:
            try:
                measured.update(self._block(threads, tokens, prefix, line=line))
            finally:
                anyio.from_thread.run_sync(done.set, token=token)

        WORKER.add(_Once(work))
        await done.wait()
        return measured

    def _block(self, threads: int, tokens: int, prefix: tuple[int, ...], *, line: bool) -> dict[str, float]:
        decoder = self._decoder
        decoder.clear()
        self._fill(0, prefix, 0)
        self._fork(1, headers(1, 0), len(prefix))
        start = perf_counter()
        self._fork(1, headers(1, 0), len(prefix))
        one, computed = perf_counter(), [self._compute_s]
        self._fork(threads, headers(threads, 1), len(prefix))
        forked = perf_counter()
        computed.append(self._compute_s)
        ids = self._fork(threads, headers(threads, 2), len(prefix))
        at = len(prefix) + len(headers(1, 0)[0])
        seqs = range(1, threads + 1)
        for step in range(tokens - 1):
            ids = self._step(ids, at + step, seqs)
        sampled = perf_counter()
        computed.append(self._compute_s)
        # The last token of a thread is part of what the parent reads.
        self._step(ids, at + tokens - 1, seqs)
        for seq in seqs:
            decoder.copy(seq, 0, len(prefix), at + tokens)
            decoder.remove(seq)
        self._fill(0, SEPARATOR, at + tokens)
        joined = perf_counter()
        computed.append(self._compute_s)
        measured = {
            "fork_ms": ((forked - one) - (one - start)) * 1e3,
            "tokens_per_s": threads * tokens / (sampled - forked),
            "tokens_per_s_of_one": tokens / (sampled - forked),
            "join_ms": (joined - sampled) * 1e3,
            "prefilled_again": 0,
            "block_ms": (joined - forked) * 1e3,
            "fork_own_ms": (forked - one - computed[1] + computed[0]) * 1e3,
            "join_own_ms": (joined - sampled - computed[3] + computed[2]) * 1e3,
        }
        # There is no event loop here: all of it is the engine's thread.
        measured |= {f"{name}_engine_ms": measured[f"{name}_own_ms"] for name in ("fork", "join")}
        if line:
            decoder.clear()
            self._fill(0, prefix, 0)
            alone = perf_counter()
            ids = self._fork(1, headers(1, 3), len(prefix))
            for step in range(threads * tokens):
                ids = self._step(ids, at + step, (1,))
            measured["line_ms"] = (perf_counter() - alone) * 1e3
            measured["speedup_wall"] = measured["line_ms"] / measured["block_ms"]
        return measured

    def _fork(self, threads: int, opened: Sequence[Sequence[int]], at: int) -> list[int]:
        """Share the prefix with so many sequences and compute how each opens; their first tokens."""
        decoder, row, last = self._decoder, 0, []
        for seq in range(1, threads + 1):
            decoder.remove(seq)
            decoder.copy(0, seq, 0, at)
            for i, id in enumerate(opened[seq - 1]):
                decoder.tokens[row], decoder.positions[row], decoder.seq_ids[row, 0] = id, at + i, seq
                decoder.outputs[row] = i == len(opened[seq - 1]) - 1
                row += 1
        last = self._decode(row, threads)
        return last

    def _step(self, ids: Sequence[int], at: int, seqs: Sequence[int]) -> list[int]:
        """One token of every sequence; the next ones."""
        decoder, rows = self._decoder, len(ids)
        decoder.tokens[:rows], decoder.positions[:rows], decoder.seq_ids[:rows, 0] = ids, at, seqs
        decoder.outputs[:rows] = 1
        return self._decode(rows, rows)

    def _fill(self, seq: int, ids: Sequence[int], at: int) -> list[int]:
        decoder, rows = self._decoder, len(ids)
        decoder.tokens[:rows], decoder.positions[:rows] = ids, range(at, at + rows)
        decoder.seq_ids[:rows, 0], decoder.outputs[:rows] = seq, 0
        decoder.outputs[rows - 1] = 1
        return self._decode(rows, 1)

    def _decode(self, rows: int, outputs: int) -> list[int]:
        self._decoder.num_seqs[:rows] = 1
        start = perf_counter()
        code = self._decoder.decode(rows)
        logits = self._decoder.logits(outputs)
        self._compute_s += perf_counter() - start
        assert code == 0, f"llama_decode gave {code}: {self._decoder.last_error()}"
        return logits.argmax(1).tolist()


class _Once:
    """A job of the engines' thread that is over after one turn."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def ready(self) -> bool:
        return True

    def turn(self) -> bool:
        self._work()
        return False
