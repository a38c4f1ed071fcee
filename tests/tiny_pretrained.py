"""Tiny random models of transformers with a tokenizer of characters, as folders. Needs the hf extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]
SPECIAL = ("<unk>", "<s>", "</s>")


def write(folder: Path, kind: str, *, tied: bool = True, spare: int = 0, fast: Any = None) -> Path:
    """A folder as transformers saves it.

    Args:
        kind: `qwen3` or `llama`.
        spare: Rows of the embedding beyond the vocabulary.
        fast: Its tokenizer instead of one of characters.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    if fast is None:
        words = {text: id for id, text in enumerate((*SPECIAL, *CHARACTERS))}
        inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        inner.decoder = decoders.Fuse()
        fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    sizes: dict[str, Any] = {
        "vocab_size": len(fast) + spare,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
        "initializer_range": 0.05,
    }
    torch.manual_seed(0)
    configs = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config, model = configs[kind]
    model(config(**sizes)).save_pretrained(folder)
    return folder
