"""A tiny Llama with random weights for tests: as a GGUF file, and as a plain numpy forward to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.types import Context, Merge

VOCAB, WIDTH, LAYERS, HEADS, HIDDEN = 48, 64, 2, 2, 96
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 512,
}


@lru_cache
def weights(seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Random, but large enough that outputs vary and near-ties are rare."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 2.0) -> npt.NDArray[Any]:
        return (rng.standard_normal((rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, WIDTH, 4.0), "model.norm.weight": np.ones(WIDTH, np.float32)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for name in "qkvo":
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(WIDTH, WIDTH)
        tensors[f"{at}mlp.gate_proj.weight"] = matrix(HIDDEN, WIDTH)
        tensors[f"{at}mlp.up_proj.weight"] = matrix(HIDDEN, WIDTH)
        tensors[f"{at}mlp.down_proj.weight"] = matrix(WIDTH, HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = np.ones(WIDTH, np.float32)
    return tensors


def write(path: Path, **options: Any) -> Path:
    """The weights as a GGUF file."""
    from plait.train.gguf import write_gguf

    return write_gguf(path, weights(), CONFIG, {"plait.config": '{"format": "multiverse"}'}, **options)


def layout(context: Context) -> tuple[list[int], list[int], npt.NDArray[np.bool_]]:
    """Ids, positions and who sees whom, straight from the definition of a context."""
    ids: list[int] = []
    positions: list[int] = []
    seen: list[list[int]] = []

    def walk(parts: Context, visible: list[int], start: int) -> tuple[list[int], int]:
        for part in parts:
            if isinstance(part, Merge):
                ends = [walk(branch, visible, start) for branch in part.branches]
                visible = visible + [i for own, _ in ends for i in own if i not in set(visible)]
                start = max(end for _, end in ends)
                continue
            for id in part:
                visible = [*visible, len(ids)]
                ids.append(id)
                positions.append(start)
                seen.append(visible)
                start += 1
        return visible, start

    walk(context, [], 0)
    mask = np.zeros((len(ids), len(ids)), bool)
    for row, columns in enumerate(seen):
        mask[row, columns] = True
    return ids, positions, mask


def forward(context: Context) -> npt.NDArray[np.float64]:
    """Log-probabilities of the token after a context: one float64 forward, explicit mask and positions."""
    return scores(context, (0,))[0]


def scores(context: Context, following: Sequence[int]) -> npt.NDArray[np.float64]:
    """Log-probabilities at each of the ids that follow a context."""
    context = (*context, tuple(following[:-1])) if len(following) > 1 else context
    ids, positions, mask = layout(context)
    w = {name: tensor.astype(np.float64) for name, tensor in weights().items()}
    size = WIDTH // HEADS
    angles = np.outer(positions, 10000.0 ** (-np.arange(0, size, 2) / size))
    cos, sin = (np.concatenate([f(angles)] * 2, -1) for f in (np.cos, np.sin))

    def norm(x: Any, name: str) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[name]

    def rotate(x: Any) -> Any:
        return x * cos + np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    def heads(x: Any) -> Any:
        return x.reshape(len(ids), HEADS, size).swapaxes(0, 1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        h = norm(x, f"{at}input_layernorm.weight")
        q, k, v = (heads(h @ w[f"{at}self_attn.{n}_proj.weight"].T) for n in "qkv")
        scores = np.where(mask, rotate(q) @ rotate(k).swapaxes(1, 2) / np.sqrt(size), -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + mixed.swapaxes(0, 1).reshape(len(ids), WIDTH) @ w[f"{at}self_attn.o_proj.weight"].T
        h = norm(x, f"{at}post_attention_layernorm.weight")
        gate = h @ w[f"{at}mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"{at}mlp.up_proj.weight"].T)) @ w[f"{at}mlp.down_proj.weight"].T
    logits = norm(x[-len(following) :], "model.norm.weight") @ w["model.embed_tokens.weight"].T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
