"""A model that is being trained: what trainers ask of one, whoever's model it is.

Two there are: `embedded` (Plait's own small models) and `pretrained` (models of transformers). Knows nothing of
trees, data, rewards and schedules.

Shapes: R rows, T slots of a row, W trained slots of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plait.tokenizer import Tokenizer
from plait.train.config import OptimiserConfig
from plait.train.optimiser import optimisers
from plait.train.packing import PackedBatch
from plait.train.ranks import whole
from plait.train.tensors import inputs, spans


class Model(Protocol):
    """A module that takes packed trees."""

    @property
    def layers(self) -> nn.ModuleList: ...
    @property
    def num_parameters(self) -> int: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def biases(self, end: Tensor, hide_lo: Tensor, hide_hi: Tensor) -> Any: ...
    def losses(self, token_ids: Tensor, position_ids: Tensor, labels: Tensor, prev: Tensor, biases: Any) -> Tensor: ...


def nll(model: Model, batch: PackedBatch) -> Tensor:
    """Negative log-likelihood [R, T] in nats of every trained token of a batch, 0 elsewhere."""
    ids, positions, labels, prev = inputs(batch)
    return model.losses(ids, positions, labels, prev, model.biases(*spans(batch)))


class Learner(ABC):
    """A model, its tokenizer and its optimisers.

    Args:
        model: With the weights to start from; what its optimisers saw is given by `restore`.
        tokenizer: Its own.
        config: How it learns.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, config: OptimiserConfig) -> None:
        self.model, self.tokenizer, self._config = model, tokenizer, config
        self.optimisers = optimisers(model, config)

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return self.model.num_parameters

    @property
    def pad_id(self) -> int:
        """Fills what is left of a row; nothing sees it, so any id will do."""
        return self.tokenizer.control_id("<pad>") or 0

    def compile(self) -> bool:
        """Compile what a step spends its time in, where that is to be asked for; False where nothing here can."""
        return True

    def update(self, factor: float) -> float:
        """Step along the gradients that were gathered, and forget them.

        Args:
            factor: Of the learning rate.

        Returns:
            The norm of the gradient before it was clipped.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._config.clip)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self._config.lr * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return float(whole(norm))

    @abstractmethod
    def losses(self, batch: PackedBatch, *, odd: bool = False) -> Tensor:
        """`nll` with gradient, in the precision of the run.

        Args:
            odd: Of a shape of its own: compiling for it would not pay.
        """

    @abstractmethod
    def start_losses(self, batch: PackedBatch, *, odd: bool = False) -> Tensor:
        """`nll` under the weights that the run started with, without gradient."""

    @abstractmethod
    def forced(self, batch: PackedBatch) -> tuple[float, Tensor]:
        """Summed `nll` of a batch, and of each trained token, [W], whether greedy sampling would write it."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; every process is asked."""

    @abstractmethod
    def restore(self, saved: Mapping[str, Any]) -> None:
        """The inverse of `state` for what is not weights."""

    @abstractmethod
    def weights(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """All weights under the names of transformers, and `config.json`: what engines load. Every process is asked."""

    @abstractmethod
    def engine_options(self) -> dict[str, Any]:
        """Number type and device of an engine over these weights."""

    @abstractmethod
    def export(self, out: Path, *, config: Mapping[str, Any], scores: Mapping[str, Any]) -> Path:
        """Write the weights into a run folder for other tools; every process is asked."""
