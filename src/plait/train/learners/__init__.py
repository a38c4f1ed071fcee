"""Models that learn, one interface for all of them: `base` says what trainers ask, siblings are whose model it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from plait.errors import RequestError
from plait.tasks.vocabulary import tokenizer_for
from plait.train import checkpoint, machine
from plait.train.config import RunConfig
from plait.train.learners.base import Learner, nll
from plait.train.learners.embedded import Embedded, start_from
from plait.train.model import Decoder
from plait.train.ranks import Ranks


def open_learner(
    config: RunConfig,
    *,
    fresh: Callable[[], Decoder],
    ranks: Ranks,
    saved: Mapping[str, Any] | None,
    start: bool = False,
) -> Learner:
    """The model that a config names, with its optimisers, as it was saved or as it begins.

    Args:
        config: With its precision resolved.
        fresh: Makes one of Plait's own models where a run begins.
        saved: A checkpoint's state to go on from.
        start: Whether it is to remember the weights that the run started with.

    Raises:
        RequestError: Several processes train one of Plait's own models, or a package is missing.
        ModelError: The weights cannot be read.
    """
    machine.keep_memory()
    machine.use_threads(config.threads)
    torch.manual_seed(config.seed)
    if config.base is not None:
        from plait.train.learners.pretrained import PretrainedLearner

        learner: Learner = PretrainedLearner(
            config.base,
            config.optimiser,
            format=config.data.format,
            bf16=config.precision == "bf16",
            ranks=ranks,
            saved=saved,
            start=start,
        )
    elif ranks.count > 1:
        raise RequestError(f"one of Plait's own models trains in one process; these are {ranks.count}")
    else:
        learner = Embedded(
            checkpoint.model_of(saved) if saved is not None else fresh(),
            config.optimiser,
            tokenizer=tokenizer_for(config.data.vocabulary, config.data.format),
            precision="bf16" if config.precision == "bf16" else "fp32",
            export=config.weights,
            start=start,
        )
    if saved is not None:
        learner.restore(saved)
    return learner


__all__ = ["Learner", "nll", "open_learner", "start_from"]
