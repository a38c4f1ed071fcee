"""What the lane of real servers gives vLLM is the embedded model, as transformers reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("transformers", reason="compares with transformers")
pytest.importorskip("safetensors")

import plait
from hf_weights import write, write_numbered

pytestmark = pytest.mark.torch


def test_transformers_gives_the_answer_of_the_embedded_engine(tmp_path: Path) -> None:
    import torch
    import transformers

    model = plait.load_model("plait-tiny-sequential")
    folder = write(model, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = model.request("What is 47 * 26?").prompt_ids
    assert tokenizer("347*6: ", add_special_tokens=False).input_ids == model.tokenizer.encode("347*6: ")
    assert tokenizer.decode([3, 4, 7], skip_special_tokens=False) == "347"
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder)
    output = llama.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False, pad_token_id=0)
    text = model.tokenizer.decode(output[0, len(prompt) :].tolist())
    assert "Answer: 1222" in text
    assert text.endswith("<eos>")


def test_tokens_without_a_vocabulary_are_called_by_their_ids(tmp_path: Path) -> None:
    import transformers

    path = plait.load_model("plait-tiny-sequential").path
    assert path is not None
    folder = write_numbered(path, tmp_path / "hf")
    assert transformers.AutoTokenizer.from_pretrained(folder).decode([3, 4, 63]) == "<3><4><63>"
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 64
