"""Writes a Llama-shaped model as one GGUF file, the format that llama.cpp and every engine of Plait reads.

Takes plain numpy arrays under Hugging Face tensor names and knows nothing of how they were trained. The file has no
tokenizer (`no_vocab`): Plait speaks token ids, and what belongs to the weights (tokenizer, format, join, scores)
travels as strings in `metadata`, by convention one JSON object under the key `plait.config`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

from plait.errors import RequestError

DType = Literal["F32", "F16", "Q8_0"]
CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
"""What `config` must hold, named as in a Hugging Face `LlamaConfig`."""

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FILE_TYPE = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_QUANT = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def write_gguf(
    path: str | Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    dtype: DType = "F32",
) -> Path:
    """Write the weights of a Llama-shaped model as a GGUF file.

    Matrices are stored in `dtype`, norms always in F32. The file appears under its name only when it is complete.

    Args:
        tensors: `model.embed_tokens.weight`, `model.norm.weight`, `model.layers.N.self_attn.q_proj.weight` and so on;
            `lm_head.weight` only if it is not tied to the embedding.
        config: The keys of `CONFIG_KEYS`; optionally `num_key_value_heads`, `head_dim`, `rms_norm_eps` (1e-5) and
            `rope_theta` (10000).
        metadata: String keys and values stored in the file's header.

    Raises:
        RequestError: A tensor or key is missing or unknown, or a row does not fit Q8_0's blocks of 32.
    """
    if dtype not in _QUANT:
        raise RequestError(f"GGUF dtype is {dtype!r}; it must be one of {', '.join(_QUANT)}")
    missing = [k for k in CONFIG_KEYS if k not in config]
    if missing:
        raise RequestError(f"the model config lacks {', '.join(missing)}")
    arrays = _renamed(tensors, config)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    try:
        _add_header(writer, config, dtype)
        for key, value in (metadata or {}).items():
            writer.add_string(key, value)
        for name, array in arrays.items():
            _add_tensor(writer, name, array, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _add_header(writer: gguf.GGUFWriter, config: Mapping[str, Any], dtype: DType) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5))
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_FILE_TYPE[dtype])


def _renamed(tensors: Mapping[str, npt.NDArray[Any]], config: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The tensors under llama.cpp's names, rows of q and k in llama.cpp's order."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for i in range(config["num_hidden_layers"]):
        for theirs, ours in _LAYER.items():
            names[f"model.layers.{i}.{theirs}.weight"] = f"blk.{i}.{ours}.weight"
    missing = [n for n in names if n not in tensors]
    if missing:
        raise RequestError(f"the weights lack {missing[0]} ({len(missing)} tensors missing)")
    if "lm_head.weight" in tensors:
        names["lm_head.weight"] = "output.weight"
    unknown = sorted(set(tensors) - set(names))
    if unknown:
        raise RequestError(f"the weights hold {unknown[0]}, which no Llama has ({len(unknown)} unknown tensors)")
    out: dict[str, npt.NDArray[Any]] = {}
    for theirs, ours in names.items():
        array = np.asarray(tensors[theirs], dtype=np.float32)
        if ours.endswith("attn_q.weight"):
            array = _interleaved(array, heads)
        elif ours.endswith("attn_k.weight"):
            array = _interleaved(array, kv_heads)
        out[ours] = np.ascontiguousarray(array)
    return out


def _interleaved(array: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of each head from halves (x0.. y0..), as Hugging Face rotates, to pairs (x0 y0 ..), as llama.cpp does."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: npt.NDArray[Any], dtype: DType) -> None:
    if array.ndim < 2 or dtype == "F32":
        writer.add_tensor(name, array)
        return
    if dtype == "Q8_0" and array.shape[-1] % 32:
        raise RequestError(f"{name} has rows of {array.shape[-1]}; Q8_0 needs a multiple of 32")
    writer.add_tensor(name, gguf.quants.quantize(array, _QUANT[dtype]), raw_dtype=_QUANT[dtype])
