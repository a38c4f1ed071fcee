"""A small decoder in Llama's shape (RMSNorm, RoPE, SwiGLU, tied embeddings, no biases) for packed trees.

Knows nothing of trees, formats or files: it is given ids, positions and intervals of visibility, and gives logits.
Shape: LLaMA (Touvron et al. 2023, arXiv:2302.13971).

Shapes: R rows, T slots of a row, Q queries and K keys of one attention block, H heads, D head width, C width,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.errors import ModelError, RequestError

EPS = 1e-5
HIDDEN = -30000.0
"""Added to a score that must not be seen: far below any real one, and representable in half precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of a decoder."""

    vocab_size: int
    width: int = 192
    layers: int = 4
    heads: int = 3
    ff: int = 0
    """Inner width of the feed-forward block; 0 takes 8/3 of the width, rounded up to a multiple of 32."""
    theta: float = 10000.0
    max_positions: int = 2048
    query_block: int = 64
    """Queries of one attention block: each block reads keys up to its own end only. Speed, not meaning."""

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise RequestError(f"width {self.width} is not an even head width times {self.heads} heads")
        for name in ("vocab_size", "layers", "max_positions", "query_block"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def inner(self) -> int:
        return self.ff or math.ceil(self.width * 8 / 3 / 32) * 32


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), EPS)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.width
        self.config = config
        self.norm_attention = RMSNorm(c)
        self.norm_mlp = RMSNorm(c)
        self.qkv = nn.Linear(c, 3 * c, bias=False)
        self.out = nn.Linear(c, c, bias=False)
        self.gate_up = nn.Linear(c, 2 * config.inner, bias=False)
        self.down = nn.Linear(config.inner, c, bias=False)

    def forward(self, x_RTC: Tensor, cos: Tensor, sin: Tensor, biases: Sequence[Tensor]) -> Tensor:
        rows, slots, width = x_RTC.shape
        heads, dim = self.config.heads, self.config.head_dim
        qkv = self.qkv(self.norm_attention(x_RTC)).view(rows, slots, 3, heads, dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = _rotate(q, cos, sin) * dim**-0.5, _rotate(k, cos, sin)
        outs: list[Tensor] = []
        at = 0
        for bias in biases:
            queries, keys = bias.shape[-2:]
            outs.append(_attend(q[:, :, at : at + queries], k[:, :, :keys], v[:, :, :keys], bias))
            at += queries
        y = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
        x_RTC = x_RTC + self.out(y.transpose(1, 2).reshape(rows, slots, width))
        gate, up = self.gate_up(self.norm_mlp(x_RTC)).chunk(2, -1)
        return x_RTC + self.down(F.silu(gate) * up)


class _Attention(torch.autograd.Function):
    """Softmax attention with an additive bias, keeping one array of probabilities in the inputs' precision.

    Measured (0.8k-slot rows, one core with AVX-512 BF16): a quarter faster than autograd's own, which keeps float32
    scores too; SDPA with a mask has half the speed.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.matmul(q, k.transpose(-1, -2)).to(wide) + bias
        p = torch.softmax(scores, -1).to(v.dtype)
        out = torch.matmul(p, v)
        ctx.save_for_backward(q, k, v, p, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, out = ctx.saved_tensors
        (d_out,) = grads
        wide = torch.promote_types(q.dtype, torch.float32)
        d_v = torch.matmul(p.transpose(-1, -2), d_out)
        d_p = torch.matmul(d_out, v.transpose(-1, -2))
        # The sum over keys of p times its gradient equals that over D of the output times its gradient.
        mean = (d_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        d_scores = (p.to(wide) * (d_p.to(wide) - mean)).to(q.dtype)
        return torch.matmul(d_scores, k), torch.matmul(d_scores.transpose(-1, -2), q), d_v, None


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out = _Attention.apply(q, k, v, bias)
    assert isinstance(out, Tensor)
    return out


class Decoder(nn.Module):
    """The model. `forward` gives logits, `losses` the negative log-likelihood of every label."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        freq = config.theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angle = torch.outer(torch.arange(config.max_positions, dtype=torch.float64), freq)
        angle = torch.cat([angle, angle], -1)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = 0.05 if name == "embed.weight" else 0.02
                if name.endswith(("out.weight", "down.weight")):
                    std /= math.sqrt(2 * config.layers)
                nn.init.normal_(weight, 0.0, std)

    @property
    def num_parameters(self) -> int:
        """Trained numbers, the embedding included (it is also the head)."""
        return sum(p.numel() for p in self.parameters())

    def biases(self, end: Tensor, hide_lo: Tensor, hide_hi: Tensor) -> list[Tensor]:
        """What `forward` and `losses` take as `biases`: see `visibility`."""
        block, dtype = self.config.query_block, self.norm.weight.dtype
        return visibility(end, hide_lo, hide_hi, block=block, dtype=dtype)

    def hidden(self, token_ids: Tensor, position_ids: Tensor, biases: Sequence[Tensor]) -> Tensor:
        """What the last layer gives, [R, T, C]; not yet normed."""
        x_RTC = self.embed(token_ids)
        if torch.is_autocast_enabled("cpu"):
            x_RTC = x_RTC.to(torch.get_autocast_dtype("cpu"))
        cos = self.cos[position_ids][:, None].to(x_RTC.dtype)
        sin = self.sin[position_ids][:, None].to(x_RTC.dtype)
        for layer in self.layers:
            x_RTC = layer(x_RTC, cos, sin, biases)
        return x_RTC

    def head(self, x_RTC: Tensor) -> Tensor:
        return F.linear(self.norm(x_RTC), self.embed.weight)

    def forward(self, token_ids: Tensor, position_ids: Tensor, biases: Sequence[Tensor]) -> Tensor:
        """Logits [R, T, V] of every token."""
        return self.head(self.hidden(token_ids, position_ids, biases))

    def nll(self, x_RTC: Tensor, labels: Tensor, prev: Tensor) -> Tensor:
        """Negative log-likelihood [R, T] of each label given `hidden`, 0 where the label is -100.

        A label's logits are those at its `prev`, not at the slot before it: one token at a fork predicts the first
        token of every branch.
        """
        logits = self.head(x_RTC)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows, slots, vocab = logits.shape
        flat = torch.log_softmax(logits, -1).view(rows, slots * vocab)
        picked = flat.gather(1, prev * vocab + labels.clamp(min=0))
        return torch.where(labels >= 0, -picked, 0.0)

    def losses(
        self, token_ids: Tensor, position_ids: Tensor, labels: Tensor, prev: Tensor, biases: Sequence[Tensor]
    ) -> Tensor:
        """`nll` of a packed batch."""
        return self.nll(self.hidden(token_ids, position_ids, biases), labels, prev)

    def compile_parts(self) -> None:
        """Compile what a step spends its time in, part by part.

        A layer is compiled once for all layers: a third of the time that the whole model takes, for nearly its speed.
        Biases are a graph of their own, for inside a layer they would be computed again by every head.
        """
        for layer in self.layers:
            layer.compile(dynamic=False)
        self.biases = torch.compile(self.biases, dynamic=False)
        self.nll = torch.compile(self.nll, dynamic=False)


def visibility(end: Tensor, hide_lo: Tensor, hide_hi: Tensor, *, block: int, dtype: torch.dtype) -> list[Tensor]:
    """What is added to the scores, one [R, 1, Q, K] for each block of queries: 0 for a visible key, else `HIDDEN`.

    A block reads keys up to its own end, so the upper triangle is neither built nor multiplied.
    """
    slots = end.shape[1]
    biases: list[Tensor] = []
    for lo in range(0, slots, block):
        hi = min(slots, lo + block)
        query = torch.arange(lo, hi, device=end.device)[None, :, None]
        key = torch.arange(hi, device=end.device)[None, None, :]
        seen = (key <= query) & (query < end[:, None, :hi])
        for n in range(hide_lo.shape[2]):
            seen = seen & ~((query >= hide_lo[:, None, :hi, n]) & (query < hide_hi[:, None, :hi, n]))
        biases.append(torch.where(seen, 0.0, HIDDEN).to(dtype)[:, None])
    return biases


def to_hf(model: Decoder) -> dict[str, np.ndarray]:
    """Weights as float32 under the names of `LlamaForCausalLM`."""
    out: dict[str, Tensor] = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        q, k, v = layer.qkv.weight.chunk(3)
        gate, up = layer.gate_up.weight.chunk(2)
        tensors = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.out.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down.weight,
            "input_layernorm": layer.norm_attention.weight,
            "post_attention_layernorm": layer.norm_mlp.weight,
        }
        out |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in tensors.items()}
    return {name: np.ascontiguousarray(t.detach().float().numpy()) for name, t in out.items()}


def from_hf(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Decoder:
    """The inverse of `to_hf`.

    Raises:
        ModelError: A weight is missing or has another shape than the sizes say.
    """
    model = Decoder(config)
    try:
        state = {
            "embed.weight": weights["model.embed_tokens.weight"],
            "norm.weight": weights["model.norm.weight"],
        }
        for i in range(config.layers):
            of = {n: weights[f"model.layers.{i}.{n}.weight"] for n in _HF_LAYER}
            state |= {
                f"layers.{i}.qkv.weight": np.concatenate([of[f"self_attn.{x}_proj"] for x in "qkv"]),
                f"layers.{i}.out.weight": of["self_attn.o_proj"],
                f"layers.{i}.gate_up.weight": np.concatenate([of["mlp.gate_proj"], of["mlp.up_proj"]]),
                f"layers.{i}.down.weight": of["mlp.down_proj"],
                f"layers.{i}.norm_attention.weight": of["input_layernorm"],
                f"layers.{i}.norm_mlp.weight": of["post_attention_layernorm"],
            }
        model.load_state_dict({name: torch.from_numpy(np.array(w, np.float32)) for name, w in state.items()})
    except (KeyError, RuntimeError) as exc:
        raise ModelError(f"the weights do not fit {config}: {exc}") from exc
    return model


_HF_LAYER = (
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)


def hf_config(config: ModelConfig) -> dict[str, object]:
    """`config.json` of the same model for transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.inner,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": EPS,
        "rope_theta": config.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }
