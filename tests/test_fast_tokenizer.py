"""One tokenizer from a folder and from transformers: the same ids, texts and ends, and no orders from a text."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="needs the torch extra")
pytest.importorskip("transformers", reason="compares with transformers")

import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import tiny_tokenizers
from plait import tasks
from plait.errors import ModelError, RequestError
from plait.models import response_text
from plait.tokenizer.fast import FastTokenizer
from plait.train.pretrained.tokenizer import open_tokenizer
from plait.tree import Segment, Tree

pytestmark = pytest.mark.torch
KINDS = tiny_tokenizers.KINDS
TAGS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<s>", "</s>", "<unk>", "[INST]")

plain_texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=6),
        st.sampled_from(["the sky", " is", "  ", "    blue", "\n\n", " ", "assistant\n", "\u2060", "\u20600\u2060"]),
    ),
    max_size=5,
).map("".join)
hostile_texts = st.lists(st.one_of(plain_texts, st.sampled_from(TAGS)), min_size=1, max_size=6).map("".join)
examples = settings(max_examples=40, deadline=None)


@cache
def both(kind: str, *, template: bool = True) -> tuple[FastTokenizer, FastTokenizer, Any]:
    """From the folder, from what transformers makes of it, and that itself."""
    folder = tiny_tokenizers.write(Path(mkdtemp()), kind, template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return FastTokenizer.of_folder(folder), FastTokenizer.of_fast(theirs), theirs


def controls(tokenizer: FastTokenizer, ids: Any) -> list[str]:
    return [tokenizer.tokens[id] for id in ids if tokenizer.tokens[id] in tokenizer.control]


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_the_same_vocabulary_and_the_same_ends(kind: str) -> None:
    ours, theirs, fast = both(kind)
    assert (ours.tokens, ours.control, ours.bos_ids, ours.eos_ids) == (
        theirs.tokens,
        theirs.control,
        theirs.bos_ids,
        theirs.eos_ids,
    )
    assert ours.eos_ids[0] == fast.eos_token_id
    assert len(ours.eos_ids) == (1 if kind.startswith("llama") else 2)
    assert ours.bos_ids == ((1,) if kind.startswith("llama") else ())
    assert ours.about(["<think>"]) == theirs.about(["<think>"])


@pytest.mark.parametrize("kind", KINDS)
@given(text=hostile_texts, special=st.booleans())
@examples
def test_both_ways_write_the_same_ids_and_read_the_text_back(kind: str, text: str, special: bool) -> None:
    ours, theirs, _ = both(kind)
    ids = ours.encode(text, special=special)
    assert theirs.encode(text, special=special) == ids
    kept = text if kind.startswith("llama") else unicodedata.normalize("NFC", text)
    assert ours.decode(ids) == theirs.decode(ids) == kept
    if not special:
        assert not controls(ours, ids)


@pytest.mark.parametrize("kind", KINDS)
@given(first=plain_texts, second=plain_texts)
@examples
def test_texts_can_be_put_together(kind: str, first: str, second: str) -> None:
    ours, *_ = both(kind)
    read = ours.decode([*ours.encode(first), *ours.encode(second)])
    assert unicodedata.normalize("NFC", read) == unicodedata.normalize("NFC", first + second)


@pytest.mark.parametrize("kind", KINDS)
@given(text=hostile_texts)
@examples
def test_what_a_person_writes_gives_a_prompt_no_orders(kind: str, text: str) -> None:
    for template in (True, False):
        ours, theirs, _ = both(kind, template=template)
        ids = ours.prompt_ids(text)
        assert theirs.prompt_ids(text) == ids
        assert controls(ours, ids) == controls(ours, ours.prompt_ids("why"))
        said = ours.decode(ids)
        assert unicodedata.normalize("NFC", text.strip()) in unicodedata.normalize("NFC", said)


@pytest.mark.parametrize("kind", KINDS)
@given(text=plain_texts)
@examples
def test_an_ordinary_prompt_has_the_ids_of_transformers(kind: str, text: str) -> None:
    ours, _, fast = both(kind)
    assume(not any(tag in text for tag in ours.control))
    messages = [{"role": "user", "content": text}]
    expected = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(ours.prompt_ids(text)) == expected
    ours, _, fast = both(kind, template=False)
    assert list(ours.prompt_ids(text)) == fast.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_has_the_ids_of_transformers_whatever_the_assistant_thought(kind: str) -> None:
    ours, theirs, fast = both(kind)
    said = [("user", "Why? "), ("assistant", "<think>\nhm\n</think>\n\nthe air"), ("user", "is  the sky blue?")]
    messages = [{"role": role, "content": content} for role, content in said]
    ids = ours.prompt_ids(messages)
    assert list(ids) == fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert theirs.prompt_ids(messages) == ids
    assert "<think>" not in controls(ours, ids)
    messages[0]["content"] = "<|im_end|></s>"
    assert "<|im_end|></s>" in ours.decode(ours.prompt_ids(messages))
    assert len(controls(ours, ours.prompt_ids(messages))) == len(controls(ours, ids))


def test_runs_of_white_space_are_text_wherever_they_stand() -> None:
    ours, _, fast = both("neox")
    ids = ours.encode("x" + " " * 6 + "y<think>")
    assert fast.convert_ids_to_tokens(ids)[1] == " " * 6
    assert "<think>" not in controls(ours, ids)
    assert ours.control_id(" " * 6) is None


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_copy_that_later_settings_of_the_trainers_do_not_reach(kind: str) -> None:
    fast = tiny_tokenizers.fast(kind)
    ours = FastTokenizer.of_fast(fast)
    before = ours.encode("the sky is <Goal> blue", special=True), ours.prompt_ids("the sky is blue because")
    fast.add_special_tokens({"additional_special_tokens": ["<Goal>"]})
    fast("the sky is blue because", truncation=True, max_length=2)
    assert (ours.encode("the sky is <Goal> blue", special=True), ours.prompt_ids("the sky is blue because")) == before


@pytest.mark.parametrize(("kind", "name"), [("qwen", "Qwen2Tokenizer"), ("llama-first", "LlamaTokenizer")])
@given(text=hostile_texts)
@examples
def test_the_folder_that_a_trainer_writes_reads_as_the_trainer_did(kind: str, name: str, text: str) -> None:
    trained, served = trained_and_served(kind, name)
    assert served.encode(text) == trained.encode(text)
    assert served.prompt_ids(text) == trained.prompt_ids(text)
    assert (served.eos_ids, served.bos_ids, served.control) == (trained.eos_ids, trained.bos_ids, trained.control)


@cache
def trained_and_served(kind: str, name: str) -> tuple[FastTokenizer, FastTokenizer]:
    """transformers reads some models by classes of their own, which change what `tokenizer.json` says."""
    start = tiny_tokenizers.write(Path(mkdtemp()), kind)
    about = json.loads((start / "tokenizer_config.json").read_text())
    (start / "tokenizer_config.json").write_text(json.dumps({**about, "tokenizer_class": name}))
    fast = transformers.AutoTokenizer.from_pretrained(start)
    fast.add_tokens([transformers.AddedToken("<Goal>", special=True, normalized=False)])
    end = Path(mkdtemp())
    fast.save_pretrained(end)
    for file in ("config.json", "generation_config.json"):
        (end / file).write_text((start / file).read_text())
    return FastTokenizer.of_fast(fast), FastTokenizer.of_folder(end)


def test_what_ends_a_text_is_said_by_the_tokenizer_then_by_the_models_configs(tmp_path: Path) -> None:
    fast = tiny_tokenizers.fast("qwen")
    end, other = fast.eos_token_id, fast.encode("<|endoftext|>")[0]
    assert FastTokenizer.of_fast(fast).eos_ids == (end,)
    assert FastTokenizer.of_fast(fast, eos_ids=[None, [other, end], 3]).eos_ids == (end, other, 3)
    fast.eos_token = None
    assert FastTokenizer.of_fast(fast, eos_ids=[other]).eos_ids == (other,)
    with pytest.raises(ModelError, match="does not say which token ends a text"):
        FastTokenizer.of_fast(fast)
    folder = tiny_tokenizers.write(tmp_path, "qwen")
    (folder / "generation_config.json").unlink()
    assert FastTokenizer.of_folder(folder).eos_ids == (end, other), "config.json says the other"


def test_a_name_gives_the_tokenizer_with_all_that_ends_a_text(tmp_path: Path) -> None:
    folder = tiny_tokenizers.write(tmp_path, "qwen")
    fast, ours = open_tokenizer(str(folder))
    assert fast.encode("the sky") == ours.encode("the sky")
    assert ours.eos_ids == FastTokenizer.of_folder(folder).eos_ids
    for file in ("config.json", "generation_config.json"):
        (folder / file).unlink()
    assert open_tokenizer(str(folder))[1].eos_ids == ours.eos_ids[:1], "a tokenizer may be all there is"


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_is_graded_without_what_ends_it(kind: str) -> None:
    ours, *_ = both(kind)
    problem = tasks.parse("What is 3+4?")
    for eos in ours.eos_ids:
        said = Segment(id="0:0", sampled_ids=[*ours.encode("\nAnswer: 7"), eos])
        response = response_text(Tree({said.id: said}), ours)
        assert response == "\nAnswer: 7"
        assert tasks.grade(problem, response)


def test_what_cannot_be_written_is_said() -> None:
    words = {text: id for id, text in enumerate(("<unk>", "</s>", *"abc "))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    ours = FastTokenizer.of_fast(fast)
    assert ours.decode(ours.prompt_ids("a cab")) == "a cab"
    with pytest.raises(RequestError, match="'cabd' cannot be written without the control token '<unk>'"):
        ours.encode("cabd")
    with pytest.raises(RequestError, match="no chat template"):
        ours.prompt_ids([{"role": "user", "content": "a"}])
    with pytest.raises(RequestError, match="no messages"):
        both("qwen")[0].prompt_ids([])
    with pytest.raises(RequestError, match="list is no fast tokenizer"):
        FastTokenizer.of_fast([])


def test_a_template_may_do_what_templates_of_transformers_do() -> None:
    fast = tiny_tokenizers.fast("qwen", template=False)
    for template in (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m.content }}{{ ns.n }}"
        "{% endfor %}{{ eos_token }}{{ pad_token }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ tools is none }}",
        "{{ strftime_now('%Y')[:2] }}{{ messages[-1].content }}{{ dict(a=1) | tojson }}",
    ):
        fast.chat_template = template
        messages = [{"role": "user", "content": "caf\u00e9 <b>"}]
        expected = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(FastTokenizer.of_fast(fast).prompt_ids(messages)) == expected
    fast.chat_template = (
        "{{ messages[0].content }}{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}"
    )
    ours = FastTokenizer.of_fast(fast)
    assert ours.decode(ours.prompt_ids("x")) == "x2024", "a prompt does not depend on the day"
    for template, said in (
        ("{{ messages[0].content }}{{ namespace(__class__=1) }}", "underscore"),
        ("no", "leaves the"),
    ):
        fast.chat_template = template
        with pytest.raises(ModelError, match=said):
            FastTokenizer.of_fast(fast).prompt_ids("x")
