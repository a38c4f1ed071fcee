"""Small tokenizers of the kinds that models have, as transformers saves them. Needs the tokenizers package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["the sky is blue because the air scatters the light. What is 3+4? Answer: 7\n\n[INST] user assistant"] * 3
QWEN = (
    "{%- for m in messages %}{%- set said = m.content %}"
    "{%- if m.role == 'assistant' and '</think>' in said %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""As Qwen3's: what an assistant thought earlier is left out."""
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""As Llama 2's."""
KINDS = ("qwen", "llama-legacy", "llama-first", "llama-always", "neox")


def tokenizer(kind: str) -> Tokenizer:
    """`qwen` and `neox`: bytes; `llama`: a space before a text, by a normalizer or by Metaspace, and byte fallback."""
    return _llama(kind.partition("-")[2]) if kind.startswith("llama") else _bytes(kind)


def _bytes(kind: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    if kind == "neox":
        made.add_tokens([AddedToken(" " * n, normalized=True) for n in range(8, 1, -1)])
    return made


def _llama(prefix: str) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    plain = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)])
    numbers = [f"<0x{n:02X}>" for n in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *numbers], show_progress=False)
    )
    described = json.loads(made.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in special]
    made = Tokenizer.from_str(json.dumps(described))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def fast(kind: str, *, template: bool = True) -> Any:
    """The same as transformers has it in memory."""
    from transformers import PreTrainedTokenizerFast

    llama = kind.startswith("llama")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(kind),
        bos_token="<s>" if llama else None,
        eos_token="</s>" if llama else "<|im_end|>",
        chat_template=(LLAMA if llama else QWEN) if template else None,
    )


def write(folder: Path, kind: str, *, template: bool = True) -> Path:
    """A folder with everything of a model but its weights."""
    made = fast(kind, template=template)
    made.save_pretrained(folder)
    ends = [made.eos_token_id] if kind.startswith("llama") else [made.eos_token_id, made.encode("<|endoftext|>")[0]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ends[-1]}))
    return folder
