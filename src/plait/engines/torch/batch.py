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


PADDED_CELLS = 256
"""Fewest cells that a padded row sees; more come in powers of two of it."""


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


def assemble_padded(
    pieces: Sequence[Piece], outputs: Sequence[int], *, spare: int, device: torch.device, dtype: torch.dtype
) -> Rows:
    """The rows of a step that only samples, one a piece, in sizes that are powers of two.

    Args:
        outputs: Rows that want logits, as many as there are; logits of padding come after theirs.
        spare: The cell that padding writes and sees.
    """
    count = len(pieces)
    rows = 1 << (count - 1).bit_length()
    most = max(len(piece.sees) for piece in pieces)
    width = PADDED_CELLS << max(0, (most - 1) // PADDED_CELLS).bit_length()
    token_ids, position_ids = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    cells_GC = np.full((rows, width), spare, np.int64)
    bias_GRC = np.full((rows, 1, width), -np.inf, np.float32)
    bias_GRC[count:, 0, 0] = 0  # a row that sees nothing would come out as NaN
    for i, piece in enumerate(pieces):
        token_ids[i], position_ids[i] = piece.token_ids[0], piece.start
        cells_GC[i, : len(piece.sees)] = piece.sees
        bias_GRC[i, 0, : len(piece.sees)] = 0
    own = np.full(rows, spare, np.int64)
    own[:count] = [piece.sees[-1] for piece in pieces]
    group = Group(
        rows_GR=_tensor(np.arange(rows)[:, None], device),
        cells_GC=_tensor(cells_GC, device),
        bias_GRC=_tensor(bias_GRC, device).to(dtype),
    )
    return Rows(
        token_ids=_tensor(token_ids, device),
        position_ids=_tensor(position_ids, device),
        cells=_tensor(own, device),
        groups=[group],
        places=None,
        outputs=_tensor(np.concatenate([np.array(outputs, np.int64), np.arange(count, rows)]), device),
        padded=True,
    )


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
