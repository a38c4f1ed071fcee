"""The tokenizer of a model by name: a folder, or what transformers finds under that name. Imports transformers late."""

# transformers is not among what the types are checked with.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from plait.tokenizer.fast import FastTokenizer


def open_tokenizer(model: str) -> tuple[Any, FastTokenizer]:
    """The tokenizer as transformers reads it, and the same one as Plait's own, with all that ends a text."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    fast = AutoTokenizer.from_pretrained(model)
    eos_ids: list[Any] = []
    for kind in (GenerationConfig, AutoConfig):
        try:
            eos_ids.append(kind.from_pretrained(model).eos_token_id)
        except (OSError, ValueError):
            # A tokenizer may be all there is under this name.
            continue
    return fast, FastTokenizer.of_fast(fast, eos_ids=eos_ids)
