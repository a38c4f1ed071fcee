"""The torch engine on tiny random weights: its contract, merges against a dense mask, scarce memory, new weights."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import tiny_llama

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.anyio]

from plait.engines.torch import TorchEngine  # noqa: E402
from plait.engines.torch.batch import Piece, assemble, assemble_padded  # noqa: E402
from plait.engines.torch.checkpoint import Checkpoint, read_checkpoint  # noqa: E402
from plait.errors import ContextLengthError, EngineError, EngineUnavailable, ModelError, RequestError  # noqa: E402
from plait.testing.conformance import check_engine  # noqa: E402
from plait.testing.pytest import EngineClause  # noqa: E402
from plait.types import Context, Merge, SamplingParams, StopReason  # noqa: E402

torch.set_num_threads(1)
TOLERANCE = 5e-4
"""float32 against float64, on weights that are larger than real ones."""
PROMPT = (7, 3, 11, 40, 2, 19, 23, 5)
CONFIG = {**tiny_llama.CONFIG, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def make(seed: int = 0, **options: Any) -> TorchEngine:
    return TorchEngine.from_weights(tiny_llama.weights(seed), CONFIG, **{"cells": 1024, "device": "cpu", **options})


def reference(context: Context) -> list[float]:
    return tiny_llama.forward(context).tolist()


async def call(engine: Any, context: Context, **params: Any) -> tuple[tuple[int, ...], tuple[float, ...], Any]:
    ids: list[int] = []
    logprobs: list[float] = []
    stop = None
    async with aclosing(engine.generate(context, SamplingParams(**{"max_tokens": 8, **params}))) as chunks:
        async for chunk in chunks:
            ids += chunk.token_ids
            logprobs += chunk.logprobs
            stop = chunk.stop
    return tuple(ids), tuple(logprobs), stop


async def side_by_side(engine: Any, contexts: Sequence[Context], **params: Any) -> list[tuple[int, ...]]:
    outs: list[tuple[int, ...]] = [()] * len(contexts)

    async def one(i: int) -> None:
        outs[i] = (await call(engine, contexts[i], **params))[0]

    async with anyio.create_task_group() as tasks:
        for i in range(len(contexts)):
            tasks.start_soon(one, i)
    return outs


def assert_greedy(context: Context, ids: Sequence[int], logprobs: Sequence[float] = ()) -> None:
    """What was sampled is what a dense forward would sample, up to rounding."""
    for k, id in enumerate(ids):
        tail = context[-1]
        assert isinstance(tail, tuple)
        expected = tiny_llama.forward((*context[:-1], (*tail, *ids[:k])))
        assert expected.max() - expected[id] < TOLERANCE, f"token {k}"
        assert not logprobs or abs(expected[id] - logprobs[k]) < TOLERANCE, f"token {k}"


def random_context(rng: random.Random, depth: int = 2) -> Context:
    """Runs and merges, nested, ending in a run; ids are few, so that branches open alike and share cells."""
    parts: list[Any] = [tuple(rng.randrange(3) for _ in range(rng.randint(1, 6)))]
    for _ in range(rng.randint(0, 2) if depth else 0):
        parts.append(Merge(tuple(random_context(rng, depth - 1) for _ in range(rng.randint(1, 3)))))
        parts.append(tuple(rng.randrange(tiny_llama.VOCAB) for _ in range(rng.randint(1, 3))))
    return tuple(parts)


def assert_idle(engine: TorchEngine) -> None:
    scheduler: Any = engine._scheduler
    assert (scheduler.active, scheduler.queued) == (0, 0)
    scheduler.pool.check()


async def test_the_engine_keeps_its_contract(engine_clause: EngineClause) -> None:
    await engine_clause.check(
        make,
        vocab_size=tiny_llama.VOCAB,
        reference=reference,
        tolerance=TOLERANCE,
        variants=[
            lambda: make(flush_s=0, prefill_rows=1),
            lambda: make(max_seqs=1, block_size=1),
            lambda: make(block_size=64),
        ],
    )


async def test_half_precision_keeps_the_contract_too() -> None:
    await check_engine(
        lambda: make(dtype="bfloat16"), vocab_size=tiny_llama.VOCAB, tolerance=0.3, reference=reference, max_tokens=4
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
async def test_a_gpu_keeps_the_contract_too() -> None:
    await check_engine(lambda: make(device="cuda"), vocab_size=tiny_llama.VOCAB, reference=reference, tolerance=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.timeout(600)
async def test_cuda_graphs_keep_the_contract_too(dtype: Any) -> None:
    tolerance = {"float32": 5e-3, "bfloat16": 0.3}[dtype]
    await check_engine(
        lambda: make(device="cuda", compile=True, dtype=dtype),
        vocab_size=tiny_llama.VOCAB,
        reference=reference,
        tolerance=tolerance,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.timeout(600)
async def test_new_weights_reach_the_graphs_that_were_recorded() -> None:
    async with make(1, device="cuda") as fresh:
        after = (await call(fresh, (PROMPT,)))[0]
    async with make(0, device="cuda", compile=True) as engine:
        for _ in range(3):
            await call(engine, (PROMPT,))
        await engine.load_weights(tiny_llama.weights(1), version=1)
        assert (await call(engine, (PROMPT,)))[0] == after


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_padded_step_samples_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled, without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    contexts = [(PROMPT,), (PROMPT, Merge((((1, 2),), ((3,),))), (4,)), (PROMPT[:3],)]
    async with make() as engine:
        expected = await side_by_side(engine, contexts, max_tokens=20)
    async with make(compile=True, block_size=2) as engine:
        assert await side_by_side(engine, contexts, max_tokens=20) == expected
        diverged = {name: weight * np.float32("nan") for name, weight in tiny_llama.weights(1).items()}
        await engine.load_weights(diverged, version=1)
        for context in contexts:
            with pytest.raises(EngineError, match="gave NaN"):
                await call(engine, context, max_tokens=4, logprobs=False)
        await engine.load_weights(tiny_llama.weights(1), version=2)  # nothing is left where padding reads
        ids, _, _ = await call(engine, (PROMPT,), max_tokens=20)
    async with make(1) as engine:
        assert ids == (await call(engine, (PROMPT,), max_tokens=20))[0]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_padded_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be compiled as a whole; what a compiler makes of the graph is the compiler's."""
    rows = assemble_padded(
        [Piece(token_ids=[5], start=9, sees=np.arange(300))] * 3,
        [2, 0, 1],
        spare=512,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    assert rows.groups[0].cells_GC.shape == (4, 512)
    assert rows.cells.tolist() == [299, 299, 299, 512]
    assert rows.outputs.tolist() == [2, 0, 1, 3]
    with torch.inference_mode():
        decoder = make()._decoder
        assert decoder is not None
        plain = decoder.forward(rows, decoder.new_cache(512))
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
        decoder.compile()
        assert torch.equal(decoder.forward(rows, decoder.new_cache(512)), plain)


@pytest.mark.parametrize("few", [0, 1024])
async def test_random_trees_match_a_dense_mask(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.engines.torch.batch._FEW_CELLS", few)
    rng = random.Random(1)
    contexts = [random_context(rng) for _ in range(12)]
    async with make() as engine:
        for context, ids in zip(contexts, await side_by_side(engine, contexts, max_tokens=4), strict=True):
            assert_greedy(context, ids)
        before = engine.stats()
        for context in contexts:  # now from the cache
            ids, logprobs, _ = await call(engine, context, max_tokens=4)
            assert_greedy(context, ids, logprobs)
        assert engine.stats().prefill_tokens - before.prefill_tokens == len(contexts), "all but the last token is found"
        assert_idle(engine)


async def test_a_merge_on_a_finished_call_starts_each_branch_where_that_ended() -> None:
    async with make() as engine:
        await call(engine, (PROMPT,), max_tokens=1)  # its last block has room, and nobody refers to it
        context: Context = (PROMPT, Merge((((1,),), ((2, 3),), ((1, 4),))), (5,))
        ids, logprobs, _ = await call(engine, context)
        assert_greedy(context, ids, logprobs)


async def test_a_fork_and_a_join_compute_only_what_is_new() -> None:
    async with make() as engine:
        prompt = tuple(i % 40 for i in range(200))
        plan, _, _ = await call(engine, (prompt,), max_tokens=5)
        before, trunk = engine.stats(), (*prompt, *plan)
        headers = [(41, 41 + i) for i in range(4)]
        outs = await side_by_side(engine, [((*trunk, *header),) for header in headers], max_tokens=6)
        forked = engine.stats()
        # The last sampled token of a call is not computed when it ends: the first thread computes it for all.
        assert forked.prefill_tokens - before.prefill_tokens <= 1 + 4 * 2 + 3
        assert forked.cached_tokens - before.cached_tokens <= 1 + 4 * (2 + 5) + 3, "the trunk is there once"
        threads = [(*header, *out) for header, out in zip(headers, outs, strict=True)]
        context: Context = (trunk, Merge(tuple((thread,) for thread in threads)), (46,))
        ids, logprobs, _ = await call(engine, context, max_tokens=6)
        joined = engine.stats()
        assert joined.prefill_tokens - forked.prefill_tokens == 4 + 1, "each thread's last token and the forced one"
        assert_greedy(context, ids, logprobs)
        assert_idle(engine)


async def test_threads_read_their_prefix_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[list[tuple[int, int]]] = []

    def noting(*args: Any, **options: Any) -> Any:
        rows = assemble(*args, **options)
        shapes.append([(g.rows_GR.numel(), g.cells_GC.numel()) for g in rows.groups])
        return rows

    monkeypatch.setattr("plait.engines.torch.scheduler.assemble", noting)
    async with make(cells=2048) as engine:
        prompts = [tuple((i * k) % 40 for i in range(200)) for k in (1, 3)]
        for prompt in prompts:
            await call(engine, (prompt,), max_tokens=1)
        shapes.clear()
        contexts: list[Context] = [((*prompt, 41, 41 + i),) for prompt in prompts for i in range(4)]
        outs = await side_by_side(engine, contexts, max_tokens=5)
        for context, ids in zip(contexts, outs, strict=True):
            assert_greedy(context, ids)
    # Two prefixes of 200 cells, and behind each at most 6 cells of four threads.
    assert any(len(groups) == 2 and all(rows >= 4 and cells <= 224 for rows, cells in groups) for groups in shapes)


async def test_forgetting_at_any_point_changes_no_token() -> None:
    rng = random.Random(2)
    contexts = [random_context(rng) for _ in range(6)]
    async with make() as engine:
        expected = await side_by_side(engine, contexts, max_tokens=24)
    async with make(flush_s=0) as engine:
        outs: list[Any] = []
        async with anyio.create_task_group() as tasks:

            async def forget() -> None:
                while True:
                    await engine.load_weights(tiny_llama.weights(), version=engine.version + 1)
                    await anyio.sleep(0.002)

            tasks.start_soon(forget)
            while engine.version < 3:  # until it was forgotten while calls ran
                outs.append(await side_by_side(engine, contexts, max_tokens=24))
            tasks.cancel_scope.cancel()
        assert outs == [expected] * len(outs)


@pytest.mark.parametrize("seed", range(3))
async def test_random_programs_in_too_little_memory_give_no_wrong_token(seed: int) -> None:
    rng = random.Random(seed)
    contexts = [random_context(rng) for _ in range(16)]
    lengths = [rng.randint(1, 12) for _ in contexts]
    engine = make(cells=112, block_size=4, max_seqs=6, prefill_rows=3, flush_s=0)
    outs: dict[int, Any] = {}

    async def one(i: int) -> None:
        for _ in range(rng.randrange(4)):
            await anyio.lowlevel.checkpoint()
        try:
            with anyio.move_on_after(0.002 if i % 5 == 0 else 60):
                outs[i] = await call(engine, contexts[i], max_tokens=lengths[i])
        except ContextLengthError:
            outs[i] = None

    async with engine:
        with anyio.fail_after(50):
            async with anyio.create_task_group() as tasks:
                for i in range(len(contexts)):
                    tasks.start_soon(one, i)
        while engine.stats().active:  # noqa: ASYNC110 - nothing tells
            await anyio.sleep(0.001)
        assert_idle(engine)
    done = {i: out for i, out in outs.items() if out is not None}
    assert len(done) > 6
    for i, (ids, logprobs, stop) in done.items():
        assert_greedy(contexts[i], ids, logprobs)
        assert len(ids) == lengths[i] or stop is StopReason.LENGTH


async def test_calls_wait_for_memory_and_all_end_as_if_alone() -> None:
    prompts: list[Context] = [(tuple((i * 7 + k) % 48 for k in range(10)),) for i in range(6)]
    async with make() as engine:
        expected = await side_by_side(engine, prompts, max_tokens=30)
    async with make(cells=64, block_size=4) as engine:
        assert await side_by_side(engine, prompts, max_tokens=30) == expected
        assert engine.stats().prefill_tokens > 60, "some were pushed out and computed again"
        assert_idle(engine)


async def test_where_a_context_ends_depends_on_sizes_alone() -> None:
    async with make(cells=32, block_size=4) as engine:
        alone = await call(engine, (PROMPT,), max_tokens=100)
        assert (len(alone[0]), alone[2]) == (24, StopReason.LENGTH)
        joined = await call(engine, (PROMPT, Merge((((1,),), ((2,),))), (3,)), max_tokens=100)
        # Four blocks are left for what follows the threads; the token sampled last needs no cell.
        assert (len(joined[0]), joined[2]) == (16, StopReason.LENGTH)
        both = await side_by_side(engine, [(PROMPT,), (PROMPT[::-1],)], max_tokens=100)
        assert both[0] == alone[0]
        with pytest.raises(ContextLengthError, match="blocks of 4 cells"):
            await call(engine, (PROMPT, Merge(tuple(((i,),) for i in range(6))), (1,)))
        with pytest.raises(ContextLengthError, match="positions"):
            await call(engine, (PROMPT * 4,))


async def test_a_cancelled_call_gives_its_blocks_back() -> None:
    async with make(cells=128, block_size=4, flush_s=0) as engine:
        for _ in range(5):
            async with aclosing(engine.generate((PROMPT,), SamplingParams(max_tokens=110))) as chunks:
                await anext(chunks)
        with anyio.fail_after(40):
            while engine.stats().active:  # noqa: ASYNC110 - nothing tells
                await anyio.sleep(0.001)
        assert_idle(engine)
        ids, _, _ = await call(engine, (PROMPT[::-1],), max_tokens=110)
        assert len(ids) == 110


async def test_sampling_means_the_same_as_in_llamacpp(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from plait.engines.llamacpp import LlamaCppEngine

    path = tiny_llama.write(tmp_path / "tiny.gguf")
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.7, "top_p": 0.8, "seed": 6},
        {"temperature": 1.5, "top_k": 5, "seed": 7, "banned_ids": (3, 4)},
    ]
    context: Context = (PROMPT, Merge((((1, 2),), ((3,),))), (4,))
    async with TorchEngine(path, device="cpu", cells=512) as ours, LlamaCppEngine(path, cache="F32") as theirs:
        for params in settings:
            a, b = (
                await call(ours, context, max_tokens=16, **params),
                await call(theirs, context, max_tokens=16, **params),
            )
            assert a[0] == b[0]
            assert a[1] == pytest.approx(b[1], abs=2 * TOLERANCE)


async def test_new_weights_take_the_place_of_the_old() -> None:
    old, new = tiny_llama.weights(0), tiny_llama.weights(1)
    async with make(0) as fresh:
        before = (await call(fresh, (PROMPT,)))[0]
    async with make(1) as fresh:
        after = (await call(fresh, (PROMPT,)))[0]
    assert before != after
    async with make(0) as engine:
        assert (await call(engine, (PROMPT,)))[0] == before
        given = {name: weight.copy() for name, weight in new.items()}
        await engine.load_weights(given, version=3)
        for weight in given.values():
            weight[:] = 0  # it was copied
        assert engine.version == 3
        assert (await call(engine, (PROMPT,)))[0] == after, "nothing of the old weights' cache is used"
        tensors = {name: torch.from_numpy(weight) for name, weight in old.items()}
        await engine.load_weights({**tensors, "lm_head.weight": torch.zeros(48, 64)}, version=4)
        assert (await call(engine, (PROMPT,)))[0] == before


@pytest.mark.parametrize("dtype", [np.longdouble, np.int64, object])
async def test_weights_that_are_no_floats_are_refused_and_the_old_ones_stay(dtype: Any) -> None:
    async with make() as engine:
        before, _, _ = await call(engine, (PROMPT,))
        with pytest.raises(RequestError, match=r"is no array that torch takes|weights are floats"):
            await engine.load_weights(
                {name: weight.astype(dtype) for name, weight in tiny_llama.weights(1).items()}, version=1
            )
        assert (await call(engine, (PROMPT,)))[0] == before
        await engine.load_weights(tiny_llama.weights(1), version=2)
        assert (await call(engine, (PROMPT,)))[0] != before


async def test_a_closed_engine_holds_no_weights() -> None:
    engine = make()
    async with engine:
        await call(engine, (PROMPT,))
        weights = weakref.ref(engine._decoder)
        sampled = engine.stats().decode_tokens
    gc.collect()
    with anyio.fail_after(40):
        while weights() is not None:
            await anyio.sleep(0.02)
            gc.collect()
    assert engine.stats() == replace(engine.stats(), active=0, queued=0, cached_tokens=0, decode_tokens=sampled)


async def test_weights_that_cannot_be_put_in_place_are_reported_to_whoever_gave_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(weights: object) -> None:
        raise RuntimeError("no memory")

    async with make() as engine:
        monkeypatch.setattr(engine._decoder, "load", full)
        with pytest.raises(EngineError, match="could not be put in place: no memory"):
            await engine.load_weights(tiny_llama.weights(1), version=1)
        assert engine.version == 0
        with pytest.raises(EngineError, match="please report: RuntimeError"):  # half of them may be there
            await call(engine, (PROMPT,))


async def test_a_call_goes_on_with_new_weights_from_what_it_sampled() -> None:
    async with make(0, flush_s=0) as engine:
        ids: list[int] = []
        async with aclosing(engine.generate((PROMPT,), SamplingParams(max_tokens=200))) as chunks:
            async for chunk in chunks:
                if not ids:
                    await engine.load_weights(tiny_llama.weights(1), version=1)
                ids += chunk.token_ids
        assert len(ids) == 200
    async with make(1) as fresh:
        rest = (await call(fresh, ((*PROMPT, *ids[:150]),), max_tokens=50))[0]
    assert tuple(ids[150:]) == rest


async def test_weights_that_do_not_fit_are_refused_and_change_nothing() -> None:
    good = tiny_llama.weights(1)
    async with make(0) as engine:
        before = (await call(engine, (PROMPT,)))[0]
        for bad, message in (
            ({**good, "model.norm.weight": np.ones(3, np.float32)}, r"model.norm.weight has shape \[3\]"),
            ({k: v for k, v in good.items() if k != "model.norm.weight"}, "lack model.norm.weight"),
            ({**good, "model.extra.weight": np.ones(3)}, "hold model.extra.weight"),
            ({name: torch.from_numpy(weight).to("meta") for name, weight in good.items()}, "device meta"),
        ):
            with pytest.raises(RequestError, match=message):
                await engine.load_weights(bad, version=9)
        assert engine.version == 0
        assert (await call(engine, (PROMPT,)))[0] == before
    with pytest.raises(EngineUnavailable, match="closed"):
        await engine.load_weights(good, version=1)
    with pytest.raises(ModelError, match="lack"):
        TorchEngine.from_weights({}, CONFIG)


async def test_a_forward_that_fails_fails_the_calls_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make() as engine:
        expected = await call(engine, (PROMPT,))
        with monkeypatch.context() as patch:

            def broken(*_: object) -> None:
                raise RuntimeError("out of memory")

            patch.setattr(engine._decoder, "forward", broken)
            with pytest.raises(EngineError, match="forward pass of the torch engine failed: out of memory"):
                await call(engine, (PROMPT[::-1],))
        assert (await call(engine, (PROMPT,)))[0] == expected[0]
        assert_idle(engine)


async def test_a_bug_is_told_to_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make() as engine:
        monkeypatch.setattr(engine._decoder, "forward", lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(EngineError, match="please report: ZeroDivisionError"):
                await call(engine, (PROMPT,))
        with pytest.raises(EngineError, match="please report"):
            await engine.load_weights(tiny_llama.weights(), version=1)


async def test_leaving_ends_the_calls_that_still_run() -> None:
    engine = make()
    with pytest.raises(EngineUnavailable, match="open the engine first"):
        await call(engine, (PROMPT,))
    async with engine:
        chunks = engine.generate((PROMPT,), SamplingParams(max_tokens=500))
        await anext(chunks)
    with pytest.raises(EngineUnavailable, match="closed"):
        [chunk async for chunk in chunks]
    with pytest.raises(EngineUnavailable, match="once"):
        await engine.__aenter__()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_shipped_model_says_the_same_as_in_llamacpp(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from plait.engines.llamacpp import LlamaCppEngine
    from plait.models import load_model
    from plait.session import open_run
    from plait.train.gguf import write_gguf

    model = load_model()
    assert model.path is not None
    read = read_checkpoint(model.path)
    wide = write_gguf(tmp_path / "wide.gguf", read.weights, read.config)  # the same numbers without their blocks of 32
    questions = ("What is 347 * 526?", "What is 34 * 27 + 58 * 16?")
    async with (
        model.open_engine("torch", device="cpu") as ours,
        LlamaCppEngine(wide, cache="F32", flash_attention=False) as theirs,
    ):
        for question in questions:
            texts: list[list[tuple[int, ...]]] = []
            for engine in (ours, theirs):
                async with open_run(model.request(question), engine=engine, format=model.format) as run:
                    async for _ in run:
                        pass
                texts.append([tuple(segment.sampled_ids) for segment in run.tree.segments.values()])
            assert sorted(texts[0]) == sorted(texts[1])
            assert len(texts[0]) > 3, "it forked"


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0"])
def test_a_gguf_gives_back_the_weights_that_were_written(dtype: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    read = read_checkpoint(tiny_llama.write(tmp_path / "tiny.gguf", dtype=dtype))
    assert {key: read.config[key] for key in tiny_llama.CONFIG} == tiny_llama.CONFIG
    assert read.config["tie_word_embeddings"]
    assert (read.config["partial_rotary_factor"], read.config["use_sliding_window"]) == (1, False)
    written = tiny_llama.weights()
    assert set(read.weights) == set(written)
    for name, weight in written.items():
        rounding = {"F32": 0, "F16": 1e-3, "Q8_0": 1e-2}[dtype] * np.abs(weight).max()
        assert np.abs(read.weights[name] - weight).max() <= rounding, name


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model file or folder"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds no object"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": ["model-1.safetensors"]}}')
    with pytest.raises(ModelError, match="cannot read"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ModelError, match=r"lacks model-1\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "model-1.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError, match="cannot read"):
        read_checkpoint(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="as GGUF"):
        read_checkpoint(tmp_path / "broken.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "cannot run model_type 'mamba'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rotary embedding of the kind"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "makes no sense"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "gives no numbers"),
        ({"hidden_size": None}, "incomplete"),
        ({"num_attention_heads": 0}, "incomplete"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"max_position_embeddings": -1}, "above 0"),
    ],
)
def test_a_model_of_another_kind_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        TorchEngine(Checkpoint(config={**CONFIG, **changes}, weights=tiny_llama.weights()), device="cpu")


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(RequestError, match="dtype is 'int8'"):
        make(dtype="int8")
    with pytest.raises(RequestError, match="max_seqs is 0"):
        make(max_seqs=0)
    with pytest.raises(EngineUnavailable, match="no device 'nonsense'"):
        make(device="nonsense")
