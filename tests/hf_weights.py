"""The embedded model as a folder that transformers and vLLM load: weights, config, tokenizer. Needs the torch extra."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from plait.engines.torch.checkpoint import read_checkpoint
from plait.models import Model
from plait.tokenizer import FixedTokenizer


def write(model: Model, folder: Path) -> Path:
    """Write a model's GGUF file again in float32; its ids stay as they are."""
    assert model.path is not None
    checkpoint = read_checkpoint(model.path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: np.ascontiguousarray(w, dtype=np.float32) for name, w in checkpoint.weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = model.tokenizer
    config = {
        **checkpoint.config,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": tokenizer.bos_ids[0],
        "eos_token_id": tokenizer.eos_ids[0],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": tokenizer.tokens[tokenizer.bos_ids[0]],
                "eos_token": tokenizer.tokens[tokenizer.eos_ids[0]],
                "clean_up_tokenization_spaces": False,
            }
        )
    )
    _tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    return folder


def _tokenizer(fixed: FixedTokenizer) -> Tokenizer:
    """Longest match over the fixed list, as the model's own tokenizer."""
    tokenizer = Tokenizer(WordLevel({text: id for id, text in enumerate(fixed.tokens)}, unk_token="<pad>"))
    plain = sorted((t for t in fixed.tokens if t not in fixed.control), key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, plain))), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in sorted(fixed.control)])
    return tokenizer
