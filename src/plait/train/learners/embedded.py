"""Plait's own small models as learners: a `Decoder` on the CPU, kept whole in checkpoints, exported as GGUF.

Knows nothing of trees, data, rewards and schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.tasks.vocabulary import tokenizer_for
from plait.tokenizer import FixedTokenizer
from plait.train import checkpoint, machine
from plait.train.config import OptimiserConfig, SourceConfig
from plait.train.learners.base import Learner, nll
from plait.train.model import Decoder, hf_config, to_hf
from plait.train.packing import PackedBatch
from plait.train.tensors import inputs, spans


class Embedded(Learner):
    """A decoder that learns.

    Args:
        model: With the weights to start from.
        tokenizer: What it reads and writes.
        precision: Autocast over float32 weights.
        export: Number type of the exported file.
        start: Keep a copy of the weights as they are: the ones that the run started with.
    """

    def __init__(
        self,
        model: Decoder,
        config: OptimiserConfig,
        *,
        tokenizer: FixedTokenizer,
        precision: Literal["bf16", "fp32"],
        export: Literal["F32", "F16", "Q8_0"],
        start: bool = False,
    ) -> None:
        self.decoder, self.words_of = model, tokenizer
        super().__init__(model, self.words_of, config)
        self._bf16 = precision == "bf16"
        self._export: Literal["F32", "F16", "Q8_0"] = export
        self._start = _frozen(model) if start else None

    def compile(self) -> bool:
        """Compile what a step spends its time in; False where nothing here can."""
        if machine.has_compiler():
            self.decoder.compile_parts()
            return True
        return False

    def losses(self, batch: PackedBatch, *, odd: bool = False) -> Tensor:
        with self._running(odd=odd):
            return nll(self.decoder, batch)

    def start_losses(self, batch: PackedBatch, *, odd: bool = False) -> Tensor:
        assert self._start is not None, "asked of a learner that keeps them"
        with torch.no_grad(), self._running(odd=odd):
            return nll(self._start, batch)

    def forced(self, batch: PackedBatch) -> tuple[float, Tensor]:
        # Every example has another length: compiling for each would take longer than the run.
        with torch.no_grad(), self._running(odd=True):
            ids, positions, labels, prev = inputs(batch)
            logits = self.decoder(ids, positions, self.decoder.biases(*spans(batch))).float()
            row, slot = torch.nonzero(labels >= 0, as_tuple=True)
            logits, labels = logits[row, prev[row, slot]], labels[row, slot]
            nats = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return float(nats), logits.argmax(-1) == labels

    def _running(self, *, odd: bool) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._bf16))
        if odd:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        return stack

    def state(self) -> dict[str, Any]:
        return {
            "model": self.decoder.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "reference": self._start.state_dict() if self._start is not None else None,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        if self._start is not None:
            self._start.load_state_dict(saved["reference"])

    def weights(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return to_hf(self.decoder), hf_config(self.decoder.config)

    def engine_options(self) -> dict[str, Any]:
        return {"dtype": "float32"}

    def export(self, out: Path, *, config: Mapping[str, Any], scores: Mapping[str, Any]) -> Path:
        about = checkpoint.description(config, scores=scores, tokenizer=self.words_of)
        checkpoint.export_gguf(out / "model.gguf", self.decoder, about=about, dtype=self._export)
        return out / "model.gguf"


def _frozen(model: Decoder) -> Decoder:
    copy = Decoder(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.requires_grad_(False)


def start_from(model: Decoder, path: Path, data: SourceConfig) -> None:
    """Take the weights of another run. Tokens that its vocabulary had not keep their random embeddings.

    Raises:
        ModelError: It cannot be read, its ids mean something else, or its sizes differ.
    """
    given = checkpoint.load(path)
    theirs, format = given["config"]["data"]["vocabulary"], given["config"]["data"]["format"]
    had, have = tokenizer_for(theirs, format).tokens, tokenizer_for(data.vocabulary, data.format).tokens
    if have[: len(had)] != had:
        raise ModelError(
            f"{path} was trained in {format} with the vocabulary {theirs!r}, whose ids mean something else in "
            f"{data.vocabulary!r} with the tags of {data.format}"
        )
    weights = checkpoint.model_of(given).state_dict()
    try:
        embed = model.embed.weight.detach().clone()
        embed[: len(had)] = weights["embed.weight"][: len(had)]
        model.load_state_dict(weights | {"embed.weight": embed})
    except RuntimeError as exc:
        raise ModelError(f"the weights of {path} do not fit [model]: {exc}") from exc
