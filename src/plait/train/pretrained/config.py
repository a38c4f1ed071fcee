"""Which model of transformers is trained: `[base]` of a config. Plain values; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plait.errors import RequestError
from plait.settings import one_of

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """Which model is trained, and how much of it."""

    path: str
    """Folder as transformers saves it, or a name that it resolves."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights. float32 with precision bf16 is mixed precision; bfloat16 halves the memory of a frozen base."""
    lora_rank: int = 0
    """0 trains everything."""
    lora_alpha: int = 0
    """0 takes twice the rank."""
    lora_targets: tuple[str, ...] = LINEAR
    gradient_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """auto: flex on CUDA."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", ["float32", "bfloat16"]), ("attention", ["auto", "sdpa", "flex"])):
            one_of(getattr(self, name), allowed, f"base {name}")
        if not self.path or self.lora_rank < 0 or self.lora_alpha < 0:
            raise RequestError("base needs a path, and lora_rank and lora_alpha of at least 0")
