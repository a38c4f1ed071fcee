"""A LoRA adapter, as peft saves it, added to the weights it belongs to: W + scale * alpha / rank * B A.

Reads the folder itself, so peft is not needed. Knows names and matrices, nothing of models.
Source: LoRA (Hu et al. 2021, arXiv:2106.09685); rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from plait.engines.torch.checkpoint import Checkpoint, load_safetensors
from plait.errors import ModelError

_PREFIX = "base_model.model."
_OTHERWISE = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules",
    "lora_bias": "biases of its own",
    "alora_invocation_tokens": "a part that only tokens behind an invocation see",
    "layer_replication": "layers used twice",
    **dict.fromkeys(("arrow_config", "kasa_config", "use_bdlora", "use_qalora"), "another sum"),
}
"""What peft may also save, and this does not add."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin (`init_lora_weights`) that take something out of the base weights: the adapter is for what is left."""


def with_lora(checkpoint: Checkpoint, folder: str | Path, *, scale: float = 1.0) -> Checkpoint:
    """Weights with an adapter added, in the dtype that they have; the sum itself is taken in float32.

    Args:
        folder: `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ModelError: The folder is missing or damaged, is no plain LoRA, or belongs to other weights.
        EngineUnavailable: safetensors is not installed.
    """
    folder = Path(folder).expanduser()
    config = _config(folder)
    pairs = _pairs(folder, load_safetensors(folder / "adapter_model.safetensors"))
    weights = dict(checkpoint.weights)
    for name, (a, b) in pairs.items():
        at = f"{name}.weight"
        if at not in weights or (name == "lm_head" and checkpoint.config.get("tie_word_embeddings")):
            raise ModelError(f"{folder} adapts {name}, which these weights do not have")
        weight = torch.as_tensor(weights[at])
        if b.shape[0] != weight.shape[0] or a.shape[1] != weight.shape[1] or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"{folder} adapts {name} by {list(b.shape)} x {list(a.shape)}; its weight has {list(weight.shape)}"
            )
        rank, alpha = a.shape[0], _of(config, "alpha_pattern", name, config["lora_alpha"])
        factor = scale * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        weights[at] = (weight.float() + factor * (b.float() @ a.float())).to(weight.dtype)
    return replace(checkpoint, weights=weights)


def _config(folder: Path) -> Mapping[str, Any]:
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"cannot read {file}: {exc}; a LoRA adapter is a folder as peft saves it") from exc
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA" or not isinstance(config.get("lora_alpha"), int | float):
        raise ModelError(f"{folder} is a {kind} adapter; the torch engine adds LORA only, with a lora_alpha")
    for key, what in _OTHERWISE.items():
        if config.get(key):
            raise ModelError(f"{folder} is a LoRA with {what} ({key}); merge it with peft and load the result")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        raise ModelError(
            f"{folder} was begun with {config['init_lora_weights']}, which changes the weights that it is for; convert"
            " it to a plain LoRA with peft (path_initial_model_for_weight_conversion)"
        )
    return config


def _pairs(folder: Path, tensors: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """A and B of each module."""
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        module, _, part = key.removeprefix(_PREFIX).rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise ModelError(f"{folder} holds {key}, which is neither lora_A nor lora_B of a linear layer")
        found.setdefault(module, {})[part[0]] = tensor
    for module, parts in found.items():
        if len(parts) < 2:
            raise ModelError(f"{folder} has only lora_{next(iter(parts))} of {module}")
    return {module: (parts["A"], parts["B"]) for module, parts in found.items()}


def _of(config: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """A value that may be another for some modules, named by the end of their names or by a pattern."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
