"""The embedded models, any other weights that Plait trained, and gold traces in their place."""

from __future__ import annotations

from plait.models.gold import gold_model, gold_tree
from plait.models.model import DEFAULT, NAMES, WEIGHTS, Model, load_model, prompt_ids, response_text, twin_name

__all__ = [
    "DEFAULT",
    "NAMES",
    "WEIGHTS",
    "Model",
    "gold_model",
    "gold_tree",
    "load_model",
    "prompt_ids",
    "response_text",
    "twin_name",
]
