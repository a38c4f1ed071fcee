"""GGUF files with a vocabulary of their own, as llama.cpp's converter writes them, over tiny random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, CONTEXT = 32, 512
NORMAL, UNKNOWN, CONTROL, USERS, BYTE = 1, 2, 3, 4, 6
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ("t h", "th e", "Ġ s", "Ġs k", "Ġsk y", "i s", "Ġ is", "Ġ b", "l u", "lu e", "Ġb lue", "Ġ Ġ", "1 2")


def alphabet() -> list[str]:
    """GPT-2's: a printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


USERS_TOKENS = ("<think>", "</think>", "<Parallel>")


def tokens_of_bytes(users: Sequence[str] = USERS_TOKENS) -> list[str]:
    """Bytes, what merges make of them, tokens for control, tokens that users added."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    return [*alphabet(), *merged, "<|endoftext|>", "<|im_start|>", "<|im_end|>", *users]


def write_bytes(path: Path, *, template: str | None = CHATML, users: Sequence[str] = USERS_TOKENS) -> Path:
    """Byte-level BPE, like Qwen's or Llama 3's."""
    tokens = tokens_of_bytes(users)
    kinds = [NORMAL] * (len(tokens) - 3 - len(users)) + [CONTROL] * 3 + [USERS] * len(users)
    with _writer(path, len(tokens)) as writer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(list(MERGES))
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
        writer.add_add_bos_token(False)
        if template is not None:
            writer.add_chat_template(template)
    return path


def write_pieces(path: Path) -> Path:
    """SentencePiece, like Llama 2's: a space before a text, bytes where no piece fits."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "▁the", "sk", "sky", "▁sky", "is", "▁is"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *dict.fromkeys(words)]
    with _writer(path, len(tokens)) as writer:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_token_types([UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)
    return path


@contextmanager
def _writer(path: Path, vocab: int) -> Iterator[Any]:
    """A GGUF file of one random layer, to which a vocabulary is added."""
    from gguf import GGUFWriter

    writer, rng = GGUFWriter(str(path), "llama"), np.random.default_rng(0)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    yield writer
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = {f"blk.0.{name}": rng.standard_normal((WIDTH, WIDTH)) for name in matrices}
    tensors |= {name: np.ones(WIDTH) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    tensors["token_embd"] = rng.standard_normal((vocab, WIDTH))
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
