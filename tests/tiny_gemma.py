"""A tiny Gemma 3 with random weights for tests: sliding windows in all layers but one, as a GGUF and as plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.types import Context
from tiny_llama import layout

VOCAB, WIDTH, LAYERS, HEADS, SIZE, HIDDEN, WINDOW = 48, 64, 3, 2, 32, 96, 16
_GLOBAL = 3
"""Every third layer sees everything."""


@lru_cache
def weights() -> dict[str, npt.NDArray[Any]]:
    """Random, under llama.cpp's names."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int, scale: float = 2.0) -> npt.NDArray[Any]:
        return (rng.standard_normal((rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

    def norm(size: int) -> npt.NDArray[Any]:
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    tensors = {"token_embd": matrix(VOCAB, WIDTH, 1.0), "output_norm": norm(WIDTH)}
    for i in range(LAYERS):
        at = f"blk.{i}."
        tensors |= {
            f"{at}attn_q": matrix(HEADS * SIZE, WIDTH),
            f"{at}attn_k": matrix(SIZE, WIDTH),
            f"{at}attn_v": matrix(SIZE, WIDTH),
            f"{at}attn_output": matrix(WIDTH, HEADS * SIZE),
            f"{at}attn_q_norm": norm(SIZE),
            f"{at}attn_k_norm": norm(SIZE),
            f"{at}attn_norm": norm(WIDTH),
            f"{at}post_attention_norm": norm(WIDTH),
            f"{at}ffn_norm": norm(WIDTH),
            f"{at}post_ffw_norm": norm(WIDTH),
            f"{at}ffn_gate": matrix(HIDDEN, WIDTH),
            f"{at}ffn_up": matrix(HIDDEN, WIDTH),
            f"{at}ffn_down": matrix(WIDTH, HIDDEN),
        }
    return tensors


def write(path: Path) -> Path:
    """The weights as a GGUF file."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(SIZE)
    writer.add_value_length(SIZE)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(WINDOW)
    writer.add_sliding_window_pattern(_GLOBAL)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in weights().items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scores(context: Context, following: Sequence[int]) -> npt.NDArray[np.float64]:
    """Log-probabilities at each of the ids that follow a context: one float64 forward, explicit masks."""
    context = (*context, tuple(following[:-1])) if len(following) > 1 else context
    ids, positions, mask = layout(context)
    near = np.subtract.outer(positions, positions) < WINDOW
    w = {name: tensor.astype(np.float64) for name, tensor in weights().items()}

    def norm(x: Any, name: str) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[name]

    x = w["token_embd"][ids] * np.sqrt(WIDTH)
    for i in range(LAYERS):
        at, sees_all = f"blk.{i}.", i % _GLOBAL == _GLOBAL - 1
        angles = np.outer(positions, (1e6 if sees_all else 1e4) ** (-np.arange(0, SIZE, 2) / SIZE))
        cos, sin = (np.concatenate([f(angles)] * 2, -1) for f in (np.cos, np.sin))

        def rotate(x: Any, cos: Any = cos, sin: Any = sin) -> Any:
            return x * cos + np.concatenate([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1) * sin

        h = norm(x, f"{at}attn_norm")
        q = (h @ w[f"{at}attn_q"].T).reshape(len(ids), HEADS, SIZE).swapaxes(0, 1)
        k, v = h @ w[f"{at}attn_k"].T, h @ w[f"{at}attn_v"].T
        q, k = rotate(norm(q, f"{at}attn_q_norm")), rotate(norm(k, f"{at}attn_k_norm"))
        seen = mask if sees_all else mask & near
        weight = np.where(seen, q @ k.T / np.sqrt(SIZE), -np.inf)
        weight = np.exp(weight - weight.max(-1, keepdims=True))
        mixed = (weight / weight.sum(-1, keepdims=True)) @ v
        mixed = mixed.swapaxes(0, 1).reshape(len(ids), HEADS * SIZE) @ w[f"{at}attn_output"].T
        x = x + norm(mixed, f"{at}post_attention_norm")
        h = norm(x, f"{at}ffn_norm")
        gate = h @ w[f"{at}ffn_gate"].T
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + norm((gate * (h @ w[f"{at}ffn_up"].T)) @ w[f"{at}ffn_down"].T, f"{at}post_ffw_norm")
    logits = norm(x[-len(following) :], "output_norm") @ w["token_embd"].T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
