"""The engine that runs transformers weights: every live call of every session in one forward per step.

Puts the pieces together. It is the reference for what a merge means, and weights can be replaced between two steps,
so it is what training rolls out on. It knows nothing of threads, formats or text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import anyio

from plait.engines.inprocess.calls import Part
from plait.engines.inprocess.engine import InProcessEngine, Mailbox, check_options, deliver, poster
from plait.engines.inprocess.sampling import Sampler
from plait.engines.inprocess.worker import WORKER
from plait.engines.torch.checkpoint import Checkpoint, read_checkpoint
from plait.errors import ContextLengthError, EngineError, EngineUnavailable, RequestError, needs
from plait.settings import within
from plait.types import SamplingParams, context_positions

try:
    import torch
except ImportError as exc:
    raise EngineUnavailable(f"{needs('the torch engine', 'torch')} ({exc})") from exc

from plait.engines.torch.blocks import Pool
from plait.engines.torch.lora import with_lora
from plait.engines.torch.model import Config, Decoder
from plait.engines.torch.scheduler import Call, NewWeights, Scheduler, num_blocks

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HALF = (torch.bfloat16, torch.float16)


class TorchEngine(InProcessEngine):
    """Continues contexts with the weights of a Llama, Qwen2 or Qwen3.

    Args:
        path: A folder as transformers saves it (`config.json` and safetensors), a GGUF file, or a checkpoint in memory.
        max_context: Positions of one call; by default what the model was trained for, as far as `cells` allow.
        cells: Tokens held in memory for all calls together, shared prefixes counted once.
        max_seqs: Calls that run at once; more wait.
        block_size: Cells handed out at once. A run of tokens takes whole blocks.
        dtype: What weights and cache are computed in; auto takes float32 weights as float32, shorter ones as bfloat16.
        device: Such as `cpu` or `cuda`; by default a GPU if there is one.
        threads: CPU threads of torch, for the whole process; by default as torch is set.
        prefill_rows: Given tokens computed in one step while other calls sample.
        flush_s: How often calls that go on sampling yield a chunk.
        compile: Compile the step that only samples, on CUDA into CUDA graphs. The first step of each size then takes
            long, up to minutes for the very first; on a CPU it needs a C++ compiler and has not paid.
        lora: A LoRA adapter of these weights, a folder as peft saves it. It is added to the weights as they are read,
            so it costs nothing later; `load_weights` replaces the sum.
        lora_scale: What the adapter is multiplied with, beside its own alpha.
        version: Number of the weights, for whoever replaces them.

    Raises:
        ModelError: The weights are missing, damaged, or of a kind that this engine does not run.
        EngineUnavailable: A package that reads them, or the device, is missing.
    """

    name = "torch"

    def __init__(
        self,
        path: str | Path | Checkpoint,
        *,
        max_context: int | None = None,
        cells: int = 16384,
        max_seqs: int = 64,
        block_size: int = 16,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: str | None = None,
        threads: int | None = None,
        prefill_rows: int = 256,
        flush_s: float = 0.01,
        compile: bool = False,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        version: int = 0,
    ) -> None:
        if dtype not in ("auto", *_DTYPES):
            raise RequestError(f"dtype is {dtype!r}; it must be auto, {' or '.join(_DTYPES)}")
        check_options(
            max_context=max_context,
            cells=cells,
            threads=threads,
            prefill_rows=prefill_rows,
            flush_s=flush_s,
            lora_scale=lora_scale,
        )
        within("max_seqs", max_seqs, 1)
        within("block_size", block_size, 1)
        self._blocks = max(cells // block_size, 2)
        super().__init__(cells=self._blocks * block_size)
        checkpoint = path if isinstance(path, Checkpoint) else read_checkpoint(path)
        if lora is not None:
            checkpoint = with_lora(checkpoint, lora, scale=lora_scale)
        config = Config.read(checkpoint.config)
        self.vocab_size = config.vocab_size
        self.max_context = min(max_context or config.max_positions, self._cells)
        self._decoder: Decoder | None = Decoder(
            config,
            checkpoint.weights,
            dtype=_stored(checkpoint) if dtype == "auto" else _DTYPES[dtype],
            device=_device(device),
            positions=self.max_context,
        )
        if compile:
            self._decoder.compile()
        self._compile = compile
        self._block_size, self._max_seqs, self._threads = block_size, max_seqs, threads
        self._prefill_rows, self._flush_s = prefill_rows, flush_s
        self.version = version
        """Number of the weights that the next step is computed with."""

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Any], config: Mapping[str, Any], *, version: int = 0, **options: Any
    ) -> TorchEngine:
        """An engine over weights in memory.

        Args:
            weights: Arrays or tensors under the names of transformers. Copied.
            config: What `config.json` would say.
            options: As of the class.
        """
        return cls(Checkpoint(config=config, weights=weights), version=version, **options)

    async def __aenter__(self) -> TorchEngine:
        self._check_unopened()
        assert self._decoder is not None
        post = poster()

        def close() -> None:
            post(self._stopped.set)

        try:
            self._scheduler = Scheduler(
                self._decoder,
                Pool(self._blocks, self._block_size),
                Sampler(self._max_seqs, self.vocab_size),
                wake=WORKER.wake,
                post=lambda deliveries: post(deliver, deliveries),
                close=close,
                max_seqs=self._max_seqs,
                prefill_rows=self._prefill_rows,
                flush_s=self._flush_s,
                threads=self._threads,
                padded=self._compile,
            )
        except (RuntimeError, MemoryError) as exc:
            await self.aclose()
            raise EngineUnavailable(f"there is no memory for {self._cells} cells: {exc}") from exc
        WORKER.add(self._scheduler)
        return self

    def _free(self) -> None:
        self._decoder = None

    async def load_weights(self, weights: Mapping[str, Any], *, version: int) -> None:
        """Replace the weights between two steps, all of them or none, and forget what was cached of the old ones.

        Calls that run go on: what they sampled stays, their contexts are computed again, later tokens are the new
        weights'. A model with tied embeddings takes and ignores `lm_head.weight`.

        Args:
            weights: Arrays or tensors under the names of transformers, in any float type. They are copied, and must
                not change before this returns.
            version: Number of these weights; `version` of the engine from then on.

        Raises:
            RequestError: A name is missing or unknown, or a shape differs; the old weights stay.
            EngineUnavailable: The engine is not open, or was closed meanwhile.
        """
        scheduler = self._check_open()
        assert self._decoder is not None
        self._decoder.check(weights)
        over = anyio.Event()
        errors: list[EngineError | None] = []
        post = poster()

        def done(error: EngineError | None) -> None:
            if error is None:
                self.version = version
            errors.append(error)
            post(over.set)

        scheduler.put(("load", NewWeights(weights, done)))
        with anyio.CancelScope(shield=True):
            await over.wait()
        if (error := errors[0]) is not None:
            raise type(error)(*error.args) from error.__cause__  # others may be told of the same one

    def _call(self, number: int, parts: tuple[Part, ...], params: SamplingParams, mailbox: Mailbox) -> Call:
        tail = parts[-1]
        assert isinstance(tail, tuple)
        room = (self._blocks - num_blocks(parts[:-1], self._block_size)) * self._block_size - len(tail)
        if room < 0:
            raise ContextLengthError(
                f"the context takes {num_blocks(parts, self._block_size)} blocks of {self._block_size} cells; the"
                f" engine has {self._blocks}"
            )
        # The token sampled last needs no cell.
        limit = min(params.max_tokens, self.max_context - context_positions(parts), room + 1)
        return Call(number, parts, params, limit, mailbox)


def _stored(checkpoint: Checkpoint) -> torch.dtype:
    kinds = {weight.dtype for weight in checkpoint.weights.values() if isinstance(weight, torch.Tensor)}
    return torch.bfloat16 if kinds & set(_HALF) else torch.float32


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise EngineUnavailable(f"there is no device {name!r}: {exc}") from exc
    if device.type == "meta":
        raise RequestError("device is 'meta', which holds no numbers; it must be one that computes, such as cpu")
    return device
