"""A causal model of transformers (Qwen3, Llama, ...) that trains on packed trees.

It takes what `Decoder` takes: ids, positions, labels, `prev`, and visibility as intervals. On CUDA attention is
FlexAttention over a block mask that those intervals make, so no T x T array exists; elsewhere SDPA with a dense mask.
Knows nothing of trees, data and losses. Facts: transformers 5.23, peft 0.21, torch 2.13.

Shapes: R rows, T slots of a row, N hidden spans, V vocabulary, W trained slots.
"""

# transformers and peft are not among what the types are checked with.
# pyright: reportMissingImports=false

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plait.errors import ModelError, RequestError, needs
from plait.tokenizer.fast import FastTokenizer
from plait.train import machine
from plait.train.pretrained.config import BaseConfig
from plait.train.ranks import whole

try:
    import transformers
except ImportError as exc:
    raise RequestError(f"{needs('a model of transformers', 'hf')} ({exc})") from exc


_SLOTS = 1024
"""Whose logits exist at a time."""


class Pretrained(nn.Module):
    """A model with its tokenizer.

    Args:
        inner: A causal model of transformers, or one that peft wrapped.
        fast: Its tokenizer, a fast one of transformers.
        flex: Whether attention is FlexAttention.
        bf16: Whether it multiplies in bfloat16.
    """

    def __init__(self, inner: Any, fast: Any, *, flex: bool = False, bf16: bool = False) -> None:
        super().__init__()
        self.inner, self.fast, self.flex, self.bf16 = inner, fast, flex, bf16
        self.tokenizer = FastTokenizer.of_fast(fast, eos_ids=[c.eos_token_id for c in _configs(self.plain)])

    @property
    def plain(self) -> Any:
        """The model without peft's wrapper; its layers hold the adapters all the same."""
        return self.inner.get_base_model() if hasattr(self.inner, "get_base_model") else self.inner

    @property
    def layers(self) -> nn.ModuleList:
        return self.plain.get_decoder().layers

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def compile_parts(self) -> None:
        """Nothing: flex attention compiles itself."""

    def biases(self, end: Tensor, hide_lo: Tensor, hide_hi: Tensor) -> Any:
        """Visibility as this model's attention takes it: a `BlockMask`, or bool [R, 1, T, T], True where seen."""
        mask = visible(*(t.to(self.device) for t in (end, hide_lo, hide_hi)))
        rows, slots = end.shape
        if self.flex:
            from torch.nn.attention.flex_attention import create_block_mask

            return create_block_mask(mask, rows, None, slots, slots, device=self.device)
        row = torch.arange(rows, device=self.device)[:, None, None]
        slot = torch.arange(slots, device=self.device)
        return mask(row, None, slot[None, :, None], slot[None, None, :])[:, None]

    def losses(self, token_ids: Tensor, position_ids: Tensor, labels: Tensor, prev: Tensor, biases: Any) -> Tensor:
        """Negative log-likelihood [R, T] of each label by the logits at its `prev`, on the CPU; 0 where it is -100."""
        nll, _ = self(token_ids, position_ids, labels, prev, biases)
        where = torch.nonzero(labels >= 0, as_tuple=True)
        return torch.zeros(labels.shape, dtype=nll.dtype).index_put(where, nll.cpu())

    def forward(
        self, token_ids: Tensor, position_ids: Tensor, labels: Tensor, prev: Tensor, biases: Any
    ) -> tuple[Tensor, Tensor]:
        """Of the trained slots in order, [W]: the label's negative log-likelihood, and whether it is the likeliest.

        The head is asked for those slots alone, some at a time, and again in the backward pass: logits of all of them
        would be the largest array there is, V being in the hundred thousands.
        """
        ids, positions, labels, prev = (t.to(self.device) for t in (token_ids, position_ids, labels, prev))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.plain.get_decoder()(
                input_ids=ids, position_ids=positions, attention_mask=biases, use_cache=False
            ).last_hidden_state
            row, slot = torch.nonzero(labels >= 0, as_tuple=True)
            hidden, labels = hidden[row, prev[row, slot]], labels[row, slot]
            scored = partial(checkpoint, self._scored, use_reentrant=False) if hidden.requires_grad else self._scored
            parts = [scored(*part) for part in zip(hidden.split(_SLOTS), labels.split(_SLOTS), strict=True)]
        nll, hits = zip(*parts, strict=True)
        return torch.cat(nll), torch.cat(hits)

    def _scored(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.plain.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels

    def trained_state(self) -> dict[str, Tensor]:
        """The weights that training changes, by name."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: t for name, t in self.state_dict().items() if name in trained}

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `trained_state`.

        Raises:
            ModelError: The names are not the ones that are trained here.
        """
        expected = set(self.trained_state())
        if expected != set(state):
            odd = sorted(expected ^ set(state))[0]
            raise ModelError(f"the checkpoint trains other weights than this run: {odd}")
        self.load_state_dict(dict(state), strict=False)

    def merged(self) -> Any:
        """The model of transformers with its adapters added in; a copy where there are any."""
        if self.inner is self.plain:
            return self.inner
        return copy.deepcopy(self.inner).merge_and_unload()

    def exported(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights under the names of transformers, and `config.json`: what the torch engine takes.

        A matrix with an adapter is W + s * B A, in float32 (LoRA, Hu et al. 2021, arXiv:2106.09685); a table whose
        tags learn by themselves has their rows in place. Where weights are sharded, every process has to ask.
        """
        model = self.plain
        state = {name: whole(t.detach()) for name, t in model.state_dict().items()}
        weights: dict[str, Tensor] = {}
        for name, tensor in state.items():
            at, adapted, kind = name.rpartition("base_layer.")
            if not adapted:
                if not any(part in name for part in (".lora_", ".trainable_tokens_")):
                    weights[name] = tensor
                continue
            module = model.get_submodule(at.removesuffix("."))
            if (low := state.get(f"{at}lora_A.default.weight")) is not None and kind == "weight":
                high = state[f"{at}lora_B.default.weight"]
                tensor = tensor.float() + module.scaling["default"] * (high.float() @ low.float())
            if (rows := state.get(f"{at}trainable_tokens_delta.default")) is not None:
                ids = torch.tensor(module.token_indices["default"], device=tensor.device)
                tensor = tensor.index_copy(0, ids, rows.to(tensor.dtype))
            weights[at.removesuffix("token_adapter.") + kind] = tensor
        config = model.config.to_dict()
        if config.get("tie_word_embeddings"):
            weights.pop("lm_head.weight", None)
        return weights, config

    def save(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write a folder that transformers and the torch engine read; adapters are merged in.

        Args:
            about: Kept in `config.json` under `plait`.
        """
        model = self.merged()
        if about is not None:
            model.config.plait = dict(about)
        model.save_pretrained(folder)
        self.fast.save_pretrained(folder)


def _configs(model: Any) -> list[Any]:
    """What is saved as `generation_config.json` and `config.json`."""
    return [config for config in (getattr(model, "generation_config", None), model.config) if config is not None]


def visible(end: Tensor, hide_lo: Tensor, hide_hi: Tensor) -> Callable[[Any, Any, Any, Any], Tensor]:
    """FlexAttention's `mask_mod` for packed trees: row, head, query, key to whether the query sees the key.

    A key is seen from itself on to its `end`, but for its hidden spans.

    Args:
        end: [R, T].
        hide_lo, hide_hi: [R, T, N].
    """
    spans = hide_lo.shape[-1]

    def mask(row: Any, head: Any, query: Any, key: Any) -> Tensor:
        seen = (key <= query) & (query < end[row, key])
        for n in range(spans):
            seen = seen & ~((query >= hide_lo[row, key, n]) & (query < hide_hi[row, key, n]))
        return seen

    return mask


def add_control_tokens(model: Any, tokenizer: Any, tags: Sequence[str]) -> list[int]:
    """Make each tag one token, whose vectors start as the mean of the pieces that it was written in.

    Spare rows of the embedding, which many models have, are used before it grows.

    Args:
        model: A causal model of transformers.
        tokenizer: A fast tokenizer of transformers.

    Returns:
        The ids that are new.
    """
    known = tokenizer.get_added_vocab()
    new = [tag for tag in dict.fromkeys(tags) if tag not in known]
    pieces = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in new}
    tokenizer.add_tokens([transformers.AddedToken(tag, special=True, normalized=False) for tag in new])
    ids = tokenizer.convert_tokens_to_ids(new)
    inputs = model.get_input_embeddings().weight
    if len(tokenizer) > inputs.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = {id(t.weight): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for table in tables.values():
            for tag, at in zip(new, ids, strict=True):
                table[at] = table[pieces[tag]].float().mean(0).to(table.dtype)
    return ids


def load(config: BaseConfig, *, tags: Sequence[str], bf16: bool = False) -> Pretrained:
    """Read a model, with these tags as tokens, ready to be trained.

    Args:
        bf16: Whether it multiplies in bfloat16.

    Raises:
        ModelError: It cannot be read.
        RequestError: peft is needed and missing.
    """
    device = machine.device(config.device)
    flex = config.attention == "flex" or (config.attention == "auto" and device.startswith("cuda"))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.path)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            config.path,
            dtype=getattr(torch, config.dtype),
            attn_implementation="flex_attention" if flex else "sdpa",
        )
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(f"transformers cannot read {config.path}: {exc}") from exc
    new = add_control_tokens(model, tokenizer, tags)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if config.lora_rank:
        model = _adapted(model, config, new or tokenizer.convert_tokens_to_ids(list(tags)))
    model.to(device).train()
    return Pretrained(model, tokenizer, flex=flex, bf16=bf16)


def _adapted(model: Any, config: BaseConfig, tokens: Sequence[int]) -> Any:
    """Adapters on the matrices, and the vectors of the tags themselves: a frozen tag would stay a mean of pieces."""
    try:
        import peft
    except ImportError as exc:
        raise RequestError(f"{needs('lora_rank', 'hf')} ({exc})") from exc
    # A head of its own learns the tags too, or they would be said as seldom as their pieces.
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    rows = list(tokens) if tied else {"embed_tokens": list(tokens), "lm_head": list(tokens)}
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules=list(config.lora_targets),
        trainable_token_indices=rows if tokens else None,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora)
