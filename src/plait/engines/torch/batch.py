"""What one step computes, as arrays: pieces of contexts become rows, padded into groups of one shape.

Knows numpy and tensors, nothing of calls and blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from plait.engines.torch.blocks import Cells
from plait.engines.torch.model import Group, Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens in a row of one context. Each sees `sees` up to its own cell."""

    token_ids: Sequence[int]
    start: int
    """Position of the first."""
    sees: Cells
    """Cells in order; the last ones are the tokens' own."""


def assemble(pieces: Sequence[Piece], outputs: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> Rows:
    """The rows of a step, piece after piece.

    Args:
        outputs: Rows that want logits.
    """
    lengths = [len(piece.token_ids) for piece in pieces]
    firsts = np.cumsum([0, *lengths])
    places = np.empty(firsts[-1], np.int64)
    groups: list[Group] = []
    base = 0
    # Widths go up in powers of two, so that a long piece does not widen the others.
    by_width: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_width.setdefault(1 << (length - 1).bit_length(), []).append(i)
    for width, members in sorted(by_width.items()):
        most = max(len(pieces[i].sees) for i in members)
        rows_GR = np.empty((len(members), width), np.int64)
        cells_GC = np.zeros((len(members), most), np.int64)
        bias_GRC = np.full((len(members), width, most), -np.inf, np.float32)
        for g, i in enumerate(members):
            length, seen = lengths[i], len(pieces[i].sees)
            rows_GR[g] = firsts[i]
            rows_GR[g, :length] += np.arange(length)
            cells_GC[g, :seen] = pieces[i].sees
            bias_GRC[g, :, :seen] = 0
            if length > 1:
                bias_GRC[g, :length, seen - length : seen][np.triu_indices(length, 1)] = -np.inf
            places[firsts[i] : firsts[i + 1]] = base + g * width + np.arange(length)
        base += len(members) * width
        groups.append(
            Group(
                rows_GR=_tensor(rows_GR, device),
                cells_GC=_tensor(cells_GC, device),
                bias_GRC=_tensor(bias_GRC, device).to(dtype),
            )
        )
    in_order = base == len(places) and bool((places == np.arange(base)).all())
    return Rows(
        token_ids=_tensor(np.fromiter((id for p in pieces for id in p.token_ids), np.int64, len(places)), device),
        position_ids=_tensor(np.concatenate([np.arange(p.start, p.start + len(p.token_ids)) for p in pieces]), device),
        cells=_tensor(np.concatenate([p.sees[-len(p.token_ids) :] for p in pieces]), device),
        groups=groups,
        places=None if in_order else _tensor(places, device),
        outputs=_tensor(np.array(outputs, np.int64), device),
    )


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
