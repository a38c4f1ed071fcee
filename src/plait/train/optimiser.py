"""What changes the weights of a run: Muon for the matrices of the layers, AdamW for the embedding and the norms.

Sources: Muon, Jordan et al. 2024 (kellerjordan.github.io/posts/muon); its steps scaled to AdamW's, so that one learning
rate serves both, Liu et al. 2025 (arXiv:2502.16982); AdamW (arXiv:1711.05101).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from plait.train.config import OptimiserConfig


class Layered(Protocol):
    """A model whose matrices are those of its layers."""

    @property
    def layers(self) -> torch.nn.ModuleList: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


def optimisers(model: Layered, config: OptimiserConfig) -> list[torch.optim.Optimizer]:
    """One optimiser for each rule that `config.name` stands for; together they cover every weight once."""
    matrices = list[torch.nn.Parameter]()
    if config.name == "muon":
        matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    taken = set(map(id, matrices))
    adamw = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in taken],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(
        matrices,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw]
