"""Run folders on disk: checkpoints to go on from, and exports that other tools load.

A checkpoint records the trajectory format that its weights were trained in. The join is part of the function a model
computes, so loading weights under another format is refused instead of giving wrong answers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from plait.errors import ModelError
from plait.formats import format_class
from plait.tokenizer import FixedTokenizer
from plait.train.gguf import write_gguf
from plait.train.model import Decoder, ModelConfig, hf_config, to_hf

SCHEMA = 2


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; a reader finds the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save({"schema": SCHEMA, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load(path: Path, *, format: str | None = None) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: What `save` wrote.
        format: The format to use the weights in; None for any.

    Raises:
        ModelError: The file is missing, corrupt, of another schema, or trained in another format.
    """
    if not path.exists():
        raise ModelError(f"there is no checkpoint {path}; another run writes it, or `--set init=PATH` names one")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        schema, trained = state["schema"], state["config"]["data"]["format"]
    except Exception as exc:
        # Not all of it: torch goes on to advise loading the file without its guard against code in it.
        why = str(exc).partition("\n")[0].partition(". ")[0]
        raise ModelError(f"{path} is not a readable checkpoint ({type(exc).__name__}: {why})") from exc
    if schema != SCHEMA:
        raise ModelError(f"{path} has checkpoint schema {schema}; this Plait reads {SCHEMA}")
    if format is not None and format != trained:
        raise ModelError(f"{path} was trained in the {trained} format; it gives wrong answers in {format}")
    return state


def metrics_size(saved: Mapping[str, Any] | None) -> int:
    """Bytes of `metrics.jsonl` that belong to a checkpoint: none without one, all where it does not say."""
    return 0 if saved is None else saved.get("metrics", sys.maxsize)


def load_model(path: Path, *, format: str | None = None) -> Decoder:
    """The weights of a checkpoint as a model.

    Raises:
        ModelError: As `load`, or the weights do not fit the recorded sizes.
    """
    try:
        return model_of(load(path, format=format))
    except RuntimeError as exc:
        if isinstance(exc, ModelError):
            raise
        raise ModelError(f"the weights of {path} do not fit its config: {exc}") from exc


def model_of(state: Mapping[str, Any]) -> Decoder:
    """The weights of what `load` read, as a model."""
    model = Decoder(ModelConfig(**state["config"]["model"]))
    model.load_state_dict(state["model"])
    return model


def description(config: Mapping[str, Any], *, scores: Mapping[str, Any], tokenizer: FixedTokenizer) -> dict[str, Any]:
    """What travels with the weights under `plait.config`: how to read them and where they come from."""
    format = config["data"]["format"]
    return {
        "schema": SCHEMA,
        "format": format,
        "join": format_class(format).join_kind,
        "tokenizer": tokenizer.to_dict(),
        "train": dict(config),
        "scores": dict(scores),
    }


def export_gguf(
    path: Path, model: Decoder, *, about: Mapping[str, Any], dtype: Literal["F32", "F16", "Q8_0"] = "F32"
) -> None:
    """Write a model as one GGUF file, with `about` as JSON under `plait.config`."""
    write_gguf(path, to_hf(model), hf_config(model.config), {"plait.config": json.dumps(about)}, dtype)
