"""Models of transformers as learners: sharded over processes where there are several (FSDP2), exported as a folder.

A checkpoint keeps what is trained: all weights, or adapters and the vectors of the tags. Knows nothing of trees, data,
rewards and schedules.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from plait.formats import format_class
from plait.train.checkpoint import SCHEMA
from plait.train.config import OptimiserConfig
from plait.train.learners.base import Learner, nll
from plait.train.packing import PackedBatch
from plait.train.pretrained.config import BaseConfig
from plait.train.pretrained.model import Pretrained, load
from plait.train.ranks import Ranks, whole
from plait.train.tensors import inputs, spans


class PretrainedLearner(Learner):
    """A model of transformers that learns.

    Args:
        base: Which.
        format: Trajectory format; its tags become tokens.
        bf16: Whether it multiplies in bfloat16.
        saved: A checkpoint's state to go on from.
        start: Keep what is needed to score under the weights that the run started with.
    """

    def __init__(
        self,
        base: BaseConfig,
        config: OptimiserConfig,
        *,
        format: str,
        bf16: bool,
        ranks: Ranks,
        saved: Mapping[str, Any] | None,
        start: bool = False,
    ) -> None:
        self._base, self._format, self._ranks = base, format, ranks
        self.pretrained = load(base, tags=format_class(format).tags(), bf16=bf16)
        # With adapters those weights are there already, under the adapters.
        self._start = copy.deepcopy(self.pretrained).requires_grad_(False) if start and not base.lora_rank else None
        if saved is not None:
            self.pretrained.load_trained(saved["model"])
        for model in (self.pretrained, self._start):
            if model is not None and ranks.count > 1:
                _shard(model)
        super().__init__(self.pretrained, self.pretrained.tokenizer, config)

    def losses(self, batch: PackedBatch, *, odd: bool = False) -> Tensor:
        return nll(self.pretrained, batch)

    def start_losses(self, batch: PackedBatch, *, odd: bool = False) -> Tensor:
        with torch.no_grad():
            if self._start is not None:
                return nll(self._start, batch)
            trained = [p for p in self.pretrained.parameters() if p.requires_grad]
            with self.pretrained.inner.disable_adapter():
                losses = nll(self.pretrained, batch)
            # peft turns gradients off and on again; where weights are sharded, of other objects than these by then.
            for parameter in trained:
                parameter.requires_grad_(True)
            return losses

    def forced(self, batch: PackedBatch) -> tuple[float, Tensor]:
        with torch.no_grad():
            ids, positions, labels, prev = inputs(batch)
            losses, hits = self.pretrained(ids, positions, labels, prev, self.pretrained.biases(*spans(batch)))
        return float(losses.sum()), hits.cpu()

    def state(self) -> dict[str, Any]:
        return {
            "model": {name: whole(t).cpu() for name, t in self.pretrained.trained_state().items()},
            "optimisers": [get_optimizer_state_dict(self.pretrained, o, options=_WHOLE) for o in self.optimisers],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            set_optimizer_state_dict(self.pretrained, optimiser, state, options=_WHOLE)

    def weights(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return self.pretrained.exported()

    def engine_options(self) -> dict[str, Any]:
        half = self.pretrained.bf16 or self._base.dtype == "bfloat16"
        return {"dtype": "bfloat16" if half else "float32", "device": str(self.pretrained.device)}

    def export(self, out: Path, *, config: Mapping[str, Any], scores: Mapping[str, Any]) -> Path:
        model = self.pretrained
        if self._ranks.count > 1:
            # Whole weights exist on no process: the model is read again, without shards.
            state = {name: whole(t).cpu() for name, t in model.trained_state().items()}
            if self._ranks.first:
                model = load(replace(self._base, device="cpu"), tags=format_class(self._format).tags())
                model.load_trained(state)
        about = {"schema": SCHEMA, "format": self._format, "join": format_class(self._format).join_kind}
        if self._ranks.first:
            # Who learned the tasks here is asked in their notation; who learned from text, in plain words.
            ours = not config["data"].get("path")
            model.save(out / "model", {**about, "train": dict(config), "scores": dict(scores)} if ours else None)
        self._ranks.barrier()
        return out / "model"


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _shard(model: Pretrained) -> None:
    """Spread weights over the processes, a layer at a time."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
