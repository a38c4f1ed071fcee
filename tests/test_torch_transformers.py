"""The torch engine against transformers, on tiny random checkpoints: sizes, norms, biases, rotary scalings, merges."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest

from plait.types import Context, Merge, SamplingParams
from random_trees import expand

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

from plait.engines.torch import TorchEngine  # noqa: E402

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
PROMPT = (7, 3, 11, 40, 2, 19, 23, 5)
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "beta_fast": 16.0,
    },
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("Llama", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 with yarn": ("Qwen3", {"rope_parameters": {"rope_theta": 1e6, **ROPES["yarn"]}}),
    **{name: ("Llama", {"rope_parameters": {"rope_theta": 500.0, **rope}}) for name, rope in ROPES.items()},
}


def build(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().float()
    for weight in model.parameters():
        # Far from the quiet start, so that a wrong position, norm or bias is felt.
        torch.nn.init.normal_(weight, 0.0 if weight.dim() > 1 else 1.0, 0.4)
    return model


def reference(model: Any, context: Context) -> Any:
    """Log-probabilities after a context: one forward with a 4-D mask and explicit positions."""
    ids, positions, sees = expand(context)
    mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min)
    for row, seen in enumerate(sees):
        mask[row, list(seen)] = 0
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), attention_mask=mask[None, None]
        )
    return torch.log_softmax(out.logits[0, -1].double(), -1)


def sampled(engine: TorchEngine, contexts: list[Context], **params: Any) -> list[list[tuple[int, float]]]:
    """What calls that run side by side sample, with log-probabilities."""
    outs: list[list[tuple[int, float]]] = [[] for _ in contexts]

    async def one(i: int) -> None:
        stream = engine.generate(contexts[i], SamplingParams(**{"max_tokens": 24, **params}))
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                outs[i] += zip(chunk.token_ids, chunk.logprobs, strict=True)

    async def main() -> None:
        async with engine, anyio.create_task_group() as tasks:
            for i in range(len(contexts)):
                tasks.start_soon(one, i)

    anyio.run(main)
    return outs


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_checkpoint_says_the_same_as_in_transformers(name: str, tmp_path: Path) -> None:
    model = build(*MODELS[name])
    model.save_pretrained(tmp_path, max_shard_size="20KB" if name == "llama" else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or name != "llama"
    contexts: list[Context] = [
        (PROMPT,),
        (PROMPT, Merge(((PROMPT[:3],), (PROMPT[2:], Merge((((1,),), ((2, 3),))), (4,)), (PROMPT,))), (9, 8)),
    ]
    outs = sampled(TorchEngine(tmp_path, device="cpu", cells=512), contexts)
    for context, out in zip(contexts, outs, strict=True):
        tail = context[-1]
        assert isinstance(tail, tuple)
        for k, (id, logprob) in enumerate(out):
            expected = reference(model, (*context[:-1], (*tail, *(i for i, _ in out[:k]))))
            assert id == int(expected.argmax())
            assert logprob == pytest.approx(float(expected[id]), abs=2e-4)
    plain = model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert [i for i, _ in outs[0]] == plain[0, len(PROMPT) :].tolist()
