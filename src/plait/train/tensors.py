"""A packed batch as the tensors that a model takes. Shares the arrays' memory."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.train.packing import PackedBatch


def inputs(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, positions, labels and `prev`, [R, T]."""
    ids, positions, labels, prev = map(
        torch.from_numpy, (batch.token_ids, batch.position_ids, batch.labels, batch.prev)
    )
    return ids, positions, labels, prev


def spans(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Visibility: `end` [R, T], `hide_lo` and `hide_hi` [R, T, N]."""
    return torch.from_numpy(batch.end), torch.from_numpy(batch.hide_lo), torch.from_numpy(batch.hide_hi)
