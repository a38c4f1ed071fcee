"""What one step computes, as arrays: pieces of contexts become rows, in groups that attend together.

Knows numpy and tensors, nothing of calls and blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
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


_FEW_CELLS = 1024
"""Cells that rows see, all together, from which on it pays to look for those that they have in common."""
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
    many = sum(len(piece.sees) for piece in pieces) >= _FEW_CELLS
    for family in _families(pieces, range(len(pieces))) if many else [[i] for i in range(len(pieces))]:
        if len(family) == 1:
            by_width.setdefault(1 << (lengths[family[0]] - 1).bit_length(), []).append(family[0])
            continue
        rows_R = np.concatenate([np.arange(firsts[i], firsts[i + 1]) for i in family])
        cells_C, bias_RC = _side_by_side([pieces[i] for i in family])
        places[rows_R] = base + np.arange(len(rows_R))
        base += len(rows_R)
        groups.append(_group(rows_R[None], cells_C[None], bias_RC[None], device, dtype))
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
                bias_GRC[g, :length, seen - length : seen][_later(length)] = -np.inf
            places[firsts[i] : firsts[i + 1]] = base + g * width + np.arange(length)
        base += len(members) * width
        groups.append(_group(rows_GR, cells_GC, bias_GRC, device, dtype))
    in_order = base == len(places) and bool((places == np.arange(base)).all())
    return Rows(
        token_ids=_tensor(np.fromiter((id for p in pieces for id in p.token_ids), np.int64, len(places)), device),
        position_ids=_tensor(np.concatenate([np.arange(p.start, p.start + len(p.token_ids)) for p in pieces]), device),
        cells=_tensor(np.concatenate([p.sees[-len(p.token_ids) :] for p in pieces]), device),
        groups=groups,
        places=None if in_order else _tensor(places, device),
        outputs=_tensor(np.array(outputs, np.int64), device),
    )


@lru_cache(16)
def _later(length: int) -> npt.NDArray[np.bool_]:
    """Which tokens [length, length] of a piece come after which."""
    return np.triu(np.ones((length, length), bool), 1)


def _families(pieces: Sequence[Piece], members: Sequence[int]) -> list[list[int]]:
    """Pieces that read the cells of their common ancestors together, and those that read all theirs alone.

    Threads of a fork see the same prefix. Side by side they read it once, at the price of attention to each other's
    cells that is masked out.
    """
    if len(members) == 1:
        return [list(members)]
    alone = sum(len(pieces[i].sees) for i in members)
    common = _common([pieces[i] for i in members])
    rows = [len(pieces[i].token_ids) for i in members]
    together = alone - (len(members) - 1) * common
    attended = sum(n * len(pieces[i].sees) for n, i in zip(rows, members, strict=True))
    if 2 * together <= alone and sum(rows) * together <= 2 * attended:
        return [list(members)]
    # They part behind the common cells: some of them may still go on together.
    parts: dict[int, list[int]] = {}
    for i in members:
        parts.setdefault(int(pieces[i].sees[common]), []).append(i)
    if len(parts) == 1:
        return [[i] for i in members]
    return [family for part in parts.values() for family in _families(pieces, part)]


def _common(pieces: Sequence[Piece]) -> int:
    """How many cells all of them see first, none of them their own."""
    first = pieces[0].sees
    common = min(len(piece.sees) - len(piece.token_ids) for piece in pieces)
    for piece in pieces[1:]:
        differ = first[:common] != piece.sees[:common]
        common = int(differ.argmax()) if differ.any() else common
    return common


def _side_by_side(pieces: Sequence[Piece]) -> tuple[Cells, np.ndarray]:
    """The cells that pieces with a common beginning see, each once, and which of their rows sees which."""
    common = _common(pieces)
    rows = sum(len(piece.token_ids) for piece in pieces)
    cells_C = np.concatenate([pieces[0].sees[:common], *(piece.sees[common:] for piece in pieces)])
    bias_RC = np.full((rows, len(cells_C)), -np.inf, np.float32)
    bias_RC[:, :common] = 0
    row, column = 0, common
    for piece in pieces:
        length, own = len(piece.token_ids), len(piece.sees) - common
        bias_RC[row : row + length, column : column + own] = 0
        if length > 1:
            last = bias_RC[row : row + length, column + own - length : column + own]
            last[_later(length)] = -np.inf
        row, column = row + length, column + own
    return cells_C, bias_RC


def _group(rows_GR: Cells, cells_GC: Cells, bias_GRC: np.ndarray, device: torch.device, dtype: torch.dtype) -> Group:
    return Group(
        rows_GR=_tensor(rows_GR, device),
        cells_GC=_tensor(cells_GC, device),
        bias_GRC=_tensor(bias_GRC, device).to(dtype),
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
    group = _group(np.arange(rows)[:, None], cells_GC, bias_GRC, device, dtype)
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
