"""A decoder in Llama's shape over a KV cache of cells: one forward for any rows of any contexts.

Covers Llama, Qwen2 and Qwen3: grouped queries, norms of queries and keys, biases, scaled rotary embeddings, tied
embeddings. A row is a token with a position, the cell its keys and values go to, and the cells it sees; because all
rows write before any reads, rows of one step may see each other. Knows nothing of contexts, blocks and sampling.
Source: LLaMA (Touvron et al. 2023, arXiv:2302.13971), Qwen3 (arXiv:2505.09388), YaRN (arXiv:2309.00071).

Shapes: N rows, G groups of rows with R rows and C cells each, H query heads, J key heads, D head width, W width,
S rows that want logits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.errors import ModelError, RequestError

_ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Sizes and switches of a decoder."""

    vocab_size: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    eps: float
    theta: float
    rope: Mapping[str, Any]
    """Scaling of the rotary embedding, as in `config.json`; empty for none."""
    tied: bool
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Config:
        """What a `config.json` of transformers says, version 4 or 5.

        Raises:
            ModelError: It describes another kind of model, or lacks a size.
        """
        kind = config.get("model_type", "llama")
        if kind not in _ARCHITECTURES:
            raise ModelError(f"the torch engine cannot run model_type {kind!r}; it runs {', '.join(_ARCHITECTURES)}")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if what := _unknown(config, rope):
            raise ModelError(f"the torch engine has no {what}; this model uses it")
        bias = bool(config.get("attention_bias", False))
        try:
            heads = int(config["num_attention_heads"])
            read = cls(
                vocab_size=int(config["vocab_size"]),
                width=int(config["hidden_size"]),
                inner=int(config["intermediate_size"]),
                layers=int(config["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
                max_positions=int(config["max_position_embeddings"]),
                eps=float(config.get("rms_norm_eps", 1e-6)),
                theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
                rope=rope,
                tied=bool(config.get("tie_word_embeddings", False)),
                qk_norm=kind == "qwen3",
                qkv_bias=bias or kind == "qwen2",
                out_bias=bias,
                mlp_bias=bool(config.get("mlp_bias", False)),
            )
        except (ArithmeticError, KeyError, TypeError, ValueError) as exc:
            raise ModelError(f"the model's config is incomplete: {type(exc).__name__}: {exc}") from exc
        sizes = (read.vocab_size, read.width, read.inner, read.layers, read.heads, read.kv_heads, read.head_dim)
        if min(*sizes, read.max_positions, read.theta) <= 0 or read.heads % read.kv_heads or read.head_dim % 2:
            raise ModelError(
                f"the model's config makes no sense: its sizes must be above 0, num_attention_heads ({read.heads}) a"
                f" multiple of num_key_value_heads ({read.kv_heads}), head_dim ({read.head_dim}) even"
            )
        return read


def _unknown(config: Mapping[str, Any], rope: Any) -> str | None:
    """What a config asks for that this file does not do, and would leave out without a word."""
    if config.get("use_sliding_window") or any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        return "sliding-window attention"
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act {config['hidden_act']!r}, only 'silu'"
    if config.get("quantization_config"):
        return "quantised weights (quantization_config)"
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return f"rotary embedding of the kind {rope!r:.80}"
    if any(of.get("partial_rotary_factor") not in (None, 1) for of in (config, rope)):
        return "rotary embedding of a part of each head (partial_rotary_factor)"
    return None


class Decoder:
    """Weights on a device, fused where they are multiplied together, and the forward over them.

    Args:
        weights: Under the names of transformers. Copied.

    Raises:
        ModelError: They do not fit the config.
    """

    def __init__(
        self, config: Config, weights: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device, positions: int
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self._compiled: Any = None

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.views: dict[str, Tensor] = {}
        """Where each named weight lies; several may be parts of one tensor."""
        self._embed = self._view("model.embed_tokens.weight", empty(config.vocab_size, config.width))
        self._norm = self._view("model.norm.weight", empty(config.width))
        self._head = self._embed
        if not config.tied:
            self._head = self._view("lm_head.weight", empty(config.vocab_size, config.width))
        self._layers = [_Layer(config, self._view, f"model.layers.{i}.", empty) for i in range(config.layers)]
        try:
            self.load(weights)
        except RequestError as exc:
            raise ModelError(str(exc)) from exc
        self._cos, self._sin = (t.to(device=device, dtype=dtype) for t in rotary(config, positions))

    def _view(self, name: str, tensor: Tensor) -> Tensor:
        self.views[name] = tensor
        return tensor

    def check(self, weights: Mapping[str, Any]) -> None:
        """Hold weights against the names and shapes of these.

        Raises:
            RequestError: A name is missing or unknown, a shape differs, or something is no array of floats.
        """
        given = set(weights)
        if self.config.tied:
            given.discard("lm_head.weight")
        missing, unknown = sorted(set(self.views) - given), sorted(given - set(self.views))
        if missing:
            raise RequestError(f"the weights lack {missing[0]} ({len(missing)} tensors missing)")
        if unknown:
            raise RequestError(f"the weights hold {unknown[0]}, which this model has not ({len(unknown)} unknown)")
        for name, view in self.views.items():
            try:
                weight = _tensor(weights[name])
            except (TypeError, ValueError, RuntimeError) as exc:
                raise RequestError(f"{name} is no array that torch takes: {exc}") from exc
            if not weight.is_floating_point() or weight.is_meta:
                kind = "nothing (device meta)" if weight.is_meta else weight.dtype
                raise RequestError(f"{name} holds {kind}; weights are floats")
            if weight.shape != view.shape:
                raise RequestError(f"{name} has shape {list(weight.shape)}; this model has {list(view.shape)}")

    def load(self, weights: Mapping[str, Any]) -> None:
        """Copy weights into place, all or none.

        Raises:
            RequestError: As `check`.
        """
        self.check(weights)
        with torch.no_grad():
            for name, view in self.views.items():
                view.copy_(_tensor(weights[name]))

    def new_cache(self, cells: int) -> list[Tensor]:
        """Keys and values of every layer, [cells + 1, 2, J, D] each. The last cell is where padding writes."""
        c = self.config
        # Zeros, not whatever lies there: padding reads cell 0, and nothing times NaN is NaN.
        shape = (cells + 1, 2, c.kv_heads, c.head_dim)
        cache = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(c.layers)]
        if self._compiled is not None:
            _keep_in_place(cache)
        return cache

    def compile(self) -> None:
        """Compile the forward of padded rows, on CUDA into CUDA graphs. Call it before `new_cache`."""
        _keep_in_place([*self.views.values(), self._cos, self._sin])
        for layer in self._layers:
            _keep_in_place(layer.tensors())
        # Sizes are few by padding, but a compilation for each would still take minutes; a graph for each does not.
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self._compiled = torch.compile(self._forward, dynamic=True, mode=mode)

    def forward(self, rows: Rows, cache: Sequence[Tensor]) -> Tensor:
        """Compute rows, writing their keys and values into the cache; logits [S, V] in float32."""
        run = self._compiled if rows.padded and self._compiled is not None else self._forward
        groups = [(group.rows_GR, group.cells_GC, group.bias_GRC) for group in rows.groups]
        return run(rows.token_ids, rows.position_ids, rows.cells, groups, rows.places, rows.outputs, cache)

    def _forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        cells: Tensor,
        groups: Sequence[tuple[Tensor, Tensor, Tensor]],
        places: Tensor | None,
        outputs: Tensor,
        cache: Sequence[Tensor],
    ) -> Tensor:
        x_NW = F.embedding(token_ids, self._embed)
        cos, sin = self._cos[position_ids][:, None], self._sin[position_ids][:, None]
        for layer, kv in zip(self._layers, cache, strict=True):
            x_NW = layer.forward(x_NW, cos, sin, cells, groups, places, kv)
        x_SW = F.rms_norm(x_NW[outputs], (self.config.width,), self._norm, self.config.eps)
        return F.linear(x_SW, self._head).float()


def _keep_in_place(tensors: Sequence[Tensor]) -> None:
    """Tell CUDA graphs that these stay where they are: they are read, and the cache written, without a copy."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def _tensor(weight: Any) -> Tensor:
    # A file that is mapped into memory gives arrays that cannot be written, of which torch warns.
    return weight if isinstance(weight, Tensor) else torch.from_numpy(np.require(weight, requirements=["C", "W"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows that attend together, padded to the same number of rows and cells."""

    rows_GR: Tensor
    """Which rows; padding repeats any."""
    cells_GC: Tensor
    bias_GRC: Tensor
    """0 where a row sees a cell, else -inf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One step."""

    token_ids: Tensor
    position_ids: Tensor
    cells: Tensor
    """Where each row's own keys and values go."""
    groups: Sequence[Group]
    places: Tensor | None
    """Where each row is in the groups' rows, all written one after another; None where they are in order."""
    outputs: Tensor
    """Rows that want logits."""
    padded: bool = False
    """Whether there are rows that stand for nothing, so that sizes are few; they come last, also in the logits."""


class _Layer:
    def __init__(self, config: Config, view: Any, at: str, empty: Any) -> None:
        c = self.config = config
        query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self._norm_attention = view(f"{at}input_layernorm.weight", empty(c.width))
        self._norm_mlp = view(f"{at}post_attention_layernorm.weight", empty(c.width))
        self._norm_q = view(f"{at}self_attn.q_norm.weight", empty(c.head_dim)) if c.qk_norm else None
        self._norm_k = view(f"{at}self_attn.k_norm.weight", empty(c.head_dim)) if c.qk_norm else None

        def linear(bias: bool, width: int, **parts: int) -> tuple[Tensor, Tensor | None]:
            """Matrices that are multiplied with the same input, as one."""
            total = sum(parts.values())
            weight, offset = empty(total, width), empty(total) if bias else None
            start = 0
            for name, rows in parts.items():
                block = "self_attn" if name in "q_proj k_proj v_proj o_proj" else "mlp"
                view(f"{at}{block}.{name}.weight", weight[start : start + rows])
                if offset is not None:
                    view(f"{at}{block}.{name}.bias", offset[start : start + rows])
                start += rows
            return weight, offset

        self._qkv = linear(c.qkv_bias, c.width, q_proj=query, k_proj=key, v_proj=key)
        self._out = linear(c.out_bias, query, o_proj=c.width)
        self._gate_up = linear(c.mlp_bias, c.width, gate_proj=c.inner, up_proj=c.inner)
        self._down = linear(c.mlp_bias, c.inner, down_proj=c.width)

    def tensors(self) -> list[Tensor]:
        """Weights and biases as they are multiplied."""
        norms = (self._norm_attention, self._norm_mlp, self._norm_q, self._norm_k)
        parts = (*norms, *self._qkv, *self._out, *self._gate_up, *self._down)
        return [tensor for tensor in parts if tensor is not None]

    def forward(
        self,
        x_NW: Tensor,
        cos: Tensor,
        sin: Tensor,
        cells: Tensor,
        groups: Sequence[tuple[Tensor, Tensor, Tensor]],
        places: Tensor | None,
        kv: Tensor,
    ) -> Tensor:
        c = self.config
        h_NW = F.rms_norm(x_NW, (c.width,), self._norm_attention, c.eps)
        qkv = F.linear(h_NW, *self._qkv).view(-1, c.heads + 2 * c.kv_heads, c.head_dim)
        q, k, v = qkv.split([c.heads, c.kv_heads, c.kv_heads], 1)
        if self._norm_q is not None and self._norm_k is not None:
            q = F.rms_norm(q, (c.head_dim,), self._norm_q, c.eps)
            k = F.rms_norm(k, (c.head_dim,), self._norm_k, c.eps)
        kv.index_copy_(0, cells, torch.stack([_rotate(k, cos, sin), v], 1))
        y_NW = _attend(_rotate(q, cos, sin), kv, groups, places)
        x_NW = x_NW + F.linear(y_NW, *self._out)
        h_NW = F.rms_norm(x_NW, (c.width,), self._norm_mlp, c.eps)
        gate, up = F.linear(h_NW, *self._gate_up).chunk(2, -1)
        return x_NW + F.linear(F.silu(gate) * up, *self._down)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _attend(
    q_NHD: Tensor, kv: Tensor, groups: Sequence[tuple[Tensor, Tensor, Tensor]], places: Tensor | None
) -> Tensor:
    """Attention of every row over the cells it sees, [N, H * D]."""
    (heads, dim), kv_heads = q_NHD.shape[1:], kv.shape[2]
    outs: list[Tensor] = []
    for rows_GR, cells_GC, bias_GRC in groups:
        count, width = rows_GR.shape
        # Query heads of one key head are more rows for it: no key is copied for them.
        q = q_NHD.index_select(0, rows_GR.flatten())
        q = q.view(count, width, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
        shared = q.shape[2]
        q = q.reshape(count, kv_heads, shared * width, dim)
        # Whole cells at once: indexing by element takes several times as long.
        seen = kv.flatten(1).index_select(0, cells_GC.flatten())
        k, v = seen.view(count, -1, 2, kv_heads, dim).permute(2, 0, 3, 1, 4)
        bias = bias_GRC[:, None].repeat(1, 1, shared, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.view(count, kv_heads, shared, width, dim).permute(0, 3, 1, 2, 4)
        outs.append(y.reshape(count * width, heads * dim))
    y = torch.cat(outs) if len(outs) > 1 else outs[0]
    return y if places is None else y[places]


def rotary(config: Config, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, D] of the rotary embedding, scaled as the config says.

    Raises:
        ModelError: It asks for a scaling that is not known here.
    """
    rope, dim = config.rope, config.head_dim
    inverse = config.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    scale = 1.0
    try:
        if kind == "linear":
            inverse = inverse / rope["factor"]
        elif kind == "llama3":
            inverse = _llama3(inverse, rope)
        elif kind == "yarn":
            inverse, scale = _yarn(inverse, rope, config)
        elif kind != "default":
            raise ModelError(f"the torch engine has no rope scaling {kind!r}; it has default, linear, llama3, yarn")
    except KeyError as exc:
        raise ModelError(f"the model's rope scaling {kind!r} lacks {exc}") from exc
    except (ArithmeticError, TypeError, ValueError) as exc:
        raise ModelError(f"the model's rope scaling makes no sense ({exc}): {dict(rope)!r:.200}") from exc
    if not inverse.isfinite().all():
        raise ModelError(f"the model's rope scaling gives no numbers: {dict(rope)!r:.200}")
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), inverse)
    angle = torch.cat([angle, angle], -1)
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def _llama3(inverse: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a ramp between (Llama 3.1)."""
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = old * inverse / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse / rope["factor"] * (1 - ramp) + inverse * ramp


def _yarn(inverse: Tensor, rope: Mapping[str, Any], config: Config) -> tuple[Tensor, float]:
    """Frequencies, and what the embedding is multiplied by so that attention stays as sharp."""
    factor, dim = rope["factor"], config.head_dim
    old = rope.get("original_max_position_embeddings") or config.max_positions

    def place(turns: float) -> float:
        """The pair of channels that makes so many turns over the trained length."""
        return dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = place(rope.get("beta_fast") or 32), place(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp), _sharpness(rope, factor)


def _sharpness(rope: Mapping[str, Any], factor: float) -> float:
    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return of(rope["mscale"]) / of(rope["mscale_all_dim"])
    return of(1.0)
