"""GGUF files as folders that transformers and vLLM load: weights, config, tokenizer. Needs the torch extra."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel

from plait.engines.torch.checkpoint import read_checkpoint
from plait.models import Model
from plait.tokenizer import FixedTokenizer


def write(model: Model, folder: Path) -> Path:
    """Write a model's GGUF file again in float32, with its vocabulary; its ids stay as they are."""
    assert model.path is not None
    fixed = model.tokenizer
    _write(model.path, folder, bos=fixed.bos_ids[0], eos=fixed.eos_ids[0], name=fixed.tokens.__getitem__)
    _tokenizer(fixed).save(str(folder / "tokenizer.json"))
    return folder


def write_numbered(path: Path, folder: Path) -> Path:
    """Write any GGUF file of Llama's shape again in float32. Its tokens are called by their ids, and never read."""
    config = _write(path, folder, bos=1, eos=2, name="<{}>".format)
    names = {f"<{id}>": id for id in range(config["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(names, unk_token="<0>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _write(path: Path, folder: Path, *, bos: int, eos: int, name: Callable[[int], str]) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: np.ascontiguousarray(w, dtype=np.float32) for name, w in checkpoint.weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        **checkpoint.config,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name(bos),
        "eos_token": name(eos),
        "clean_up_tokenization_spaces": False,
    }
    for file, content in (("config.json", config), ("tokenizer_config.json", described)):
        (folder / file).write_text(json.dumps(content))
    return config


def _tokenizer(fixed: FixedTokenizer) -> Tokenizer:
    """Longest match over the fixed list, as the model's own tokenizer, and its opening before a prompt."""
    tokenizer = Tokenizer(WordLevel({text: id for id, text in enumerate(fixed.tokens)}, unk_token="<pad>"))
    plain = sorted((t for t in fixed.tokens if t not in fixed.control), key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, plain))), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in sorted(fixed.control)])
    bos = fixed.bos_ids[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{fixed.tokens[bos]} $A", special_tokens=[(fixed.tokens[bos], bos)]
    )
    return tokenizer
