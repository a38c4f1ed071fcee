"""LoRA adapters: an engine with one says what it says over weights into which the adapter was multiplied by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import tiny_llama
from plait.engines.llamacpp import LlamaCppEngine
from plait.errors import ModelError
from plait.types import Context, Merge
from test_llamacpp import PROMPT, call

gguf = pytest.importorskip("gguf", reason="writes its own weights: needs the train extra")

RANK, ALPHA = 4, 6.0
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
CONTEXTS: list[Context] = [(PROMPT,), (PROMPT, Merge((((1, 2),), ((3,),))), (4,))]


def pairs(scale: float = 1.0) -> dict[str, tuple[Any, Any]]:
    """A and B of some modules of each layer."""
    rng = np.random.default_rng(5)
    out: dict[str, tuple[Any, Any]] = {}
    for i in range(tiny_llama.LAYERS):
        for module in MODULES:
            rows, columns = tiny_llama.weights()[f"model.layers.{i}.{module}.weight"].shape
            a, b = rng.standard_normal((RANK, columns)), rng.standard_normal((rows, RANK))
            out[f"model.layers.{i}.{module}"] = (a.astype(np.float32) * 0.2, b.astype(np.float32) * 0.2 * scale)
    return out


def merged(factor: float) -> dict[str, Any]:
    """The sum by hand."""
    weights = dict(tiny_llama.weights())
    for name, (a, b) in pairs().items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + factor * (b @ a)
    return weights


def write_gguf_adapter(path: Path, *, kind: str = "lora", layers: int = tiny_llama.LAYERS) -> Path:
    """As llama.cpp's converter writes one."""
    from plait.train.gguf import _interleaved

    names = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down"}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, (a, b) in pairs().items():
        layer, _, module = name.removeprefix("model.layers.").partition(".")
        at = f"blk.{int(layer) + layers - tiny_llama.LAYERS}.{names[module]}.weight"
        writer.add_tensor(f"{at}.lora_a", a)
        writer.add_tensor(f"{at}.lora_b", _interleaved(b, tiny_llama.HEADS) if "q_proj" in module else b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_peft_adapter(folder: Path, *, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    """As peft saves one."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(MODULES), **config}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    named = {f"base_model.model.{name}.lora_A.weight": a for name, (a, _) in pairs().items()}
    named |= {f"base_model.model.{name}.lora_B.weight": b for name, (_, b) in pairs().items()}
    save_file(named if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def said(engine: Any) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    async def main() -> list[Any]:
        async with engine:
            return [(await call(engine, context, max_tokens=12))[:2] for context in CONTEXTS]

    return anyio.run(main)


def assert_alike(ours: Any, by_hand: Any, *, plain: Any) -> None:
    for (ids, logprobs), (other, expected) in zip(ours, by_hand, strict=True):
        assert ids == other
        assert logprobs == pytest.approx(expected, abs=1e-3)
    assert [ids for ids, _ in ours] != [ids for ids, _ in plain], "the adapter changes what is said"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("weights") / "tiny.gguf")


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_llamacpp_adds_an_adapter_to_its_weights(base: Path, tmp_path: Path, scale: float) -> None:
    from plait.train.gguf import write_gguf

    by_hand = write_gguf(tmp_path / "sum.gguf", merged(scale * ALPHA / RANK), tiny_llama.CONFIG)
    adapter = write_gguf_adapter(tmp_path / "adapter.gguf")
    assert_alike(
        said(LlamaCppEngine(base, cache="F32", lora=adapter, lora_scale=scale)),
        said(LlamaCppEngine(by_hand, cache="F32")),
        plain=said(LlamaCppEngine(base, cache="F32")),
    )


def test_an_adapter_that_does_not_fit_llamacpp_is_refused(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("hello")
    for path, message in (
        (tmp_path / "none.gguf", r"cannot read .*none\.gguf"),
        (tmp_path / "text", "not a GGUF"),
        (base, r"tiny\.gguf as a LoRA adapter of these weights: "),
        (write_gguf_adapter(tmp_path / "other.gguf", kind="control"), "as a LoRA adapter"),
        (write_gguf_adapter(tmp_path / "deep.gguf", layers=40), r"deep\.gguf as a LoRA adapter"),
    ):
        with pytest.raises(ModelError, match=message):
            LlamaCppEngine(base, lora=path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"alpha_pattern": {"layers.0.mlp.down_proj": ALPHA, "nothing": 9}, "use_dora": False}, ALPHA / RANK),
    ],
    ids=["plain", "rank-stabilised", "by module"],
)
def test_torch_adds_an_adapter_to_its_weights(tmp_path: Path, config: dict[str, Any], factor: float) -> None:
    pytest.importorskip("torch")
    from plait.engines.torch import TorchEngine
    from test_torch_engine import CONFIG, make

    by_hand = TorchEngine.from_weights(merged(factor), CONFIG, device="cpu", cells=512)
    assert_alike(said(make(lora=write_peft_adapter(tmp_path / "adapter", **config))), said(by_hand), plain=said(make()))


@pytest.mark.torch
def test_an_adapter_that_does_not_fit_torch_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from test_torch_engine import make

    q = "base_model.model.model.layers.0.self_attn.q_proj"
    ones = np.ones((RANK, tiny_llama.WIDTH), np.float32)
    for config, tensors, message in (
        ({"peft_type": "IA3"}, None, "is a IA3 adapter"),
        ({"use_dora": True}, None, r"DoRA \(use_dora\)"),
        ({"modules_to_save": ["lm_head"]}, None, "whole modules"),
        ({"alora_invocation_tokens": [3]}, None, "behind an invocation"),
        ({"init_lora_weights": "pissa_niter_16"}, None, "begun with pissa_niter_16"),
        ({"lora_alpha": None}, None, "with a lora_alpha"),
        ({}, {f"{q}.lora_A.weight": ones}, "only lora_A"),
        ({}, {f"{q}.lora_magnitude_vector": ones}, "neither lora_A nor lora_B"),
        ({}, {f"{q}.lora_A.weight": ones, f"{q}.lora_B.weight": ones}, r"q_proj by \[4, 64\] x \[4, 64\]"),
        ({}, {"x.lora_A.weight": ones, "x.lora_B.weight": ones.T.copy()}, "adapts x, which these weights do not have"),
    ):
        with pytest.raises(ModelError, match=message):
            make(lora=write_peft_adapter(tmp_path / "adapter", tensors=tensors, **config))
    write_peft_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match=r"cannot read .*adapter_model\.safetensors"):
        make(lora=tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"cannot read .*adapter_config\.json"):
        make(lora=tmp_path / "none")
