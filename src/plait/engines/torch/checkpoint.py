"""Weights and sizes from disk: a folder as transformers writes it, or a GGUF file in Llama's shape.

Reads safetensors and `config.json` itself, so transformers is not needed. Weights come out under the names of
transformers, whatever the file. Knows nothing of the model that they make.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.errors import EngineUnavailable, ModelError, needs

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NOT_WEIGHTS = ("rope_freqs.weight", "rotary_emb.inv_freq")
"""Derived from the config; some files hold them all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model on its way into memory."""

    config: Mapping[str, Any]
    """As in `config.json`."""
    weights: Mapping[str, Any]
    """Arrays or tensors under the names of transformers."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a model.

    Args:
        path: A folder with `config.json` and `*.safetensors` (one file, or shards with their index), or a GGUF file.

    Raises:
        ModelError: It is missing, damaged, or neither of the two.
        EngineUnavailable: The package that reads it is not installed.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ModelError(f"there is no model file or folder {path}")
    return _gguf(path)


def _folder(path: Path) -> Checkpoint:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(
            f"cannot read {path / 'config.json'}: {exc}; a folder must be as transformers saves it"
        ) from exc
    if not isinstance(config, dict):
        raise ModelError(f"{path / 'config.json'} holds no object; a folder must be as transformers saves it")
    weights: dict[str, Any] = {}
    for file in _shards(path):
        weights |= load_safetensors(file)
    return Checkpoint(config=config, weights={n: w for n, w in weights.items() if not n.endswith(_NOT_WEIGHTS)})


def load_safetensors(file: Path) -> dict[str, Any]:
    """The tensors of a file.

    Raises:
        ModelError: It is missing or damaged.
        EngineUnavailable: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as exc:
        raise EngineUnavailable(needs(f"reading {file}", "torch")) from exc
    try:
        return load_file(file)
    except (OSError, SafetensorError) as exc:
        raise ModelError(f"cannot read {file}: {exc}") from exc


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise ModelError(f"{path} holds no *.safetensors; save the model with safe serialization")
        return found
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
        raise ModelError(f"cannot read {index}: {type(exc).__name__}: {exc}") from exc
    if lost := [name for name in names if not (path / name).is_file()]:
        raise ModelError(f"{path} lacks {lost[0]} ({len(lost)} of {len(names)} files missing)")
    return [path / name for name in names]


def _gguf(path: Path) -> Checkpoint:
    try:
        import gguf
    except ImportError as exc:
        raise EngineUnavailable(needs(f"reading {path}", "torch")) from exc
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        config = _config(path, fields, {tensor.name for tensor in reader.tensors})
        weights = {
            name: _ordered(name, gguf.quants.dequantize(tensor.data, tensor.tensor_type), config)
            for tensor in reader.tensors
            if (name := _name(path, tensor.name))
        }
    except ModelError:
        raise
    except Exception as exc:
        raise ModelError(f"cannot read {path} as GGUF: {type(exc).__name__}: {exc}") from exc
    config.setdefault("vocab_size", len(weights["model.embed_tokens.weight"]))
    return Checkpoint(config=config, weights=weights)


def _config(path: Path, fields: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ModelError(f"{path} is of architecture {kind!r}; the torch engine runs llama, qwen2 and qwen3")

    def of(key: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{key}", default)
        if value is None:
            raise ModelError(f"{path} lacks {kind}.{key}")
        return value

    scaling = of("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise ModelError(
            f"{path} scales its rotary embedding; the torch engine reads such models from safetensors only"
        )
    head_dim = of("attention.key_length", of("embedding_length") // of("attention.head_count"))
    config = {
        "model_type": kind,
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv", of("attention.head_count")),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_theta": of("rope.freq_base", 10000.0),
        "head_dim": head_dim,
        "partial_rotary_factor": of("rope.dimension_count", head_dim) / head_dim,
        "use_sliding_window": bool(of("attention.sliding_window", 0)),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return config


def _name(path: Path, name: str) -> str | None:
    """Under which name transformers has a tensor; None for one that is not a weight."""
    if name in _TOP:
        return _TOP[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, kind = rest.rpartition(".")
    if name.startswith("blk.") and part in _LAYER:
        return f"model.layers.{block}.{_LAYER[part]}.{kind}"
    if name in _NOT_WEIGHTS:
        return None
    raise ModelError(f"{path} holds {name}, which no model of this shape has")


def _ordered(name: str, array: npt.NDArray[Any], config: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Rows of Llama's q and k back from llama.cpp's pairs (x0 y0 ..) to halves (x0.. y0..)."""
    if config["model_type"] != "llama":
        return array
    for part, heads in _rotated(config):
        if f".{part}." in name:
            turned = array.reshape(heads, array.shape[0] // heads // 2, 2, -1).swapaxes(1, 2)
            return np.ascontiguousarray(turned.reshape(array.shape))
    return array


def _rotated(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    yield "q_proj", config["num_attention_heads"]
    yield "k_proj", config["num_key_value_heads"]
