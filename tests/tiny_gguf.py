"""Writes GGUF headers by hand, so that loading is tested without the packages that training needs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from plait.spelling import describe
from plait.tasks.vocabulary import TOKENIZER


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(metadata: dict[str, str | int], *, num_weights: int = 64) -> bytes:
    """A file with one F32 tensor of zeros."""
    out = b"GGUF" + struct.pack("<IQQ", 3, 1, len(metadata))
    for key, value in metadata.items():
        out += string(key)
        out += struct.pack("<I", 8) + string(value) if isinstance(value, str) else struct.pack("<II", 4, value)
    out += string("token_embd.weight") + struct.pack("<IQIQ", 1, num_weights, 0, 0)
    return out + bytes(-len(out) % 32) + bytes(4 * num_weights)


def config(**changes: Any) -> dict[str, Any]:
    """What an adaptive model says under `plait.config`."""
    base: dict[str, Any] = {
        "schema": 1,
        "format": "multiverse",
        "join": "merge",
        "tokenizer": describe(TOKENIZER),
        "train": {"data": {"mixture": {"long_multiplication": 2.0, "control": 1.0, "bundle": 0.0}}},
        "scores": {"accuracy": 0.99},
    }
    return base | changes


def write_random_weights(path: Path, *, max_context: int = 192) -> Path:
    """A model that llama.cpp runs: one layer, random; it says nothing sensible. Needs the gguf package."""
    import numpy as np

    from plait.train.gguf import write_gguf

    rng, width, inner, vocab = np.random.default_rng(0), 32, 64, len(TOKENIZER.tokens)
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    tensors = {f"model.layers.0.{name}.weight": rng.standard_normal(shape) for name, shape in shapes.items()}
    tensors["model.embed_tokens.weight"] = rng.standard_normal((vocab, width))
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = np.ones(width)
    sizes = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": max_context,
    }
    return write_gguf(path, tensors, sizes, {"plait.config": json.dumps(config())})


def write_model(path: Path, **changes: Any) -> Path:
    about = {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "plait.config": json.dumps(config(**changes)),
    }
    path.write_bytes(gguf(about))
    return path
